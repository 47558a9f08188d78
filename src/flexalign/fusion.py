"""Equation 5 of the paper, for logits and for hidden states.

The realigned distribution of a token is ``softmax(λ·aligned + (1−λ)·reference)`` over the logits
of two models (arXiv 2506.12704, equation 5; token-level DeRa). Training, decoding, serving and
evaluation all call this module. It imports only torch and the errors, and does not depend on
models, tokenizers or devices.

:func:`fuse` checks its arguments and is for single calls. Code that fuses at every token checks λ
once with :func:`as_lambda` and then calls :func:`fuse_logits` or :func:`fuse_hidden`, which do not
check it.
"""

import math
import numbers
from typing import TypeAlias

import torch
from torch import Tensor

from flexalign.errors import ConfigError, LambdaError, PairMismatchError

Lambda: TypeAlias = float | Tensor
"""One λ for everything, or a tensor that broadcasts over the leading dimensions."""

_ORDINARY_LOGIT = 1e30
"""Larger in magnitude than any logit of a model. Values that mask a token lie beyond it."""

_LARGEST = torch.finfo(torch.float32).max


def as_lambda(lam: object) -> Lambda:
    """Check a λ and return it as a float or as a floating-point tensor.

    Args:
        lam: A real number, or a real tensor of any shape. Booleans are refused: ``true`` in a
            request is a mistake, not λ=1.

    Raises:
        LambdaError: If it is not a real number or tensor, or if any value is NaN or infinite.
    """
    if isinstance(lam, Tensor):
        if lam.dtype == torch.bool or lam.is_complex():
            raise LambdaError(f"λ must be real numbers, got a tensor of {lam.dtype}.")
        lam = lam if lam.is_floating_point() else lam.to(torch.float32)
        if not bool(torch.isfinite(lam).all()):
            raise LambdaError("λ must be finite, got a tensor with NaN or infinity in it.")
        return lam
    if isinstance(lam, bool) or not isinstance(lam, numbers.Real):
        raise LambdaError(f"λ must be a real number or a tensor, got {lam!r}.")
    try:
        value = float(lam)
    except OverflowError:
        value = math.inf
    if not abs(value) <= _LARGEST:
        raise LambdaError(f"λ must be finite, got {lam}.")
    return value


def as_gate(gate: float) -> float:
    """Check a gate, a total variation in [0, 1], and return it.

    Raises:
        ConfigError: If it is not a number in [0, 1]; booleans are refused as in :func:`as_lambda`.
    """
    if isinstance(gate, bool) or not isinstance(gate, numbers.Real) or not 0 <= gate <= 1:
        raise ConfigError(f"the gate must be a number in [0, 1] (a total variation), got {gate!r}.")
    return gate


def fuse(reference: Tensor, aligned: Tensor, lam: Lambda, gate: float | None = None) -> Tensor:
    """Fuse two models' logits: ``λ·aligned + (1−λ)·reference`` (equation 5).

    λ=0 gives the reference and λ=1 the aligned logits exactly; between them it interpolates,
    above 1 it extrapolates, below 0 it moves away from the aligned model. For a λ other than 0 and
    1, a token that either model masks (−inf, or the minimum of its dtype) is masked with −inf. The
    result has no NaN if the inputs have none.

    Args:
        reference: Logits of the reference model, shape ``(..., V)``.
        aligned: Logits of the aligned model, same shape.
        lam: A number, or a tensor of shape ``(B,)``, ``(B, T)`` or any other that broadcasts,
            aligned from the left, over the leading dimensions.
        gate: τ in [0, 1]. If given, λ outside [0, 1] is used only at positions where the total
            variation between the two distributions exceeds τ. At all other positions the nearer
            end of [0, 1] is used.

    Returns:
        Fused logits, shape ``(..., V)``, in float32, or in the inputs' own precision where that
        is higher. It may share storage with an input when λ is 0 or 1.

    Raises:
        LambdaError: If λ is not finite or does not broadcast over the leading dimensions.
        ConfigError: If the gate is outside [0, 1].
        PairMismatchError: If the two shapes differ.
    """
    if reference.shape != aligned.shape:
        raise PairMismatchError(
            f"reference logits {tuple(reference.shape)} and aligned logits {tuple(aligned.shape)} "
            "must have one shape; cut padded vocabularies to the shared width first."
        )
    return fuse_logits(reference, aligned, as_lambda(lam), gate)


