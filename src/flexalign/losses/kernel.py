"""The chunked divergence of :mod:`flexalign.losses`, as one autograd function.

The logits, divergence and gradients of a chunk are computed in a few buffers, which the next chunk
overwrites. So no tensor of size tokens × vocabulary is kept.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flexalign.heads import Head
from flexalign.losses.sampled import token_score
from flexalign.losses.sequence import Score
from flexalign.losses.teacher import (
    LOG_ZERO,
    FusedTeacher,
    add_product,
    outer,
    write_logits,
)


@dataclass(frozen=True)
class DivergenceTask:
    """The arguments of a sum of divergences over positions.

    Attributes:
        positions: Indices of the counted positions among the N, shape ``(P,)``.
        student: The student's head, detached from the graph.
        teacher: The teacher.
        beta: 0 is the forward, 1 the reverse divergence; between them the Jensen–Shannon family.
        chunk_size: Positions per chunk.
        metrics: Whether to compute the KL to the two models of the teacher too.
        gradients: Whether to compute gradients.
        score: A term that is added to the gradient, for tokens that the student sampled; only with
            ``beta`` 1.
        sampled: The token that the student sampled at each counted position, shape ``(P,)``. The
            gradient is then that of :mod:`flexalign.losses.sampled` instead of the divergence's;
            only with ``beta`` 1 and without `score`.
    """

    positions: Tensor
    student: Head
    teacher: FusedTeacher
    beta: float
    chunk_size: int
    metrics: bool
    gradients: bool
    score: Score | None = None
    sampled: Tensor | None = None


def sum_in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, task: DivergenceTask
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum the divergence over the counted positions, in nats.

    Args:
        hidden: The student's final hidden states, shape ``(N, H)``; gets a gradient.
        weight: The weight of the student's head, shape ``(V, H)``; gets a gradient.
        bias: Its bias, shape ``(V,)``, or None; gets a gradient.
        task: The other arguments.

    Returns:
        The sum, with its graph; and, without gradients, the sums of KL(student‖reference) and
        KL(student‖aligned), which are zeros unless the task has ``metrics``, and the divergence of
        each counted position, shape ``(P,)``.
    """
    sums: tuple[Tensor, Tensor, Tensor, Tensor] = _ChunkedDivergence.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, task
    )
    return sums


