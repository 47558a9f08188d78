"""Five dense lines each, in float64: what the library computes, written down directly."""

import torch
from torch import Tensor

from flexalign.heads import Head


def logits64(head: Head, hidden: Tensor) -> Tensor:
    """The head's logits from its definition."""
    z = hidden.double() @ head.weight.double().T
    z = z if head.bias is None else z + head.bias.double()
    z = z * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def divergence64(s: Tensor, t: Tensor, divergence: str, beta: float) -> Tensor:
    """Per position, from logits (..., V)."""
    s, t = s.softmax(-1), t.softmax(-1)
    if divergence == "forward" or (divergence == "jsd" and beta == 0):
        return (t * (t.log() - s.log())).sum(-1)
    if divergence == "reverse" or beta == 1:
        return (s * (s.log() - t.log())).sum(-1)
    m = (1 - beta) * s + beta * t
    return (beta * t * (t / m).log() + (1 - beta) * s * (s / m).log()).sum(-1)


def fuse64(r: Tensor, a: Tensor, lam: float | Tensor, gate: float | None = None) -> Tensor:
    """Equation 5, λ with one value per leading dimension or a number."""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    lam = lam.reshape(lam.shape + (1,) * (r.ndim - lam.ndim))
    if gate is not None:
        differs = 0.5 * (r.softmax(-1) - a.softmax(-1)).abs().sum(-1, keepdim=True) > gate
        lam = torch.where(differs, lam, lam.clamp(0, 1))
    return lam * a.double() + (1 - lam) * r.double()
