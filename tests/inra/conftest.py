"""A tiny model with an adapter that is no identity, and equation 5 recomputed at every token."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from contract.subjects import stir
from flexalign.inra import InRaModel
from twin import fuse64

PROMPTS = ["one and two", "1+2=", "the answer is six because one and two make three and three more"]


@pytest.fixture
def base(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(initializer_range=0.1)


@pytest.fixture
def model(base: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> InRaModel:
    """Its two streams disagree often; every λ of the tests is in its range."""
    model = InRaModel.create(base)
    stir(model.adapter, 0.2, seed=2)
    model.inra_config = replace(model.inra_config, lambda_range=(-2, 4))
    model.tokenizer = tiny_tokenizer
    return model


@pytest.fixture
def inputs(tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    batch = tiny_tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@pytest.fixture
def rows(tiny_tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@torch.no_grad()
def recompute(
    model: InRaModel, ids: list[int], lam: Any, steps: int, gate: float | None = None
) -> list[int]:
    """Decode one prompt greedily, both streams afresh and alone at every token.

    Args:
        lam: λ, or a function of the number of tokens written so far.
    """
    written: list[int] = []
    for step in range(steps):
        tokens = torch.tensor([ids + written])
        base, adapter = (model(tokens, lam=end).logits[:, -1].double() for end in (0.0, 1.0))
        here = lam(step) if callable(lam) else lam
        written.append(int(fuse64(base, adapter, here, gate).argmax()))
    return written


@pytest.fixture
def naive() -> Callable[..., list[int]]:
    return recompute


@pytest.fixture
def greedy(inputs: dict[str, Tensor]) -> Callable[..., list[list[int]]]:
    """Generate greedily and return what was written, row by row."""

    def generate(model: InRaModel, **settings: Any) -> list[list[int]]:
        given = inputs | {"do_sample": False, "eos_token_id": None} | settings
        output = model.generate(**given)
        written: list[list[int]] = output[:, given["input_ids"].shape[1] :].tolist()
        return written

    return generate


@pytest.fixture
def passes(model: InRaModel) -> Iterator[list[tuple[int, int]]]:
    """The (rows, tokens) of every pass through the base, as they happen."""
    seen: list[tuple[int, int]] = []
    handle = model.base.get_input_embeddings().register_forward_hook(
        lambda _, __, output: seen.append(tuple(output.shape[:2]))
    )
    yield seen
    handle.remove()