class _ChunkedDivergence(torch.autograd.Function):
    """Sum of the divergence over the counted positions. ``forward`` computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: DivergenceTask
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        needed = ctx.needs_input_grad[:3] if task.gradients else (False, False, False)
        # The gradient of the weight is by far the largest. The first chunk writes it whole.
        unfilled = torch.empty_like if len(task.positions) else torch.zeros_like
        makers = (torch.zeros_like, unfilled, torch.zeros_like)
        grads = [
            make(tensor, dtype=dtype) if need and tensor is not None else None
            for make, tensor, need in zip(makers, (hidden, weight, bias), needed, strict=True)
        ]

        with torch.autocast(hidden.device.type, enabled=False):
            sums, values = _sum_chunks(hidden, task, grads)

        # Not save_for_backward: the gradients are not part of the graph, and backward changes them.
        ctx.grads, ctx.dtypes = (
            grads,
            (hidden.dtype, weight.dtype, None if bias is None else bias.dtype),
        )
        total, kl_reference, kl_aligned = sums.unbind()
        ctx.mark_non_differentiable(kl_reference, kl_aligned, values)
        return total, kl_reference, kl_aligned, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *_take_gradients(ctx, grad_total), None


def _take_gradients(ctx: Any, grad_total: Tensor) -> list[Tensor | None]:
    """Return the gradients that ``forward`` computed, scaled in place; the context loses them."""
    if ctx.grads is None:
        raise RuntimeError(
            "backward through fused_divergence can run once: its gradients are made with the "
            "loss and handed over; call fused_divergence again."
        )
    grads, ctx.grads = ctx.grads, None
    return [
        None if grad is None else grad.mul_(grad_total).to(dtype)
        for grad, dtype in zip(grads, ctx.dtypes, strict=True)
    ]


def _sum_chunks(
    hidden: Tensor, task: DivergenceTask, grads: list[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Sum over the counted positions in chunks, and add to the gradients in place.

    Returns:
        Sums over positions of the divergence, KL(s‖reference) and KL(s‖aligned), shape (3,); and
        the divergence of each position, shape (P,).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    head = task.student
    rows_at_most = min(task.chunk_size, len(task.positions))
    buffers = hidden.new_empty((4, rows_at_most, head.vocab_size), dtype=dtype)
    sums = hidden.new_zeros(3, dtype=dtype)
    values = hidden.new_empty(len(task.positions), dtype=dtype)

    for start in range(0, len(task.positions), task.chunk_size):
        chunk = slice(start, start + task.chunk_size)
        rows = task.positions[chunk]
        logits, log_s, log_t, spare = buffers[:, : len(rows)]

        # The student. Its logits' buffer is free again after this.
        h = hidden[rows].to(dtype)
        write_logits(head, h, logits)
        _log_softmax(logits, log_s)
        if head.softcap is not None:
            # The derivative of the tanh, dlogits/d(scale·(h·Wᵀ + b)), computed from its value.
            slope = torch.square(logits).mul_(-(head.softcap**-2)).add_(1)

        # The teacher. Metrics need both models' logits; otherwise fewer products are enough.
        if task.metrics:
            fused, reference, aligned = task.teacher.all_logits(rows, dtype)
            s = torch.exp(log_s, out=logits)
            for index, other in ((1, reference), (2, aligned)):
                _log_softmax(other, log_t)
                sums[index] += torch.sub(log_s, log_t, out=spare).mul_(s).sum()
        else:
            fused = task.teacher.logits(rows, logits)
        _log_softmax(fused, log_t)

        own = None if task.sampled is None else token_score(log_s, log_t, task.sampled[chunk])
        values[chunk], gradient = _divergence(log_s, log_t, logits, spare, task.beta)
        sums[0] += values[chunk].sum()
        if task.score is not None:
            task.score.add_to(gradient, logits, chunk)
        if own is not None:
            own.add_to(gradient.zero_(), logits, slice(None))

        # From the logits back to the product h·Wᵀ.
        if head.softcap is not None:
            gradient.mul_(slope)
        if head.scale != 1.0:
            gradient.mul_(head.scale)
        _add_gradients(gradient, h, rows, head.weight, start == 0, grads)
    return sums, values


def _add_gradients(
    gradient: Tensor,
    h: Tensor,
    rows: Tensor,
    weight: Tensor,
    is_first: bool,
    grads: list[Tensor | None],
) -> None:
    grad_hidden, grad_weight, grad_bias = grads
    if grad_hidden is not None:
        part = torch.zeros_like(h)
        add_product(gradient, weight, part)
        grad_hidden[rows] = part
    if grad_weight is not None:
        outer(gradient, h, weight, grad_weight, add=not is_first)
    if grad_bias is not None:
        grad_bias.add_(gradient.sum(0))


def _divergence(
    log_s: Tensor, log_t: Tensor, one: Tensor, two: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Return the divergence at each position of a chunk, and its gradient by the student's logits.

    All four tensors (C, V) are overwritten; the gradient is one of them. If β is 1, `one` holds the
    student's probabilities afterwards.
    """
    if beta == 0.0:  # Σ t·(log t − log s); gradient s − t
        t = torch.exp(log_t, out=one)
        value = log_t.sub_(log_s).mul_(t).sum(-1)
        return value, log_s.exp_().sub_(t)
    if beta == 1.0:  # Σ s·(log s − log t); gradient s·(log s − log t − KL)
        s = torch.exp(log_s, out=one)
        terms = log_s.sub_(log_t).mul_(s)
        kl = terms.sum(-1, keepdim=True)
        return kl.squeeze(-1), terms.addcmul_(s, kl, value=-1)

    # With x = log t/s: log m/s = softplus(x + logit β) + log(1−β). The constant cancels in the
    # gradient, (1−β)·s·(log s/m − KL(s‖m)), and is left out of it.
    t = torch.exp(log_t, out=two)
    x = log_t.sub_(log_s)
    softplus = torch.add(x, math.log(beta) - math.log1p(-beta), out=one)
    torch.logaddexp(softplus, softplus.new_zeros(()), out=softplus)
    from_teacher = x.sub_(softplus).mul_(t).sum(-1)
    s = log_s.exp_()
    terms = softplus.neg_().mul_(s)
    kl = terms.sum(-1, keepdim=True)
    value = beta * from_teacher + (1 - beta) * kl.squeeze(-1) - math.log1p(-beta)
    return value, terms.addcmul_(s, kl, value=-1).mul_(1 - beta)


def _log_softmax(logits: Tensor, out: Tensor) -> None:
    """Write the log-softmax to `out`, with a finite floor so that 0·(log 0 − log 0) is 0."""
    torch.log_softmax(logits, -1, out=out)
    out.clamp_(min=LOG_ZERO)
