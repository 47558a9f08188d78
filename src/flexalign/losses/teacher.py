"""The fused teacher of the chunked loss: two hidden states and two heads in, logits out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexalign.fusion import Lambda, concatenate_hidden, fuse
from flexalign.heads import Head
from flexalign.losses.products import project, rounds_its_factor, write_logits

__all__ = ["FusedTeacher"]


@dataclass(frozen=True)
class FusedTeacher:
    """Two frozen models at the positions of one batch, without gradients.

    Attributes:
        reference_hidden: Shape ``(N, H_reference)``.
        reference: The head for it.
        aligned_hidden: Shape ``(N, H_aligned)``.
        aligned: The head for it.
        lam: A number, or one per position, shape ``(N,)``.
        gate: As in :func:`~flexalign.fusion.fuse`.
        mixes_hidden: The two heads are one, so hidden states may be mixed before it.
    """

    reference_hidden: Tensor
    reference: Head
    aligned_hidden: Tensor
    aligned: Head
    lam: Lambda
    gate: float | None
    mixes_hidden: bool

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """Return the fused logits (C, V) at some positions, by as few products as are exact.

        Args:
            rows: Indices of the positions, shape ``(C,)``.
            out: A buffer (C, V), which the result may be in.
        """
        lam = self._lam(rows)
        if isinstance(lam, float) and lam in (0.0, 1.0):
            return self._reference(rows, out) if lam == 0.0 else self._aligned(rows, out)
        if self.mixes_hidden:
            mixed = fuse(self.reference_hidden[rows], self.aligned_hidden[rows], lam)
            return write_logits(self.reference, mixed, out)
        if self._joins():
            return self._joined(rows, lam, out)
        return self.all_logits(rows, out.dtype)[0]

    def all_logits(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the fused, the reference's and the aligned model's logits, each (C, V)."""
        reference, aligned = self.reference_hidden.new_empty(
            (2, len(rows), self.reference.vocab_size), dtype=dtype
        )
        self._reference(rows, reference)
        self._aligned(rows, aligned)
        return fuse(reference, aligned, self._lam(rows), self.gate), reference, aligned

    def log_weights(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return log(π_reference^(1−λ)·π_aligned^λ) at some positions, (C, V): not normalised."""
        reference, aligned = (
            torch.log_softmax(logits, -1) for logits in self.all_logits(rows, dtype)[1:]
        )
        return fuse(reference, aligned, self._lam(rows), self.gate)

    def _lam(self, rows: Tensor) -> Lambda:
        return self.lam[rows] if isinstance(self.lam, Tensor) else self.lam

    def _reference(self, rows: Tensor, out: Tensor) -> Tensor:
        return write_logits(self.reference, self.reference_hidden[rows], out)

    def _aligned(self, rows: Tensor, out: Tensor) -> Tensor:
        return write_logits(self.aligned, self.aligned_hidden[rows], out)

    def _joins(self) -> bool:
        """Whether one product over the joined width is equation 5, unrounded."""
        return self.gate is None and all(
            head.softcap is None and head.bias is None and not rounds_its_factor(head.weight)
            for head in (self.reference, self.aligned)
        )

    def _joined(self, rows: Tensor, lam: Lambda, out: Tensor) -> Tensor:
        """One product of joined hidden states and heads, added up in halves: no head is copied."""
        joined = concatenate_hidden(
            self.reference.scale * self.reference_hidden[rows].to(out.dtype),
            self.aligned.scale * self.aligned_hidden[rows].to(out.dtype),
            lam,
        )
        width = self.reference.width
        project(joined[:, :width], self.reference.weight, out)
        project(joined[:, width:], self.aligned.weight, out, add=True)
        return out
