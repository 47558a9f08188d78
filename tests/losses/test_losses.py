"""The chunked loss is the dense one: values, gradients, denominators, and nothing for teachers."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

import flexalign.losses.kernel
import flexalign.losses.teacher
from families import family_model
from flexalign.errors import ConfigError, LambdaError, PairMismatchError
from flexalign.fusion import concatenate_hidden, total_variation
from flexalign.heads import Head, last_hidden
from flexalign.losses import DIVERGENCES, DivergenceMetrics, fused_divergence
from fresh import Fresh
from twin import divergence64, fuse64, logits64

V = 211
PER_ROW = torch.tensor([0.5, 2.0, -0.3])
GATE = 0.8  # some positions of a case pass it, others do not


@dataclasses.dataclass
class Case:
    """Three models' hidden states, of different widths, and their heads."""

    student_hidden: Tensor
    student_head: Head
    reference_hidden: Tensor
    reference_head: Head
    aligned_hidden: Tensor
    aligned_head: Head
    mask: Tensor

    def arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def make_case(kind: str = "plain", seed: int = 0, shape: tuple[int, ...] = (3, 11)) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def side(width: int) -> tuple[Tensor, Head]:
        head = Head(
            2 * normal(V, width) / width**0.5,
            normal(V) if kind in ("bias", "all") else None,
            {"scale": 0.6, "all": 0.6, "doubled": 2.0}.get(kind, 1.0),
            3.0 if kind in ("softcap", "all") else None,
        )
        return normal(*shape, width), head

    student, reference, aligned = side(16), side(24), side(20)
    if kind.startswith("one head"):
        aligned = normal(*shape, 24), reference[1]
    return Case(*student, *reference, *aligned, torch.rand(shape, generator=generator) > 0.3)


def twin(case: Case, lam: Any, divergence: str, beta: float, gate: float | None) -> Tensor:
    s = logits64(case.student_head, case.student_hidden)
    r = logits64(case.reference_head, case.reference_hidden)
    a = logits64(case.aligned_head, case.aligned_hidden)
    return divergence64(s, fuse64(r, a, lam, gate), divergence, beta)[case.mask].mean()


def with_gradients(case: Case, loss: Callable[[Case], Tensor]) -> list[Tensor]:
    """The loss, and its gradients by the student's hidden states, head weight and bias."""
    head = case.student_head
    leaves = {"hidden": case.student_hidden, "weight": head.weight, "bias": head.bias}
    leaves = {
        name: leaf.detach().clone().requires_grad_()
        for name, leaf in leaves.items()
        if leaf is not None
    }
    head = dataclasses.replace(head, weight=leaves["weight"], bias=leaves.get("bias"))
    value = loss(dataclasses.replace(case, student_hidden=leaves["hidden"], student_head=head))
    value.backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    return [value.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def assert_agree(found: list[Tensor], expected: list[Tensor], relative: float = 2e-6) -> None:
    """Compare with float64; how float32 rounds differs between processors, up to 1.1e-6 was seen."""
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other.double()).norm() <= relative * other.double().norm()


@pytest.mark.parametrize("kind", ["gate", "one head, gate"])
def test_the_gate_of_these_tests_divides_their_positions(kind: str) -> None:
    case = make_case(kind)
    r = logits64(case.reference_head, case.reference_hidden)
    a = logits64(case.aligned_head, case.aligned_hidden)
    passed = (total_variation(r, a) > GATE)[case.mask]
    assert 5 < passed.sum() < len(passed) - 5


KINDS = (
    "plain",
    "softcap",
    "bias",
    "scale",
    "doubled",
    "all",
    "one head",
    "gate",
    "one head, gate",
)
DIRECTIONS = [("reverse", 0.5), ("forward", 0.5), *(("jsd", b) for b in (0.0, 0.1, 0.5, 0.9, 1.0))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("divergence", "beta"), DIRECTIONS)
def test_value_and_gradients_equal_the_twin(kind: str, divergence: Any, beta: float) -> None:
    case = make_case(kind)
    gate = GATE if "gate" in kind else None
    for lam in (2.0, PER_ROW):
        found = with_gradients(
            case,
            lambda c, lam=lam: fused_divergence(  # type: ignore[misc]
                **c.arguments(), lam=lam, divergence=divergence, beta=beta, gate=gate, chunk_size=5
            ),
        )
        expected = with_gradients(
            case,
            lambda c, lam=lam: twin(c, lam, divergence, beta, gate),  # type: ignore[misc]
        )
        assert found[0].dtype == torch.float32
        assert found[0].shape == ()
        assert_agree(found, expected)


