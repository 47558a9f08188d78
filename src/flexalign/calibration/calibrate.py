"""From measured settings of an InRa dial to what each effort means, and into the adapter's file.

An adapter with a fast mode, one that answers at λ = 1 with a fraction of the tokens, is dialled by
the threshold of the adaptive policy; any other by λ.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from flexalign._version import __version__
from flexalign.calibration.cascade import Ways, fit_thresholds
from flexalign.calibration.effort import (
    REFERENCE_EFFORT,
    VERSION,
    Answers,
    figures,
    find_holes,
    fit_lambdas,
    level_figures,
    require_saving,
)
from flexalign.errors import ConfigError, ServingError
from flexalign.evaluation.samples import ResultsFolder
from flexalign.evaluation.sweep import Sweep
from flexalign.evaluation.tasks import Task
from flexalign.lambdas import Adaptive, Measure, Setting
from flexalign.systems import System, SystemOptions

# Drawing what a calibration rests on.

Progress = Callable[[int], None]
"""Told how many samples were made since it was last told."""


def measure_ways(
    sweep: Sweep,
    output: Path,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> tuple[dict[str, Answers], Ways]:
    """Answer every question fast and slow, or go on where an earlier run stopped.

    Args:
        sweep: The one that `plan_sweeps` calls ``ways``.
        output: Folder of the samples.
        workers: Processes that grade.
        progress: Told how many samples were made since it was last told.

    Returns:
        Samples by setting, and the two ways of each.

    Raises:
        ServingError: If samples could not be made.
    """
    answers = measure_settings(sweep, output, workers=workers, progress=progress)
    (fast,) = (setting.id for setting in sweep.settings if isinstance(setting.dial, Adaptive))
    return answers, _read_ways(answers["λ=0"], answers[fast])


def measure_settings(
    sweep: Sweep, output: Path, *, workers: int = 1, progress: Progress | None = None
) -> dict[str, Answers]:
    """Answer every question at every setting, or go on where an earlier run stopped.

    Args:
        sweep: What is asked.
        output: Folder of the samples.
        workers: Processes that grade.
        progress: Told how many samples were made since it was last told.

    Returns:
        Samples by setting, all in the same order.

    Raises:
        ConfigError: If the folder belongs to another configuration.
        ServingError: If samples could not be made.
    """
    with warnings.catch_warnings():
        # This is where λ outside the adapter's present range gets its measurement.
        warnings.filterwarnings("ignore", message="λ from .* leaves this adapter's range")
        result = sweep.run(output, workers=workers, begun=progress, progress=progress)
    if result.lost:
        raise ServingError(
            f"{len(result.lost)} samples could not be made (the first: {result.lost[0].reason}); "
            "give the same command again to go on."
        )
    rows = sorted(ResultsFolder.read(output).rows, key=lambda row: (row["question"], row["sample"]))
    found = {}
    for setting in sweep.settings:
        own = [row for row in rows if row["setting"] == setting.id]
        found[setting.id] = Answers(
            [row["question"] for row in own],
            np.array([row["tokens"] for row in own], dtype=np.float64),
            np.array([row["status"] == "correct" for row in own]),
            own,
        )
    return found


def _read_ways(slow: Answers, fast: Answers) -> Ways:
    is_whole = np.array([row["route"] == "fast" for row in fast.rows])
    sure = np.array([row["confidence"] for row in fast.rows], dtype=np.float64)
    rejected = np.array([row["rejected_tokens"] for row in fast.rows], dtype=np.float64)
    return Ways(
        slow.questions,
        np.where(is_whole, sure, -1.0),
        np.where(is_whole, fast.tokens, rejected),
        fast.correct & is_whole,
        slow.tokens,
        slow.correct,
    )


Kind = Literal["auto", "adaptive", "lambda"]

_EFFORTS = tuple(range(0, 101, 5))
_FAST_SHARE = 0.5
_STEPS = 8


@dataclass(frozen=True)
class CalibrateOptions:
    """How a dial is calibrated.

    Attributes:
        dial: What effort turns: ``adaptive`` (the threshold), ``lambda``, or ``auto``: the
            threshold if fast answers take at most half of λ = 0's tokens.
        measure: Of the fast answer's confidence.
        lambda_range: The λ's that effort may use; 0 lies among them.
        margin: Loss of accuracy below λ = 0 that the adapter's own threshold may show.
        samples: Answers to each question.
        seed: Of all sampling.

    Raises:
        ConfigError: If one is out of its range.
    """

    dial: Kind = "auto"
    measure: Measure = "answer_probability"
    lambda_range: tuple[float, float] = (0.0, 1.0)
    margin: float = 0.02
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dial not in get_args(Kind):
            raise ConfigError(f"the dial is auto, adaptive or lambda, not {self.dial!r}.")
        if self.measure == "agreement":
            raise ConfigError(
                "agreement takes a handful of values, which cannot be turned in small steps; take "
                "answer_probability or min_token_probability."
            )
        Adaptive(measure=self.measure)
        low, high = self.lambda_range
        if not low <= 0 < high:
            raise ConfigError(
                f"effort goes from λ = 0 to a λ above it, and [{low:g}, {high:g}] leaves no room; "
                "widen --lambda-range."
            )
        if self.dial == "adaptive" and high < 1:
            raise ConfigError(f"an adaptive dial answers at λ = 1, and λ ends at {high:g} here.")
        if not 0 <= self.margin < 1:
            raise ConfigError(f"margin must be in [0, 1), got {self.margin}.")
        if self.samples < 1:
            raise ConfigError(f"samples must be at least 1, got {self.samples}.")

    @property
    def deeper(self) -> list[float]:
        """The λ's below 0 that are measured."""
        low = self.lambda_range[0]
        return [low * step / 4 for step in range(4, 0, -1)] if low < 0 else []

    @property
    def grid(self) -> list[float]:
        """All λ's that are measured where λ is the dial."""
        high = self.lambda_range[1]
        return [*self.deeper, *(high * step / _STEPS for step in range(_STEPS + 1))]


