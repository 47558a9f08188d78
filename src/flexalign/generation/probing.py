"""What the tests of a model have in common that run when it is loaded.

Model families pass different inputs to their layers, and a layer may read its tokens in an order of
its own. Instead of keeping a list of families, a few tokens are run in two ways that must agree.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-4


@contextmanager
def perturbed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Add noise to parameters inside the block, so that a dial has an effect before training."""
    generator = torch.Generator().manual_seed(2)
    originals = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
    try:
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.copy_(original)


def distance_beyond_rounding(found: Tensor, expected: Tensor, dtype: torch.dtype) -> float | None:
    """Return ‖found − expected‖ ÷ ‖expected‖; None if it is no larger than rounding.

    Args:
        found: Hidden states or logits, of any shape.
        expected: Those that they must equal, of the same shape.
        dtype: The data type that they were computed in.
    """
    found, expected = found.float(), expected.float()
    off = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
    # A NaN is not within any tolerance.
    return None if off <= max(_TOLERANCE, 8 * torch.finfo(dtype).eps) else off
