"""Effort: the calibrated dial, from 0, the fastest setting, over 100, the reference, and beyond.

A calibration stores how an effort becomes a setting as points between which it is a straight
line: ``{"effort": {"thresholds": [[effort, threshold], …], "lambdas": [[effort, λ], …]}}``.
Thresholds of the adaptive dial, where there are any, serve efforts below 100; λ serves the rest.
"""

import json
import math
import numbers
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

import flexalign
from flexalign._storage import write_json
from flexalign.calibration.cascade import Ways
from flexalign.errors import ConfigError
from flexalign.evaluation.summary import token_cut_interval
from flexalign.inra.configuration import CONFIG_FILE, WEIGHTS_FILE, InRaConfig
from flexalign.lambdas import Adaptive, Fixed, Setting
from flexalign.statistics import (
    clustered_interval,
    paired_difference_interval,
    simultaneous_confidence,
)

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


# A calibration in its adapter's file.


def store_calibration(folder: Path, calibration: Mapping[str, Any]) -> InRaConfig:
    """Write a calibration into an adapter's settings, whose λ range is widened to hold it.

    The file is written beside its place and then moved there: a crash leaves the old one.

    Returns:
        The new settings.

    Raises:
        CheckpointError: If the folder holds no adapter.
    """
    settings = InRaConfig.load(folder)
    least, largest = calibration["lambda_range"]
    low, high = settings.lambda_range
    kept = json.loads(json.dumps(calibration))
    settings = replace(
        settings, calibration=kept, lambda_range=(min(low, least), max(high, largest))
    )
    write_json(folder / CONFIG_FILE, json.loads(settings.to_text()))
    return settings


def is_packaged(folder: Path) -> bool:
    """Whether a folder, by whatever path or link it is named, is a part of this package."""
    return folder.resolve().is_relative_to(Path(flexalign.__file__).resolve().parent)


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter's two files to a folder that may be written to."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        shutil.copyfile(source / name, target / name)


# The dial of λ: its tokens as a monotone function, and ranges of it that nobody should want.


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


# What a setting, or an effort, costs and gets right on the questions of a calibration.

LEVELS = (0.0, 25.0, 50.0, 75.0, 100.0)
"""The efforts that are shown and stored with what they cost and get right."""


@dataclass(frozen=True)
class Answers:
    """Samples of one setting, in the order of (question, sample).

    Attributes:
        questions: The question of each.
        tokens: Tokens written for each, rejected ones included.
        correct: Which are right.
        rows: The samples as the results folder has them, where they were drawn at this setting.
    """

    questions: Sequence[str]
    tokens: NDArray[np.float64]
    correct: NDArray[np.bool_]
    rows: Sequence[Mapping[str, Any]] = ()


def figures(answers: Answers) -> dict[str, Any]:
    """Mean tokens and accuracy with 95 % intervals, and the tokens' tenth and ninetieth percentile.

    A mean may hide a coin between two lengths; the percentiles show it.
    """
    tokens = clustered_interval(answers.tokens, answers.questions, share=False)
    accuracy = clustered_interval(answers.correct, answers.questions, share=True)
    p10, p90 = np.quantile(answers.tokens, (0.1, 0.9))
    return {
        "tokens": tokens.mean,
        "tokens_ci": [tokens.low, tokens.high],
        "tokens_p10": float(p10),
        "tokens_p90": float(p90),
        "accuracy": accuracy.mean,
        "accuracy_ci": [accuracy.low, accuracy.high],
    }


def level_figures(
    calibration: Mapping[str, Any], ways: Ways | None, fixed: Mapping[float, Answers]
) -> list[dict[str, Any]]:
    """What the shown efforts, and the largest, cost and get right, beside the straight line.

    Args:
        calibration: With its `effort`, `measure` and `holes`.
        ways: Both ways of an adaptive dial; None where λ is the dial.
        fixed: Samples of each measured λ.

    Returns:
        One object for each effort. Its `accuracy_change` is against λ = 0, paired by question, and
        0 for λ = 0 itself. Its `source` says where the figures are from: `measured`,
        `simulated` from the two ways, or `interpolated` between two measured λ.

    Raises:
        ConfigError: If efforts stand for thresholds, and the two ways are not given.
    """
    largest = largest_effort(calibration)
    reference = float(fixed[0.0].tokens.mean())
    start = effort_to_dial(calibration, 0)
    fastest = _at(start, ways, fixed)[0]["tokens"]
    levels = []
    for effort in [*LEVELS, *([largest] if largest > REFERENCE_EFFORT else [])]:
        dial = effort_to_dial(calibration, effort)
        found, source = _at(dial, ways, fixed)
        levels.append(
            {
                "effort": effort,
                "setting": Setting.of(dial).id,
                "line": fastest + effort / REFERENCE_EFFORT * (reference - fastest),
                "source": source,
                **found,
            }
        )
    return levels


