"""Every public method of transformers' models has a known answer on a fused model.

It acts on the whole, is a fact of the leading model that holds for the whole, or is refused by
name. A method that a new release of transformers adds is in none of the tables, and fails here.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from flexalign.data.prompting import PromptSettings
from flexalign.errors import ConfigError
from flexalign.generation import TwoModelDecoder, TwoPromptDecoder
from flexalign.generation.inherited import REFUSED
from flexalign.inra import InRaModel
from flexalign.lora_dial import LoRADial, LoRADialConfig
from flexalign.models.pair import ModelPair
from flexalign.models.prompted import PromptPair
from lora_folders import miniature_lora

WHOLE = {
    *("generate", "prepare_inputs_for_generation", "save_pretrained", "from_pretrained"),
    *("num_parameters", "get_memory_footprint", "get_parameter_or_buffer"),
    "named_non_persistent_buffers",
    *("gradient_checkpointing_enable", "gradient_checkpointing_disable"),
    *("activation_checkpointing_enable", "activation_checkpointing_disable"),
}
"""Answered by the fused model itself."""

FACTS = {
    *("base_model", "base_model_prefix", "can_generate", "can_record_outputs", "config_class"),
    *("device", "dtype", "dummy_inputs", "generation_config_class", "input_modalities"),
    *("main_input_name", "model_tags", "output_modalities", "loss_function", "tie_weights"),
    *("get_decoder", "get_input_embeddings", "get_output_embeddings", "get_position_embeddings"),
    *("get_correct_attn_implementation", "get_correct_experts_implementation"),
    *("get_experts_implementation", "get_expanded_tied_weights_keys", "set_attn_implementation"),
    *("is_activation_checkpointing", "is_backend_compatible", "is_custom_code"),
    *("is_distributed_loading_by_transformers", "is_gradient_checkpointing", "is_remote_code"),
    *("supports_context_parallel", "supports_gradient_checkpointing", "supports_pp_plan"),
    *("supports_tp_plan", "use_kernels", "ep_plan", "fsdp_plan", "fsdp_size", "pp_plan"),
    *("tp_plan", "tp_size", "warn_if_padding_and_no_attention_mask"),
    *("compute_transition_scores", "heal_tokens", "adjust_generation_fn"),
    "destroy_cached_continuous_batching_manager",
}
"""The leading model's, or independent of the model. The adapter's layers share its configuration,
so `set_attn_implementation` reaches them."""


@pytest.fixture(scope="module")
def inra() -> InRaModel:
    return InRaModel.from_pretrained("miniature", "miniature:fast", dtype="float32")


@pytest.fixture(scope="module")
def two_models() -> TwoModelDecoder:
    return TwoModelDecoder(ModelPair.load("miniature", dtype=torch.float32))


@pytest.fixture(scope="module")
def two_prompts() -> TwoPromptDecoder:
    prompts = PromptPair(aligned=PromptSettings(system="check"))
    return TwoPromptDecoder.from_pretrained("miniature", prompts, dtype="float32")


@pytest.fixture(scope="module")
def lora_dial() -> LoRADial:
    return LoRADial(miniature_lora(), LoRADialConfig("miniature", "")).eval()


@pytest.fixture(params=["inra", "two_models", "two_prompts", "lora_dial"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def tokens(inra: InRaModel) -> torch.Tensor:
    assert inra.tokenizer is not None
    ids: torch.Tensor = inra.tokenizer(["17 + 25 =", "3 + 40 ="], return_tensors="pt").input_ids
    return ids


def prompts(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same tokens as the prompts of all streams."""
    names = ("input_ids", "aligned_ids") if isinstance(model, TwoPromptDecoder) else ("inputs",)
    return dict.fromkeys(names, tokens)


def public_methods() -> set[str]:
    names = {*dir(PreTrainedModel), *dir(GenerationMixin)} - set(dir(nn.Module))
    return {name for name in names if not name.startswith("_")}


def test_every_method_has_one_known_answer():
    tables = [WHOLE, FACTS, set(REFUSED)]
    assert set.union(*tables) == public_methods()
    assert sum(map(len, tables)) == len(public_methods())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_the_refused_are_refused_by_name(model: Any, name: str):
    with pytest.raises(ConfigError, match=rf"{type(model).__name__}\.{name} is not available: \w"):
        getattr(model, name)("argument")


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_the_whole_answers_for_itself(model: Any, name: str):
    assert getattr(model, name).__self__ in (model, type(model))


