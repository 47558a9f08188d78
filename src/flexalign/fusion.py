"""Equation 5 of the paper, in its one home: of logits and of hidden states.

The realigned distribution of a token is ``softmax(λ·aligned + (1−λ)·reference)`` over the logits
of two models (arXiv 2506.12704, equation 5; token-level DeRa). Training, decoding, serving and
evaluation are different ways of feeding it. This module imports torch and the errors alone and
knows nothing of models, tokenizers or devices.

λ is checked where it enters. :func:`fuse` is the entry for one call; who fuses token after token
checks λ once by :func:`as_lambda` and then calls :func:`fuse_logits` or :func:`fuse_hidden`, which
trust it.
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
"""Magnitude that no logit of a model has; beyond it lie the values that mask a token."""

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
        ConfigError: If it is anything else; booleans are refused as in :func:`as_lambda`.
    """
    if isinstance(gate, bool) or not isinstance(gate, numbers.Real) or not 0 <= gate <= 1:
        raise ConfigError(f"the gate must be a number in [0, 1] (a total variation), got {gate!r}.")
    return gate


def fuse(reference: Tensor, aligned: Tensor, lam: Lambda, gate: float | None = None) -> Tensor:
    """Fuse two models' logits: ``λ·aligned + (1−λ)·reference`` (equation 5).

    λ=0 gives the reference and λ=1 the aligned logits exactly; between them it interpolates,
    above 1 it extrapolates, below 0 it moves away from the aligned model. For any other λ a token
    that either model masks (−inf, or the minimum of its dtype) is masked with −inf. The result is
    never NaN for inputs without NaN.

    Args:
        reference: Logits of the reference model, shape ``(..., V)``.
        aligned: Logits of the aligned model, same shape.
        lam: A number, or a tensor of shape ``(B,)``, ``(B, T)`` or any other that broadcasts,
            aligned from the left, over the leading dimensions.
        gate: τ in [0, 1]. If given, λ outside [0, 1] is used only at positions where the total
            variation between the two distributions exceeds τ; elsewhere the nearer end of [0, 1].

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

    For callers inside that fuse at every token: the shapes are one, and λ has been through
    :func:`as_lambda`. Arguments and result are those of :func:`fuse`.

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

    # lerp and not r + λ(a − r): its two branches are exact at both ends.
    if _is_ordinary(reference, floors[0]) and _is_ordinary(aligned, floors[1]):
        return _bounded(torch.lerp(reference, aligned, weight))

    # Something is masked. Where λ is 0 or 1 the other model's mask does not count.
    fused = _bounded(torch.lerp(_ordinary(reference), _ordinary(aligned), weight))
    fused = fused.masked_fill((reference <= floors[0]) | (aligned <= floors[1]), -math.inf)
    fused = torch.where(weight == 0, reference, fused)
    return torch.where(weight == 1, aligned, fused)


def gated_lambda(reference: Tensor, aligned: Tensor, lam: Lambda, gate: float) -> Lambda:
    """Return the λ that the gate lets through at each position.

    Extrapolation multiplies every difference between the two models, noise included. The gate
    keeps a λ outside [0, 1] only where they really differ: where their total variation exceeds
    the gate. Elsewhere the nearer end of [0, 1] is taken. λ has been checked.

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
    """Half the L1 distance between the two distributions: shape ``(...)`` from ``(..., V)``."""
    dtype = _working_dtype(reference, aligned)
    difference = torch.softmax(reference.to(dtype), -1) - torch.softmax(aligned.to(dtype), -1)
    return 0.5 * difference.abs().sum(-1)


def fuse_hidden(reference: Tensor, aligned: Tensor, lam: Lambda) -> Tensor:
    """Fuse two hidden states before the one linear head that both have: equation 5, exactly.

    That holds where :func:`flexalign.heads.can_mix_hidden` says so. λ has been checked, and nothing
    is read back from the device, so that the call can be captured in a graph.

    Args:
        reference: The reference's final hidden states, shape ``(..., H)``.
        aligned: The aligned model's, same shape.
        lam: As in :func:`fuse`, finite.

    Returns:
        Shape ``(..., H)``, in float32, or in the inputs' own precision where that is higher; at
        λ=0 and λ=1 the values of one side exactly. It may share storage with an input there.
    """
    dtype = _working_dtype(reference, aligned)
    if isinstance(lam, float):
        if lam in (0.0, 1.0):
            return (reference if lam == 0.0 else aligned).to(dtype)
        return torch.lerp(reference.to(dtype), aligned.to(dtype), lam)
    weight = _over_leading_dimensions(lam, reference).to(dtype).unsqueeze(-1)
    return torch.lerp(reference.to(dtype), aligned.to(dtype), weight)


def concatenate_hidden(reference_hidden: Tensor, aligned_hidden: Tensor, lam: Lambda) -> Tensor:
    """Scale and join two hidden states so that ONE head product gives the fused logits.

    With linear heads, ``[(1−λ)·h_ref, λ·h_al] @ [W_ref, W_al]ᵀ`` is equation 5: the two products
    and the mix become one matrix product over the joined width. The training loss does so where
    the two models have heads of their own. λ has been checked.

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
    """Return λ as a number, or as one value per position of ``hidden``: ``(..., H)`` → ``(N,)``.

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
    """Return the value at and below which a logit counts as masked: half its dtype's minimum."""
    return 0.5 * torch.finfo(logits.dtype).min


def _is_ordinary(logits: Tensor, floor: float) -> bool:
    """Say whether nothing is masked, infinite or NaN, as in nearly every call."""
    if logits.numel() == 0:
        return True
    bound = min(_ORDINARY_LOGIT, -floor)
    least, largest = torch.aminmax(logits)
    return bool((least > -bound) & (largest < bound))


def _ordinary(logits: Tensor) -> Tensor:
    """Bound the logits so that no difference of two of them overflows."""
    return logits.clamp(-_ORDINARY_LOGIT, _ORDINARY_LOGIT)


def _bounded(logits: Tensor) -> Tensor:
    """Keep what an enormous λ made infinite representable."""
    limits = torch.finfo(logits.dtype)
    return logits.clamp_(limits.min, limits.max)


def _over_leading_dimensions(lam: Tensor, logits: Tensor) -> Tensor:
    """Shape λ, aligned from the left, so that it broadcasts over ``logits.shape[:-1]``."""
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