def known_cut(calibration: Mapping[str, Any] | None, setting: str) -> tuple[float, str] | None:
    """Look up what a setting saves of the tokens of λ = 0.

    Args:
        calibration: Of an adapter's configuration; None if it has none.
        setting: Its id, such as ``λ=0.5``.

    Returns:
        The share saved, negative where it costs more, and the figure's source as in
        :func:`level_figures`; None for λ = 0 itself, or if calibration did not look at it.
    """
    known = calibration or {}
    rows = [*known.get("levels", ()), *known.get("settings", ())]  # the latter are measured
    found = {row["setting"]: row for row in rows}
    if setting not in found or setting == "λ=0" or not found.get("λ=0", {}).get("tokens"):
        return None
    row = found[setting]
    return 1 - row["tokens"] / found["λ=0"]["tokens"], row["source"]


def _at(
    dial: Adaptive | Fixed, ways: Ways | None, fixed: Mapping[float, Answers]
) -> tuple[dict[str, Any], str]:
    if isinstance(dial, Adaptive):
        if ways is None or dial.threshold is None:
            raise ConfigError("this calibration's efforts are thresholds; give both ways.")
        tokens, correct = ways.tokens(dial.threshold), ways.correct(dial.threshold)
        found = figures(Answers(ways.questions, tokens, correct))
        return found | _change(correct, fixed[0.0]), "simulated"
    lam = dial.lam
    if lam in fixed:
        return figures(fixed[lam]) | _change(fixed[lam].correct, fixed[0.0]), "measured"
    low, high = max(one for one in fixed if one < lam), min(one for one in fixed if one > lam)
    share = (lam - low) / (high - low)
    one, other = figures(fixed[low]), figures(fixed[high])
    mixed = {
        name: ((1 - share) * np.array(one[name]) + share * np.array(other[name])).tolist()
        for name in one
    }
    correct = (1 - share) * fixed[low].correct + share * fixed[high].correct
    return mixed | _change(correct, fixed[0.0]), "interpolated"


def _change(correct: NDArray[Any], reference: Answers) -> dict[str, Any]:
    """Accuracy less that of λ = 0, with its 95 % interval, paired by question."""
    if correct is reference.correct:
        return {"accuracy_change": 0.0, "accuracy_change_ci": [0.0, 0.0]}
    low, mean, high = paired_difference_interval(
        correct, reference.questions, reference.correct, reference.questions
    )
    return {"accuracy_change": mean, "accuracy_change_ci": [low, high]}


# Whether a dial is worth a scale: whether it saves tokens at all, and at what loss of accuracy.


def require_saving(faster: Mapping[str, Answers], reference: Answers, remedy: str) -> None:
    """Refuse a dial of which no measured setting saves tokens beyond chance.

    Args:
        faster: Answers at every setting that efforts below 100 rest on, by id.
        reference: Answers of λ = 0.
        remedy: What to do about it.

    Raises:
        ConfigError: If no token cut, of 95 % intervals that hold together, is above 0.
    """
    level = simultaneous_confidence(len(faster))
    cuts = {
        name: token_cut_interval(
            own.tokens, own.questions, reference.tokens, reference.questions, level
        )
        for name, own in faster.items()
    }
    if any(cut.low > 0 for cut in cuts.values()):
        return
    name, cut = max(cuts.items(), key=lambda item: item[1].mean)
    raise ConfigError(
        f"no setting of this dial saves tokens beyond chance: {name} cuts most, "
        f"{100 * cut.mean:.1f} % [{100 * cut.low:.1f}, {100 * cut.high:.1f}] of λ = 0's tokens on "
        f"{len(set(reference.questions))} questions, so that there is no effort to set; {remedy}, "
        "or, if you expect more of it, ask more questions."
    )


def describe_loss(calibration: Mapping[str, Any]) -> str | None:
    """Say that every effort below 100 loses more accuracy than the margin allows.

    Each of the shown levels that is another setting than λ = 0 has to: its whole interval, paired
    with λ = 0 by question. As all of them must, none of the intervals needs to be wider.

    Args:
        calibration: With its `levels` and `margin`.

    Returns:
        One sentence on the level that loses least; None if there is one that may do.
    """
    margin = calibration["margin"]
    steps = [
        level
        for level in calibration["levels"]
        if level["effort"] < REFERENCE_EFFORT and level["setting"] != "λ=0"
    ]
    if not steps or any(level["accuracy_change_ci"][1] >= -margin for level in steps):
        return None
    best = max(steps, key=lambda level: level["accuracy_change"])
    low, high = best["accuracy_change_ci"]
    return (
        f"every effort below {REFERENCE_EFFORT:g} is less accurate than λ = 0 by more than the "
        f"margin of {100 * margin:g} points; effort {best['effort']:g} loses least, "
        f"{-100 * best['accuracy_change']:.1f} points [{-100 * high:.1f}, {-100 * low:.1f}]: train "
        "the adapter further or on better answers before you use this dial, or accept the loss "
        "with a larger --margin."
    )
