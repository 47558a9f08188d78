"""Effort: the calibrated dial. 0 is the fastest setting, 100 the reference, more is above it.

A :class:`Calibration` maps efforts to settings, by points between which it interpolates linearly,
and holds the measurements behind them. Efforts below 100 are thresholds if the dial is adaptive;
all other efforts are λ's. A dial's configuration (``inra_config.json``, ``lora_dial.json`` or, of two
prompts, ``two_prompts.json``) stores it as JSON under ``calibration``.
"""

import json
import math
import numbers
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

import flexalign
from flexalign._storage import write_json
from flexalign.data.logits import LogitsSettings
from flexalign.errors import ConfigError
from flexalign.evaluation.samples import Samples
from flexalign.generation.dial_config import DialConfig
from flexalign.lambdas import Adaptive, Fixed, Measure, Setting
from flexalign.statistics import Interval
from flexalign.systems.dials import dial_files, read_dial

if TYPE_CHECKING:
    from flexalign.evaluation.sweep import Sweep

VERSION = 1
"""The version of a calibration's JSON form."""

REFERENCE_EFFORT = 100.0
"""The effort at which the tokens are those of λ = 0."""

_SAMPLING = ("temperature", "top_p", "max_new_tokens")
"""The sampling options that a calibration depends on."""

_AS_THEY_ARE = (
    *("measure", "threshold", "margin", "sampling", "dial", "task", "questions"),
    *("questions_hash", "parts"),
)
"""The fields that have the same name and value in the JSON form."""

Points = tuple[tuple[float, float], ...]
"""Pairs (effort, value), efforts ascending, between which the value is linear."""

Source = Literal["measured", "simulated", "interpolated"]
"""The source of figures: measured at the setting itself, simulated from the fast and the slow
answers of an adaptive dial, or interpolated between two measured λ's."""


# The stored calibration.


@dataclass(frozen=True)
class SettingMetrics:
    """The cost and the accuracy of a setting on a calibration's questions.

    The percentiles show what a mean hides, such as a mixture of short and long responses.

    Attributes:
        tokens: Mean tokens, with their 95 % interval.
        tokens_p10: The tenth percentile of the tokens of single responses.
        tokens_p90: The ninetieth.
        accuracy: Share of right answers, with its 95 % interval.
    """

    tokens: Interval
    tokens_p10: float
    tokens_p90: float
    accuracy: Interval

    @classmethod
    def of(cls, samples: Samples) -> "SettingMetrics":
        """Compute them from the samples of one setting."""
        p10, p90 = np.quantile(samples.tokens, (0.1, 0.9))
        return cls(samples.tokens_interval(), float(p10), float(p90), samples.accuracy_interval())

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "SettingMetrics":
        """Read the JSON form.

        Raises:
            KeyError: If a key is missing.
        """
        return cls(
            Interval.from_json(given, "tokens"),
            given["tokens_p10"],
            given["tokens_p90"],
            Interval.from_json(given, "accuracy"),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            **self.tokens.to_json("tokens"),
            "tokens_p10": self.tokens_p10,
            "tokens_p90": self.tokens_p90,
            **self.accuracy.to_json("accuracy"),
        }


@dataclass(frozen=True)
class MeasuredSetting:
    """A setting that was sampled.

    Attributes:
        setting: Its id, such as ``λ=0.5``.
        metrics: Its cost and accuracy.
        source: Always ``measured``.
    """

    setting: str
    metrics: SettingMetrics
    source: Source = "measured"

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "MeasuredSetting":
        """Read the JSON form.

        Raises:
            KeyError: If a key is missing.
        """
        return cls(given["setting"], SettingMetrics.from_json(given), given["source"])

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"setting": self.setting, "source": self.source, **self.metrics.to_json()}


