"""A tiny model with a LoRA dial, alone and as folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contract.subjects import put_lora
from flexalign.lora_dial import LoRADial, LoRADialConfig
from flexalign.models.loading import fingerprint

PROMPTS = ["one and two", "1+2=", "the answer is six because one and two make three and three more"]


@pytest.fixture
def base(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(initializer_range=0.1)


@pytest.fixture
def dial(base: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> LoRADial:
    """λ changes what it writes; every λ of the tests is in its range."""
    config = LoRADialConfig("base", fingerprint(base), lambda_range=(-2, 5))
    return LoRADial(put_lora(base, 0.2), config, tiny_tokenizer).eval()


@pytest.fixture
def folder(dial: LoRADial, tmp_path: Path) -> Path:
    dial.save_pretrained(tmp_path / "dial")
    return tmp_path / "dial"


@pytest.fixture
def base_folder(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> Path:
    tiny_model(initializer_range=0.1).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def inputs(tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    batch = tiny_tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@pytest.fixture
def rows(tiny_tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@torch.no_grad()
def recompute(dial: LoRADial, ids: list[int], lam: Any, steps: int) -> list[int]:
    """Decode one prompt greedily by plain models alone: W + λ·s·B·A, merged anew at every λ.

    Every token is read once, at the λ of its step, and its keys and values stay as they are.

    Args:
        lam: λ, or a function of the number of tokens written so far.
    """
    written: list[int] = []
    cache, fed = None, list(ids)
    for step in range(steps):
        here = lam(step) if callable(lam) else lam
        output = dial.merged(here)(torch.tensor([fed]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        fed = [int(output.logits[0, -1].argmax())]
        written += fed
    return written


@pytest.fixture
def naive() -> Callable[..., list[int]]:
    return recompute


@pytest.fixture
def greedy(inputs: dict[str, Tensor]) -> Callable[..., list[list[int]]]:
    """Generate greedily and return what was written, row by row."""

    def generate(dial: LoRADial, **settings: Any) -> list[list[int]]:
        given = inputs | {"do_sample": False, "eos_token_id": None} | settings
        output = dial.generate(**given)
        written: list[list[int]] = output[:, given["input_ids"].shape[1] :].tolist()
        return written

    return generate


@pytest.fixture
def passes(dial: LoRADial) -> list[tuple[int, int]]:
    """The (rows, tokens) of every pass through the base, as they happen."""
    seen: list[tuple[int, int]] = []
    dial.base.get_input_embeddings().register_forward_hook(
        lambda _, __, output: seen.append(tuple(output.shape[:2]))
    )
    return seen
