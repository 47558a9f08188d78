"""The divergence between a student and the fused teacher, one chunk of tokens at a time.

Equation 6 of the paper minimises ``KL(student ‖ softmax(λ·aligned + (1−λ)·reference))`` at every
response token. A direct implementation needs several matrices of tokens × vocabulary. Here they
exist for one chunk at a time, and the gradients are computed together with the loss, so memory does
not grow with the sequence. :mod:`flexalign.fusion` mixes the two teachers.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args, overload

import torch
from torch import Tensor

from flexalign.errors import ConfigError, PairMismatchError
from flexalign.fusion import Lambda, per_position
from flexalign.heads import Head, can_mix_hidden
from flexalign.losses.kernel import DivergenceTask, sum_in_chunks
from flexalign.losses.sequence import sampled_score
from flexalign.losses.teacher import FusedTeacher, for_products

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "DivergenceMetrics",
    "SampledObjective",
    "fused_divergence",
]

Divergence: TypeAlias = Literal["reverse", "forward", "jsd"]

DIVERGENCES: tuple[Divergence, ...] = ("reverse", "forward", "jsd")
"""Names that ``divergence`` takes; reverse is the paper's equation 6."""

SampledObjective: TypeAlias = Literal["sequence", "sampled"]
"""What the gradient is for tokens that the student sampled: that of whole responses
(:mod:`flexalign.losses.sequence`), or of each sampled token's own reward
(:mod:`flexalign.losses.sampled`)."""


@dataclass(frozen=True)
class DivergenceMetrics:
    """What a batch measures beside its loss, in nats per token, without gradients.

    Attributes:
        kl_reference: KL(student‖reference), over the same tokens and denominator as the loss.
        kl_aligned: KL(student‖aligned), over the same tokens and denominator as the loss.
        per_token: The divergence at each counted position, in order, shape ``(P,)``; their sum over
            the denominator is the loss.
    """

    kl_reference: Tensor
    kl_aligned: Tensor
    per_token: Tensor


