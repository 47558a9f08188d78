"""Measures a dial, and fits effort to the tokens of its settings.

If a dial has a fast mode, which answers at λ = 1 with a fraction of the tokens, effort sets the
threshold of the adaptive policy; otherwise it sets λ. :func:`calibrate` does all steps;
:func:`plan_calibration` only checks the arguments, and loads no weights.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from flexalign._version import __version__
from flexalign.calibration.card import add_calibration
from flexalign.calibration.cascade import Cascade, fit_thresholds
from flexalign.calibration.effort import (
    REFERENCE_EFFORT,
    Calibration,
    MeasuredSetting,
    Points,
    SettingMetrics,
    copy_adapter,
    is_packaged,
    store_calibration,
)
from flexalign.calibration.fitting import effort_levels, find_holes, fit_lambdas, require_saving
from flexalign.errors import ConfigError, ServingError
from flexalign.evaluation.samples import ResultsFolder, Samples
from flexalign.evaluation.sweep import Progress, Sweep, sampling_options
from flexalign.evaluation.tasks import Task, load_task
from flexalign.generation.two_prompt_config import TwoPromptConfig
from flexalign.lambdas import Adaptive, Measure, Setting
from flexalign.models.hub import name_of
from flexalign.models.loading import load_tokenizer
from flexalign.models.prompted import PromptPair
from flexalign.models.sources import resolve, resolve_adapter
from flexalign.systems import System, SystemOptions
from flexalign.systems.dials import read_dial

Kind = Literal["auto", "adaptive", "lambda"]

_EFFORTS = tuple(range(0, 101, 5))
"""The efforts whose thresholds are stored."""

_FAST_SHARE = 0.5
"""A dial is adaptive if fast answers use at most this share of the tokens of λ = 0."""

_SHORTER = "train the adapter on shorter answers"
"""What makes an adapter's answers shorter, for messages."""

_STEPS = 8
"""Number of steps of λ between 0 and the end of its range."""

_QUESTIONS = 300
"""Number of questions that are drawn from a task given by name."""


def calibrate(
    base: str,
    adapter: str | Path | None,
    task: str | Task,
    *,
    prompts: PromptPair | None = None,
    save_to: str | Path | None = None,
    output: str | Path | None = None,
    dial: Kind = "auto",
    measure: Measure = "answer_probability",
    lambda_range: tuple[float, float] | None = None,
    margin: float = 0.02,
    samples: int = 1,
    seed: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
    **sampling: Any,
) -> Calibration:
    """Measure a dial, and write the setting of each effort into its configuration.

    Args:
        base: The adapter's base, or the model of two prompts: a folder or a known name.
        adapter: The InRa adapter or LoRA dial that is calibrated; None with `prompts`.
        task: Questions with known answers; from a task given by name, 300 are drawn.
        prompts: Instead of an adapter, the two prompts of the model.
        save_to: A folder for a calibrated copy of the adapter; if not given, the adapter itself is
            changed. With `prompts`, the folder for the calibration, which must be given.
        output: A folder for the samples, from which an interrupted run continues; if not given,
            they are not kept.
        dial: What effort sets, as in :class:`CalibrateOptions`, like the next five.
        measure: The measure of the fast answer's confidence.
        lambda_range: The least and the largest λ of all efforts; if not given, the adapter's range,
            and [0, 1] for two prompts.
        margin: Permitted loss of accuracy at the dial's own threshold.
        samples: Responses to each question.
        seed: Seed of all sampling, and of the draw of questions.
        workers: Number of processes that grade.
        progress: Called with the number of samples made since its last call.
        **sampling: Fields of :class:`~flexalign.systems.SystemOptions`; temperature,
            top_p and max_new_tokens are the task's own if not given.

    Raises:
        ConfigError: If an option is out of its range, a part is missing, the adapter cannot be
            written to, or the dial saves no tokens beyond chance.
        CheckpointError: If the adapter is damaged.
        LambdaError: If the range is empty.
        ServingError: If samples could not be made.
    """
    plan = plan_calibration(
        base,
        adapter,
        load_task(task, limit=_QUESTIONS, seed=seed) if isinstance(task, str) else task,
        prompts=prompts,
        save_to=save_to,
        dial=dial,
        measure=measure,
        lambda_range=lambda_range,
        margin=margin,
        samples=samples,
        seed=seed,
        **sampling,
    )
    calibration = plan.measure(output, workers=workers, progress=progress)
    plan.store(calibration)
    return calibration


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of a calibration.

    Attributes:
        dial: What effort sets: ``adaptive`` (the threshold), ``lambda``, or ``auto``: the
            threshold if fast answers use at most half the tokens of λ = 0.
        measure: The measure of the fast answer's confidence.
        lambda_range: The least and the largest λ of all efforts; 0 must be within.
        margin: Permitted loss of accuracy, against λ = 0, at the adapter's own threshold.
        samples: Answers to each question.
        seed: Seed of all sampling.

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
        Adaptive(measure=self.measure)  # raises if the measure is unknown

        low, high = self.lambda_range
        if not low <= 0 < high:
            raise ConfigError(
                f"effort goes from λ = 0 to a λ above it, and [{low:g}, {high:g}] leaves no room; "
                "widen --lambda-range."
            )
        if self.measure != type(self).measure and (self.dial == "lambda" or high < 1):
            raise ConfigError(
                f"measure {self.measure} is of how sure a fast answer is, at λ = 1, and effort sets λ "
                "here; leave it out."
            )
        if self.dial == "adaptive" and high < 1:
            raise ConfigError(f"an adaptive dial answers at λ = 1, and λ ends at {high:g} here.")
        if not 0 <= self.margin < 1:
            raise ConfigError(f"margin must be in [0, 1), got {self.margin}.")
        if self.samples < 1:
            raise ConfigError(f"samples must be at least 1, got {self.samples}.")

    @property
    def deeper(self) -> list[float]:
        """The λ's below 0 that are measured, ascending; empty if the range begins at 0."""
        low = self.lambda_range[0]
        return [low * step / 4 for step in range(4, 0, -1)] if low < 0 else []

    @property
    def grid(self) -> list[float]:
        """All λ's that are measured if effort sets λ, ascending."""
        high = self.lambda_range[1]
        return [*self.deeper, *(high * step / _STEPS for step in range(_STEPS + 1))]


