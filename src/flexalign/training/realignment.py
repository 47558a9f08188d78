"""Realignment (TrRa): a student learns the fusion of a reference and an aligned model.

The entry point is `realign`: it reads the recipe and the files that it names, makes one run for
each λ, trains them, and compares the students if there are several.
"""

import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Unpack, overload

from datasets import Dataset
from transformers import TrainerCallback

from flexalign._storage import following_umask, write_json, write_text
from flexalign.data.prompting import PromptSettings
from flexalign.data.rendering import rendering_record
from flexalign.data.thinking import ThinkingTags
from flexalign.lambdas import Schedule, require_forward
from flexalign.models.compatibility import ModelFacts, PairFacts
from flexalign.models.hub import (
    check_before_download,
    downloads_wait,
    fetch_weights,
    is_waiting,
)
from flexalign.models.loading import load_adapter, load_model
from flexalign.models.pair import SIDES
from flexalign.models.prompted import PromptPair
from flexalign.models.weights import tensor_infos
from flexalign.training.cache import cache_filler
from flexalign.training.callbacks import AtLambda, StepClock, make_watcher, read_curve
from flexalign.training.card import table, versions_in_use
from flexalign.training.checkpoints import MANIFEST, newest_complete, seal, writing
from flexalign.training.events import Events
from flexalign.training.hidden_cache import HiddenStateCache, stored_dtype
from flexalign.training.inputs import Inputs, Watched, read_inputs
from flexalign.training.memory import count_parameters
from flexalign.training.pair_rows import PairRows
from flexalign.training.plan import TrainingPlan, plan_memory, plan_steps, sample_rows
from flexalign.training.recipes import IDLE_GATE, RealignRecipe, plain_value
from flexalign.training.run import (
    LARGEST_EFFECTIVE_LAMBDA,
    Outcome,
    Round,
    RunOptions,
    TrainingRun,
    effective_lambda,
    one_process,
    plan_rounds,
    trainer_state,
)
from flexalign.training.settings import as_yaml
from flexalign.training.trainer import TrRaTrainer

Given = str | Path | Mapping[str, Any] | RealignRecipe | Sequence[RealignRecipe]
"""A recipe's file, a mapping in the form of such a file, a recipe, or a list with one for each λ."""


class RealignOptions(RunOptions, total=False):
    """The keyword options of `realign`, which describes them."""

    data: Dataset | None
    extrapolate: bool


@overload
def realign(
    recipe: Given, *, dry_run: Literal[False] = False, **options: Unpack[RealignOptions]
) -> Outcome: ...


@overload
def realign(
    recipe: Given, *, dry_run: Literal[True], **options: Unpack[RealignOptions]
) -> TrainingPlan: ...


@overload
def realign(
    recipe: Given, *, dry_run: bool, **options: Unpack[RealignOptions]
) -> Outcome | TrainingPlan: ...