@dataclass(frozen=True)
class AchievedRatio:
    """Achieved ÷ asked tokens, over the questions of a calibration.

    A question is asked for the tokens on the straight line between its own tokens at effort 0 and
    at effort 100, and achieves its own tokens at the effort; both are means over its samples. A
    mean may lie on the line while hardly any question does.

    Attributes:
        p10: The tenth percentile.
        median: The median.
        p90: The ninetieth percentile.
    """

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, achieved: ArrayLike, asked: ArrayLike) -> "AchievedRatio | None":
        """Compute it from the tokens of each question, both of shape (questions,).

        Returns:
            The percentiles over all questions that are asked for more than 0 tokens (above effort
            100 a line that falls may end below 0); None if there is no such question.
        """
        own, wanted = np.asarray(achieved, np.float64), np.asarray(asked, np.float64)
        is_positive = wanted > 0
        if not is_positive.any():
            return None
        quantiles = np.quantile(own[is_positive] / wanted[is_positive], (0.1, 0.5, 0.9))
        return cls(*map(float, quantiles))

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "AchievedRatio | None":
        """Read a level's JSON form; None if it has no ratio, as before this version of flexalign.

        Raises:
            KeyError: If a key is missing.
        """
        if given.get("achieved_median") is None:
            return None
        return cls(given["achieved_p10"], given["achieved_median"], given["achieved_p90"])

    def to_json(self) -> dict[str, float]:
        """Return its keys of a level's JSON form."""
        return {f"achieved_{name}": value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class EffortLevel:
    """The cost and the accuracy of an effort.

    Attributes:
        effort: The effort.
        setting: The id of its setting.
        line: The tokens of the straight line from effort 0 to effort 100, at this effort.
        source: The source of the figures.
        metrics: Cost and accuracy.
        accuracy_change: Accuracy minus that of λ = 0, paired by question, with its 95 % interval;
            0 for λ = 0 itself.
        achieved: Achieved ÷ asked tokens by question; None if it was not measured.
    """

    effort: float
    setting: str
    line: float
    source: Source
    metrics: SettingMetrics
    accuracy_change: Interval
    achieved: AchievedRatio | None = None

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "EffortLevel":
        """Read the JSON form.

        Raises:
            KeyError: If a key is missing.
        """
        return cls(
            given["effort"],
            given["setting"],
            given["line"],
            given["source"],
            SettingMetrics.from_json(given),
            Interval.from_json(given, "accuracy_change"),
            AchievedRatio.from_json(given),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "effort": self.effort,
            "setting": self.setting,
            "line": self.line,
            "source": self.source,
            **self.metrics.to_json(),
            **self.accuracy_change.to_json("accuracy_change"),
            **({} if self.achieved is None else self.achieved.to_json()),
        }


@dataclass(frozen=True)
class Calibration:
    """A calibrated dial.

    Attributes:
        lambdas: λ by effort; the last effort, at least 100, is the largest that was calibrated.
        thresholds: Thresholds of the adaptive dial by effort, for efforts below 100; empty if
            effort sets λ.
        holes: Ranges of λ that calibration found worse than both their ends.
        measure: The measure of the fast answer's confidence; None if effort sets λ.
        threshold: The threshold of an adaptive policy without its own; None if effort sets λ.
        margin: Permitted loss of accuracy at `threshold`, against λ = 0.
        lambda_range: The least and the largest λ of all efforts.
        sampling: The sampling options, by name.
        settings: The settings that were sampled.
        levels: The cost and the accuracy of some efforts.
        dial: What effort sets: ``adaptive`` (the threshold) or ``lambda``.
        task: The name of the task.
        questions: The number of questions.
        questions_hash: A hash of the questions.
        parts: Paths and fingerprints of base and adapter, or of the one model.
        made_by: The version of flexalign that made it.
    """

    lambdas: Points
    thresholds: Points = ()
    holes: tuple[tuple[float, float], ...] = ()
    measure: Measure | None = None
    threshold: float | None = None
    margin: float = 0.0
    lambda_range: tuple[float, float] = (0.0, 1.0)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[MeasuredSetting, ...] = ()
    levels: tuple[EffortLevel, ...] = ()
    dial: Literal["adaptive", "lambda"] = "lambda"
    task: str = ""
    questions: int = 0
    questions_hash: str = ""
    parts: Sequence[Any] = field(default_factory=list)
    made_by: str = ""

    @property
    def largest_effort(self) -> float:
        """The effort at the end of the range that was calibrated, at least 100."""
        return self.lambdas[-1][0]

    @classmethod
    def from_json(cls, given: Mapping[str, Any] | None) -> "Calibration":
        """Read a calibration from an adapter's configuration.

        Args:
            given: The JSON value; None if the adapter has none. It must have the version and the
                points of λ by effort; all other keys may be missing.

        Raises:
            ConfigError: If there is none, or it has another version or is damaged.
        """
        if given is None:
            raise ConfigError(
                "effort has no meaning before calibration, and this adapter has none; run "
                "flexalign calibrate BASE --adapter ADAPTER --task TASK, or give --lambda or "
                "--policy."
            )

        version = given.get("version")
        if version != VERSION:
            raise ConfigError(
                f"this dial's calibration has version {version!r} and this flexalign reads "
                f"{VERSION}; run flexalign calibrate again."
            )

        try:
            points = given["effort"]
            calibration = cls(
                lambdas=_pairs(points["lambdas"]),
                thresholds=_pairs(points.get("thresholds", ())),
                holes=_pairs(given.get("holes", ())),
                lambda_range=_pair(given.get("lambda_range", (0.0, 1.0))),
                settings=tuple(map(MeasuredSetting.from_json, given.get("settings", ()))),
                levels=tuple(map(EffortLevel.from_json, given.get("levels", ()))),
                made_by=given.get("flexalign", ""),
                **{name: given[name] for name in _AS_THEY_ARE if name in given},
            )
            _ = calibration.largest_effort  # raises IndexError if there are no points
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ConfigError(
                f"this dial's calibration is damaged ({error!r}); run flexalign calibrate again."
            ) from error
        return calibration

    def to_json(self) -> dict[str, Any]:
        """Return the JSON value, with keys in the file's order."""
        return {
            "version": VERSION,
            "flexalign": self.made_by,
            "dial": self.dial,
            "measure": self.measure,
            "task": self.task,
            "questions": self.questions,
            "questions_hash": self.questions_hash,
            "sampling": dict(self.sampling),
            "parts": self.parts,
            "lambda_range": list(self.lambda_range),
            "margin": self.margin,
            "holes": [list(hole) for hole in self.holes],
            "effort": {
                "thresholds": [list(point) for point in self.thresholds],
                "lambdas": [list(point) for point in self.lambdas],
            },
            "threshold": self.threshold,
            "settings": [setting.to_json() for setting in self.settings],
            "levels": [level.to_json() for level in self.levels],
        }


def _pair(given: Sequence[float]) -> tuple[float, float]:
    low, high = given
    return float(low), float(high)


def _pairs(given: Sequence[Sequence[float]]) -> Points:
    return tuple(map(_pair, given))


# From efforts to settings.


def effort_to_dial(calibration: Calibration, effort: float) -> Adaptive | Fixed:
    """Return the setting of an effort.

    Ranges of λ that calibration found worse than both their ends (`holes`) are skipped: an effort
    inside one gets its nearer end.

    Args:
        calibration: The adapter's calibration.
        effort: 0 for the fastest setting, 100 for the reference's tokens, more for λ < 0.

    Returns:
        An adaptive policy with its threshold, or one λ.

    Raises:
        ConfigError: If the effort is outside the calibrated range.
    """
    largest = calibration.largest_effort
    is_number = isinstance(effort, numbers.Real) and not isinstance(effort, bool)
    if not is_number or not 0 <= float(effort) <= largest:
        raise ConfigError(
            f"an effort of this dial is a number from 0 (fastest) to {show_effort(largest)} (100 is the "
            f"reference), got {effort!r}."
        )

    effort = float(effort)
    if calibration.thresholds and effort < REFERENCE_EFFORT:
        threshold = _along(calibration.thresholds, effort)
        if calibration.measure is None:
            return Adaptive(threshold)
        return Adaptive(threshold, measure=calibration.measure)
    return Fixed(_outside(calibration.holes, _along(calibration.lambdas, effort)))


def show_effort(effort: float) -> str:
    """Return a calibrated effort as text, rounded down to a tenth, so that it is one to ask for.

    Example:
        >>> show_effort(142.0048)
        '142'
    """
    return f"{math.floor(10 * effort) / 10:g}"


def effort_settings(calibration: Calibration, efforts: Sequence[float]) -> list[Setting]:
    """Return the settings of several efforts, each with its effort.

    Raises:
        ConfigError: If an effort is outside the calibrated range.
    """
    return [Setting.of(effort_to_dial(calibration, effort), float(effort)) for effort in efforts]


def _along(points: Points, effort: float) -> float:
    efforts, values = zip(*points, strict=True)
    return float(np.interp(effort, efforts, values))


def _outside(holes: Sequence[tuple[float, float]], lam: float) -> float:
    for low, high in holes:
        if low < lam < high:
            return low if math.fabs(lam - low) <= math.fabs(high - lam) else high
    return lam


# Notes for users of a calibrated adapter.


def known_cut(calibration: Calibration | None, setting: str) -> tuple[float, Source] | None:
    """Look up a setting's token cut against λ = 0.

    Args:
        calibration: The adapter's calibration; None if it has none.
        setting: The setting's id, such as ``λ=0.5``.

    Returns:
        The share of tokens saved, negative if the setting costs more, and the figure's source;
        None for λ = 0 itself, or if the calibration has no figures of the setting.
    """
    if calibration is None:
        return None
    found: dict[str, EffortLevel | MeasuredSetting] = {
        level.setting: level for level in calibration.levels
    }
    found |= {one.setting: one for one in calibration.settings}  # measured ones replace others
    if setting not in found or setting == "λ=0" or "λ=0" not in found:
        return None

    reference = found["λ=0"].metrics.tokens.mean
    if not reference:
        return None
    return 1 - found[setting].metrics.tokens.mean / reference, found[setting].source


def note_on_sampling(calibrated: Mapping[str, object], asked: Mapping[str, object]) -> str | None:
    """Warn that an effort is requested with other sampling options than its calibration's.

    Args:
        calibrated: The options of the calibration, such as ``{"temperature": 0.7}``.
        asked: The requested options. Only numbers that are in both mappings are compared.

    Returns:
        One sentence that names the differences; None if there are none.
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


def sweep_notes(sweep: "Sweep") -> list[str]:
    """Warn of efforts that a sweep measures with other sampling options than their calibration's.

    Returns:
        A sentence for each such dial, as of :func:`note_on_sampling`.
    """
    if all(setting.effort is None for setting in sweep.settings):
        return []
    from flexalign.systems import LocalBackend

    usual = asdict(LogitsSettings())
    asked, notes = asdict(sweep.options) | asdict(sweep.options.logits), []
    for backend in sweep.backends.values():
        stored = backend.calibration if isinstance(backend, LocalBackend) else None
        if stored is not None:
            known = {**usual, **Calibration.from_json(stored).sampling}
            compared = {name: known.get(name) for name in (*_SAMPLING, *usual)}
            notes.append(note_on_sampling(compared, asked))
    return [note for note in notes if note is not None]


# The adapter's folder.


def store_calibration(
    folder: Path, calibration: Calibration, settings: DialConfig | None = None
) -> DialConfig:
    """Write a calibration into a dial's configuration, and widen its λ range if needed.

    The file is replaced in one step: after a crash the old file is unchanged.

    Args:
        folder: The dial's folder.
        calibration: The calibration.
        settings: The configuration; the one in the folder, an adapter's, if not given.

    Returns:
        The new configuration.

    Raises:
        CheckpointError: If no configuration is given and the folder holds no adapter.
    """
    settings = read_dial(folder) if settings is None else settings
    settings = settings.widened(calibration.lambda_range)
    settings = replace(settings, calibration=json.loads(json.dumps(calibration.to_json())))
    write_json(folder / settings.CONFIG_FILE, json.loads(settings.to_text()))
    return settings


def is_packaged(folder: Path) -> bool:
    """Whether a folder is a part of this package; links are resolved."""
    return folder.resolve().is_relative_to(Path(flexalign.__file__).resolve().parent)


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter's files, and its card, to a folder that may be written to."""
    target.mkdir(parents=True, exist_ok=True)
    card = ["README.md"] if (source / "README.md").is_file() else []
    for name in [*dial_files(read_dial(source), source), *card]:
        shutil.copyfile(source / name, target / name)
