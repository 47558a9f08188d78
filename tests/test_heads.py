"""head(hidden) is model.logits: in every family of the contract, and refused where it is not."""

import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, Gemma3Config, Gemma3ForConditionalGeneration

from families import FAMILIES, family_config, family_model
from flexalign.errors import PairMismatchError, UnsupportedModelError
from flexalign.heads import Head, are_equal, can_mix_hidden, last_hidden
from twin import logits64


def batch(vocab_size: int = 97) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, vocab_size, (2, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def difference(head: Head, model: nn.Module) -> float:
    """Largest difference from the model's own logits, relative to the largest of them."""
    expected = model(**batch()).logits
    real = batch()["attention_mask"].bool()
    return float(
        (head(last_hidden(model, **batch())) - expected)[real].abs().max()
        / expected[real].abs().max()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_gives_the_logits_of_the_model(family: str) -> None:
    model = family_model(family)
    head = Head.of(model)
    assert difference(head, model) <= 1e-6
    assert head.weight is model.get_output_embeddings().weight
    assert (head.vocab_size, head.width) == tuple(head.weight.shape)


@pytest.mark.parametrize(
    ("family", "without"),
    [("granite", {"scale": 1.0}), ("cohere", {"scale": 1.0}), ("gemma2", {"softcap": None})],
)
def test_scale_and_softcap_are_not_decoration(family: str, without: dict[str, Any]) -> None:
    model = family_model(family)
    bare = dataclasses.replace(Head.of(model), **without)
    assert difference(bare, model) > 1e-3


@pytest.mark.parametrize("family", ["granite", "gemma2", "phi"])
def test_the_head_is_its_definition(family: str) -> None:
    model = family_model(family)
    head = Head.of(model)
    with torch.no_grad():
        if head.bias is not None:
            head.bias.normal_()
        hidden = 5 * torch.randn(4, head.width)
        torch.testing.assert_close(
            head(hidden).double(), logits64(head, hidden), rtol=1e-5, atol=1e-5
        )
    assert (head.bias is not None) == (family == "phi")


def test_bfloat16_models_pass_the_probe() -> None:
    model = family_model("granite").to(torch.bfloat16)
    head = Head.of(model)
    assert head(last_hidden(model, **batch())).dtype == torch.bfloat16
    assert difference(head, model) <= 0.02


class _Shifted(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + hidden.square().sum(-1, keepdim=True)


class _Doubled(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).repeat_interleave(2, dim=-1)


def test_a_head_of_another_kind_is_refused_by_its_family() -> None:
    model = family_model("llama")
    model.lm_head = _Shifted(64, 97, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"family llama.*misses its logits by"):
        Head.of(model)
    assert Head.of(model, probe=False).weight is model.lm_head.weight


def test_an_undeclared_scale_is_refused_by_its_family() -> None:
    model = family_model("qwen2")
    model.config.logit_scale = 0.5
    with pytest.raises(UnsupportedModelError, match=r"family qwen2.*scale 0\.5, misses"):
        Head.of(model)


@pytest.mark.parametrize(
    ("family", "head", "bias", "says"),
    [
        ("gemma2", _Shifted, True, r"a 97×64 matrix, a bias, soft-cap 0\.5, misses"),
        ("llama", _Doubled, False, r"gives \(.*97\) where its logits are \(.*194\)"),
    ],
    ids=["what was read of it", "another width"],
)
def test_a_refusal_says_how_the_head_differs(
    family: str, head: type[nn.Linear], bias: bool, says: str
) -> None:
    model = family_model(family)
    model.lm_head = head(64, 97, bias=bias)
    with pytest.raises(UnsupportedModelError, match=says):
        Head.of(model)


def test_a_model_without_a_head_is_refused() -> None:
    base = AutoModel.from_config(family_config("llama"))
    with pytest.raises(UnsupportedModelError, match="no output matrix"):
        Head.of(base)
    with pytest.raises(UnsupportedModelError, match="no decoder apart from the head"):
        last_hidden(base, **batch())
    with pytest.raises(UnsupportedModelError, match="no output matrix"):
        Head.of(nn.Linear(3, 3))


def test_a_quantised_head_is_refused() -> None:
    model = family_model("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(torch.int8\)"):
        Head.of(model)


def test_the_probe_leaves_modes_and_random_numbers_as_they_were() -> None:
    model = family_model("gpt2", resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    Head.of(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_no_cache_is_built_and_what_is_none_is_left_out() -> None:
    model = family_model("llama")
    seen: list[dict[str, Any]] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    last_hidden(model, **batch(), position_ids=None)
    assert seen[0]["use_cache"] is False
    assert "position_ids" not in seen[0]


def lora(model: nn.Module, **settings: Any) -> nn.Module:
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return adapted


def test_an_adapted_model_runs_with_its_adapter_and_without() -> None:
    model = family_model("qwen2")
    plain = model(**batch()).logits
    adapted = lora(model, target_modules="all-linear")
    head = Head.of(adapted)
    assert difference(head, adapted) <= 1e-6
    assert (adapted(**batch()).logits - plain).abs().max() > 0.1
    with adapted.disable_adapter():
        torch.testing.assert_close(head(last_hidden(adapted, **batch())), plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapter_on_the_head_is_refused(settings: dict[str, Any]) -> None:
    adapted = lora(family_model("qwen2"), **settings)
    with pytest.raises(UnsupportedModelError, match="leave lm_head out"):
        Head.of(adapted)


def test_virtual_tokens_are_refused() -> None:
    prefix = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    model = get_peft_model(family_model("llama"), prefix)
    with pytest.raises(UnsupportedModelError, match="adds virtual tokens"):
        last_hidden(model, **batch())


def test_the_text_tower_of_a_vision_language_model_is_a_language_model() -> None:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=family_config("gemma3_text").to_dict(),
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=96,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    assert difference(Head.of(model), model) <= 1e-6


def test_a_cut_head_shares_its_storage_and_passes_gradients() -> None:
    weight = torch.randn(10, 4, requires_grad=True)
    head = Head(weight, torch.randn(10), scale=0.5, softcap=3.0)
    cut = head.cut(7)
    hidden = torch.randn(2, 4)
    torch.testing.assert_close(cut(hidden), head(hidden)[..., :7])
    assert cut.weight.data_ptr() == weight.data_ptr()
    cut(hidden).sum().backward()
    assert weight.grad[:7].abs().min() > 0
    assert weight.grad[7:].abs().max() == 0
    assert head.cut(10) is head
    with pytest.raises(PairMismatchError, match="cannot be cut to 11"):
        head.cut(11)


def test_hidden_states_are_mixed_only_before_one_linear_head() -> None:
    weight, bias = torch.randn(5, 3), torch.randn(5)
    plain = Head(weight)
    assert can_mix_hidden(plain, Head(weight))
    assert can_mix_hidden(plain, Head(weight.detach()))
    assert can_mix_hidden(Head(weight, bias, 0.5), Head(weight, bias, 0.5))
    assert not can_mix_hidden(plain, plain, gate=0.0)
    assert not can_mix_hidden(plain, Head(weight.clone()))
    assert not can_mix_hidden(plain, Head(weight[:4]))
    assert not can_mix_hidden(plain, Head(weight, bias))
    assert not can_mix_hidden(Head(weight, bias), Head(weight, bias.clone()))
    assert not can_mix_hidden(plain, Head(weight, scale=2.0))
    assert not can_mix_hidden(Head(weight, softcap=30.0), Head(weight, softcap=30.0))


def test_heads_are_equal_by_value() -> None:
    weight, bias = torch.randn(5, 3), torch.randn(5)
    head = Head(weight, bias, 0.5, 30.0)
    assert are_equal(head, Head(weight.clone(), bias.clone(), 0.5, 30.0))
    for other in (
        Head(weight.clone().mul_(2), bias, 0.5, 30.0),
        Head(weight, bias + 1, 0.5, 30.0),
        Head(weight, None, 0.5, 30.0),
        Head(weight, bias, 1.0, 30.0),
        Head(weight, bias, 0.5),
        Head(weight[:4], bias[:4], 0.5, 30.0),
        Head(weight.double(), bias, 0.5, 30.0),
    ):
        assert not are_equal(head, other)
        assert not are_equal(other, head)
