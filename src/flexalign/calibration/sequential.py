"""Sequential tests: several looks at the evidence with a total error of at most α.

There are two methods. *Alpha spending* (Lan and DeMets 1983, "Discrete sequential boundaries for
clinical trials"): each look may use a part of the error, which is fixed beforehand by the share of
the questions seen so far; the boundaries follow by recursive integration over the scores that have
not crossed one (Armitage, McPherson and Rowe 1969). *Betting* (Waudby-Smith and Ramdas 2024,
"Estimating means of bounded random variables by betting"): the wealth of a gambler who bets against
the hypothesis. If the hypothesis is true, the wealth reaches 1/α at any time with probability at
most α, for every bounded distribution.
"""

import math
from functools import lru_cache
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from flexalign.errors import ConfigError

Looks: TypeAlias = Literal["obrien-fleming", "pocock", "betting"]
"""How the error is divided among the looks."""

_GRID = 401
_FAR = 8.0
_LAST_TAIL = 37.0
"""Standard deviations beyond which a normal tail is nearly too small for a float."""
_BOLDEST = 0.75


def spent_error(fraction: float, alpha: float, looks: Looks) -> float:
    """Return the error that may be used up to this fraction of the questions.

    O'Brien and Fleming's function spends very little early; Pocock's spends nearly evenly.

    Args:
        fraction: Share of the questions seen so far, in (0, 1].
        alpha: Total one-sided error.
        looks: ``"obrien-fleming"`` or ``"pocock"``.
    """
    if looks == "pocock":
        return alpha * math.log1p((math.e - 1) * fraction)
    z = ndtri(1 - alpha / 2)
    return 2 * float(ndtr(-z / math.sqrt(fraction)))


@lru_cache(maxsize=256)
def look_levels(fractions: tuple[float, ...], alpha: float, looks: Looks) -> tuple[float, ...]:
    """Return the one-sided level of the test at each look, for a total error of `alpha`.

    Args:
        fractions: Share of the questions at each look, ascending, in (0, 1].
        alpha: Total one-sided error.
        looks: ``"obrien-fleming"`` or ``"pocock"``.

    Raises:
        ConfigError: If the fractions do not ascend within (0, 1], or `looks` is ``"betting"``.
    """
    if looks not in get_args(Looks)[:2]:
        raise ConfigError(f"{looks!r} spends no alpha; take obrien-fleming or pocock.")
    if not fractions or any(
        not low < high for low, high in zip((0.0, *fractions), (*fractions, math.inf), strict=True)
    ):
        raise ConfigError(f"looks must come at rising fractions in (0, 1], got {fractions}.")

    # The density of the running sum B(t) ~ N(0, t) where no look has crossed its boundary.
    places, density = np.zeros(1), np.ones(1)
    levels = []
    before = used = 0.0

    for fraction in fractions:
        target = spent_error(fraction, alpha, looks) - used
        step = math.sqrt(fraction - before)
        boundary = _boundary(places, density, step, target)
        levels.append(float(ndtr(-boundary / math.sqrt(fraction))))

        # The same density after this look, by the trapezoid rule.
        grid = np.linspace(-_FAR * math.sqrt(fraction), boundary, _GRID)
        gaps = (grid[:, None] - places) / step
        weights = np.full(_GRID, grid[1] - grid[0])
        weights[[0, -1]] /= 2
        density = (np.exp(-(gaps**2) / 2) @ density) / (step * math.sqrt(2 * math.pi)) * weights
        places, before, used = grid, fraction, used + target
    return tuple(levels)


def _boundary(
    places: NDArray[np.float64], density: NDArray[np.float64], step: float, target: float
) -> float:
    """Return the boundary that the next running sum exceeds with probability `target`."""

    def excess(boundary: float) -> float:
        return float(density @ ndtr((places - boundary) / step)) - target

    furthest = float(places[-1]) + _LAST_TAIL * step
    if excess(furthest) >= 0:  # the error of an early look may round to 0
        return furthest
    return float(brentq(excess, -_FAR, furthest, xtol=1e-12))


def predictive_power(score: float, fraction: float, level: float) -> float:
    """Return the probability that the last look will pass, given the score at this one.

    The effect is estimated from the data, and its uncertainty is included (Spiegelhalter, Freedman
    and Blackburn 1986, "Monitoring clinical trials: conditional or predictive power?").

    Args:
        score: Estimate divided by its standard error, at this look.
        fraction: Share of the questions at this look, in (0, 1).
        level: One-sided level of the last look.
    """
    needed = ndtri(1 - level)
    return float(ndtr((score - needed * math.sqrt(fraction)) / math.sqrt(1 - fraction)))


def betting_wealth(slack: NDArray[np.float64], lowest: float) -> float:
    """Return the largest wealth of a gambler who starts with 1 and bets on a mean slack above 0.

    If the mean is not above 0, the wealth ever reaches 1/α with probability at most α (Ville's
    inequality). The stake on each question is growth-optimal for the mean and the variance of the
    questions before it ("approximate GRAPA" of Waudby-Smith and Ramdas), and at most three quarters
    of the largest stake that cannot lead to ruin.

    Args:
        slack: One value for each question in the order asked, shape (n,).
        lowest: The least possible value, below 0.
    """
    values = np.asarray(slack, dtype=np.float64)
    count = np.arange(1, values.size + 1)
    mean = np.cumsum(values) / (count + 1)
    square = (np.cumsum(values**2) + 0.25) / (count + 1)
    stake = np.clip(mean / square, 0.0, _BOLDEST / -lowest)
    stake = np.concatenate([[0.0], stake[:-1]])
    return float(np.exp(np.cumsum(np.log1p(stake * values)).max(initial=0.0)))
