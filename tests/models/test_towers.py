"""Models that see or hear: one rule says which are text, and those run as the whole model does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flexalign.errors import UnsupportedModelError
from flexalign.heads import Head, last_hidden
from flexalign.inra.modeling import InRaModel
from flexalign.models.loading import load_config, load_model, other_towers, skeleton

IDS = {"input_ids": torch.arange(5, 15)[None]}
TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
# As many layers as the text has, so that their lists cannot be told apart by length.
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip

REFUSED = {
    **dict.fromkeys(
        ("aya_vision", "idefics3", "internvl", "llava", "llava_next", "mistral3", "ovis2"),
        "vision-language",
    ),
    **dict.fromkeys(
        ("paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "smolvlm"),
        "vision-language",
    ),
    **dict.fromkeys(("glmasr", "granite_speech", "qwen2_audio", "voxtral"), "multimodal"),
}
TAKEN: dict[str, dict[str, Any]] = {
    "fuyu": {**TEXT, "text_config": {"model_type": "persimmon", **TEXT}, "patch_size": 4},
    "gemma3": {"text_config": {"model_type": "gemma3_text", **TEXT}, "vision_config": VISION},
    "git": {**TEXT, "vision_config": VISION},
    "got_ocr2": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": VISION | {"output_channels": 32, "mlp_dim": 32, "window_size": 2},
        "image_token_index": 90,
    },
    "llama4": {
        "text_config": TEXT
        | {"intermediate_size_mlp": 64, "num_local_experts": 2, "interleave_moe_layer_step": 2},
        "vision_config": VISION
        | {"vision_output_dim": 32, "projector_input_dim": 32}
        | {"projector_output_dim": 32},
    },
    "mllama": {
        "text_config": TEXT | {"cross_attention_layers": [1]},
        "vision_config": VISION
        | {"attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 64}
        | {"intermediate_layers_indices": [0], "max_num_tiles": 1}
        | {"supported_aspect_ratios": [[1, 1]]},
    },
    "qwen3_5": {
        "text_config": TEXT
        | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
        | {"out_hidden_size": 32, "num_position_embeddings": 16, "patch_size": 4},
    },
}


def save(folder: Path, family: str) -> Any:
    """Save the whole model of a family, all towers, as its makers publish it."""
    config = AutoConfig.for_model(family, **TAKEN[family])
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", REFUSED)
def test_what_transformers_loads_as_no_causal_model_is_refused(tmp_path: Path, family: str) -> None:
    config = AutoConfig.for_model(family)
    for whole in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) in whole._model_mapping:
            config.architectures = [whole._model_mapping[type(config)].__name__]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        load_config(tmp_path)
    told = str(caught.value)
    assert f"({config.architectures[0]}) is a {REFUSED[family]} model (" in told
    assert "transformers loads no causal language model of it" in told
    assert told.count(". ") == 0
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", TAKEN)
def test_a_model_that_is_taken_as_text_writes_as_the_whole(tmp_path: Path, family: str) -> None:
    whole = save(tmp_path, family)
    assert family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert other_towers(load_config(tmp_path)) != [] or family == "fuyu"
    loaded = load_model(tmp_path)
    assert type(skeleton(load_config(tmp_path))) is type(loaded)
    with torch.no_grad():
        expected = whole(**IDS).logits
        assert torch.equal(loaded(**IDS).logits, expected)
        head = Head.of(loaded)
        torch.testing.assert_close(head(last_hidden(loaded, **IDS)), expected)


@pytest.mark.parametrize("family", TAKEN)
def test_an_adapter_stands_before_the_text_and_not_before_a_tower(
    tmp_path: Path, family: str
) -> None:
    save(tmp_path, family)
    base = load_model(tmp_path)
    if family in ("git", "qwen3_5"):
        why = "cannot be made the identity" if family == "git" else "keeps a LinearAttentionLayer"
        with pytest.raises(UnsupportedModelError, match=why):
            InRaModel.create(base)
        return
    with torch.no_grad():
        expected = base(**IDS).logits
        model = InRaModel.create(base)
        for lam in (0.0, 1.0):  # a new adapter is the identity
            torch.testing.assert_close(model(**IDS, lam=lam).logits, expected)
        for parameter in model.adapter.parameters():
            parameter += 0.1
        assert torch.equal(model(**IDS, lam=0.0).logits, expected)
        assert not torch.allclose(model(**IDS, lam=1.0).logits, expected)
