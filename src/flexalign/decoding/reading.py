"""Responses that are given, read by two models: both models' logits, one chunk at a time."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flexalign.heads import Head

__all__ = ["Row", "read_logits"]

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response."""


def read_logits(
    hidden: Callable[..., Sequence[Tensor]],
    heads: Sequence[Head],
    rows: Sequence[Row],
    *,
    device: torch.device,
    batch_size: int,
    chunk_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield both models' logits, (N, V) each, and (row, position) of the tokens they predict.

    The longest rows come first: what does not fit in memory fails at once.

    Args:
        hidden: Gives the final hidden states of both for ``input_ids`` and ``attention_mask``.
        heads: Of both.
        rows: Prompts and responses; the responses' tokens are those predicted.
        device: Of the models.
        batch_size: Rows read together.
        chunk_size: N, at most.
        progress: Called after each batch with (rows done, rows in all).
    """
    order = sorted(range(len(rows)), key=lambda index: -sum(map(len, rows[index])))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        yield from _read_batch(hidden, heads, rows, batch, device, chunk_size)
        if progress is not None:
            progress(start + len(batch), len(order))


def _read_batch(
    hidden: Callable[..., Sequence[Tensor]],
    heads: Sequence[Head],
    rows: Sequence[Row],
    batch: Sequence[int],
    device: torch.device,
    chunk_size: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Read some of the rows together; of their logits there is one chunk at a time."""
    tokens = [rows[index][0] + rows[index][1] for index in batch]
    longest = max(map(len, tokens))
    padded = [row + [row[-1]] * (longest - len(row)) for row in tokens]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in tokens]
    inputs = {
        "input_ids": torch.tensor(padded, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
    places = [
        (line, position - 1)
        for line, (index, row) in enumerate(zip(batch, tokens, strict=True))
        for position in range(max(len(rows[index][0]), 1), len(row))
    ]
    states = hidden(**inputs)
    for start in range(0, len(places), chunk_size):
        here = torch.tensor(places[start : start + chunk_size])
        logits = [
            head(own[here[:, 0], here[:, 1]]).cpu() for head, own in zip(heads, states, strict=True)
        ]
        where = torch.stack([torch.tensor(batch)[here[:, 0]], here[:, 1] + 1])
        yield logits[0], logits[1], where
