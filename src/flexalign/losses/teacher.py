"""The fused teacher of the chunked loss: logits from two hidden states and two heads.

Head products are accumulated in float32 for heads of every precision, and are written into a buffer
of the caller. Half-precision heads are multiplied without conversion if the device can write
float32 results (CUDA). Otherwise one slice of the vocabulary at a time is converted to float32, so
that there is never a float32 copy of a whole head.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexalign.fusion import Lambda, concatenate_hidden, fuse_hidden, fuse_logits
from flexalign.heads import Head

LOG_ZERO = -1e4
"""The logarithm of a probability of 0. Its exponential is 0, and differences with it are finite."""

_WIDENED_ROWS = 8192
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FusedTeacher:
    """Two frozen models at the positions of one batch, without gradients.

    Attributes:
        reference_hidden: Shape ``(N, H_reference)``.
        reference: The reference's head.
        aligned_hidden: Shape ``(N, H_aligned)``.
        aligned: The aligned model's head.
        lam: A number, or one per position, shape ``(N,)``.
        gate: As in :func:`~flexalign.fusion.fuse`.
        mixes_hidden: Whether hidden states may be mixed before the head, because both models share
            it (see :func:`~flexalign.heads.can_mix_hidden`).
    """

    reference_hidden: Tensor
    reference: Head
    aligned_hidden: Tensor
    aligned: Head
    lam: Lambda
    gate: float | None
    mixes_hidden: bool

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """Return the fused logits (C, V) at some positions, with the fewest exact products.

        Args:
            rows: Indices of the positions, shape ``(C,)``.
            out: A buffer (C, V), which may hold the result.
        """
        lam = self._lam(rows)
        if isinstance(lam, float) and lam in (0.0, 1.0):
            return self._reference(rows, out) if lam == 0.0 else self._aligned(rows, out)

        if self.mixes_hidden:
            mixed = fuse_hidden(self.reference_hidden[rows], self.aligned_hidden[rows], lam)
            return write_logits(self.reference, mixed, out)
        if self._joins():
            return self._joined(rows, lam, out)

        # A gate reads both distributions; a soft-cap, a bias or a rounding product is not linear.
        return self.all_logits(rows, out.dtype)[0]

    def all_logits(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the fused, the reference's and the aligned model's logits, each (C, V)."""
        reference, aligned = self.reference_hidden.new_empty(
            (2, len(rows), self.reference.vocab_size), dtype=dtype
        )
        self._reference(rows, reference)
        self._aligned(rows, aligned)
        return fuse_logits(reference, aligned, self._lam(rows), self.gate), reference, aligned

    def log_weights(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return log(π_reference^(1−λ)·π_aligned^λ) at some positions, (C, V): not normalised."""
        reference, aligned = (
            torch.log_softmax(logits, -1) for logits in self.all_logits(rows, dtype)[1:]
        )
        return fuse_logits(reference, aligned, self._lam(rows), self.gate)

    def _lam(self, rows: Tensor) -> Lambda:
        return self.lam[rows] if isinstance(self.lam, Tensor) else self.lam

    def _reference(self, rows: Tensor, out: Tensor) -> Tensor:
        return write_logits(self.reference, self.reference_hidden[rows], out)

    def _aligned(self, rows: Tensor, out: Tensor) -> Tensor:
        return write_logits(self.aligned, self.aligned_hidden[rows], out)

    def _joins(self) -> bool:
        """Return whether one product over the joined width is equation 5 without rounding."""
        return self.gate is None and all(
            head.softcap is None and head.bias is None and not rounds_its_factor(head.weight)
            for head in (self.reference, self.aligned)
        )

    def _joined(self, rows: Tensor, lam: Lambda, out: Tensor) -> Tensor:
        """Return the product of the joined hidden states and heads, computed in two halves.

        Adding the two halves avoids a copy of the heads.
        """
        joined = concatenate_hidden(
            self.reference.scale * self.reference_hidden[rows].to(out.dtype),
            self.aligned.scale * self.aligned_hidden[rows].to(out.dtype),
            lam,
        )
        width = self.reference.width
        project(joined[:, :width], self.reference.weight, out)
        project(joined[:, width:], self.aligned.weight, out, add=True)
        return out


def for_products(head: Head) -> Head:
    """Detach a head from the graph; under autocast on an accelerator, convert it to its dtype."""
    weight = head.weight.detach()
    device = weight.device.type
    if device != "cpu" and torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))  # pragma: no cover (needs CUDA)
    return replace(head, weight=weight, bias=None if head.bias is None else head.bias.detach())


def rounds_its_factor(weight: Tensor) -> bool:
    """Return whether a product with this weight rounds the other factor to half precision."""
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


def outer(
    gradient: Tensor, hidden: Tensor, weight: Tensor, out: Tensor, *, add: bool = False
) -> None:
    """Write ``gradientᵀ·hidden``, the gradient of ``weight``, into ``out``, or add it.

    Shapes: (C, V), (C, H) → (V, H).
    """
    if rounds_its_factor(weight):
        _half_product(gradient.t(), hidden.to(weight.dtype), out, add=add)
    else:
        out.addmm_(gradient.t(), hidden.to(out.dtype), beta=int(add))


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
