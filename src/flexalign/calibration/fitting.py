"""From measured settings to efforts: λ by effort, holes, levels, and checks of what a dial saves.

:mod:`flexalign.calibration.cascade` fits thresholds by effort.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from flexalign.analysis.deeper import Verdict
from flexalign.calibration.cascade import Cascade
from flexalign.calibration.effort import (
    REFERENCE_EFFORT,
    AchievedRatio,
    Calibration,
    EffortLevel,
    Points,
    SettingMetrics,
    Source,
    effort_to_dial,
    show_effort,
)
from flexalign.errors import ConfigError
from flexalign.evaluation.samples import Samples
from flexalign.lambdas import Adaptive, Fixed, Setting
from flexalign.statistics import Interval, paired_difference_interval, simultaneous_confidence

LEVELS = (0.0, 25.0, 50.0, 75.0, 100.0)
"""The efforts that are shown and stored with their cost and accuracy."""


def fit_lambdas(tokens: Mapping[float, float]) -> Points:
    """Map effort to λ so that mean tokens are linear in effort.

    Mean tokens as a function of λ are first replaced by the non-increasing function that is closest
    in least squares (pooling adjacent violators, Ayer et al. 1955). Of several λ's with the same
    value the one nearest to 0 is used.

    Args:
        tokens: Measured mean tokens of each λ, including 0, without those inside a hole.

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
    # The quotient first, so that the reference is at exactly 100 for any tokens.
    return tuple((100 * ((mean - fastest) / saved), kept[mean]) for mean in sorted(kept))


def find_holes(
    correct: Mapping[float, NDArray[np.bool_]], questions: Sequence[str], confidence: float = 0.95
) -> list[tuple[float, float]]:
    """Find ranges of λ in which every measured setting is less accurate than both their ends.

    Args:
        correct: For each measured λ, whether each sample is right, shape (n,), in one order.
        questions: The question of each sample, n of them.
        confidence: Probability that no setting is wrongly called worse, over all comparisons.

    Returns:
        The ends of the ranges, which are measured λ's; ascending, without overlap.
    """
    lams = sorted(correct)
    if len(lams) < 3:
        return []
    level = simultaneous_confidence(2 * (len(lams) - 2), confidence)

    def is_worse(one: int, other: int) -> bool:
        first, second = correct[lams[one]], correct[lams[other]]
        return paired_difference_interval(first, questions, second, questions, level).high < 0

    # For each low end the farthest high end is tried first, so that the ranges are as wide as
    # possible.
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


# Cost and accuracy of efforts.


def effort_levels(
    calibration: Calibration, cascade: Cascade | None, fixed: Mapping[float, Samples]
) -> tuple[EffortLevel, ...]:
    """Compute the cost and the accuracy of the efforts in `LEVELS`, and of the largest effort.

    Args:
        calibration: The map from efforts to settings.
        cascade: The fast and the slow answers of an adaptive dial; None if effort sets λ.
        fixed: Samples of each measured λ.

    Raises:
        ConfigError: If efforts are thresholds, and no cascade is given.
    """
    largest = calibration.largest_effort
    efforts = [*LEVELS, *([largest] if largest > REFERENCE_EFFORT else [])]
    dials = [effort_to_dial(calibration, effort) for effort in efforts]
    found = [_parts(dial, cascade, fixed) for dial in dials]

    # The first of LEVELS is effort 0, which is always one setting that was measured or simulated.
    [(_, fast)] = found[0][1]
    slow = fixed[0.0]
    fastest, reference = _metrics(found[0][1]).tokens.mean, slow.mean_tokens
    fast_each, slow_each = (samples.by_question(samples.tokens) for samples in (fast, slow))

    levels = []
    for effort, dial, (source, parts) in zip(efforts, dials, found, strict=True):
        share = effort / REFERENCE_EFFORT
        levels.append(
            EffortLevel(
                effort,
                Setting.of(dial).id,
                fastest + share * (reference - fastest),
                source,
                _metrics(parts),
                _change(parts, slow),
                _achieved(parts, fast_each + share * (slow_each - fast_each)),
            )
        )
    return tuple(levels)


_Parts = Sequence[tuple[float, Samples]]
"""The samples behind an effort, each with its weight: one setting, or the two next to it."""


def _parts(
    dial: Adaptive | Fixed, cascade: Cascade | None, fixed: Mapping[float, Samples]
) -> tuple[Source, _Parts]:
    """Return the source of a dial's figures, and the samples that they are made from."""
    if isinstance(dial, Adaptive):
        if cascade is None or dial.threshold is None:
            raise ConfigError("this calibration's efforts are thresholds; give a cascade.")
        return "simulated", [(1.0, cascade.at(dial.threshold))]

    lam = dial.lam
    if lam in fixed:
        return "measured", [(1.0, fixed[lam])]

    # Between two measured λ's all figures are interpolated linearly.
    low, high = max(one for one in fixed if one < lam), min(one for one in fixed if one > lam)
    share = (lam - low) / (high - low)
    return "interpolated", [(1 - share, fixed[low]), (share, fixed[high])]


def _metrics(parts: _Parts) -> SettingMetrics:
    first, *others = (SettingMetrics.of(samples) for _, samples in parts)
    if not others:
        return first
    (second,) = others
    (before, _), (share, _) = parts
    return SettingMetrics(
        _between(first.tokens, second.tokens, share),
        before * first.tokens_p10 + share * second.tokens_p10,
        before * first.tokens_p90 + share * second.tokens_p90,
        _between(first.accuracy, second.accuracy, share),
    )


