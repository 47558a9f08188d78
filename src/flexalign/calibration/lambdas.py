"""The dial of λ: its tokens as a monotone function, and ranges of it that nobody should want."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from flexalign.errors import ConfigError
from flexalign.evaluation.statistics import paired_difference_interval, simultaneous_confidence

__all__ = ["find_holes", "fit_lambdas"]


def fit_lambdas(tokens: Mapping[float, float]) -> list[tuple[float, float]]:
    """Map effort to λ so that mean tokens lie on the straight line of effort.

    Means are first made to fall with λ by the closest such function in squares (pooling adjacent
    violators, Ayer et al. 1955); where they stand still, the λ nearest to 0 serves.

    Args:
        tokens: Measured mean tokens of each λ, 0 among them; none from inside a hole.

    Returns:
        Points (effort, λ), efforts ascending from 0, and 100 at λ = 0.

    Raises:
        ConfigError: If no λ above 0 saves tokens.
    """
    lams = sorted(tokens)
    means = isotonic_regression([tokens[lam] for lam in lams], increasing=False).x.tolist()
    kept: dict[float, float] = {}
    for lam, mean in zip(lams, means, strict=True):
        if mean not in kept or abs(lam) < abs(kept[mean]):
            kept[mean] = lam
    reference, fastest = means[lams.index(0.0)], means[-1]
    if fastest >= reference:
        raise ConfigError(
            f"this dial saves no tokens between λ = 0 and {lams[-1]:g} "
            f"({tokens[0.0]:.1f} and {tokens[lams[-1]]:.1f} on average), so that there is no "
            "effort to set; train the adapter on shorter answers, or widen --lambda-range."
        )
    saved = reference - fastest
    return [(100 * ((mean - fastest) / saved), kept[mean]) for mean in sorted(kept)]


def find_holes(
    correct: Mapping[float, NDArray[np.bool_]], questions: Sequence[str], confidence: float = 0.95
) -> list[tuple[float, float]]:
    """Find ranges of λ in which every measured setting is less accurate than both their ends.

    Args:
        correct: For each measured λ which samples were right, in one order.
        questions: The question of each sample.
        confidence: That no setting is wrongly called worse, shared among all that may be.

    Returns:
        The ends of each range, themselves measured and not worse; ascending, apart.
    """
    lams = sorted(correct)
    if len(lams) < 3:
        return []
    level = simultaneous_confidence(2 * (len(lams) - 2), confidence)

    def is_worse(one: int, other: int) -> bool:
        first, second = correct[lams[one]], correct[lams[other]]
        return paired_difference_interval(first, questions, second, questions, level).high < 0

    holes: list[tuple[float, float]] = []
    low = 0
    while low < len(lams) - 2:
        ends = (
            high
            for high in range(len(lams) - 1, low + 1, -1)
            if all(is_worse(i, low) and is_worse(i, high) for i in range(low + 1, high))
        )
        high = next(ends, None)
        if high is not None:
            holes.append((lams[low], lams[high]))
        low = high or low + 1
    return holes