def test_parameters_of_all_parts_are_counted(model: Any):
    parameters = {id(p): p for p in model.parameters()}.values()
    assert model.num_parameters() == sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    assert model.num_parameters(only_trainable=True) == trainable
    size = sum(p.numel() * p.element_size() for p in parameters)
    assert size <= model.get_memory_footprint() <= 1.01 * size


def test_every_layer_is_checkpointed(model: Any):
    def layers() -> list[bool]:
        parts = [model.base, *model.adapter] if isinstance(model, InRaModel) else model.children()
        modules = [module for part in parts for module in part.modules()]
        return [m.gradient_checkpointing for m in modules if type(m).__name__.endswith("Layer")]

    model.activation_checkpointing_enable()
    assert set(layers()) == {True}
    model.activation_checkpointing_disable()
    assert set(layers()) == {False}


def test_the_attention_is_that_of_all_parts(model: Any):
    was = model.config._attn_implementation if isinstance(model, InRaModel) else "sdpa"
    model.set_attn_implementation("eager")
    parts = [model.base, *model.adapter] if isinstance(model, InRaModel) else model.children()
    found = {
        module.config._attn_implementation
        for part in parts
        for module in part.modules()
        if hasattr(module, "config")
    }
    model.set_attn_implementation(was)
    assert found == {"eager"}


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_labels_give_the_loss_of_the_fused_logits(model: Any, tokens: torch.Tensor, lam: float):
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.3, -100)
    output = model(tokens, labels=labels, lam=lam)

    logs = model(tokens, lam=lam).logits.double().log_softmax(-1)[:, :-1]
    kept = labels[:, 1:] != -100
    picked = logs.gather(-1, tokens[:, 1:, None]).squeeze(-1)[kept]
    assert output.loss.item() == pytest.approx(-picked.mean().item(), rel=1e-5)


def test_labels_without_their_logits_are_refused(model: Any, tokens: torch.Tensor):
    with pytest.raises(ConfigError, match=r"labels have shape.*leave out logits_to_keep"):
        model(tokens, labels=tokens, lam=0.5, logits_to_keep=1)


def test_a_tuple_is_returned_where_one_is_asked_for(model: Any, tokens: torch.Tensor):
    loss, logits = model(tokens, labels=tokens, lam=0.5, return_dict=False)
    output = model(tokens, labels=tokens, lam=0.5)
    assert torch.equal(logits, output.logits)
    assert loss == output.loss


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_inner_outputs_are_refused(model: Any, tokens: torch.Tensor, name: str):
    with pytest.raises(ConfigError, match=f"{name} is not available for fused models"):
        model(tokens, lam=0.5, **{name: True})
    with pytest.raises(ConfigError, match=f"{name} is not available for fused models"):
        model.generate(**prompts(model, tokens), lam=0.5, **{name: True})


def test_guidance_is_refused(model: Any, tokens: torch.Tensor):
    with pytest.raises(ConfigError, match=r"guidance_scale is not available.*default λ"):
        model.generate(**prompts(model, tokens), lam=1.0, guidance_scale=2.0)
    with pytest.raises(ConfigError, match="guidance_scale"):
        model.generate(
            **prompts(model, tokens),
            lam=1.0,
            generation_config=GenerationConfig(guidance_scale=3.0),
        )


def test_the_dynamic_cache_may_be_named(model: Any, tokens: torch.Tensor):
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "lam": 0.5}
    expected = model.generate(**prompts(model, tokens), **asked)
    named = model.generate(**prompts(model, tokens), cache_implementation="dynamic", **asked)
    assert torch.equal(named, expected)

    config = GenerationConfig(
        max_new_tokens=6, do_sample=False, cache_implementation="dynamic", pad_token_id=0
    )
    config.eos_token_id = model.generation_config.eos_token_id
    assert torch.equal(
        model.generate(**prompts(model, tokens), lam=0.5, generation_config=config), expected
    )
    assert config.cache_implementation == "dynamic"


def test_two_models_are_neither_loaded_nor_saved_as_one(two_models: TwoModelDecoder):
    with pytest.raises(ConfigError, match=r"ModelPair\.load"):
        TwoModelDecoder.from_pretrained("miniature")
    with pytest.raises(ConfigError, match="save each"):
        two_models.save_pretrained("folder")


def test_an_input_that_two_models_cannot_share_is_refused(
    two_models: TwoModelDecoder, tokens: torch.Tensor
):
    with pytest.raises(ConfigError, match="forward takes no inputs_embeds"):
        two_models(tokens, inputs_embeds=torch.zeros(2, 5, 128))