def plan_sweeps(
    system: System, task: Task, options: CalibrateOptions, sampling: SystemOptions
) -> dict[str, Sweep]:
    """Say what may be sampled, by name: ``ways`` (λ = 0, fast) and ``lambdas`` (the grid).

    Both are checked, and no weights are loaded. With ``auto``, what ``ways`` shows decides
    whether ``lambdas`` is needed.

    Raises:
        ConfigError: If the system is no dial, or a part of it is not there.
        LambdaError: If the range is wider than the sampling's own.
    """
    if system.kind != "dial":
        raise ConfigError(f"{system.name} is no InRa dial; only an adapter can be calibrated.")
    how = replace(sampling, lambda_range=options.lambda_range)
    fast = Adaptive(0.0, measure=options.measure)
    wanted: dict[str, list[Any]] = {
        "ways": [*options.deeper, 0.0, fast],
        "lambdas": list(options.grid),
    }
    if options.dial == "lambda" or options.lambda_range[1] < 1:
        del wanted["ways"]
    if options.dial == "adaptive":
        del wanted["lambdas"]
    return {
        name: Sweep(
            [system],
            [task],
            [Setting.of(value) for value in values],
            options.samples,
            options.seed,
            options=how,
        )
        for name, values in wanted.items()
    }


def calibrate(
    sweeps: Mapping[str, Sweep],
    options: CalibrateOptions,
    output: Path,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a dial, or go on where an earlier run stopped, and fit effort to its tokens.

    Args:
        sweeps: As `plan_sweeps` made them of the same options.
        options: How.
        output: Folder of the samples; one results folder for each sweep in it.
        workers: Processes that grade.
        progress: Told how many samples were made since it was last told.

    Returns:
        The calibration, as the adapter's configuration keeps it.

    Raises:
        ConfigError: If the dial saves no tokens beyond chance, or the folder is of another
            calibration.
        ServingError: If samples could not be made.
    """
    answers: dict[str, Answers] = {}
    ways: Ways | None = None
    if "ways" in sweeps:
        answers, ways = measure_ways(
            sweeps["ways"], output / "ways", workers=workers, progress=progress
        )
        is_fast = ways.tokens(0.0).mean() <= _FAST_SHARE * ways.slow_tokens.mean()
        if options.dial == "auto" and not is_fast:
            ways = None
    if ways is None:
        answers |= measure_settings(
            sweeps["lambdas"], output / "lambdas", workers=workers, progress=progress
        )
    (task,), sweep = next(iter(sweeps.values())).tasks, next(iter(sweeps.values()))
    described = sweep.configuration()
    calibration = {
        "version": VERSION,
        "flexalign": __version__,
        "dial": "lambda" if ways is None else "adaptive",
        "measure": None if ways is None else options.measure,
        "task": task.name,
        "questions": len(task.questions),
        "questions_hash": task.content_hash,
        "sampling": described["sampling"],
        "parts": described["systems"][0]["parts"],
        "lambda_range": list(options.lambda_range),
        "margin": options.margin,
    }
    fixed = {setting.lam: answers[setting.id] for setting in _settings(sweeps, ways)}
    correct = {lam: own.correct for lam, own in fixed.items()}
    holes = find_holes(correct, answers["λ=0"].questions)
    calibration["holes"] = [list(hole) for hole in holes]
    tokens = {
        lam: float(own.tokens.mean())
        for lam, own in fixed.items()
        if not any(low < lam < high for low, high in holes)
    }
    _require_saving(answers, ways, tokens)
    if ways is None:
        calibration["effort"] = {"thresholds": [], "lambdas": fit_lambdas(tokens)}
    else:
        calibration["effort"] = _fit_ways(ways, tokens)
    calibration["threshold"] = None if ways is None else _choose(ways, calibration, options.margin)
    calibration["settings"] = [
        {"setting": name, "source": "measured", **figures(own)} for name, own in answers.items()
    ]
    calibration["levels"] = level_figures(calibration, ways, fixed)
    return calibration


def _settings(sweeps: Mapping[str, Sweep], ways: Ways | None) -> list[Any]:
    """The settings of one λ that the dial rests on."""
    sweep = sweeps["lambdas" if ways is None else "ways"]
    return [setting for setting in sweep.settings if setting.lam is not None]


def _require_saving(
    answers: Mapping[str, Answers], ways: Ways | None, tokens: Mapping[float, float]
) -> None:
    """Refuse a dial that saves nothing at the settings that efforts below 100 rest on."""
    reference = answers["λ=0"]
    shorter = "train the adapter on shorter answers"
    if ways is None:
        names = [Setting.of(lam).id for lam in tokens if lam > 0]
        faster = {name: answers[name] for name in names}
        require_saving(faster, reference, f"{shorter}, widen --lambda-range")
    else:
        fast = Answers(ways.questions, ways.tokens(0.0), ways.correct(0.0))
        require_saving({"the fast answer": fast}, reference, f"{shorter}, take --dial lambda")


def _fit_ways(ways: Ways, tokens: Mapping[float, float]) -> dict[str, Any]:
    fastest, reference = float(ways.tokens(0.0).mean()), float(ways.slow_tokens.mean())
    thresholds = fit_thresholds(ways, _EFFORTS)
    lambdas, most = [(REFERENCE_EFFORT, 0.0)], reference
    for lam in sorted((lam for lam in tokens if lam < 0), reverse=True):
        if tokens[lam] > most:
            most = tokens[lam]
            lambdas.append((100 * (most - fastest) / (reference - fastest), lam))
    points = [[float(effort), value] for effort, value in zip(_EFFORTS, thresholds, strict=True)]
    return {"thresholds": points, "lambdas": [list(point) for point in lambdas]}


def _choose(ways: Ways, calibration: Mapping[str, Any], margin: float) -> float:
    """The lowest fitted threshold whose accuracy is within the margin; else the most accurate."""
    thresholds = [float(value) for _, value in calibration["effort"]["thresholds"]]
    accuracies = [float(ways.correct(value).mean()) for value in thresholds]
    wanted = min(float(ways.slow_correct.mean()) - margin, max(accuracies))
    pairs = zip(thresholds, accuracies, strict=True)
    return next(value for value, accuracy in pairs if accuracy >= wanted)
