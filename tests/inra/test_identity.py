"""A layer becomes the identity by the fewest parameters, and is left by small steps, or refused."""

import copy

import pytest
import torch
from torch import Tensor, nn

from contract.subjects import make_base, stir
from families import family_model
from flexalign.errors import UnsupportedModelError
from flexalign.inra import InRaModel
from flexalign.inra.adapter import (
    LayerCall,
    copy_first_layer,
    decoder_layers,
    identity_adapter,
    make_identity,
)

SILENCED = {
    "llama": {"self_attn.o_proj.weight", "mlp.down_proj.weight"},
    "gpt2": {"attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"},
    "opt": {"self_attn.out_proj.weight", "self_attn.out_proj.bias", "fc2.weight", "fc2.bias"},
    "mixtral": {"self_attn.o_proj.weight", "mlp.experts.down_proj"},
    "gpt_oss": {
        "self_attn.o_proj.weight",
        "self_attn.o_proj.bias",
        "mlp.experts.down_proj",
        "mlp.experts.down_proj_bias",
    },
    "olmo2": {"post_attention_layernorm.weight", "post_feedforward_layernorm.weight"},
    "gemma2": {"post_attention_layernorm.weight", "post_feedforward_layernorm.weight"},
    "glm4": {"post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"},
    "qwen2_moe": {
        "self_attn.o_proj.weight",
        "mlp.experts.down_proj",
        "mlp.shared_expert.down_proj.weight",
    },
}

FEW_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


class Layer(nn.Module):
    """A made-up layer: its input plus one block, or something of the two."""

    def __init__(self, combine) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)
        self.combine = combine

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.combine(hidden_states, self.outer(self.inner(hidden_states).tanh()))


def hidden() -> LayerCall:
    return LayerCall((torch.randn(2, 5, 8),), {})


@pytest.mark.parametrize("family", SILENCED)
def test_which_parameters_change(family):
    base = make_base(family, **(FEW_EXPERTS if family == "qwen2_moe" else {}))
    (adapter,) = identity_adapter(base, 1, family)
    source = dict(decoder_layers(base, family)[0].named_parameters())
    changed = {k: p for k, p in adapter.named_parameters() if not torch.equal(p, source[k])}
    assert changed.keys() == SILENCED[family]
    value = -1 if family == "gemma2" else 0
    assert all(bool((parameter == value).all()) for parameter in changed.values())


def test_half_precision_keeps_its_precision():
    base = make_base("llama").to(torch.bfloat16)
    (adapter,) = identity_adapter(base, 1, "llama")
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.bfloat16}
    kept = adapter.self_attn.q_proj.weight
    assert torch.equal(kept, base.model.layers[0].self_attn.q_proj.weight)


def test_a_copy_shares_the_configuration_and_nothing_else():
    base = family_model("llama")
    InRaModel.create(base)
    (layer,) = copy_first_layer(base, 1, "llama")
    assert layer.self_attn.config is base.config
    assert layer.self_attn.layer_idx == len(base.model.layers)
    assert not layer._forward_pre_hooks
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    assert pointers.isdisjoint(parameter.data_ptr() for parameter in layer.parameters())


def test_post_ln_is_refused_by_name():
    base = family_model("opt", do_layer_norm_before=False)
    stir(base, 0.05, seed=1)
    with pytest.raises(UnsupportedModelError, match=r"OPTForCausalLM.*identity.*post-LN"):
        InRaModel.create(base)


def test_a_jump_is_refused():
    """Behind a normalisation without a scale a zeroed projection is the identity, by a jump."""
    layer = Layer(lambda x, y: x + nn.functional.normalize(y, dim=-1))
    with pytest.raises(UnsupportedModelError, match="by a jump or not at all"):
        make_identity(layer, hidden(), "made-up")


def test_a_dead_end_is_refused():
    """Where the block enters squared, no step from zero moves the layer to first order."""
    layer = Layer(lambda x, y: x + y * y)
    with pytest.raises(UnsupportedModelError, match="by a jump or not at all"):
        make_identity(layer, hidden(), "made-up")


def test_a_sum_is_taken_and_no_more_is_zeroed_than_needed():
    layer = Layer(lambda x, y: x + y)
    before = copy.deepcopy(layer)
    call = hidden()
    make_identity(layer, call, "made-up")
    assert torch.equal(call.of(layer), call.hidden)
    assert torch.equal(layer.inner.weight, before.inner.weight)
    assert torch.equal(layer.inner.bias, before.inner.bias)


def test_a_model_without_a_stack_is_refused():
    base = family_model("llama")
    base.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModelError, match="no stack of 3 decoder layers"):
        decoder_layers(base, "llama")


def test_quantised_layers_are_refused():
    base = family_model("llama")
    layer = base.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"quantised.*int8.*de-quantised"):
        copy_first_layer(base, 1, "llama")