def realign(
    recipe: Given,
    *,
    dry_run: bool = False,
    data: Dataset | None = None,
    extrapolate: bool = False,
    skip_bad_rows: bool = False,
    events: Events | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    command: str = "flexalign.realign",
) -> Outcome | TrainingPlan:
    """Train a student towards the fusion of a reference and an aligned model (TrRa).

    A run that was stopped is resumed from its newest complete checkpoint. A run that is finished is
    not run again. On Ctrl-C or SIGTERM the run writes a checkpoint and ends.

    Example::

        outcome = realign("realign.yaml")
        outcome = realign({"reference": "models/base", "aligned": "models/concise",
                           "data": "traces.jsonl", "output": "out/realigned", "lambda": 2.0})
        outcome.output, outcome.steps

    Args:
        recipe: A YAML file's path, a mapping with the keys of such a file, a `RealignRecipe`, or a
            list of them that differ only in λ and output. Its λ may be a list.
        dry_run: Load no weights and write nothing; return the plan of the run.
        data: Rows in memory, instead of those that the recipe names.
        extrapolate: Allow λ < 0, and several rounds beyond an effective λ of 4.
        skip_bad_rows: Leave out rows that cannot be used.
        events: Receives progress and warnings.
        callbacks: As transformers' ``Trainer`` takes them.
        command: The command that the model card shows.

    Returns:
        The outcome; with several λ, its `students` are the outcomes of each. For a dry run, the
        plan.

    Raises:
        ConfigError: If the recipe, or something that it names, cannot be used, or the output
            folder holds another run.
        LambdaError: If λ is not a finite number or a schedule, or is below 0 without `extrapolate`.
        DataError: If a row cannot be used.
        PairMismatchError: If the two models do not fit together.
        CheckpointError: If the output folder cannot be written to.
        Stopped: If a signal ended the run early.
    """
    events = events or Events()
    recipes = RealignRecipe.each(recipe)
    if not extrapolate:
        asked = [(f"λ = {each.lambda_range or each.lam}", each.schedule) for each in recipes]
        require_forward(asked, "allow it with --extrapolate")

    def prepare() -> tuple[list[Realignment], Inputs, Callable[[], HiddenStateCache] | None]:
        inputs = read_inputs(recipes[0], skip_bad_rows=skip_bad_rows, data=data)
        if recipes[0].lora is not None:
            # This builds the student without storage, and refuses a LoRA that cannot be trained.
            count_parameters(inputs.pair.reference.config, recipes[0].peft_config())
        is_cached = recipes[0].teacher == "cached" and not is_waiting()
        cache = cache_filler(recipes[0], inputs, events) if is_cached else None
        runs = [
            Realignment(
                each,
                inputs.traces,
                inputs.tokenizer,
                models=inputs.fingerprints,
                watched=inputs.watched,
                pair_rows=inputs.pair_rows,
                cache=cache,
                extrapolate=extrapolate,
                command=command,
                events=events,
            )
            for each in recipes
        ]
        for run in runs:
            run.renamed = inputs.pair.renamed
        return runs, inputs, cache

    if dry_run:
        with downloads_wait() as waiting:
            runs, inputs, _ = prepare()
            plan = _plan(runs, inputs).with_downloads(waiting)
        _give_cautions(recipes, inputs, events)
        return plan

    runs, inputs, cache = check_before_download(prepare)
    _give_cautions(recipes, inputs, events)
    outcomes = [run.run(callbacks) for run in runs]
    return outcomes[0] if len(runs) == 1 else _join(runs, outcomes, cache)


def _give_cautions(recipes: Sequence[RealignRecipe], inputs: Inputs, events: Events) -> None:
    """Give the cautions about the data and about λ."""
    if inputs.survey is not None:
        for doubt in inputs.survey.cautions():
            events.caution(doubt)
    recipe = recipes[0]  # the recipes differ only in λ and output
    unread = _unread_cache(recipe)
    if unread is not None:
        events.note(
            f"{unread} holds hidden states of teachers, which are not read, as both teachers run in "
            "every step; to train from them, set `teacher: cached`."
        )
    if all(each.has_idle_gate for each in recipes):
        events.note(IDLE_GATE)
    lam, steps = recipe.schedule, plan_steps(recipe.arguments, inputs.lengths)[0]["steps"]
    if isinstance(lam, Schedule) and lam.at(steps) != lam.end_value:
        events.note(
            f"the schedule of λ is longer than the {steps:,} steps of a run, which ends at λ = "
            f"{lam.at(steps):g}, not {lam.end_value:g}."
        )
    caution = _caution_of_distance(recipes)
    if caution is not None:
        events.caution(caution)


def _unread_cache(recipe: RealignRecipe) -> str | None:
    """Return the folder of a cache that a run could read and does not; None if there is none."""
    is_for_a_cache = recipe.rounds == 1 and not recipe.rollouts
    if recipe.teacher == "cached" or not is_for_a_cache:
        return None
    folder = recipe.cache_folder
    return folder if stored_dtype(Path(folder)) is not None else None