@dataclass(frozen=True)
class CalibrationPlan:
    """A calibration whose parts are checked; no weights are loaded.

    Attributes:
        target: The folder that the calibration is written to.
        copied_from: The adapter's folder, if `target` becomes a copy of it; None otherwise.
        settings: Of two prompts, the configuration to be written; None for an adapter, which has
            its own.
        options: Options of the calibration.
        sweeps: The sweeps that may be needed, from :func:`plan_sweeps`.
    """

    target: Path
    copied_from: Path | None
    settings: TwoPromptConfig | None
    options: CalibrateOptions
    sweeps: Mapping[str, Sweep]

    @property
    def total(self) -> int:
        """The largest number of samples that may be needed."""
        return sum(sweep.total for sweep in self.sweeps.values())

    def measure(
        self,
        output: str | Path | None = None,
        *,
        workers: int = 1,
        progress: Progress | None = None,
    ) -> Calibration:
        """Sample and fit with :func:`measure_dial`; without `output`, samples are not kept."""
        with TemporaryDirectory(prefix="flexalign-") as scratch:
            kept = Path(scratch if output is None else output)
            return measure_dial(self.sweeps, self.options, kept, workers=workers, progress=progress)

    def store(self, calibration: Calibration) -> Path:
        """Write a calibration into the dial's configuration, and into an adapter's card.

        Returns:
            The file of the configuration.
        """
        if self.copied_from is not None:
            copy_adapter(self.copied_from, self.target)
        self.target.mkdir(parents=True, exist_ok=True)
        settings = store_calibration(self.target, calibration, self.settings)
        add_calibration(self.target, calibration)
        return self.target / settings.CONFIG_FILE


def plan_calibration(
    base: str,
    adapter: str | Path | None,
    task: Task,
    *,
    prompts: PromptPair | None = None,
    save_to: str | Path | None = None,
    is_stored: bool = True,
    dial: Kind = "auto",
    measure: Measure = "answer_probability",
    lambda_range: tuple[float, float] | None = None,
    margin: float = 0.02,
    samples: int = 1,
    seed: int = 0,
    **sampling: Any,
) -> CalibrationPlan:
    """Check a calibration's arguments, which are those of :func:`calibrate`; loads no weights.

    Args:
        is_stored: Whether the calibration will be written; if not, an adapter that is not to be
            changed needs no `save_to`.
    """
    system = System.of(base, None if adapter is None else str(adapter), prompts=prompts)
    if system.kind == "model":
        raise ConfigError(
            "calibrate measures a dial, and the model alone has none; name its --adapter or an "
            "--aligned-prompt."
        )
    folder = None if adapter is None else resolve_adapter(str(adapter))
    target = _target(adapter, folder, save_to, is_stored=is_stored)

    limits = lambda_range or ((0.0, 1.0) if folder is None else read_dial(folder).lambda_range)
    options = CalibrateOptions(dial, measure, limits, margin, samples, seed)
    how = sampling_options([task], prompts=prompts, **sampling)
    sweeps = plan_sweeps(system, task, options, how)
    copied_from = None if target == folder else folder
    return CalibrationPlan(target, copied_from, _two_prompts(base, how), options, sweeps)


