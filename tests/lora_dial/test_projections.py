"""The joint products against PEFT's own forward and float64 by hand, and when they must not run."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from contract.subjects import dial_subject_of
from families import FAMILIES, family_model
from flexalign.errors import LambdaError
from flexalign.lora_dial.projections import FEW_TOKENS, LoRAProjections
from lora_dial.test_scaling import TOKENS, by_hand, logits, with_lora

LAMS = torch.tensor([0.3, -1.0, 4.0])


def ending(groups: list[list[str]]) -> list[list[str]]:
    return [[name.rpartition(".")[2] for name in names] for names in groups]


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    size = max(1.0, float(expected.abs().max()))
    return float((found.double() - expected.double()).abs().max()) <= tolerance * size


@torch.no_grad()
def run(path: LoRAProjections, model: PeftModel, lam: Any, tokens: Tensor = TOKENS) -> Tensor:
    with path.at(lam, *tokens.shape):
        return logits(model, tokens)


def counted(operator: str, work: Callable[[], object]) -> int:
    """Return how often torch calls an operator."""
    with torch.profiler.profile() as profile:
        work()
    return sum(event.count for event in profile.key_averages() if event.key == operator)


def test_every_row_is_the_model_with_its_lambda_in_the_weights() -> None:
    model = with_lora()
    path = LoRAProjections(model)
    expected = torch.cat(
        [logits(by_hand(model, lam), TOKENS[i : i + 1]) for i, lam in enumerate(LAMS.tolist())]
    )
    found = run(path, model, LAMS)
    assert near(found, expected)
    assert near(run(path, model, LAMS.double()), expected)
    assert torch.equal(run(path, model, LAMS[:, None].expand(3, 7)), found)
    for row, lam in enumerate(LAMS.tolist()):
        assert near(run(path, model, lam, TOKENS[row : row + 1])[0], found[row])
        assert near(run(path, model, lam)[row], found[row])


def test_lambda_of_a_token_is_its_own() -> None:
    model = with_lora()
    path = LoRAProjections(model)
    lam = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) * 4
    with path.scale.at(lam):
        expected = logits(model)
    assert near(run(path, model, lam), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_every_family_is_pefts_forward(family: str) -> None:
    dial = dial_subject_of(family).dial
    model, path = dial.peft, dial.projections
    assert sorted(name for names in path.groups for name in names) == sorted(path.scale.layers)
    with model.disable_adapter():
        base = logits(model)
    for lam in (1.0, -0.7, LAMS):
        with path.scale.at(lam):
            expected = logits(model)
        assert near(run(path, model, lam), expected)
        assert not near(expected, base)
    assert near(run(path, model, 0.0), base, 0.0)
    assert near(run(path, model, torch.tensor([0.0, 1.0, 0.0]))[[0, 2]], base[[0, 2]], 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("repeats", [1, 2])
def test_every_precision(
    dtype: torch.dtype, adapter_dtype: torch.dtype | None, repeats: int
) -> None:
    """Of few tokens, and of more than are multiplied in float32."""
    tokens = TOKENS.repeat(1, repeats)
    assert (tokens.numel() > FEW_TOKENS) == (repeats > 1)
    model = with_lora(dtype=dtype)
    if adapter_dtype is not None:
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(adapter_dtype)
    path = LoRAProjections(model)
    expected = torch.cat(
        [logits(by_hand(model, lam), tokens[i : i + 1]) for i, lam in enumerate(LAMS.tolist())]
    )
    with path.scale.at(LAMS):
        peft = logits(model, tokens)
    found = run(path, model, LAMS, tokens)
    assert found.dtype == dtype

    # In low precision, as far from the exact result as PEFT's own forward is.
    off, own = ((one.double() - expected).norm() / expected.norm() for one in (found, peft))
    assert float(off) <= max(1.5 * float(own), 1e-6)
    with model.disable_adapter():
        base = logits(model, tokens)
    ends = run(path, model, torch.tensor([0.0, 2.0, 0.0]), tokens)
    assert torch.equal(ends[[0, 2]], base[[0, 2]])


def test_a_shared_input_is_multiplied_once() -> None:
    model = with_lora()
    path = LoRAProjections(model)
    one_layer = [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert ending(path.groups) == 2 * one_layer

    with path.at(1.0, *TOKENS.shape):
        model(TOKENS)
    base = counted("aten::mm", lambda: run(path, model, 0.0))
    assert counted("aten::mm", lambda: run(path, model, LAMS)) == base + 2 * 4
    assert counted("aten::addmm_", lambda: run(path, model, LAMS)) == 2 * 7
    assert counted("aten::addmm_", lambda: run(path, model, torch.zeros(3))) == 0


class Layers(nn.Module):
    """Two layers with one input, which may be written in between, or come as another tensor."""

    def __init__(self, inner: nn.Module, way: str) -> None:
        super().__init__()
        self.inner = inner
        self.way = way

    def forward(self, hidden: Tensor) -> Tensor:
        if self.way == "written":
            hidden = hidden.clone()
        gate = self.inner.gate_proj(hidden)
        if self.way == "written":
            hidden += 1
        elif self.way == "copied":
            hidden = hidden.clone()
        elif self.way == "again":
            gate = gate + self.inner.gate_proj(2 * hidden)
        up: Tensor = self.inner.up_proj(hidden)
        down: Tensor = self.inner.down_proj(self.inner.act_fn(gate) * up)
        return down


@pytest.mark.parametrize("way", ["shared", "written", "copied", "again"])
def test_inputs_that_only_look_shared(way: str) -> None:
    model = with_lora(target_modules=["gate_proj", "up_proj", "down_proj"])
    for layer in model.get_base_model().model.layers:
        layer.mlp = Layers(layer.mlp, way)
    path = LoRAProjections(model)
    shared = {len(names) for names in path.groups if "down_proj" not in names[0]}
    assert shared == ({2} if way == "shared" else {1})
    with path.scale.at(LAMS):
        expected = logits(model)
    assert near(run(path, model, LAMS), expected)


def test_an_input_that_is_shared_no_longer() -> None:
    model = with_lora(target_modules=["gate_proj", "up_proj", "down_proj"])
    for layer in model.get_base_model().model.layers:
        layer.mlp = Layers(layer.mlp, "shared")
    path = LoRAProjections(model)
    for layer in model.get_base_model().model.layers:
        layer.mlp.way = "copied"
    with path.scale.at(LAMS):
        expected = logits(model)
    assert near(run(path, model, LAMS), expected)


def test_ranks_and_scalings_may_differ() -> None:
    model = with_lora(rank_pattern={"k_proj": 2, "up_proj": 7}, alpha_pattern={"v_proj": 3})
    path = LoRAProjections(model)
    with path.scale.at(LAMS):
        expected = logits(model)
    assert near(run(path, model, LAMS), expected)


def test_merged_weights_serve_their_lambda_alone() -> None:
    for family in ("llama", "gpt2"):
        dial = dial_subject_of(family).dial
        model, path = dial.peft, dial.projections
        with model.disable_adapter():
            base = logits(model)
        expected = {lam: run(path, model, lam) for lam in (2.0, 0.5)}
        path.merge(2.0)
        assert counted("aten::addmm_", lambda: run(path, model, 2.0)) == 0  # noqa: B023
        assert near(run(path, model, torch.full((3,), 2.0)), expected[2.0])
        assert near(run(path, model, 0.5), expected[0.5], 0.0)
        assert torch.equal(run(path, model, 0.0), base)
        mixed = run(path, model, torch.tensor([0.0, 2.0, 0.5]))
        assert torch.equal(mixed[0], base[0])
        assert near(mixed[1], expected[2.0][1])
        path.merge(None)
        assert torch.equal(run(path, model, 2.0), expected[2.0])
    with pytest.raises(LambdaError, match="finite"):
        path.merge(float("inf"))


def test_changed_weights_are_read_again() -> None:
    model = with_lora()
    path = LoRAProjections(model)
    path.merge(2.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.mul_(-0.5)
    for lam in (2.0, LAMS):
        with path.scale.at(lam):
            expected = logits(model)
        assert near(run(path, model, lam), expected)

    model.double()
    with path.scale.at(LAMS):
        exact = logits(model)
    assert exact.dtype == torch.float64
    assert near(run(path, model, LAMS), exact, 1e-12)


def test_gradients_dropout_and_a_switched_off_adapter_are_pefts() -> None:
    model = with_lora(lora_dropout=0.5)
    path = LoRAProjections(model)
    with path.scale.at(LAMS):
        expected = model(TOKENS, use_cache=False).logits
    with path.at(LAMS, *TOKENS.shape):
        found = model(TOKENS, use_cache=False).logits
    assert torch.equal(found, expected)
    found.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_" in name)

    with model.disable_adapter():
        off = run(path, model, LAMS)
        assert torch.equal(off, logits(model))
    with torch.autocast("cpu", torch.bfloat16):
        with path.scale.at(LAMS):
            expected = logits(model)
        assert torch.equal(run(path, model, LAMS), expected)

    model.train()
    torch.manual_seed(0)
    with path.scale.at(LAMS):
        expected = logits(model)
    torch.manual_seed(0)
    assert torch.equal(run(path, model, LAMS), expected)


def test_it_works_in_inference_mode_and_as_a_copy() -> None:
    model = with_lora()
    path = LoRAProjections(model)
    expected = run(path, model, LAMS)
    with torch.inference_mode():
        assert near(run(path, model, LAMS), expected)
        own = with_lora()
        assert near(run(LoRAProjections(own), own, LAMS), expected)
    twin, twin_path = copy.deepcopy((model, path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(twin_path, twin, LAMS), expected)


def test_hooks_are_called() -> None:
    model = with_lora()
    path = LoRAProjections(model)
    layer = next(iter(path.scale.layers.values()))
    expected = run(path, model, LAMS)
    seen: list[tuple[str, Tensor]] = []
    layer.base_layer.register_forward_hook(lambda *call: seen.append(("base", call[2])))
    layer.register_forward_hook(lambda *call: seen.append(("layer", call[2])))
    assert torch.equal(run(path, model, LAMS), expected)
    with path.scale.at(LAMS):
        logits(model)
    (_, base), (_, whole), (_, peft_base), (_, peft_whole) = seen
    assert [name for name, _ in seen] == ["base", "layer"] * 2
    assert torch.equal(base, peft_base)
    assert near(whole, peft_whole)
    assert not near(whole, base)


def test_outside_the_block_and_after_removal_the_model_is_pefts() -> None:
    model = with_lora()
    stock = logits(model)
    path = LoRAProjections(model)
    with pytest.raises(RuntimeError, match="stop"), path.at(LAMS, *TOKENS.shape):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), stock)
    path.remove()
    assert torch.equal(run(path, model, 3.0), stock)


def test_lambda_of_another_shape_is_refused() -> None:
    model = with_lora()
    path = LoRAProjections(model)
    for lam in (torch.tensor([0.1, 0.2]), torch.rand(3, 5)):
        with pytest.raises(LambdaError, match="does not fit"):
            run(path, model, lam)
    with pytest.raises(LambdaError, match="finite"):
        run(path, model, float("nan"))


def test_an_adapter_of_another_name() -> None:
    model = get_peft_model(
        family_model("llama"), LoraConfig(r=4, target_modules="all-linear"), adapter_name="style"
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    path = LoRAProjections(model, "style")
    assert near(run(path, model, 1.0), logits(model))


def test_a_dial_takes_this_path_and_keeps_merged_weights_when_asked() -> None:
    subject = dial_subject_of("llama")
    dial = subject.dial
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}

    def written(lam: Any) -> Tensor:
        tokens: Tensor = dial.generate(**subject.batch, lam=lam, **settings)
        return tokens

    before = {lam: written(lam) for lam in (0.0, 2.0, 3.0)}
    steps = 4 * 2 * 7
    assert counted("aten::addmm_", lambda: written([0.5, 2.0, 3.0])) == steps
    assert counted("aten::addmm_", lambda: written(0.0)) == 0
    dial.merge(2.0)
    assert counted("aten::addmm_", lambda: written(2.0)) == 0
    assert counted("aten::addmm_", lambda: written([2.0, 2.0, 3.0])) == steps
    for lam, tokens in before.items():
        assert torch.equal(written(lam), tokens)
    dial.merge(None)
    assert counted("aten::addmm_", lambda: written(2.0)) == steps


@pytest.mark.parametrize("shape", [(0,), (2,), (3, 1), (1, 7)])
def test_equal_numbers_in_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = with_lora()
    path = LoRAProjections(model)
    for number in (0.0, 1.0, 2.0):
        with pytest.raises(LambdaError, match="does not fit the input"):
            run(path, model, torch.full(shape, number))
    assert torch.equal(run(path, model, torch.tensor([2.0])), run(path, model, 2.0))
