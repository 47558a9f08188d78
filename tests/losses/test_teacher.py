"""Head products: added or written, in float32, on the CPU and as an accelerator would."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexalign.heads import Head
from flexalign.losses import teacher


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's half-precision products with float32 results, which the CPU does not have."""

    def product(left: Tensor, right: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert left.dtype == right.dtype == torch.bfloat16
        assert out.dtype == out_dtype == torch.float32
        return left.double() @ right.double()

    def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        return out.copy_(product(left, right, out_dtype, out))

    def addmm(
        base: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor
    ) -> Tensor:
        return out.copy_(base.double() + product(left, right, out_dtype, out))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(teacher, "rounds_its_factor", lambda weight: True)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(hidden: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = draw(3, 7, seed=9)
    teacher.project(hidden, weight, out)
    return out, hidden.double() @ weight.double().T


def add(hidden: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = draw(3, 7, seed=9)
    expected = out.double() + hidden.double() @ weight.double().T
    teacher.project(hidden, weight, out, add=True)
    return out, expected


def add_product(hidden: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = draw(3, 4, seed=9)
    expected = out.double() + gradient.double() @ weight.double()
    teacher.add_product(gradient, weight, out)
    return out, expected


def add_outer(hidden: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = draw(7, 4, seed=9)
    expected = out.double() + gradient.double().T @ hidden.double()
    teacher.outer(gradient, hidden, weight, out, add=True)
    return out, expected


def write_outer(hidden: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.full((7, 4), torch.nan)
    teacher.outer(gradient, hidden, weight, out)
    return out, gradient.double().T @ hidden.double()


PRODUCTS = pytest.mark.parametrize("run", [write, add, add_product, add_outer, write_outer])


@PRODUCTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_exact_in_float32(
    run: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "_WIDENED_ROWS", 3)
    weight, gradient = draw(7, 4, seed=1).to(dtype), draw(3, 7, seed=2)
    found, expected = run(draw(3, 4, seed=3).to(dtype), gradient, weight)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@PRODUCTS
def test_an_accelerator_rounds_the_other_factor_and_not_the_result(
    run: Callable[..., tuple[Tensor, Tensor]], accelerator: None
) -> None:
    weight = draw(7, 4, seed=1).bfloat16()
    # float32 factors whose values are those of bfloat16
    hidden, gradient = (draw(3, n, seed=n).bfloat16().float() for n in (4, 7))
    found, expected = run(hidden, gradient, weight)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_half_precision_on_an_accelerator_rounds(cuda: bool, dtype: torch.dtype) -> None:
    weight: Any = SimpleNamespace(is_cuda=cuda, dtype=dtype)
    assert teacher.rounds_its_factor(weight) == (cuda and dtype != torch.float32)


def test_a_half_precision_weight_is_widened_a_slice_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher, "_WIDENED_ROWS", 3)
    weight = draw(7, 4, seed=1)
    widened = list(teacher._widened(weight.bfloat16(), torch.float32))
    assert [len(part) for _, part in widened] == [3, 3, 1]
    assert torch.equal(torch.cat([weight[rows] for rows, _ in widened]), weight)
    ((_, whole),) = teacher._widened(weight, torch.float32)
    assert whole.data_ptr() == weight.data_ptr()
    assert whole.shape == weight.shape


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_are_those_of_the_head(scale: float, softcap: float | None) -> None:
    head = Head(draw(7, 4, seed=1), draw(7, seed=2), scale, softcap)
    hidden, out = draw(3, 4, seed=3), torch.full((3, 7), torch.nan)
    assert teacher.write_logits(head, hidden, out) is out
    torch.testing.assert_close(out, head(hidden))


def test_a_head_for_products_is_cut_from_the_graph() -> None:
    head = Head(draw(7, 4, seed=1).requires_grad_(), draw(7, seed=2).requires_grad_(), 0.5, 3.0)
    cut = teacher.for_products(head)
    assert cut.bias is not None
    assert head.bias is not None
    for part, whole in ((cut.weight, head.weight), (cut.bias, head.bias)):
        assert not part.requires_grad
        assert part.data_ptr() == whole.data_ptr()
    assert (cut.scale, cut.softcap) == (0.5, 3.0)
    assert teacher.for_products(Head(head.weight)).bias is None


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_on_an_accelerator_gives_the_head_its_precision(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Weight:
        device = SimpleNamespace(type="cuda")
        dtype = torch.float32

        def detach(self) -> "Weight":
            return self

        def to(self, dtype: torch.dtype) -> torch.dtype:
            return dtype

    weight: Any = Weight()
    monkeypatch.setattr(torch, "is_autocast_enabled", {"cuda": enabled}.__getitem__)
    monkeypatch.setattr(torch, "get_autocast_dtype", {"cuda": torch.float16}.__getitem__)
    assert teacher.for_products(Head(weight)).weight == (torch.float16 if enabled else weight)