def fuse_logits(
    reference: Tensor, aligned: Tensor, lam: Lambda, gate: float | None = None
) -> Tensor:
    """Fuse two models' logits as :func:`fuse` does, without its checks.

    For internal callers that fuse at every token. The two shapes must be equal, and λ must have
    been checked by :func:`as_lambda`. Arguments and result are those of :func:`fuse`.

    Raises:
        LambdaError: If λ does not broadcast over the leading dimensions.
        ConfigError: If the gate is outside [0, 1].
    """
    dtype = _working_dtype(reference, aligned)
    floors = _floor(reference), _floor(aligned)
    reference, aligned = reference.to(dtype), aligned.to(dtype)

    if gate is not None:
        lam = gated_lambda(reference, aligned, lam, gate)
    if isinstance(lam, float):
        if lam == 0.0:
            return reference
        if lam == 1.0:
            return aligned
        weight = torch.as_tensor(lam, dtype=dtype, device=reference.device)
    else:
        weight = _over_leading_dimensions(lam, reference).to(dtype).unsqueeze(-1)

    # lerp instead of r + λ(a − r), because it is exact at both ends.
    if _is_ordinary(reference, floors[0]) and _is_ordinary(aligned, floors[1]):
        return _bounded(torch.lerp(reference, aligned, weight))

    # A token is masked. Where λ is 0 or 1, the other model's mask has no effect.
    fused = _bounded(torch.lerp(_ordinary(reference), _ordinary(aligned), weight))
    fused = fused.masked_fill((reference <= floors[0]) | (aligned <= floors[1]), -math.inf)
    fused = torch.where(weight == 0, reference, fused)
    return torch.where(weight == 1, aligned, fused)


def gated_lambda(reference: Tensor, aligned: Tensor, lam: Lambda, gate: float) -> Lambda:
    """Return the λ that the gate permits at each position.

    Extrapolation multiplies every difference between the two models, including noise. The gate
    permits a λ outside [0, 1] only where their total variation exceeds it. At all other positions
    the nearer end of [0, 1] is used. λ must have been checked.

    Args:
        reference: Logits, shape ``(..., V)``.
        aligned: Logits, same shape.
        lam: As in :func:`fuse`, finite.
        gate: τ in [0, 1], in units of probability.

    Returns:
        A tensor over the leading dimensions, or `lam` itself when nothing lies outside [0, 1].

    Raises:
        ConfigError: If the gate is outside [0, 1].
    """
    gate = as_gate(gate)
    outside = not 0 <= lam <= 1 if isinstance(lam, float) else bool(((lam < 0) | (lam > 1)).any())
    if not outside:
        return lam

    if isinstance(lam, float):
        wanted = reference.new_full((), lam, dtype=_working_dtype(reference, aligned))
    else:
        wanted = _over_leading_dimensions(lam, reference)
    return torch.where(total_variation(reference, aligned) > gate, wanted, wanted.clamp(0, 1))


def total_variation(reference: Tensor, aligned: Tensor) -> Tensor:
    """Return half the L1 distance between the two distributions of logits: ``(..., V)`` → ``(...)``."""
    dtype = _working_dtype(reference, aligned)
    difference = torch.softmax(reference.to(dtype), -1) - torch.softmax(aligned.to(dtype), -1)
    return 0.5 * difference.abs().sum(-1)


