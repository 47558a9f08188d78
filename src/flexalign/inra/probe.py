"""The proof, at load, that a model's two streams are what they should be.

Families differ in what they hand to their layers; instead of a list of names, a few tokens are run
through both streams and compared. What does not come out right is refused, and not served wrongly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flexalign._modes import evaluating
from flexalign.decoding.fused import positions_of
from flexalign.errors import UnsupportedModelError
from flexalign.inra.refusal import refusing
from flexalign.inra.stacked import StackedStreams
from flexalign.inra.streams import ADAPTER, BASE

__all__ = ["probe_streams"]

_ROWS, _TOKENS, _PADDING = 2, 4, 1
"""As many tokens as rows in the stack: what is cut by rows must not be taken for tokens."""

_TOLERANCE = 1e-4

_FAILING = "its two streams cannot run as rows of one batch"
_STACKED = "its two streams disturb each other when they run as rows of one batch"
_CACHED = "its streams come out differently with a cache than without"


@torch.no_grad()
def probe_streams(model: StackedStreams, name: str) -> None:
    """Compare stacked with separate streams, and cached with uncached.

    Raises:
        UnsupportedModelError: If they differ by more than rounding.
    """
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, model.head.vocab_size, (_ROWS, _TOKENS), generator=generator)
    tokens = tokens.to(device)
    mask = torch.ones_like(tokens)
    mask[-1, :_PADDING] = 0
    stirred = _stirred(list(model.adapter.parameters()))
    with refusing(name, _FAILING), evaluating(model), stirred:
        _compare(model, tokens, mask, name)


def _compare(model: StackedStreams, tokens: Tensor, mask: Tensor, name: str) -> None:
    positions = positions_of(mask)
    whole: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
    base, adapter = model.stream_hidden(tokens, **whole)
    base_alone, _ = model.stream_hidden(tokens, streams=BASE, **whole)
    _, adapter_alone = model.stream_hidden(tokens, streams=ADAPTER, **whole)
    _require(base, base_alone, mask, _STACKED, name)
    _require(adapter, adapter_alone, mask, _STACKED, name)
    cache = model.prefill(tokens[:, :-1], mask[:, :-1])
    last: dict[str, Any] = {"attention_mask": mask, "position_ids": positions[:, -1:]}
    step = model.stream_hidden(tokens[:, -1:], cache=cache, **last)
    for cached, uncached in zip(step, (base, adapter), strict=True):
        _require(cached, uncached[:, -1:], mask[:, -1:], _CACHED, name)


@contextmanager
def _stirred(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Move an adapter away from the identity for a while, so that it can be told apart."""
    generator = torch.Generator().manual_seed(2)
    originals = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
    try:
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.copy_(original)


def _require(found: Tensor, expected: Tensor, mask: Tensor, problem: str, name: str) -> None:
    kept = mask.bool()
    allowed = max(_TOLERANCE, 8 * torch.finfo(expected.dtype).eps)
    found, expected = found[kept].float(), expected[kept].float()
    off = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
    if not off <= allowed:
        raise UnsupportedModelError(
            f"{name}: {problem} (off by {off:.1%}); InRa cannot serve this model."
        )
