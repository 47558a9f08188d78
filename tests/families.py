"""A tiny random configuration for every family that the contract names.

``MUST_PASS`` are the families that every part of the library serves; ``PASS_OR_REFUSED`` may be
refused by name, but never served wrongly.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

MUST_PASS = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_neox",
    "mixtral",
    "smollm3",
    "gpt_oss",
)
PASS_OR_REFUSED = (
    "gemma",
    "phi",
    "gpt2",
    "gpt_bigcode",
    "starcoder2",
    "granite",
    "cohere",
    "glm4",
    "stablelm",
    "falcon",
    "opt",
    "deepseek_v3",
    "bloom",
    "mpt",
    "mamba",
    "jamba",
    "qwen3_next",
)
FAMILIES = MUST_PASS + PASS_OR_REFUSED

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD_DIM = {"head_dim": 16}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32}
_EXTRA: dict[str, dict[str, Any]] = {
    "gemma": _HEAD_DIM,
    "gemma2": _HEAD_DIM | {"final_logit_softcapping": 0.5},
    "gemma3_text": _HEAD_DIM,
    "qwen3": _HEAD_DIM,
    "smollm3": _HEAD_DIM,
    "gpt_oss": _HEAD_DIM
    | _EXPERTS
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "mixtral": _EXPERTS,
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "qwen3_next": _HEAD_DIM
    | _EXPERTS
    | {
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "deepseek_v3": {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
    },
}


def family_config(family: str, **changes: Any) -> Any:
    """Return the tiny configuration of a family, with some settings changed."""
    return AutoConfig.for_model(family, **{**_COMMON, **_EXTRA.get(family, {}), **changes})


def family_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build a tiny random model of a family, in float32 and evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(family_config(family, **changes))
    return model.float().eval()
