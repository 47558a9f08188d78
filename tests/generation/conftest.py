"""Equation 5 without caches, batches or padding."""

import pytest
import torch

from twin import fuse64


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