def _target(
    adapter: str | Path | None, folder: Path | None, save_to: str | Path | None, *, is_stored: bool
) -> Path:
    """Return the folder that a calibration is written to, after checking it.

    Args:
        adapter: The adapter, as the user named it; None for two prompts.
        folder: Its folder.
        save_to: The folder that the user named.
        is_stored: Whether the calibration will be written.

    Raises:
        ConfigError: If a folder must be named and is not, or cannot be written to.
    """
    if save_to is None:
        if folder is None:
            raise ConfigError(
                "--save-to is missing: two prompts have no folder of their own; name one for their "
                "calibration, such as --save-to out/effort."
            )
        if is_stored and is_packaged(folder):
            raise ConfigError(
                f"{adapter} is part of the package and stays as it is; name a folder for a "
                "calibrated copy with --save-to, such as --save-to out/fast."
            )
        if is_stored and name_of(folder) is not None:
            raise ConfigError(
                f"{adapter} is from the hub, and what was fetched stays as it is; name a folder for "
                "a calibrated copy with --save-to, such as --save-to out/fast."
            )
        return folder

    target = Path(save_to)
    if is_packaged(target):
        raise ConfigError(f"--save-to {target} is inside the package; name a folder outside it.")
    if target.exists():
        raise ConfigError(f"--save-to {target} is there already; move it away or name another.")
    return target


def _two_prompts(model: str, how: SystemOptions) -> TwoPromptConfig | None:
    """Return the configuration of a model under two prompts; None if there are no prompts."""
    if how.prompts is None:
        return None
    source = resolve(model)
    prompts = how.prompts.with_template(how.template or {})
    return TwoPromptConfig.of(source, load_tokenizer(source), prompts)


def plan_sweeps(
    system: System, task: Task, options: CalibrateOptions, sampling: SystemOptions
) -> dict[str, Sweep]:
    """Make the sweeps that may be needed, by name: ``ways`` (λ = 0, fast), ``lambdas`` (the grid).

    Both are checked, and no weights are loaded. With ``auto``, the results of ``ways`` decide
    whether ``lambdas`` is needed.

    Raises:
        ConfigError: If the system is not a dial, or a part of it is missing.
        LambdaError: If the range is wider than that of the sampling options.
    """
    if system.kind not in ("dial", "prompts"):
        raise ConfigError(
            f"{system.name} is no InRa dial, LoRA dial or model under two prompts, and only those "
            "can be calibrated."
        )

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


