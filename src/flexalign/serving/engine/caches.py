"""Caches whose rows come and go: brought to one width, one put behind the other."""

from collections.abc import Iterable
from typing import Any

from torch import cat, nn

__all__ = ["append_rows", "reframe"]


def reframe(layers: Iterable[Any], width: int) -> None:
    """Bring cache layers to a width, on the left: padding is put before, or cut off.

    What stands in the padding is hidden by the attention mask, in every layer alike.

    Args:
        layers: Of transformers' dynamic cache, sliding windows among them.
        width: Tokens that each is to have seen.
    """
    for layer in layers:
        if not layer.is_initialized:
            continue
        kept = width
        if layer.is_sliding:
            kept = min(width, layer.sliding_window - 1)
            layer.cumulative_length = width
        layer.keys, layer.values = (_fitted(held, kept) for held in (layer.keys, layer.values))


def append_rows(layers: Iterable[Any], others: Iterable[Any]) -> None:
    """Put the rows of other layers, of the same width, behind those of these."""
    for layer, other in zip(layers, others, strict=True):
        layer.keys = cat([layer.keys, other.keys])
        layer.values = cat([layer.values, other.values])


def _fitted(held: Any, width: int) -> Any:
    have = held.shape[-2]
    if width <= have:
        return held[..., have - width :, :]
    return nn.functional.pad(held, (0, 0, width - have, 0))