@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["plain", "all", "one head"])
def test_the_ends_of_lambda_are_the_two_models(lam: float, kind: str) -> None:
    case = make_case(kind)
    for given in (lam, torch.tensor(lam), torch.full((3, 11), lam)):
        found = with_gradients(
            case,
            lambda c, g=given: fused_divergence(**c.arguments(), lam=g),  # type: ignore[misc]
        )
        assert_agree(found, with_gradients(case, lambda c: twin(c, lam, "reverse", 1, None)))


@pytest.mark.parametrize(("lam", "unread"), [(0.0, "aligned"), (1.0, "reference")])
@pytest.mark.parametrize("kind", ["plain", "all", "one head"])
def test_at_an_end_of_lambda_the_other_model_is_not_read(
    lam: float, unread: str, kind: str
) -> None:
    case = make_case(kind)
    expected = fused_divergence(**case.arguments(), lam=lam)
    getattr(case, f"{unread}_hidden").fill_(math.nan)
    assert torch.equal(fused_divergence(**case.arguments(), lam=lam), expected)


@pytest.mark.parametrize("kind", ["plain", "bias", "scale", "one head"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_set_of_buffers_serves_every_chunk(kind: str, divergence: Any) -> None:
    """Four matrices of chunk × vocabulary, and no fifth: the memory that the docstring promises."""
    case = make_case(kind)
    case.student_hidden.requires_grad_()
    case.student_head.weight.requires_grad_()
    if kind == "bias":  # the student's: heads with a bias are not joined
        case.reference_head = dataclasses.replace(case.reference_head, bias=None)
        case.aligned_head = dataclasses.replace(case.aligned_head, bias=None)
    with Fresh() as fresh:
        fused_divergence(**case.arguments(), lam=2.0, divergence=divergence, chunk_size=4)
    assert fresh.of_width(V) == [(4, 4, V)]


def test_the_buffers_hold_256_tokens_unless_told() -> None:
    case = make_case(shape=(1, 300))
    case.mask[:] = True
    with Fresh() as fresh:
        fused_divergence(**case.arguments(), lam=2.0)
    assert fresh.of_width(V) == [(4, 256, V)]


def test_one_head_is_multiplied_once_for_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("one head")
    written: list[Tensor] = []
    added: list[bool] = []
    write = flexalign.losses.teacher.write_logits
    product = flexalign.losses.teacher.project

    def watched(head: Head, hidden: Tensor, out: Tensor) -> Tensor:
        written.append(hidden)
        return write(head, hidden, out)

    monkeypatch.setattr(flexalign.losses.teacher, "write_logits", watched)

    def counted(hidden: Tensor, weight: Tensor, out: Tensor, *, add: bool = False) -> None:
        added.append(add)
        product(hidden, weight, out, add=add)

    monkeypatch.setattr(flexalign.losses.teacher, "project", counted)
    fused_divergence(**case.arguments(), lam=2.0)
    assert len(written) == 1
    assert not any(added)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_metrics_need_both_models_logits_and_no_more(divergence: Any) -> None:
    case = make_case()
    chunks = math.ceil(int(case.mask.sum()) / 4)
    with Fresh() as fresh:
        fused_divergence(
            **case.arguments(), lam=2.0, divergence=divergence, chunk_size=4, metrics=True
        )
    made = [len(shape) for shape in fresh.of_width(V)]
    assert made == [3] + chunks * [3, 2]  # the two models', and their fusion


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_is_the_closed_form(divergence: Any, seed: int) -> None:
    """With a head that is the identity, the hidden state is the logits."""
    generator = torch.Generator().manual_seed(seed)
    z, r, a = (2 * torch.randn(3, 1, 7, generator=generator, dtype=torch.float64)).unbind()
    beta, lam, eye = 0.3, 1.7, torch.eye(7, dtype=torch.float64)
    z.requires_grad_()
    fused_divergence(
        z, eye, r, eye, a, eye, torch.ones(1), lam, divergence=divergence, beta=beta
    ).backward()
    s, t = z.detach().softmax(-1), (lam * a + (1 - lam) * r).softmax(-1)
    m = (1 - beta) * s + beta * t
    to_teacher = (s / t).log()
    to_mixture = (s / m).log()
    expected = {
        "forward": s - t,
        "reverse": s * (to_teacher - (s * to_teacher).sum()),
        "jsd": (1 - beta) * s * (to_mixture - (s * to_mixture).sum()),
    }[divergence]
    torch.testing.assert_close(z.grad, expected, rtol=1e-10, atol=1e-12)


def test_beta_at_its_ends_is_forward_and_reverse() -> None:
    case = make_case()
    for beta, name in ((0, "forward"), (1, "reverse")):
        jsd = fused_divergence(**case.arguments(), lam=2.0, divergence="jsd", beta=beta)
        assert torch.equal(
            jsd,
            fused_divergence(**case.arguments(), lam=2.0, divergence=name),  # type: ignore[call-overload]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunk_size_changes_nothing(kind: str) -> None:
    case = make_case(kind)
    losses = [
        with_gradients(
            case,
            lambda c, size=size: fused_divergence(  # type: ignore[misc]
                **c.arguments(), lam=PER_ROW, gate=GATE if "gate" in kind else None, chunk_size=size
            ),
        )
        for size in (1, 4, 7, 33, 1000)
    ]
    for other in losses[1:]:
        assert_agree(other, losses[0])


def test_a_flat_batch_equals_a_rectangular_one() -> None:
    case = make_case()
    arguments = case.arguments()
    flat = {
        name: value.flatten(0, 1) if isinstance(value, Tensor) and value.ndim == 3 else value
        for name, value in arguments.items()
    } | {"mask": case.mask.flatten()}
    lam = torch.linspace(-1, 3, 33)
    assert torch.equal(
        fused_divergence(**flat, lam=lam), fused_divergence(**arguments, lam=lam.reshape(3, 11))
    )


def test_what_the_mask_leaves_out_does_not_matter() -> None:
    case = make_case()
    expected = fused_divergence(**case.arguments(), lam=2.0)
    for name in ("student_hidden", "reference_hidden", "aligned_hidden"):
        getattr(case, name)[~case.mask] = math.nan
    weights = case.mask.long()
    loss, grad_hidden, grad_weight = with_gradients(
        case, lambda c: fused_divergence(**c.arguments() | {"mask": weights}, lam=2.0)
    )
    assert torch.equal(loss, expected)
    assert grad_weight.isfinite().all()
    assert (grad_hidden[~case.mask] == 0).all()
    assert (grad_hidden[case.mask] != 0).all()


def test_nothing_to_count_is_zero_with_its_graph() -> None:
    case = make_case("bias")
    case.mask[:] = False
    loss, *gradients = with_gradients(case, lambda c: fused_divergence(**c.arguments(), lam=2.0))
    assert loss == 0.0
    assert len(gradients) == 3
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulation_does_not_change_the_gradient(rows: int, as_tensor: bool) -> None:
    """1×8, 2×4 and 8×1 with one denominator; rows have different numbers of counted positions."""
    case = make_case(shape=(8, 6))
    case.mask[1], case.mask[2] = True, False
    whole = with_gradients(case, lambda c: fused_divergence(**c.arguments(), lam=2.0))
    count: Any = case.mask.sum() if as_tensor else int(case.mask.sum())

    def accumulate(c: Case) -> Tensor:
        total = torch.zeros(())
        for start in range(0, 8, rows):
            part = {
                name: value[start : start + rows] if isinstance(value, Tensor) else value
                for name, value in c.arguments().items()
            }
            total = total + fused_divergence(**part, lam=2.0, num_items=count)
        return total

    assert_agree(with_gradients(case, accumulate), whole)


def test_the_loss_may_be_scaled_before_backward() -> None:
    case = make_case("bias")
    plain = with_gradients(case, lambda c: fused_divergence(**c.arguments(), lam=2.0))
    scaled = with_gradients(case, lambda c: 64 * fused_divergence(**c.arguments(), lam=2.0))
    assert_agree([one / 64 for one in scaled], plain)


def test_teachers_take_no_gradient_and_stay_as_they_were() -> None:
    case = make_case("bias")
    before = {}
    for name in ("reference", "aligned"):
        head = getattr(case, f"{name}_head")
        for tensor in (getattr(case, f"{name}_hidden"), head.weight, head.bias):
            before[tensor.requires_grad_()] = tensor.detach().clone()
    with_gradients(case, lambda c: fused_divergence(**c.arguments(), lam=PER_ROW))
    for tensor, value in before.items():
        assert tensor.grad is None
        assert torch.equal(tensor, value)


def test_a_frozen_head_gets_no_gradient() -> None:
    case = make_case()
    case.student_hidden.requires_grad_()
    fused_divergence(**case.arguments(), lam=2.0).backward()
    assert case.student_hidden.grad is not None
    assert case.student_head.weight.grad is None


@pytest.mark.parametrize("chunk_size", [4, 256])
@pytest.mark.parametrize("count", [None, 0])
def test_no_memory_is_read_before_it_is_written(chunk_size: int, count: int | None) -> None:
    case = make_case("all")
    if count == 0:
        case = dataclasses.replace(case, mask=torch.zeros_like(case.mask))

    def loss(case: Case) -> Tensor:
        return fused_divergence(**case.arguments(), lam=2.0, chunk_size=chunk_size)

    expected = with_gradients(case, loss)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    try:
        assert torch.isnan(torch.empty(3)).all()
        found = with_gradients(case, loss)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("bias")
    for leaf in (case.student_hidden, case.student_head.weight, case.student_head.bias):
        leaf.requires_grad_()  # type: ignore[union-attr]
    expected = fused_divergence(**case.arguments(), lam=2.0).detach()

    def nowhere_to_go(*arguments: Any) -> None:
        assert arguments[-1] == [None, None, None], "a gradient was made under no_grad"

    monkeypatch.setattr(flexalign.losses.kernel, "_add_gradients", nowhere_to_go)
    with torch.no_grad():
        assert torch.equal(fused_divergence(**case.arguments(), lam=2.0), expected)


def test_a_second_backward_is_refused_and_not_wrong() -> None:
    case = make_case()
    loss = fused_divergence(
        **case.arguments() | {"student_hidden": case.student_hidden.requires_grad_()}, lam=2.0
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run once"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_metrics_are_the_distances_to_both_models(kind: str, divergence: Any) -> None:
    case = make_case(kind)
    gate = GATE if "gate" in kind else None
    settings: dict[str, Any] = {"lam": PER_ROW, "gate": gate, "divergence": divergence}
    collected: list[DivergenceMetrics] = []

    def ours(c: Case) -> Tensor:
        loss, metrics = fused_divergence(**c.arguments(), **settings, metrics=True, chunk_size=9)
        collected.append(metrics)
        return loss

    assert_agree(
        with_gradients(case, ours),
        with_gradients(case, lambda c: fused_divergence(**c.arguments(), **settings)),
        2e-6,
    )
    (metrics,) = collected
    assert not metrics.kl_reference.requires_grad
    assert not metrics.kl_aligned.requires_grad
    assert_agree([metrics.kl_reference], [twin(case, 0.0, "reverse", 1, None)])
    assert_agree([metrics.kl_aligned], [twin(case, 1.0, "reverse", 1, None)])
    _, halved = fused_divergence(
        **case.arguments(), lam=2.0, metrics=True, num_items=2 * int(case.mask.sum())
    )
    assert_agree([2 * halved.kl_aligned], [metrics.kl_aligned])

    # Each token's own divergence is what it would be alone.
    assert metrics.per_token.shape == (int(case.mask.sum()),)
    assert not metrics.per_token.requires_grad
    places = case.mask.flatten().nonzero().squeeze(-1)
    for index in (0, 1, len(places) - 1):
        alone = torch.zeros_like(case.mask).flatten()
        alone[places[index]] = True
        arguments = case.arguments() | {"mask": alone.reshape(case.mask.shape)}
        assert_agree([metrics.per_token[index]], [fused_divergence(**arguments, **settings)])


def test_a_student_that_equals_the_teacher_is_at_distance_zero() -> None:
    case = make_case()
    same = dict.fromkeys(("student_head", "reference_head", "aligned_head"), case.student_head)
    hidden = ("student_hidden", "reference_hidden", "aligned_hidden")
    arguments = case.arguments() | same | dict.fromkeys(hidden, case.student_hidden)
    for lam, divergence in itertools.product((-3.0, 0.0, 1.0, 10.0), DIVERGENCES):
        loss = fused_divergence(**arguments, lam=lam, divergence=divergence)
        assert abs(float(loss)) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("masked", ["all", "student and reference", "reference"])
def test_masked_tokens_have_probability_zero(divergence: Any, masked: str) -> None:
    """−inf in a bias, as for padded vocabulary rows, equals a head without those rows."""
    case = make_case("bias")
    cut = {
        f"{name}_head": getattr(case, f"{name}_head").cut(V - 11)
        for name in ("student", "reference", "aligned")
    }
    expected = with_gradients(
        dataclasses.replace(case, **cut),
        lambda c: fused_divergence(**c.arguments(), lam=2.0, divergence=divergence, beta=0.3),
    )
    for name in ("student", "reference", "aligned"):
        if name in masked or masked == "all":
            getattr(case, f"{name}_head").bias[V - 11 :] = -math.inf
    found = with_gradients(
        case, lambda c: fused_divergence(**c.arguments(), lam=2.0, divergence=divergence, beta=0.3)
    )
    assert all(tensor.isfinite().all() for tensor in found)
    if "student" in masked or masked == "all":
        found = [found[0], found[1], found[2][: V - 11], found[3][: V - 11]]
        assert_agree(found, expected)
    elif divergence == "reverse":
        assert found[0] > expected[0] + 1


@pytest.mark.parametrize("family", ["gemma2", "granite", "phi"])
def test_gradients_through_a_tied_head_equal_the_twin(family: str) -> None:
    """The embedding takes its gradient from both ends of the model."""
    models = [family_model(family, seed=seed, tie_word_embeddings=True) for seed in (1, 2, 3)]
    inputs = {"input_ids": torch.arange(3, 21).reshape(2, 9)}
    heads = [Head.of(model) for model in models]
    with torch.no_grad():
        teachers = [last_hidden(model, **inputs) for model in models[1:]]
    student = models[0]
    assert heads[0].weight is student.get_input_embeddings().weight
    gradients = []
    for dense in (False, True):
        student.zero_grad()
        case = Case(
            *(last_hidden(student, **inputs), heads[0]),
            *(teachers[0], heads[1], teachers[1], heads[2]),
            torch.ones(2, 9),
        )
        case.mask = case.mask.bool()
        if dense:
            twin(case, 2.0, "reverse", 1, None).backward()
        else:
            fused_divergence(**case.arguments(), lam=2.0).backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    found, expected = (torch.cat([g.flatten() for g in side]) for side in gradients)
    assert_agree([found], [expected], 2e-5)


@pytest.mark.parametrize("slice_rows", [50, 8192])
@pytest.mark.parametrize("kind", ["plain", "scale", "all", "one head"])
def test_half_precision_weights_accumulate_in_float32(
    kind: str, slice_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flexalign.losses.teacher, "_WIDENED_ROWS", slice_rows)
    case = make_case(kind)
    for name, value in case.arguments().items():
        if isinstance(value, Head):
            bias = None if value.bias is None else value.bias.bfloat16()
            half: Any = dataclasses.replace(value, weight=value.weight.bfloat16(), bias=bias)
            setattr(case, name, half)
        elif name != "mask":
            setattr(case, name, value.bfloat16())
    found = with_gradients(case, lambda c: fused_divergence(**c.arguments(), lam=PER_ROW))
    expected = with_gradients(case, lambda c: twin(c, PER_ROW, "reverse", 1, None))
    assert found[0].dtype == torch.float32
    assert_agree(found[:1], expected[:1])
    _, metrics = fused_divergence(**case.arguments(), lam=PER_ROW, metrics=True)
    assert_agree([metrics.kl_reference], [twin(case, 0.0, "reverse", 1, None)])
    assert_agree([metrics.kl_aligned], [twin(case, 1.0, "reverse", 1, None)])
    # the twin's float64 gradients were rounded to bfloat16 too: nearly all agree to the bit
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.dtype == torch.bfloat16
        assert (one != other).float().mean() < 0.01
        torch.testing.assert_close(one, other, rtol=0.01, atol=1e-6)


def test_autocast_on_the_cpu_changes_nothing() -> None:
    case = make_case()
    expected = with_gradients(case, lambda c: fused_divergence(**c.arguments(), lam=2.0))
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(case, lambda c: fused_divergence(**c.arguments(), lam=2.0))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("lam", [-1.0, 0.5, 2.0])
def test_equals_trl_fed_with_the_joined_teacher(lam: float) -> None:
    """Its distillation loss computes equation 6 from [(1−λ)·h_ref, λ·h_al] and [W_ref, W_al]."""
    case = make_case()

    def trl(c: Case) -> Tensor:
        joined = concatenate_hidden(c.reference_hidden, c.aligned_hidden, lam)[c.mask]
        weight = torch.cat([c.reference_head.weight, c.aligned_head.weight], dim=1)
        divergence, _ = ChunkedDivergenceFunction.apply(
            c.student_hidden[c.mask], c.student_head.weight, None, joined, weight, None, 1.0
        )
        return divergence.mean()

    assert_agree(
        with_gradients(case, lambda c: fused_divergence(**c.arguments(), lam=lam)),
        with_gradients(case, trl),
        2e-6,
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"divergence": "backward"}, ConfigError, "one of reverse, forward, jsd, got 'backward'"),
        ({"beta": 1.5}, ConfigError, r"beta must be a number in \[0, 1\]"),
        ({"beta": math.nan}, ConfigError, r"beta must be a number in \[0, 1\]"),
        ({"beta": -0.1}, ConfigError, r"beta must be a number in \[0, 1\], got -0\.1"),
        ({"beta": "0.5"}, ConfigError, r"beta must be a number in \[0, 1\]"),
        ({"beta": True}, ConfigError, r"beta must be a number in \[0, 1\]"),
        ({"gate": 2.0}, ConfigError, r"gate must be a number in \[0, 1\]"),
        ({"chunk_size": 0}, ConfigError, "chunk_size must be a whole number of tokens"),
        ({"chunk_size": True}, ConfigError, "chunk_size must be a whole number of tokens"),
        ({"chunk_size": 2.5}, ConfigError, "chunk_size must be a whole number of tokens"),
        ({"num_items": 0}, ConfigError, "num_items must be a positive number"),
        ({"num_items": -1.5}, ConfigError, "num_items must be a positive number"),
        ({"num_items": math.inf}, ConfigError, "num_items must be a positive number"),
        ({"lam": math.nan}, LambdaError, "λ must be finite"),
        ({"lam": torch.ones(2)}, LambdaError, "does not broadcast"),
        ({"mask": torch.ones(3, 10)}, PairMismatchError, "do not fit the mask"),
        ({"aligned_hidden": torch.ones(3, 10, 20)}, PairMismatchError, "the aligned's hidden"),
        (
            {"reference_hidden": torch.ones(3, 11, 9)},
            PairMismatchError,
            "the reference's hidden states have width 9, its head takes 24;",
        ),
        (
            {"student_hidden": torch.ones(3, 11, 9)},
            PairMismatchError,
            "the student's hidden states have width 9, its head takes 16;",
        ),
        (
            {"student_hidden": torch.ones(16), "mask": torch.tensor(True)},
            PairMismatchError,
            r"the student's hidden states \(16,\) do not fit the mask \(\);",
        ),
        (
            {"aligned_head": torch.ones(V + 1, 20)},
            PairMismatchError,
            rf"the aligned's head scores {V + 1} tokens, the student's {V}; .*Head\.cut",
        ),
        (
            {"reference_head": torch.ones(V - 1, 24)},
            PairMismatchError,
            rf"the reference's head scores {V - 1} tokens, the student's {V};",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fused_divergence(**make_case().arguments() | {"lam": 2.0} | change)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_equals_the_twin(kind: str, dtype: torch.dtype) -> None:
    case = make_case(kind)
    gate = GATE if "gate" in kind else None

    def there(value: Any) -> Any:
        if isinstance(value, Head):
            bias = None if value.bias is None else value.bias.to("cuda", dtype)
            return dataclasses.replace(value, weight=value.weight.to("cuda", dtype), bias=bias)
        return value.cuda() if value.dtype == torch.bool else value.to("cuda", dtype)

    case = Case(**{name: there(value) for name, value in case.arguments().items()})
    found = with_gradients(case, lambda c: fused_divergence(**c.arguments(), lam=2.0, gate=gate))
    expected = with_gradients(case, lambda c: twin(c, 2.0, "reverse", 1, gate))
    assert_agree(found, expected, 5e-6 if dtype == torch.float32 else 1e-2)
