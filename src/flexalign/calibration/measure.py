"""Drawing what a calibration rests on."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flexalign.calibration.figures import Answers
from flexalign.calibration.ways import Ways
from flexalign.errors import ServingError
from flexalign.evaluation.samples import ResultsFolder
from flexalign.evaluation.sweep import Sweep
from flexalign.policies import Adaptive

__all__ = ["Progress", "measure_settings", "measure_ways"]

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