def _caution_of_distance(recipes: Sequence[RealignRecipe]) -> str | None:
    """Return a caution if any of the runs extrapolates far without a gate.

    A schedule counts with its end value, several rounds with their effective λ.

    Returns:
        One sentence; None if no run exceeds `LARGEST_EFFECTIVE_LAMBDA`, or there is a gate.
    """
    recipe = recipes[0]  # the recipes differ only in λ and output
    farthest = max(
        effective_lambda(each.schedule, each.rounds, extrapolate=True) for each in recipes
    )
    if recipe.gate is not None or farthest <= LARGEST_EFFECTIVE_LAMBDA:
        return None
    quantity = "λ" if recipe.rounds == 1 else "an effective λ"
    command = shlex.join(
        [
            *("flexalign", "inspect", *dict.fromkeys(recipe.models)),
            *_prompt_options(recipe.prompts),
            *("--diff", recipe.data if recipe.columns is None else "TRACES"),
        ]
    )
    return (
        f"{quantity} of {farthest:g} without a gate amplifies the pair's noise as well: measured on "
        "the miniature (docs/results.md), accuracy went from 0.75 to 0.72 at λ = 5 and 0.14 at "
        "λ = 10, but with `gate: 0.01` to 0.89 and 0.92; set `gate: τ`, for which "
        f"{command} proposes a τ."
    )


def _prompt_options(prompts: PromptPair | None) -> Iterator[str]:
    """Yield two prompts as the options of the command line."""
    for side in SIDES if prompts is not None else ():
        prompt: PromptSettings = getattr(prompts, side)
        given = {} if prompt.system is None else {"system": prompt.system}
        for name, value in (given | dict(prompt.template)).items():
            yield from (
                f"--{side}-prompt",
                f"{name}={value if name == 'system' else as_yaml(value)}",
            )


