"""λ on PEFT's own layers: against float64 by hand, in forward and in backward."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from families import family_model
from flexalign.errors import ConfigError, LambdaError, UnsupportedModelError
from flexalign.lora_dial.scaling import LoRAScale

TOKENS = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(3))


def with_lora(family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Return a tiny model with a LoRA whose two matrices are random."""
    settings = {"r": 4, "target_modules": "all-linear"} | settings
    torch.manual_seed(5)
    model = get_peft_model(family_model(family).to(dtype), LoraConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model


def by_hand(model: PeftModel, lam: float) -> nn.Module:
    """Return the base in float64 with W + λ·s·B·A in place of every W."""
    plain = family_model("llama").double()
    weights = dict(plain.named_parameters())
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and len(layer.lora_A):
            a, b = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
            weights[f"{name}.weight"].data += lam * layer.scaling["default"] * (b @ a)
    return plain.eval()


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens, use_cache=False).logits


def test_every_row_is_the_model_with_its_lambda_in_the_weights() -> None:
    model = with_lora()
    scale = LoRAScale(model)
    lams = [0.3, -1.0, 4.0]
    expected = torch.cat(
        [logits(by_hand(model, lam), TOKENS[i : i + 1]) for i, lam in enumerate(lams)]
    )
    with scale.at(torch.tensor(lams)):
        found = logits(model)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())

    # One number for all rows, and λ per token that is the same for a row's tokens.
    with scale.at(4.0):
        assert torch.allclose(logits(model)[2], expected[2].float(), atol=1e-4)
    with scale.at(torch.tensor(lams)[:, None].expand(3, 7)):
        assert torch.equal(logits(model), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_ends_are_exact(dtype: torch.dtype) -> None:
    model = with_lora(dtype=dtype)
    stock = logits(model)
    with model.disable_adapter():
        base = logits(model)
    scale = LoRAScale(model)
    assert torch.equal(logits(model), stock)
    assert not torch.equal(stock, base)
    for one in (1.0, torch.ones(3), torch.ones(3, 7)):
        with scale.at(one):
            assert torch.equal(logits(model), stock)
    for zero in (0.0, torch.zeros(3), torch.zeros(3, 7)):
        with scale.at(zero):
            assert torch.equal(logits(model), base)
    with scale.at(torch.tensor([0.0, 1.0, 2.5])):
        mixed = logits(model)
    assert torch.equal(mixed[0], base[0])
    assert torch.equal(mixed[1], stock[1])
    scale.set(0.5)
    scale.remove()
    assert torch.equal(logits(model), stock)


def test_a_lambda_is_not_rounded_to_the_models_precision() -> None:
    model = with_lora(dtype=torch.bfloat16)
    scale = LoRAScale(model)
    lam = 1 + 2**-8  # is 1 in bfloat16; its products with most numbers are not
    with scale.at(torch.full((3,), lam)):
        per_row = logits(model)
    with scale.at(lam):  # torch multiplies by a Python number in float32
        assert torch.equal(logits(model), per_row)
    with scale.at(1.0):
        assert not torch.equal(logits(model), per_row)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_each_row_alone(checkpointing: bool) -> None:
    model = with_lora(lora_dropout=0.0).train()
    scale = LoRAScale(model)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    lams = torch.tensor([0.0, 0.7, 3.0])

    def gradients(tokens: Tensor, lam: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        scale.set(lam)
        model(tokens, use_cache=False).logits.float().pow(2).sum().backward()
        return {k: v.grad.clone() for k, v in model.named_parameters() if v.grad is not None}

    whole = gradients(TOKENS, lams)
    alone = [gradients(TOKENS[i : i + 1], lams[i : i + 1]) for i in range(3)]
    assert whole.keys() == {k for k, v in model.named_parameters() if v.requires_grad}
    for name, found in whole.items():
        expected = sum(part[name] for part in alone)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert not alone[0][name].any()  # at λ = 0 the LoRA has no part in the loss


def test_a_list_of_tokens_is_row_after_row() -> None:
    model = with_lora("opt")  # its feed-forward layers get (B·T, H)
    scale = LoRAScale(model)
    lams = torch.tensor([0.4, 2.0, -1.0])
    with scale.at(lams):
        found = logits(model)
    with scale.at(lams[:, None].expand(3, 7)):
        assert torch.equal(logits(model), found)
    for row, lam in enumerate(lams.tolist()):
        with scale.at(lam):
            alone = logits(model, TOKENS[row : row + 1])[0]
        assert torch.allclose(found[row], alone, atol=1e-5)


def test_a_copied_model_has_a_strength_of_its_own() -> None:
    model = with_lora()
    scale = LoRAScale(model)
    twin, own = copy.deepcopy((model, scale))
    own.set(0.0)
    assert not torch.equal(logits(twin), logits(model))


def test_lambda_is_restored_after_the_block_and_after_an_error() -> None:
    scale = LoRAScale(with_lora())
    scale.set(0.5)
    with pytest.raises(KeyError), scale.at(2.0):
        raise KeyError
    assert scale.lam == 0.5


@pytest.mark.parametrize("lam", [torch.ones(2), torch.ones(3, 6), torch.ones(1)])
def test_a_lambda_that_does_not_fit_is_refused(lam: Tensor) -> None:
    scale = LoRAScale(model := with_lora())
    with scale.at(lam), pytest.raises(LambdaError, match="does not fit"):
        logits(model)


@pytest.mark.parametrize("lam", [torch.tensor(1.0), torch.ones(3, 7, 1), float("nan"), "1"])
def test_what_is_no_lambda_is_refused(lam: Any) -> None:
    with pytest.raises(LambdaError):
        LoRAScale(with_lora()).set(lam)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "Embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    ],
)
def test_what_is_not_linear_in_its_strength_is_refused(settings: Any, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        LoRAScale(with_lora(**settings))


def test_other_models_are_refused() -> None:
    model = with_lora()
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        LoRAScale(model, "other")
    model.merge_adapter()
    with pytest.raises(ConfigError, match="is merged"):
        LoRAScale(model)


def test_quantised_weights_are_refused_by_type() -> None:
    class Linear4bit(nn.Linear):
        """Stands for a layer whose weights are packed."""

    model = with_lora()
    layer = model.get_base_model().model.layers[1].self_attn.k_proj
    layer.base_layer.__class__ = Linear4bit
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.self_attn\.k_proj is a Linear4bit"
    ):
        LoRAScale(model)