@overload
def fused_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    reference_hidden: Tensor,
    reference_head: Head | Tensor,
    aligned_hidden: Tensor,
    aligned_head: Head | Tensor,
    mask: Tensor,
    lam: Lambda,
    divergence: Divergence = ...,
    beta: float = ...,
    gate: float | None = ...,
    num_items: int | float | Tensor | None = ...,
    chunk_size: int = ...,
    metrics: Literal[False] = ...,
    sampled: Tensor | None = ...,
    sampled_objective: SampledObjective = ...,
) -> Tensor: ...
@overload
def fused_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    reference_hidden: Tensor,
    reference_head: Head | Tensor,
    aligned_hidden: Tensor,
    aligned_head: Head | Tensor,
    mask: Tensor,
    lam: Lambda,
    divergence: Divergence = ...,
    beta: float = ...,
    gate: float | None = ...,
    num_items: int | float | Tensor | None = ...,
    chunk_size: int = ...,
    *,
    metrics: Literal[True],
    sampled: Tensor | None = ...,
    sampled_objective: SampledObjective = ...,
) -> tuple[Tensor, DivergenceMetrics]: ...
def fused_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    reference_hidden: Tensor,
    reference_head: Head | Tensor,
    aligned_hidden: Tensor,
    aligned_head: Head | Tensor,
    mask: Tensor,
    lam: Lambda,
    divergence: Divergence = "reverse",
    beta: float = 0.5,
    gate: float | None = None,
    num_items: int | float | Tensor | None = None,
    chunk_size: int = 256,
    metrics: bool = False,
    sampled: Tensor | None = None,
    sampled_objective: SampledObjective = "sequence",
) -> Tensor | tuple[Tensor, DivergenceMetrics]:
    """Return the divergence between a student and ``softmax(λ·aligned + (1−λ)·reference)``.

    With s the student's and t the teacher's distribution of a token (equations 5 and 6):

    * ``"reverse"``: KL(s‖t) = Σ s·(log s − log t), equation 6 of the paper;
    * ``"forward"``: KL(t‖s), the direction of the released code;
    * ``"jsd"``: β·KL(t‖m) + (1−β)·KL(s‖m) with m = (1−β)·s + β·t. β=0 is forward, β=1 reverse.

    ``student_hidden`` and the weight and bias of the student's head get gradients, the teachers do
    not. The gradients are computed together with the loss, so ``backward`` can run only once.

    Args:
        student_hidden: Final hidden states, shape ``(B, T, H)`` or ``(N, H)``.
        student_head: A :class:`~flexalign.heads.Head`, or a plain weight of shape ``(V, H)``.
        reference_hidden: Same leading dimensions; the width may differ.
        reference_head: Of the same vocabulary as the student's.
        aligned_hidden: Same leading dimensions; the width may differ.
        aligned_head: Of the same vocabulary as the student's.
        mask: Shape ``(B, T)`` or ``(N,)``. True (or non-zero) where the *prediction* made at this
            position counts. The caller must shift it.
        lam: λ as in :func:`~flexalign.fusion.fuse`: a number, ``(B,)`` or ``(B, T)``.
        divergence: One of the three above.
        beta: β of ``"jsd"``, in [0, 1].
        gate: τ in [0, 1] as in :func:`~flexalign.fusion.fuse`, or None.
        num_items: The denominator: the number of counted positions across all accumulation steps
            and processes. None: those of this call.
        chunk_size: Tokens per chunk. Memory is about four matrices of ``chunk_size × V`` float32.
        metrics: Also return :class:`DivergenceMetrics` (about a quarter more time).
        sampled: Shape ``(B, T)``: the tokens that the student sampled at the counted positions of
            a batch. Then the gradient is that of `sampled_objective`. The value is still that of
            the tokens.
        sampled_objective: Only with `sampled`: ``"sequence"``, the reverse KL between whole
            responses, or ``"sampled"``, the policy gradient with each sampled token's own reward.

    Returns:
        The sum over counted positions divided by the denominator, in nats per token: a float32
        scalar (float64 for float64 inputs). If no position counts, 0.0, which has a graph too. With
        ``metrics``, a pair of the scalar and the :class:`DivergenceMetrics`.

    Raises:
        ConfigError: If divergence, β, gate, ``num_items``, ``chunk_size`` or
            ``sampled_objective`` is out of range.
        LambdaError: If λ is not finite or does not fit the positions.
        PairMismatchError: If the shapes of hidden states, heads and mask do not fit together.
    """
    beta = _resolve_beta(divergence, beta)
    _check_sizes(num_items, chunk_size)
    if sampled is not None and (beta != 1.0 or mask.ndim != 2 or sampled.shape != mask.shape):
        raise ConfigError(
            "sampled is for the reverse divergence of a batch of rows: give divergence='reverse', "
            f"and it and the mask as (B, T), got {tuple(sampled.shape)} and {tuple(mask.shape)}."
        )

    if sampled_objective not in get_args(SampledObjective):
        raise ConfigError(
            f"sampled_objective must be one of {', '.join(get_args(SampledObjective))}, "
            f"got {sampled_objective!r}."
        )

    student = _as_head(student_head)
    reference, aligned = _as_head(reference_head), _as_head(aligned_head)
    _check_shapes("student", student_hidden, student, student, mask)
    _check_shapes("reference", reference_hidden, reference, student, mask)
    _check_shapes("aligned", aligned_hidden, aligned, student, mask)

    teacher = FusedTeacher(
        reference_hidden=reference_hidden.detach().flatten(0, -2),
        reference=for_products(reference),
        aligned_hidden=aligned_hidden.detach().flatten(0, -2),
        aligned=for_products(aligned),
        lam=per_position(lam, student_hidden),
        gate=gate,
        mixes_hidden=can_mix_hidden(reference, aligned, gate),
    )

    own = for_products(student)
    positions = mask.reshape(-1).nonzero().squeeze(-1)
    score = tokens = None
    if sampled is not None and torch.is_grad_enabled():
        if sampled_objective == "sequence":
            hidden = student_hidden.detach().flatten(0, -2)
            score = sampled_score(hidden, own, teacher, mask, sampled, chunk_size)
        else:
            tokens = sampled.reshape(-1)[positions]

    task = DivergenceTask(
        positions=positions,
        student=own,
        teacher=teacher,
        beta=beta,
        chunk_size=chunk_size,
        metrics=metrics,
        gradients=torch.is_grad_enabled(),
        score=score,
        sampled=tokens,
    )
    total, kl_reference, kl_aligned, per_token = sum_in_chunks(
        student_hidden.flatten(0, -2), student.weight, student.bias, task
    )

    denominator = max(1, len(task.positions)) if num_items is None else num_items
    loss: Tensor = total / denominator
    if not metrics:
        return loss
    return loss, DivergenceMetrics(kl_reference / denominator, kl_aligned / denominator, per_token)


def _as_head(head: Head | Tensor) -> Head:
    return head if isinstance(head, Head) else Head(head)


def _resolve_beta(divergence: str, beta: float) -> float:
    if divergence not in DIVERGENCES:
        raise ConfigError(
            f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}."
        )
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta <= 1:
        raise ConfigError(f"beta must be a number in [0, 1], got {beta!r}.")
    return {"forward": 0.0, "reverse": 1.0, "jsd": float(beta)}[divergence]


def _check_sizes(num_items: object, chunk_size: object) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ConfigError(f"chunk_size must be a whole number of tokens ≥ 1, got {chunk_size!r}.")
    if isinstance(num_items, int | float) and not 0 < num_items < math.inf:
        raise ConfigError(f"num_items must be a positive number of tokens, got {num_items!r}.")


def _check_shapes(who: str, hidden: Tensor, head: Head, student: Head, mask: Tensor) -> None:
    if hidden.ndim < 2 or hidden.shape[:-1] != mask.shape:
        raise PairMismatchError(
            f"the {who}'s hidden states {tuple(hidden.shape)} do not fit the mask "
            f"{tuple(mask.shape)}; the mask has their shape without the last dimension."
        )
    if hidden.shape[-1] != head.width:
        raise PairMismatchError(
            f"the {who}'s hidden states have width {hidden.shape[-1]}, its head takes "
            f"{head.width}; give each model's hidden states with its own head."
        )
    if head.vocab_size != student.vocab_size:
        raise PairMismatchError(
            f"the {who}'s head scores {head.vocab_size} tokens, the student's "
            f"{student.vocab_size}; cut padded heads to the true vocabulary first (Head.cut)."
        )