def fuse_hidden(reference: Tensor, aligned: Tensor, lam: Lambda) -> Tensor:
    """Fuse two hidden states before the linear head that both models share.

    The result is equation 5 exactly if :func:`flexalign.heads.can_mix_hidden` returns True. λ must
    have been checked. Nothing is read back from the device, so the call can be captured in a CUDA
    graph.

    Args:
        reference: The reference's final hidden states, shape ``(..., H)``.
        aligned: The aligned model's, same shape.
        lam: As in :func:`fuse`, finite.

    Returns:
        Shape ``(..., H)``, in float32, or in the inputs' own precision if that is higher. At λ=0
        and λ=1 it has the exact values of one input, and may share its storage.
    """
    dtype = _working_dtype(reference, aligned)
    if isinstance(lam, float):
        if lam in (0.0, 1.0):
            return (reference if lam == 0.0 else aligned).to(dtype)
        return torch.lerp(reference.to(dtype), aligned.to(dtype), lam)
    weight = _over_leading_dimensions(lam, reference).to(dtype).unsqueeze(-1)
    return torch.lerp(reference.to(dtype), aligned.to(dtype), weight)


def concatenate_hidden(reference_hidden: Tensor, aligned_hidden: Tensor, lam: Lambda) -> Tensor:
    """Scale and concatenate two hidden states so that one head product gives the fused logits.

    With linear heads, ``[(1−λ)·h_ref, λ·h_al] @ [W_ref, W_al]ᵀ`` is equation 5: one matrix product
    over the joined width replaces two products and their mixture. The training loss uses this if
    the two models have different heads. λ must have been checked.

    Args:
        reference_hidden: Shape ``(..., H_ref)``.
        aligned_hidden: Shape ``(..., H_al)``, same leading dimensions.
        lam: As in :func:`fuse`, finite.

    Returns:
        Shape ``(..., H_ref + H_al)``, in the dtype of the hidden states.
    """
    if isinstance(lam, Tensor):
        lam = _over_leading_dimensions(lam, reference_hidden).unsqueeze(-1)
    scaled = ((1 - lam) * reference_hidden, lam * aligned_hidden)
    dtype = torch.promote_types(reference_hidden.dtype, aligned_hidden.dtype)
    return torch.cat([part.to(dtype) for part in scaled], dim=-1)


def per_position(lam: Lambda, hidden: Tensor) -> Lambda:
    """Check λ; return it as a number, or with one value per position of ``hidden``, ``(N,)``.

    Args:
        lam: As in :func:`fuse`.
        hidden: Hidden states, shape ``(..., H)``, with N positions.

    Raises:
        LambdaError: As in :func:`fuse`.
    """
    lam = as_lambda(lam)
    if isinstance(lam, float):
        return lam
    return _over_leading_dimensions(lam, hidden).expand(hidden.shape[:-1]).reshape(-1)


def _working_dtype(reference: Tensor, aligned: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(reference.dtype, aligned.dtype), torch.float32)


def _floor(logits: Tensor) -> float:
    """Return the largest value of a masked logit: half the minimum of the dtype."""
    return 0.5 * torch.finfo(logits.dtype).min


def _is_ordinary(logits: Tensor, floor: float) -> bool:
    """Return whether no logit is masked, infinite or NaN, which is so in nearly all calls."""
    if logits.numel() == 0:
        return True
    bound = min(_ORDINARY_LOGIT, -floor)
    least, largest = torch.aminmax(logits)
    return bool((least > -bound) & (largest < bound))


def _ordinary(logits: Tensor) -> Tensor:
    """Clamp the logits so that no difference of two of them overflows."""
    return logits.clamp(-_ORDINARY_LOGIT, _ORDINARY_LOGIT)


def _bounded(logits: Tensor) -> Tensor:
    """Clamp, in place, logits that a very large λ made infinite to the dtype's finite range."""
    limits = torch.finfo(logits.dtype)
    return logits.clamp_(limits.min, limits.max)


def _over_leading_dimensions(lam: Tensor, logits: Tensor) -> Tensor:
    """Reshape λ, aligned from the left, so that it broadcasts over ``logits.shape[:-1]``."""
    leading = logits.shape[:-1]
    shaped = lam.to(logits.device).reshape(lam.shape + (1,) * max(0, len(leading) - lam.ndim))
    if shaped.ndim > len(leading) or any(
        have not in (1, want) for have, want in zip(shaped.shape, leading, strict=False)
    ):
        raise LambdaError(
            f"λ of shape {tuple(lam.shape)} does not broadcast over the leading dimensions "
            f"{tuple(leading)}; give one number, one per row, or one per row and position."
        )
    return shaped
