"""Which way λ leads from a pair: forward without asking, away from the alignment on request alone."""

from collections.abc import Sequence

from flexalign.errors import LambdaError
from flexalign.policies import Dial, extremes

__all__ = ["require_forward"]


def require_forward(asked: Sequence[tuple[str, Dial]], permit: str) -> None:
    """Refuse dials of a pair that may use a λ below 0.

    The arithmetic takes any finite λ, and so does the library; this is for its tools.

    Args:
        asked: Each with its name.
        permit: How it is said that this is meant.

    Raises:
        LambdaError: If there is one; says why, and how to permit it.
    """
    away = [name for name, dial in asked if extremes(dial)[0] < 0]
    if away:
        raise LambdaError(
            f"{', '.join(away)}: λ < 0 leads away from the aligned model, which on a chat pair "
            f"undoes its safety training (docs/lambda.md); if you mean it, {permit}."
        )