def measure_dial(
    sweeps: Mapping[str, Sweep],
    options: CalibrateOptions,
    output: Path,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> Calibration:
    """Measure a dial, or continue an interrupted measurement, and fit effort to its tokens.

    Args:
        sweeps: The result of `plan_sweeps` with the same options.
        options: Options of the calibration.
        output: Folder of the samples, with one results folder for each sweep.
        workers: Number of processes that grade.
        progress: Called with the number of samples made since its last call.

    Raises:
        ConfigError: If the dial saves no tokens beyond chance, or the folder belongs to another
            calibration.
        ServingError: If samples could not be made.
    """
    # Sample fast and slow answers first, and the grid of λ only if the dial is not adaptive.
    measured: dict[str, Samples] = {}
    cascade: Cascade | None = None
    if "ways" in sweeps:
        measured, cascade = measure_cascade(
            sweeps["ways"], output / "ways", workers=workers, progress=progress
        )
        is_fast = cascade.tokens(0.0).mean() <= _FAST_SHARE * cascade.slow.mean_tokens
        if options.dial == "auto" and not is_fast:
            cascade = None
    if cascade is None:
        measured |= measure_settings(
            sweeps["lambdas"], output / "lambdas", workers=workers, progress=progress
        )

    # The measured λ's, and the mean tokens of those outside the holes.
    sweep = sweeps["lambdas" if cascade is None else "ways"]
    fixed = {s.lam: measured[s.id] for s in sweep.settings if s.lam is not None}
    correct = {lam: samples.correct for lam, samples in fixed.items()}
    holes = find_holes(correct, measured["λ=0"].question.tolist())
    tokens = {
        lam: samples.mean_tokens
        for lam, samples in fixed.items()
        if not any(low < lam < high for low, high in holes)
    }
    is_prompts = sweep.systems[0].kind == "prompts"
    shorter = "give prompts for shorter answers" if is_prompts else _SHORTER
    _require_saving(measured, cascade, tokens, shorter)

    thresholds, lambdas = _fit(cascade, tokens)
    (task,) = sweep.tasks
    described = next(iter(sweeps.values())).configuration()
    calibration = Calibration(
        lambdas,
        thresholds,
        tuple(holes),
        None if cascade is None else options.measure,
        None if cascade is None else _own_threshold(cascade, thresholds, options.margin),
        options.margin,
        options.lambda_range,
        described["sampling"],
        tuple(MeasuredSetting(name, SettingMetrics.of(own)) for name, own in measured.items()),
        dial="lambda" if cascade is None else "adaptive",
        task=task.name,
        questions=len(task.questions),
        questions_hash=task.content_hash,
        parts=described["systems"][0]["parts"],
        made_by=__version__,
    )
    return replace(calibration, levels=effort_levels(calibration, cascade, fixed))


def measure_cascade(
    sweep: Sweep,
    output: Path,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> tuple[dict[str, Samples], Cascade]:
    """Answer every question fast and slow, or continue an interrupted measurement.

    Args:
        sweep: The sweep ``ways`` of `plan_sweeps`.
        output: Folder of the samples.
        workers: Number of processes that grade.
        progress: Called with the number of samples made since its last call.

    Returns:
        Samples by setting, and the pairs of a fast and a slow answer.

    Raises:
        ServingError: If samples could not be made.
    """
    measured = measure_settings(sweep, output, workers=workers, progress=progress)
    (fast,) = (setting.id for setting in sweep.settings if isinstance(setting.dial, Adaptive))
    return measured, Cascade.of(measured["λ=0"], measured[fast])


def measure_settings(
    sweep: Sweep, output: Path, *, workers: int = 1, progress: Progress | None = None
) -> dict[str, Samples]:
    """Answer every question at every setting, or continue an interrupted measurement.

    Args:
        sweep: The questions and settings.
        output: Folder of the samples.
        workers: Number of processes that grade.
        progress: Called with the number of samples made since its last call.

    Returns:
        Samples by setting, all in the order of question and sample.

    Raises:
        ConfigError: If the folder belongs to another configuration.
        ServingError: If samples could not be made.
    """
    with warnings.catch_warnings():
        # Calibration may widen the adapter's range, so that λ outside it is expected here.
        warnings.filterwarnings("ignore", message="λ .* leaves this adapter's range")
        result = sweep.run(output, workers=workers, begun=progress, progress=progress)
    if result.lost:
        raise ServingError(
            f"{len(result.lost)} samples could not be made (the first: {result.lost[0].reason}); "
            "give the same command again to go on."
        )

    rows = ResultsFolder.read(output).rows
    return {
        setting.id: Samples.from_rows(row for row in rows if row["setting"] == setting.id).sorted()
        for setting in sweep.settings
    }


def _require_saving(
    measured: Mapping[str, Samples],
    cascade: Cascade | None,
    tokens: Mapping[float, float],
    shorter: str = _SHORTER,
) -> None:
    """Refuse a dial that saves no tokens at any setting that efforts below 100 use.

    Args:
        measured: The samples, by setting.
        cascade: The fast and slow answers of an adaptive dial; None if effort sets λ.
        tokens: The mean tokens of the λ's that effort may set.
        shorter: What makes the dial's answers shorter, for the message.
    """
    reference = measured["λ=0"]
    if cascade is None:
        names = [Setting.of(lam).id for lam in tokens if lam > 0]
        faster = {name: measured[name] for name in names}
        require_saving(faster, reference, f"{shorter}, widen --lambda-range")
    else:
        faster = {"the fast answer": cascade.at(0.0)}
        require_saving(faster, reference, f"{shorter}, take --dial lambda")


def _fit(cascade: Cascade | None, tokens: Mapping[float, float]) -> tuple[Points, Points]:
    """Return thresholds by effort (empty if effort sets λ), and λ by effort."""
    if cascade is None:
        return (), fit_lambdas(tokens)

    fitted = fit_thresholds(cascade, _EFFORTS)
    thresholds = tuple((float(e), value) for e, value in zip(_EFFORTS, fitted, strict=True))

    # Efforts above 100 use each λ below 0 that has more tokens than every λ nearer to 0.
    fastest, reference = float(cascade.tokens(0.0).mean()), cascade.slow.mean_tokens
    lambdas, most = [(REFERENCE_EFFORT, 0.0)], reference
    for lam in sorted((lam for lam in tokens if lam < 0), reverse=True):
        if tokens[lam] > most:
            most = tokens[lam]
            lambdas.append((100 * (most - fastest) / (reference - fastest), lam))
    return thresholds, tuple(lambdas)


def _own_threshold(cascade: Cascade, thresholds: Points, margin: float) -> float:
    """Return the lowest threshold with an accuracy within the margin; else the most accurate."""
    accuracies = [float(cascade.correct(value).mean()) for _, value in thresholds]
    wanted = min(cascade.slow.accuracy - margin, max(accuracies))
    pairs = zip(thresholds, accuracies, strict=True)
    return next(value for (_, value), accuracy in pairs if accuracy >= wanted)
