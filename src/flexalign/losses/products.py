"""Head products that accumulate in float32 whatever the head's own precision.

Everything is written into a buffer that the caller owns. Half-precision heads are multiplied as
they are where the device can write float32 results (CUDA); elsewhere they are widened a slice of
the vocabulary at a time, so no widened copy of a whole head is ever made.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from flexalign.heads import Head

__all__ = [
    "add_outer",
    "add_product",
    "for_products",
    "project",
    "rounds_its_factor",
    "write_logits",
]

_WIDENED_ROWS = 8192
_HALF = (torch.bfloat16, torch.float16)


def for_products(head: Head) -> Head:
    """Cut a head from the graph; under autocast on an accelerator, take autocast's precision."""
    weight = head.weight.detach()
    device = weight.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))  # pragma: no cover (needs CUDA)
    return replace(head, weight=weight, bias=None if head.bias is None else head.bias.detach())


def rounds_its_factor(weight: Tensor) -> bool:
    """Say whether a product with this weight rounds the other factor to half precision first."""
    return weight.is_cuda and weight.dtype in _HALF


def write_logits(head: Head, hidden: Tensor, out: Tensor) -> Tensor:
    """Write the logits of hidden states (C, H) into ``out`` (C, V) and return it."""
    project(hidden, head.weight, out)
    if head.bias is not None:
        out.add_(head.bias)
    if head.scale != 1.0:
        out.mul_(head.scale)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_().mul_(head.softcap)
    return out


def project(hidden: Tensor, weight: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write ``hidden·weightᵀ`` into ``out``, or add it: (C, H), (V, H) → (C, V)."""
    if rounds_its_factor(weight):
        _half_product(hidden, weight.t(), out, add=add)
        return
    hidden = hidden.to(out.dtype)
    for rows, part in _widened(weight, out.dtype):
        out[:, rows].addmm_(hidden, part.t(), beta=int(add))


def add_product(gradient: Tensor, weight: Tensor, out: Tensor) -> None:
    """Add ``gradient·weight`` to ``out``: (C, V), (V, H) → (C, H)."""
    if rounds_its_factor(weight):
        _half_product(gradient, weight, out, add=True)
        return
    for rows, part in _widened(weight, out.dtype):
        out.addmm_(gradient[:, rows], part)


def add_outer(gradient: Tensor, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Add ``gradientᵀ·hidden``, the gradient of ``weight``, to ``out``: (C, V), (C, H) → (V, H)."""
    if rounds_its_factor(weight):
        _half_product(gradient.t(), hidden.to(weight.dtype), out, add=True)
    else:
        out.addmm_(gradient.t(), hidden.to(out.dtype))


def _half_product(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    left = left.to(right.dtype)
    if add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    step = len(weight) if weight.dtype == dtype else _WIDENED_ROWS
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, weight[rows].to(dtype)
