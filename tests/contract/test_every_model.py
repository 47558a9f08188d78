"""Whatever transformers can build is served rightly or refused, never served wrongly.

Each family gets one common small configuration. Those that nothing can be compared of are named
below, by the reason; any other that cannot be built is a failure.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from contract.subjects import put_lora, stir
from families import FAMILIES, family_config
from flexalign.errors import UnsupportedModelError
from flexalign.inra import InRaModel
from flexalign.lora_dial import LoRADial, LoRADialConfig

OTHERS = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(FAMILIES))
LARGEST = 5_000_000
"""Parameters; a family that cannot be made smaller would take long."""

# fmt: off
RECURRENT = [
    "bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "kimi_linear", "minimax",
    "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen4_exp_text",
]
"""Such layers are refused by name, which the tests of mamba, jamba and qwen3_next hold; slow."""
LARGE = [
    "bart", "bigbird_pegasus", "blenderbot", "blt", "deepseek_v32", "emu3", "gemma3",
    "gemma4", "gemma4_text", "gemma4_unified", "git", "glm_moe_dsa", "got_ocr2", "hy_v4",
    "llama4", "marian", "mbart", "mllama", "moss_transcribe_diarize", "mvp", "pegasus",
    "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "roc_bert",
]
"""Defaults that no option of ours makes small; minutes for one family."""
OWN_SETTINGS = [
    "axk1", "axk2", "codegen", "cohere_compass_text", "dbrx", "deepseek_v2", "dots1",
    "dots3_note", "dots3_note_text", "gemma3n", "gemma3n_text", "gemma4_assistant",
    "gemma4_unified_assistant", "glm4_moe_lite", "gpt_neo", "gptj", "lfm2_moe",
    "longcat_flash", "mamba2", "minicpm3", "musicgen", "musicgen_melody", "plbart",
    "prophetnet", "qwen4_exp", "reformer", "whisper", "xlnet", "xmod", "youtu", "zamba",
    "zamba2", "zaya",
]
"""Their plain model fails with the common configuration, in transformers' own code."""
LEFT_OUT = {*RECURRENT, *LARGE, *OWN_SETTINGS}
WITHOUT_LORA = [
    "deepseek_v4", "falcon_mamba", "llama4_text", "phimoe",
]
"""PEFT puts no LoRA on them, or the model fails with one."""
# fmt: on

pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore"),
]

TOKENS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(TOKENS)
MASK[0, :3] = 0


def build(family: str) -> PreTrainedModel:
    """Build a small model of a family whose plain forward runs; skip one that is left out."""
    try:
        return _small_model(family)
    except Exception as error:  # all of it is transformers' own; nothing of ours has run yet
        if family not in LEFT_OUT:
            raise
        # The lists above say why; a family that is in none of them has failed here.
        pytest.skip(f"{family} is named as left out ({type(error).__name__}: {error})")


def _small_model(family: str) -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4}
    experts |= {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
    config = family_config(family, head_dim=16, **experts)
    if any(name.startswith(("mamba", "linear_")) for name in config.to_dict()):
        raise ValueError("recurrent; name it in RECURRENT")

    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.numel() for parameter in shell.parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters at the least; name it in LARGE")

    model = AutoModelForCausalLM.from_config(config).float().eval()
    model(TOKENS, attention_mask=MASK, use_cache=False)
    return model


def test_no_family_is_left_out_without_its_name() -> None:
    compared = set(OTHERS) - LEFT_OUT
    assert len(compared) >= 91
    assert set(OTHERS) >= LEFT_OUT, "transformers has no such family any more; drop the name"
    assert set(WITHOUT_LORA) <= compared
    assert len(LEFT_OUT) == len(RECURRENT) + len(LARGE) + len(OWN_SETTINGS)


@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_served_or_refused(family: str) -> None:
    base = build(family)
    try:
        model = InRaModel.create(base)
    except UnsupportedModelError:
        return
    stir(model.adapter, 0.05, seed=2)
    plain = base(TOKENS, attention_mask=MASK, use_cache=False).logits
    adapter = model(TOKENS, MASK, lam=1.0).logits
    expected = torch.stack([0.7 * plain[0] + 0.3 * adapter[0], 2 * adapter[1] - plain[1]])
    found = model(TOKENS, MASK, lam=[0.3, 2.0]).logits
    assert float((found - expected)[MASK.bool()].abs().max()) <= 1e-5
    settings = {"lam": [0.0, 1.5], "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(TOKENS, attention_mask=MASK, **settings)
    assert torch.equal(
        cached, model.generate(TOKENS, attention_mask=MASK, **settings, use_cache=False)
    )


@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_a_lora_dial_is_served_or_refused(family: str) -> None:
    base = build(family)
    plain = base(TOKENS, attention_mask=MASK, use_cache=False).logits
    try:
        model = put_lora(base)
        stock = model(input_ids=TOKENS, attention_mask=MASK, use_cache=False).logits
    except Exception as error:  # PEFT's own
        if family not in WITHOUT_LORA:
            raise
        # PEFT's error, not ours: without a LoRA there is no dial to compare.
        pytest.skip(f"{family} is in WITHOUT_LORA ({type(error).__name__}: {error})")
    try:
        dial = LoRADial(model, LoRADialConfig("base", "", lambda_range=(0.0, 5.0)))
    except UnsupportedModelError:
        return
    real = MASK.bool()
    for lam, expected in ((0.0, plain), (1.0, stock)):
        assert float((dial(TOKENS, MASK, lam=lam).logits - expected)[real].abs().max()) <= 1e-6
    mixed = dial(TOKENS, MASK, lam=[0.5, 2.0]).logits
    for row, lam in enumerate((0.5, 2.0)):
        same = dial(TOKENS, MASK, lam=lam).logits[row]
        scale = max(
            1.0, float(same[real[row]].abs().max())
        )  # large logits are rounded more coarsely
        assert float((mixed[row] - same)[real[row]].abs().max()) <= 1e-5 * scale
