"""Looking at the evidence more than once without being wrong more often.

Two ways. *Alpha spending* (Lan and DeMets 1983, "Discrete sequential boundaries for clinical
trials"): each look may use a part of the error, set beforehand by the share of the questions it
has seen; the boundaries follow by recursive integration over the scores that went on (Armitage,
McPherson and Rowe 1969). A *bet* (Waudby-Smith and Ramdas 2024, "Estimating means of bounded
random variables by betting"): the wealth of a gambler who bets against the hypothesis; under it
the wealth reaches 1/α with probability α at most, at any time, for every bounded distribution.
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
"""How the error is shared among looks."""

_GRID = 401
_FAR = 8.0
_LAST_TAIL = 37.0
"""Standard deviations beyond which a normal tail is no float any more, nearly."""
_BOLDEST = 0.75


def spent_error(fraction: float, alpha: float, looks: Looks) -> float:
    """Error that may have been used once this fraction of the questions is in.

    O'Brien and Fleming's spends next to nothing early; Pocock's nearly evenly.

    Args:
        fraction: In (0, 1].
        alpha: Error in all, one-sided.
        looks: ``"obrien-fleming"`` or ``"pocock"``.
    """
    if looks == "pocock":
        return alpha * math.log1p((math.e - 1) * fraction)
    z = ndtri(1 - alpha / 2)
    return 2 * float(ndtr(-z / math.sqrt(fraction)))


@lru_cache(maxsize=256)
def look_levels(fractions: tuple[float, ...], alpha: float, looks: Looks) -> tuple[float, ...]:
    """One-sided level at which each look is to be tested, so that all together err by `alpha`.

    Args:
        fractions: Share of the questions at each look, rising, in (0, 1].
        alpha: Error in all, one-sided.
        looks: ``"obrien-fleming"`` or ``"pocock"``.

    Raises:
        ConfigError: If the fractions do not rise within (0, 1], or the way is not a spending.
    """
    if looks not in get_args(Looks)[:2]:
        raise ConfigError(f"{looks!r} spends no alpha; take obrien-fleming or pocock.")
    if not fractions or any(
        not low < high for low, high in zip((0.0, *fractions), (*fractions, math.inf), strict=True)
    ):
        raise ConfigError(f"looks must come at rising fractions in (0, 1], got {fractions}.")
    places, density = np.zeros(1), np.ones(1)  # of the running sum B(t) ~ N(0, t), no look crossed
    levels = []
    before = used = 0.0

    for fraction in fractions:
        target = spent_error(fraction, alpha, looks) - used
        step = math.sqrt(fraction - before)
        boundary = _boundary(places, density, step, target)
        levels.append(float(ndtr(-boundary / math.sqrt(fraction))))

        # The density of the sum where this look has not crossed, by the trapezoid rule.
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
    """The b that the next running sum passes with probability `target`."""

    def excess(boundary: float) -> float:
        return float(density @ ndtr((places - boundary) / step)) - target

    furthest = float(places[-1]) + _LAST_TAIL * step
    if excess(furthest) >= 0:  # an early look may be allowed an error that rounds to 0
        return furthest
    return float(brentq(excess, -_FAR, furthest, xtol=1e-12))


def predictive_power(score: float, fraction: float, level: float) -> float:
    """Probability that the last look will pass, given the score at this one.

    The effect is taken as the data have it, with its own uncertainty (Spiegelhalter, Freedman
    and Blackburn 1986, "Monitoring clinical trials: conditional or predictive power?").

    Args:
        score: Estimate over its standard error, now.
        fraction: Share of the questions now, in (0, 1).
        level: One-sided level of the last look.
    """
    needed = ndtri(1 - level)
    return float(ndtr((score - needed * math.sqrt(fraction)) / math.sqrt(1 - fraction)))


def betting_wealth(slack: NDArray[np.float64], lowest: float) -> float:
    """Largest wealth of a gambler who starts with 1 and bets that the mean slack is above 0.

    If it is not, the wealth ever reaches 1/α with probability α at most (Ville's inequality).
    The stake on each question is the growth-optimal one for mean and variance so far (their
    "approximate GRAPA"), at most three quarters of what cannot bankrupt.

    Args:
        slack: One value a question in the order asked, shape (n,).
        lowest: The least a value can be, below 0.
    """
    values = np.asarray(slack, dtype=np.float64)
    count = np.arange(1, values.size + 1)
    mean = np.cumsum(values) / (count + 1)
    square = (np.cumsum(values**2) + 0.25) / (count + 1)
    stake = np.clip(mean / square, 0.0, _BOLDEST / -lowest)
    stake = np.concatenate([[0.0], stake[:-1]])
    return float(np.exp(np.cumsum(np.log1p(stake * values)).max(initial=0.0)))