class Realignment(TrainingRun):
    """The `TrainingRun` of a realignment at one λ, in one round or several, or over a range.

    Args:
        recipe: The recipe, with one λ.
        data: The traces.
        tokenizer: The pair's tokenizer.
        models: Fingerprints of the reference and the aligned model.
        command: The command line, for the model card.
        watched: Prompts that the student answers during training.
        pair_rows: Renders the data under two prompts, if the sides have prompts of their own.
        cache: Makes missing parts of the cache of hidden states, and opens it, for a recipe with
            ``teacher: cached``. None: the cache is in the recipe's folder already.
        extrapolate: Allow several rounds beyond an effective λ of 4.
        events: Receives progress and warnings.

    Raises:
        ConfigError: If the folder holds another run, or the effective λ is too large.
    """

    recipe: RealignRecipe

    def __init__(
        self,
        recipe: RealignRecipe,
        data: Dataset,
        tokenizer: Any,
        *,
        models: Sequence[str | None],
        command: str,
        watched: Watched | None = None,
        pair_rows: PairRows | None = None,
        cache: Callable[[], HiddenStateCache] | None = None,
        extrapolate: bool = False,
        events: Events | None = None,
    ) -> None:
        effective_lambda(recipe.schedule, recipe.rounds, extrapolate=extrapolate)
        self._watched, self._cache, self._pair_rows = watched, cache, pair_rows
        self._at_lambda: AtLambda = lambda lam: nullcontext()
        super().__init__(recipe, data, tokenizer, models=models, command=command, events=events)

    def effective_lambda(self, rounds: int | None = None) -> float | None:
        """Return the effective λ of the first rounds, by default of all; None for a range."""
        if self.recipe.lambda_range is not None:
            return None
        rounds = self.recipe.rounds if rounds is None else rounds
        return effective_lambda(self.recipe.schedule, rounds, extrapolate=True)

    def run(self, callbacks: Sequence[TrainerCallback] = (), stop: Any = None) -> Outcome:
        """Train all rounds that are not done yet, and merge a LoRA student if the recipe says so.

        Raises:
            Stopped: If a signal ended the run early.
            CheckpointError: If the output folder cannot be written to.
        """
        outcome = super().run(callbacks, stop)
        if outcome.merged is not None:
            with one_process() as is_first:
                if is_first:
                    self._merge(outcome.merged)
        return outcome

    @contextmanager
    def _trainer(self, callbacks: list[TrainerCallback], round_: Round) -> Iterator[Any]:
        args = self.recipe.training_arguments(round_.output)
        args.rounds = 1
        trainer = TrRaTrainer(
            reference=self.recipe.models[0],
            aligned=round_.aligned,
            args=args,
            train_dataset=self.data,
            processing_class=self.tokenizer,
            peft_config=self.recipe.peft_config(),
            # A later round's aligned model is a student, which is asked as the reference is.
            pair_rows=self._pair_rows if round_.number == 1 else None,
            cache=self._cache() if self._cache and args.teacher == "cached" else None,
            callbacks=callbacks,
        )

        self._at_lambda = trainer.at_lambda
        if trainer.dial is not None:
            tags = ThinkingTags.of(self.tokenizer)
            asked = self.recipe.system if self._pair_rows is None else self._pair_rows.system
            system = {} if asked is None else {"system": asked}
            trainer.dial = replace(
                trainer.dial,
                thinking_tags=(tags.open, tags.close),
                rendering=rendering_record(self.tokenizer) | system,
            )
        yield trainer

    def _plan_rounds(self) -> list[Round]:
        return plan_rounds(self.recipe.models[1], self.recipe.output, self.recipe.rounds)

    def _describe_models(self, prints: list[str | None]) -> dict[str, Any]:
        return {"pair": prints}

    def _identity_of(self, round_: Round) -> dict[str, Any]:
        return self._identity | {"round": round_.number}

    def _callbacks(self) -> list[TrainerCallback]:
        watch, watched = self.recipe.watch, self._watched
        if watch is None or watched is None:
            return []
        asked = self.recipe.lambda_range
        return [
            make_watcher(
                watch,
                watched.prompts,
                watched.answers,
                self.tokenizer,
                self._events.measured,
                lams=asked.marks if asked else (),
                at_lambda=lambda lam: self._at_lambda(lam),  # the trainer is made later
            )
        ]

    def _facts_of(
        self, round_: Round, state: dict[str, Any], measures: dict[str, float]
    ) -> dict[str, Any]:
        return {
            "steps": state["global_step"],
            "tokens_seen": state["num_input_tokens_seen"],
            **self._facts,
            "round": round_.number,
            "effective_lambda": self.effective_lambda(round_.number),
        }

    def _measure(self, checkpoint: Path, trainer: Any) -> dict[str, float]:
        return {}  # the curve says more about the student than a loss

    def _outcome(self, manifest: dict[str, Any]) -> Outcome:
        return Outcome(
            output=self.output,
            merged=self.output / "merged" if self.recipe.merge else None,
            effective_lambda=self.effective_lambda(),
            lambda_range=self.recipe.lambda_range,
            steps=manifest["steps"],
            tokens_seen=manifest["tokens_seen"],
            curve=read_curve(self.output),
        )

    def _merge(self, merged: Path) -> None:
        """Save a LoRA student as a plain model."""
        if (merged / MANIFEST).exists():
            return
        self._events.say(f"merging the adapter into a plain model, {merged}")
        model = load_model(self.recipe.models[0], allow_pickle=self.recipe.allow_pickle)
        model = load_adapter(model, self.output).merge_and_unload()
        with writing("the merged model", self.output):
            with following_umask(merged):
                model.save_pretrained(merged)
            self.tokenizer.save_pretrained(merged)
            seal(merged, recipe=self.recipe.to_tree(), versions=versions_in_use())


# A dry run.


