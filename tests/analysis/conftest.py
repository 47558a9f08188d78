"""Pairs of tiny models in memory."""

import pytest
from peft import LoraConfig, get_peft_model

from flexalign.models.pair import ModelPair


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
