"""What a setting, or an effort, costs and gets right on the questions of a calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexalign.calibration.effort import REFERENCE_EFFORT, effort_to_dial, largest_effort
from flexalign.calibration.ways import Ways
from flexalign.errors import ConfigError
from flexalign.evaluation.statistics import clustered_interval, paired_difference_interval
from flexalign.evaluation.systems import Setting
from flexalign.policies import Adaptive, Fixed

__all__ = ["LEVELS", "Answers", "figures", "known_cut", "level_figures"]

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