def _plan(runs: Sequence[Realignment], inputs: Inputs) -> TrainingPlan:
    """Return the plan of a dry run of runs that differ only in λ and output."""
    for warning in inputs.pair.warnings:
        warnings.warn(warning, stacklevel=3)

    run = runs[0]
    recipe, arguments = run.recipe, run.recipe.arguments
    steps, longest = plan_steps(arguments, inputs.lengths)
    facts = {
        "reference": plain_value(recipe.reference),
        "aligned": plain_value(recipe.aligned),
        **({"renamed": [token._asdict() for token in run.renamed]} if run.renamed else {}),
        "lambda": recipe.lam,
        "teacher": recipe.teacher,
        "rounds": recipe.rounds,
        "effective_lambda": run.effective_lambda(),
        "output": recipe.output,
        "output_state": run.state,
        "data": {
            "path": recipe.data,
            **inputs.lengths.to_json(),
            "max_length": arguments.max_length,
        },
        **steps,
        **_plan_memory(recipe, inputs.pair, longest),
    }

    if len(runs) > 1:
        facts["lambda"] = [each.recipe.lam for each in runs]
        facts["output"] = [each.recipe.output for each in runs]
        facts["output_state"] = [each.state for each in runs]
    return TrainingPlan(
        facts, sample_rows(run.data, run.tokenizer, arguments.max_length, inputs.pair_rows)
    )


def _plan_memory(recipe: RealignRecipe, pair: PairFacts, longest: int) -> dict[str, Any]:
    config = pair.reference.config
    heads = 1 if pair.shared_base or pair.one_model else 2
    return plan_memory(
        recipe.arguments,
        config,
        count_parameters(config, recipe.peft_config()),
        tokens=longest,
        aligned_parameters=0 if pair.one_model else _count_aligned(pair.aligned),
        cached_heads=heads if recipe.teacher == "cached" else None,
    )


def _count_aligned(model: ModelFacts) -> int:
    if model.kind == "adapter":
        if not fetch_weights(model.source.path):
            return 0
        return sum(info.size for info in tensor_infos(model.source.path).values())
    return count_parameters(model.config).base


# Several λ: the report on the students, and on the cost of all of them.

_FIGURES = ("divergence", "kl_reference", "kl_aligned")

HOW = (
    "An online step is reckoned as the step that was measured plus both teachers' passes over its "
    "tokens, at the speed that was measured when the cache was made."
)
"""How the cost of online runs is estimated, for the report."""


