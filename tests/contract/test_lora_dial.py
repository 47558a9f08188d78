"""The contract of a LoRA dial, one set of checks for every family: none is refused."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from contract.subjects import RECURRENT, DialSubject, dial_subject_of
from families import FAMILIES
from flexalign.lora_dial import LoRADial

TOLERANCE = 1e-5
MIXED = [0.0, 1.0, 3.0]

pytestmark = pytest.mark.filterwarnings("ignore")

every_family = pytest.mark.parametrize("subject", FAMILIES, indirect=True)


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> DialSubject:
    return dial_subject_of(request.param)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    size = max(1.0, float(expected.abs().max()))
    assert float((found.detach().double() - expected.double()).abs().max()) <= tolerance * size


def assert_exact(subject: DialSubject, found: Tensor, expected: Tensor) -> None:
    if subject.base.config.model_type in RECURRENT:
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    else:
        assert torch.equal(found, expected)


@every_family
@torch.no_grad()
def test_the_ends_are_the_base_and_pefts_own_forward(subject: DialSubject, tmp_path: Path) -> None:
    subject.dial.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(copy.deepcopy(subject.base), tmp_path).eval()
    base = subject.base(**subject.batch, use_cache=False).logits
    stock = peft(**subject.batch, use_cache=False).logits
    assert float((base - stock).abs().max()) > 100 * TOLERANCE, "the LoRA does something"
    for zero in (0.0, torch.zeros(3), [0.0] * 3):
        assert_exact(subject, subject.dial(**subject.batch, lam=zero).logits, base)
    for one in (1.0, torch.ones(3), torch.ones(3, 9), None):
        assert_exact(subject, subject.dial(**subject.batch, lam=one).logits, stock)

    # In a mixed batch without gradients, products are taken together, and rounded otherwise.
    mixed = subject.dial(**subject.batch, lam=MIXED).logits
    assert_exact(subject, mixed[0], base[0])
    assert_near(mixed[1], stock[1])
    with torch.enable_grad():
        mixed = subject.dial(**subject.batch, lam=MIXED).logits
    assert_exact(subject, mixed[0], base[0])
    assert_exact(subject, mixed[1], stock[1])


@every_family
@torch.no_grad()
def test_a_mixed_batch_is_its_rows_alone(subject: DialSubject) -> None:
    together = subject.dial(**subject.batch, lam=[0.5, 2.0, -1.0]).logits
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    lams = [0.5, 2.0, -1.0]
    written = subject.dial.generate(**subject.batch, lam=lams, **settings)
    for row, lam in enumerate(lams):
        real = subject.real[row]
        tokens = subject.batch["input_ids"][row, real][None]
        alone = subject.dial(tokens, torch.ones_like(tokens), lam=lam).logits[0]
        assert_near(together[row][real], alone)
        own = subject.dial.generate(tokens, lam=lam, **settings)
        assert written[row, 9:].tolist() == own[0, tokens.shape[1] :].tolist()


@every_family
@torch.no_grad()
def test_merged_is_unmerged(subject: DialSubject) -> None:
    for lam in (0.0, 0.5, 3.0):
        plain = subject.dial.merged(lam)
        assert not any("lora" in name for name, _ in plain.named_modules())
        found = plain(**subject.batch, use_cache=False).logits[subject.real]
        expected = subject.dial(**subject.batch, lam=lam).logits[subject.real]
        assert_near(found, expected, 1e-4)  # W + λ·s·B·A is rounded once, W·x + λ·s·B·(A·x) twice


@every_family
@torch.no_grad()
def test_cached_is_uncached(subject: DialSubject) -> None:
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "lam": MIXED}
    cached = subject.dial.generate(**subject.batch, **settings)
    assert torch.equal(cached, subject.dial.generate(**subject.batch, **settings, use_cache=False))


@every_family
@torch.no_grad()
def test_save_and_load(subject: DialSubject, tmp_path: Path) -> None:
    subject.dial.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "lora_dial.json", "README.md")
    }
    loaded = LoRADial.from_pretrained(copy.deepcopy(subject.base), tmp_path)
    assert loaded.dial_config == subject.dial.dial_config
    expected = subject.dial(**subject.batch, lam=0.7).logits
    assert_exact(subject, loaded(**subject.batch, lam=0.7).logits, expected)


@every_family
def test_gradients_reach_the_lora_alone(subject: DialSubject) -> None:
    dial = subject.dial
    dial.zero_grad()
    dial(**subject.batch, lam=MIXED).logits[subject.real].logsumexp(-1).sum().backward()
    found = {name for name, p in dial.peft.named_parameters() if p.grad is not None}
    assert found
    assert all(".lora_" in name for name in found)
    dial.zero_grad()


@every_family
@torch.no_grad()
def test_eager_attention_is_sdpa_attention(subject: DialSubject, tmp_path: Path) -> None:
    base = copy.deepcopy(subject.base)
    subject.dial.save_pretrained(tmp_path)
    dial = LoRADial.from_pretrained(base, tmp_path)
    before = dial(**subject.batch, lam=MIXED).logits[subject.real]
    base.set_attn_implementation("eager")
    assert_near(dial(**subject.batch, lam=MIXED).logits[subject.real], before)


@pytest.mark.parametrize("subject", ["llama", "gemma2", *RECURRENT, "qwen3_next"], indirect=True)
@torch.no_grad()
def test_a_rejected_fast_answer_is_the_slow_one(subject: DialSubject) -> None:
    """Caches of keys and values are shared between both answers; with others prompts run again."""
    policy = {"policy": "adaptive", "threshold": 1, "fast_lambda": 3, "slow_lambda": 0.5}
    batch = {key: subject.batch[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = subject.dial.generate(**batch, lam=0.5, **settings)
    assert torch.equal(subject.dial.generate(**batch, policy=policy, **settings), expected)
