"""Pairs of tiny models in memory, and equation 5 without caches, batches or padding."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from flexalign.models.pair import ModelPair
from twin import fuse64


@pytest.fixture
def pair(tiny_model, tiny_tokenizer):
    """Two models of one family that disagree often."""
    return ModelPair.of(
        *(tiny_model(seed=s, initializer_range=0.1) for s in (0, 1)), tiny_tokenizer
    )


@pytest.fixture
def shared_pair(tiny_model, tiny_tokenizer):
    """A base and an adapter on it, in one module."""
    base = tiny_model(initializer_range=0.1)
    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, config, adapter_name="tone").eval()
    return ModelPair.of(base, adapted, tiny_tokenizer)


def recompute(pair, ids, lam, steps, gate=None, ends=()):
    """Decode one prompt greedily, both models afresh at every token. `lam(step, written)` is λ."""
    written = []
    for step in range(steps):
        inputs = {"input_ids": torch.tensor([ids + written])}
        reference, aligned = (
            pair.logits(side, **inputs)[:, -1] for side in ("reference", "aligned")
        )
        here = lam(step, written) if callable(lam) else lam
        written.append(int(fuse64(reference.double(), aligned.double(), here, gate).argmax()))
        if written[-1] in ends:
            break
    return written


@pytest.fixture
def naive():
    return recompute
