"""Effort: the calibrated dial, from 0, the fastest setting, over 100, the reference, and beyond.

A calibration stores how an effort becomes a setting as points between which it is a straight
line: ``{"effort": {"thresholds": [[effort, threshold], …], "lambdas": [[effort, λ], …]}}``.
Thresholds of the adaptive dial, where there are any, serve efforts below 100; λ serves the rest.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexalign.errors import ConfigError
from flexalign.policies import Adaptive, Fixed

__all__ = ["REFERENCE_EFFORT", "VERSION", "effort_to_dial", "largest_effort", "note_on_sampling"]

VERSION = 1
"""Of a calibration's form."""

REFERENCE_EFFORT = 100.0
"""The effort at which the tokens are those of λ = 0."""


def effort_to_dial(calibration: Mapping[str, Any] | None, effort: float) -> Adaptive | Fixed:
    """Return the setting that an effort stands for.

    Ranges of λ that calibration found worse than both their neighbours (`holes`) are skipped: an
    effort that falls into one gets the nearer end of it.

    Args:
        calibration: Of an adapter's configuration; None if it has none.
        effort: 0 for the fastest setting, 100 for the reference's tokens, above for λ < 0.

    Returns:
        An adaptive policy with its threshold, or one λ.

    Raises:
        ConfigError: If there is no calibration, it is of another version or damaged, or the
            effort lies outside what it covers.
    """
    calibration, largest = _checked(calibration)
    is_number = isinstance(effort, numbers.Real) and not isinstance(effort, bool)
    if not is_number or not 0 <= float(effort) <= largest:
        raise ConfigError(
            f"an effort of this adapter is a number from 0 (fastest) to {largest:g} (100 is the "
            f"reference), got {effort!r}."
        )
    effort = float(effort)
    points = calibration["effort"]
    if points["thresholds"] and effort < REFERENCE_EFFORT:
        return Adaptive(_along(points["thresholds"], effort), measure=calibration["measure"])
    return Fixed(_outside(calibration["holes"], _along(points["lambdas"], effort)))


def largest_effort(calibration: Mapping[str, Any] | None) -> float:
    """Return the effort at the end of the range that was calibrated, at least 100.

    Raises:
        ConfigError: If there is no calibration, or it cannot be read.
    """
    return _checked(calibration)[1]


def note_on_sampling(calibrated: Mapping[str, object], asked: Mapping[str, object]) -> str | None:
    """Say that an effort is asked for at other sampling options than its calibration's.

    Args:
        calibrated: The options of the calibration, such as ``{"temperature": 0.7}``.
        asked: Those that are asked for; what is in one of the two only, or no number, is left out.

    Returns:
        One sentence that names what differs; None if nothing does.
    """
    other = [
        (name, known, given)
        for name, known in calibrated.items()
        if isinstance(known, numbers.Real)
        and isinstance(given := asked.get(name), numbers.Real)
        and given != known
    ]
    if not other:
        return None
    before = ", ".join(f"{name} {known!s:.20}" for name, known, _ in other)
    now = ", ".join(f"{name} {given!s:.20}" for name, _, given in other)
    return (
        f"effort was calibrated at {before} and is asked for at {now}: its tokens and its "
        "accuracy may differ from what calibration measured."
    )


def _checked(calibration: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], float]:
    """Return a calibration that can be read, and its largest effort."""
    if calibration is None:
        raise ConfigError(
            "effort has no meaning before calibration, and this adapter has none; run flexalign "
            "calibrate BASE --adapter ADAPTER --task TASK, or give --lambda or --policy."
        )
    version = calibration.get("version")
    if version != VERSION:
        raise ConfigError(
            f"this adapter's calibration has version {version!r} and this flexalign reads "
            f"{VERSION}; run flexalign calibrate again."
        )
    try:
        largest = float(calibration["effort"]["lambdas"][-1][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(
            f"this adapter's calibration is damaged ({error!r}); run flexalign calibrate again."
        ) from error
    return calibration, largest


def _along(points: Sequence[Sequence[float]], effort: float) -> float:
    efforts, values = zip(*points, strict=True)
    return float(np.interp(effort, efforts, values))


def _outside(holes: Sequence[Sequence[float]], lam: float) -> float:
    for low, high in holes:
        if low < lam < high:
            return float(low if math.fabs(lam - low) <= math.fabs(high - lam) else high)
    return lam