@dataclass(frozen=True)
class Costs:
    """Seconds for students trained from one cache, and for the same students trained online.

    Attributes:
        cache: Both teachers' passes over the data, once, as measured.
        training: All steps of all students, as measured.
        online: For each student, the estimated time of a run with both teachers online.
    """

    cache: float
    training: float
    online: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the costs as the report holds them."""
        return {
            "cache_seconds": self.cache,
            "training_seconds": self.training,
            "total_seconds": self.cache + self.training,
            "online_seconds": self.online,
            "online_total_seconds": sum(self.online),
            "single_online_runs": (self.cache + self.training)
            / (sum(self.online) / len(self.online)),
            "how": HOW,
        }


def estimate_costs(
    outcomes: Sequence[Outcome], clocks: Sequence[StepClock], cache: HiddenStateCache | None
) -> Costs | None:
    """Estimate the costs.

    Args:
        outcomes: The outcome of each run.
        clocks: The clock of each run.
        cache: The cache that the runs read.

    Returns:
        The costs; None without a cache, or if a run has no measured step.
    """
    means = [clock.mean for clock in clocks]
    if cache is None or any(mean is None for mean in means):
        return None

    per_token = cache.facts["forward_seconds"] / cache.facts["input_tokens"]
    steps = [(mean or 0.0) * outcome.steps for mean, outcome in zip(means, outcomes, strict=True)]
    return Costs(
        cache=cache.facts["forward_seconds"],
        training=sum(steps),
        online=[
            seconds + per_token * (outcome.tokens_seen or 0)
            for seconds, outcome in zip(steps, outcomes, strict=True)
        ],
    )


def describe_costs(costs: Mapping[str, Any], students: int) -> str:
    """Return the costs of a report as one sentence."""
    return (
        f"{students} students took {costs['total_seconds']:.3g} s of computing "
        f"({costs['cache_seconds']:.3g} s for the cache, {costs['training_seconds']:.3g} s of "
        f"steps), as much as {costs['single_online_runs']:.3g} single runs with the teachers "
        f"online; {students} of those would take {costs['online_total_seconds']:.3g} s"
    )


def _join(
    runs: Sequence[Realignment],
    outcomes: Sequence[Outcome],
    cache: Callable[[], HiddenStateCache] | None,
) -> Outcome:
    """Return one outcome of several students, and write the report next to their folders."""
    folder = runs[0].output.parent
    was_read = cache is not None and any(run.clock.steps for run in runs)
    report = _write_report(folder, runs, outcomes, cache() if cache and was_read else None)
    return Outcome(
        output=folder,
        steps=sum(outcome.steps for outcome in outcomes),
        students=tuple(outcomes),
        report=report,
    )


def _write_report(
    folder: Path,
    runs: Sequence[Realignment],
    outcomes: Sequence[Outcome],
    cache: HiddenStateCache | None,
) -> dict[str, Any]:
    """Write ``report.json`` and ``report.md``; return the content of the former.

    Of several processes only the first writes.
    """
    students = [
        {"lambda": run.recipe.lam, **outcome.to_json(), **_last_figures(outcome.output)}
        | {"seconds_per_step": run.clock.mean}
        for run, outcome in zip(runs, outcomes, strict=True)
    ]
    costs = estimate_costs(outcomes, [run.clock for run in runs], cache)
    report = {
        "teacher": runs[0].recipe.teacher,
        "cache": str(cache.folder) if cache else None,
        "students": students,
        "cost": costs.to_json() if costs else None,
    }
    with one_process() as is_first, writing("the report", folder, remains="all students stand"):
        if is_first:
            write_json(folder / "report.json", report)
            write_text(folder / "report.md", _to_markdown(report, costs))
    return report


def _last_figures(output: Path) -> dict[str, Any]:
    """Return the last measured divergence and distances of a run, nats per response token."""
    checkpoint = newest_complete(output).path
    logs = trainer_state(checkpoint)["log_history"] if checkpoint else []
    last: dict[str, Any] = next((row for row in reversed(logs) if "divergence" in row), {})
    return {name: last.get(name) for name in _FIGURES}


def _to_markdown(report: dict[str, Any], costs: Costs | None) -> str:
    students = report["students"]
    measured = all(student["curve"] for student in students)
    graded = measured and all("accuracy" in student["curve"][-1] for student in students)

    head = ["λ", "steps", *(name.replace("_", " ") for name in _FIGURES)]
    head += (["tokens per answer"] if measured else []) + (["accuracy"] if graded else [])
    head += ["seconds per step", "folder"]

    rows = []
    for student in students:
        last: dict[str, Any] = student["curve"][-1] if student["curve"] else {}
        row = [f"{student['lambda']:g}", str(student["steps"])]
        row += [_as_text(student[name], ".4f") for name in _FIGURES]
        row += [f"{last['tokens']:.1f}"] if measured else []
        row += [f"{last['accuracy']:.3f}"] if graded else []
        row += [_as_text(student["seconds_per_step"], ".3g"), f"`{student['output']}`"]
        rows.append(row)

    parts = ["# Students of several λ", table(head, rows)]
    parts.append("Divergence and KL to either model are the last logged, in nats per token.")
    if costs:
        parts.append(f"{describe_costs(costs.to_json(), len(rows)).capitalize()}. {HOW}")
    return "\n\n".join(parts) + "\n"


def _as_text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