def _achieved(parts: _Parts, asked: NDArray[np.float64]) -> AchievedRatio | None:
    """Return achieved ÷ asked tokens by question; the percentiles of two parts are interpolated.

    Args:
        parts: The samples.
        asked: The tokens that each question is asked for, shape (questions,).
    """
    ratios = [AchievedRatio.of(own.by_question(own.tokens), asked) for _, own in parts]
    weighted: dict[str, float] = {}
    for (weight, _), ratio in zip(parts, ratios, strict=True):
        if ratio is None:
            return None
        for name, value in asdict(ratio).items():
            weighted[name] = weighted.get(name, 0.0) + weight * value
    return AchievedRatio(**weighted)


def _between(one: Interval, other: Interval, share: float) -> Interval:
    return Interval(*((1 - share) * a + share * b for a, b in zip(one, other, strict=True)))


def _change(parts: _Parts, reference: Samples) -> Interval:
    """Return the accuracy minus that of λ = 0, with its 95 % interval, paired by question."""
    if len(parts) == 1 and parts[0][1] is reference:
        return Interval(0.0, 0.0, 0.0)
    questions = reference.question.tolist()
    correct: ArrayLike = parts[0][1].correct
    if len(parts) > 1:
        correct = np.sum([weight * samples.correct for weight, samples in parts], axis=0)
    return paired_difference_interval(correct, questions, reference.correct, questions)


# Checks of a dial: whether it saves tokens, and at what loss of accuracy.


def require_saving(faster: Mapping[str, Samples], reference: Samples, remedy: str) -> None:
    """Refuse a dial of which no measured setting saves tokens beyond chance.

    Args:
        faster: Samples at every setting that efforts below 100 use, by id.
        reference: Samples of λ = 0.
        remedy: The instruction in the message.

    Raises:
        ConfigError: If no token cut has a simultaneous 95 % interval above 0.
    """
    level = simultaneous_confidence(len(faster))
    cuts = {name: samples.token_cut(reference, level) for name, samples in faster.items()}
    if any(cut.low > 0 for cut in cuts.values()):
        return
    name, cut = max(cuts.items(), key=lambda item: item[1].mean)
    raise ConfigError(
        f"no setting of this dial saves tokens beyond chance: {name} cuts most, "
        f"{100 * cut.mean:.1f} % [{100 * cut.low:.1f}, {100 * cut.high:.1f}] of λ = 0's tokens on "
        f"{len(reference.questions)} questions, so that there is no effort to set; {remedy}, "
        "or, if you expect more of it, ask more questions."
    )


def describe_loss(calibration: Calibration) -> str | None:
    """Warn that every effort below 100 loses more accuracy than the margin permits.

    This is so if the whole interval of each level, paired with λ = 0 by question, is below
    −margin; levels that are λ = 0 itself are not counted. As the statement is about all levels
    together, the intervals need no correction for their number.

    Args:
        calibration: A calibration with levels and a margin.

    Returns:
        One sentence about the level that loses least; None if any level may be within the margin.
    """
    margin = calibration.margin
    steps = [
        level
        for level in calibration.levels
        if level.effort < REFERENCE_EFFORT and level.setting != "λ=0"
    ]
    if not steps or any(level.accuracy_change.high >= -margin for level in steps):
        return None

    best = max(steps, key=lambda level: level.accuracy_change.mean)
    low, change, high = best.accuracy_change
    return (
        f"every effort below {REFERENCE_EFFORT:g} is less accurate than λ = 0 by more than the "
        f"margin of {100 * margin:g} points; effort {best.effort:g} loses least, "
        f"{-100 * change:.1f} points [{-100 * high:.1f}, {-100 * low:.1f}]: train "
        "the adapter further or on better answers before you use this dial, or accept the loss "
        "with a larger --margin."
    )


def judge_deeper(calibration: Calibration) -> Verdict | None:
    """Decide whether the largest effort above 100 pays, by its accuracy against effort 100.

    ``pays``: the whole interval is above 0. ``costs tokens only``: a gain of more than the margin
    is excluded.

    Args:
        calibration: A calibration with levels and a margin.

    Returns:
        The verdict; None if no effort above 100 is calibrated.
    """
    level = calibration.levels[-1] if calibration.levels else None
    if level is None or level.effort <= REFERENCE_EFFORT:
        return None
    if level.accuracy_change.low > 0:
        return "pays"
    return (
        "costs tokens only" if level.accuracy_change.high <= calibration.margin else "not decided"
    )


def describe_deeper(calibration: Calibration) -> str | None:
    """Say in one sentence what the efforts above 100 are worth.

    Args:
        calibration: A calibration with levels and a margin.

    Returns:
        The sentence, with the largest effort's tokens and accuracy against effort 100; None if λ
        is nowhere below 0.
    """
    if calibration.lambda_range[0] >= 0 or not calibration.levels:
        return None
    verdict = judge_deeper(calibration)
    if verdict is None:
        return "no measured λ below 0 thinks longer than λ = 0, so there is no effort above 100."

    level = calibration.levels[-1]
    (reference,) = (one for one in calibration.levels if one.effort == REFERENCE_EFFORT)
    low, change, high = (100 * end for end in level.accuracy_change)
    longer = 100 * (level.metrics.tokens.mean / reference.metrics.tokens.mean - 1)
    margin = f"{100 * calibration.margin:g} points"
    ends: dict[Verdict, str] = {
        "pays": "thinking deeper pays.",
        "costs tokens only": (
            f"thinking deeper costs tokens only, as a gain above {margin} is excluded."
        ),
        "not decided": (
            f"not decided: neither a gain nor its absence (above {margin}) is shown; ask more questions."
        ),
    }
    return (
        f"effort {show_effort(level.effort)} ({level.setting}) takes {longer:+.1f} % tokens and changes the "
        f"accuracy by {change:+.1f} points [{low:+.1f}, {high:+.1f}] against effort "
        f"{REFERENCE_EFFORT:g}: {ends[verdict]}"
    )
