"""Whatever transformers can build is served rightly or refused, never served wrongly.

Each family gets one common small configuration. Those that need settings of their own, and those
whose plain model fails with it, are skipped: nothing can be compared there.
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

pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore"),
]

TOKENS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(TOKENS)
MASK[0, :3] = 0


def build(family: str) -> PreTrainedModel:
    """Build a small model of a family whose plain forward runs, or skip."""
    experts = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4}
    experts |= {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
    try:
        config = family_config(family, head_dim=16, **experts)
        if any(name.startswith(("mamba", "linear_")) for name in config.to_dict()):
            # Such layers are refused by name, which the tests of those three hold.
            pytest.skip("recurrent, as mamba, jamba and qwen3_next are, and slow")
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
        size = sum(parameter.numel() for parameter in shell.parameters())
        if size > LARGEST:  # defaults that no option of ours makes small; minutes for one family
            pytest.skip(f"{size} parameters at the least")
        model = AutoModelForCausalLM.from_config(config).float().eval()
        model(TOKENS, attention_mask=MASK, use_cache=False)
    except Exception as error:  # all of it is transformers' own; nothing of ours has run yet
        pytest.skip(f"needs a configuration of its own ({type(error).__name__}: {error})")
    return model


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
        pytest.skip(f"PEFT puts no LoRA here ({type(error).__name__}: {error})")
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
