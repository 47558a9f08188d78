"""A training run from start to finish: rounds, resuming, and publishing the result.

A run is a recipe with its data. Creating a `TrainingRun` checks, before any expensive work, that its
output folder is new or holds this same run. Running it trains each round from the newest complete
checkpoint, writes the result to the output folder with a model card and a manifest, and returns an
`Outcome`. A realignment may have several rounds; all other runs have one.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from flexalign._storage import write_text
from flexalign.data import data_fingerprint
from flexalign.errors import CheckpointError, ConfigError, FlexAlignError
from flexalign.lambdas import LambdaRange, parse_training_lambda
from flexalign.models.compatibility import RenamedToken
from flexalign.models.sources import name_base_by_id
from flexalign.training.callbacks import StepClock, StepRelay, StopOnSignal, read_curve
from flexalign.training.card import model_card, versions_in_use
from flexalign.training.checkpoints import (
    MANIFEST,
    Found,
    newest_complete,
    seal,
    what_stands,
    writing,
)
from flexalign.training.events import Events
from flexalign.training.output import claim_output, state_of_output


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the run after a checkpoint. The same call resumes it from there.

    Attributes:
        checkpoint: The checkpoint's folder.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        output: The folder of the trained model or adapter. With several λ, the folder that holds
            their folders.
        steps: Optimizer steps; of a realignment, those of the last round.
        measures: For `adapt` and `bake`, the last logged loss; for `bake` also the divergences on
            held-out rows, in nats per token.
        trained_parameters: For `adapt`, the number of trained parameters.
        merged: The folder of the merged model of a LoRA student, if the recipe asks for it.
        effective_lambda: For a realignment at one λ, λ^rounds.
        lambda_range: For a LoRA dial, the range of λ that it was trained over.
        tokens_seen: For a realignment, the input tokens of the last round, without padding.
        curve: For a realignment, the rows of ``curve.jsonl`` of the last round.
        students: With several λ, the outcome of each.
        report: With several λ, the content of ``report.json``.
    """

    output: Path
    steps: int
    measures: dict[str, float] = field(default_factory=dict)
    trained_parameters: int | None = None
    merged: Path | None = None
    effective_lambda: float | None = None
    lambda_range: LambdaRange | None = None
    tokens_seen: int | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    students: tuple["Outcome", ...] = ()
    report: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values; with several λ, the report."""
        if self.students:
            return self.report
        if self.tokens_seen is None:
            return {"output": str(self.output), "steps": self.steps, **self.measures}
        ranged = {} if self.lambda_range is None else {"lambda_range": self.lambda_range.values}
        return {
            "output": str(self.output),
            "merged": str(self.merged) if self.merged else None,
            "effective_lambda": self.effective_lambda,
            **ranged,
            "steps": self.steps,
            "tokens_seen": self.tokens_seen,
            "curve": self.curve,
        }


class RunOptions(TypedDict, total=False):
    """The keyword options that `realign`, `adapt` and `bake` share; they describe them."""

    skip_bad_rows: bool
    events: Events | None
    callbacks: Sequence[TrainerCallback]
    command: str


# Rounds. TrRa-iter realigns the reference repeatedly; each round's aligned model is the result of
# the round before.

LARGEST_EFFECTIVE_LAMBDA = 4.0
"""The largest λ without a caution or refusal. Beyond it, several rounds must be allowed explicitly,
and a single round without a gate gets a caution. Measured on the miniature without a gate, an
effective λ of 4 has a higher accuracy than the reference, and λ = 5 a lower one
(docs/results.md)."""


@dataclass(frozen=True)
class Round:
    """One training of a run.

    Attributes:
        number: The round's number, from 1.
        aligned: Path or name of the aligned model of this round; None for runs without one.
        output: Folder of the round's result, a complete model.
    """

    number: int
    aligned: str | None
    output: Path


def plan_rounds(aligned: str | None, output: str | Path, rounds: int) -> list[Round]:
    """Plan the rounds: round i takes the result of round i−1 as the aligned model.

    The last round writes to `output`, the others to ``output/round-1``, ``output/round-2``, ….
    """
    output = Path(output)
    folders = [output / f"round-{number}" for number in range(1, rounds)] + [output]
    teachers = [aligned, *map(str, folders[:-1])]
    return [
        Round(number, teacher, folder)
        for number, (teacher, folder) in enumerate(zip(teachers, folders, strict=True), start=1)
    ]


def effective_lambda(lam: Any, rounds: int, *, extrapolate: bool = False) -> float:
    """Return the effective λ of several rounds: λ^rounds.

    With r and a the logits of the reference and the aligned model, an exact first round gives
    r + λ(a − r). The second, with that result instead of a, gives r + λ²(a − r). A schedule counts
    with its end value, a range with its upper end.

    Args:
        lam: A number, a schedule or a range.
        rounds: Number of rounds.
        extrapolate: Allow several rounds beyond `LARGEST_EFFECTIVE_LAMBDA`.

    Raises:
        ConfigError: If several rounds exceed that and it is not allowed. One round takes any λ.
    """
    end = parse_training_lambda(lam).end_value
    effective = float(end**rounds)
    if rounds > 1 and abs(effective) > LARGEST_EFFECTIVE_LAMBDA and not extrapolate:
        raise ConfigError(
            f"{rounds} rounds at λ={end:g} amount to λ={effective:g}, beyond "
            f"{LARGEST_EFFECTIVE_LAMBDA:g}, where models usually break; take fewer rounds or a "
            "smaller λ, or allow it with --extrapolate."
        )
    return effective


class TrainingRun(ABC):
    """A recipe with its data, ready to run or to be resumed.

    Args:
        recipe: The recipe.
        data: The training data as the trainer takes it.
        tokenizer: The models' tokenizer.
        models: Fingerprints of all models and adapters of the run.
        command: The command line, for the model card.
        events: Receives progress and warnings.

    Attributes:
        state: ``"new"``, ``"unfinished"`` or ``"done"``: the state of the output folder when the
            run was created.
        clock: Measures the seconds of the optimizer steps.
        renamed: The special tokens that a pair was read by id at; none if it was not.

    Raises:
        ConfigError: If the folder holds another run.
    """

    measures_after: ClassVar[bool] = False
    """Whether the result is measured with a trainer, even if nothing is left to train."""

    renamed: tuple[RenamedToken, ...] = ()

    def __init__(
        self,
        recipe: Any,
        data: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        models: Sequence[str | None],
        command: str,
        events: Events | None = None,
    ) -> None:
        self.recipe, self.data, self.tokenizer = recipe, data, tokenizer
        self.output = Path(recipe.output)
        self.rounds = self._plan_rounds()
        self.clock = StepClock()
        self._command, self._events = command, events or Events()
        self._facts = self._describe_models(list(models)) | {"data": data_fingerprint(data)}
        self._identity: dict[str, Any] = recipe.identity() | self._facts
        self.state = state_of_output(self.output, self._identity_of(self.rounds[-1]))

    def run(
        self, callbacks: Sequence[TrainerCallback] = (), stop: StopOnSignal | None = None
    ) -> Outcome:
        """Train the rounds that are not done, and return the outcome.

        Args:
            callbacks: More callbacks for the trainers.
            stop: Ends training early on a signal.

        Raises:
            Stopped: If a signal ended training early.
            CheckpointError: If the output folder cannot be written to.
        """
        stop = stop or StopOnSignal()
        self._events.begin(self)
        with one_process() as is_first:
            # Before the first round, because the folders of earlier rounds are inside this one.
            if is_first and self.state != "done":
                claim_output(self.output, self._identity_of(self.rounds[-1]))

        for round_ in self.rounds:
            if state_of_output(round_.output, self._identity_of(round_)) != "done":
                checkpoint, measures = self._train(round_, callbacks, stop)
                with one_process() as is_first:
                    if is_first:
                        self._publish(round_, checkpoint, measures)

        manifest = json.loads((self.output / MANIFEST).read_text(encoding="utf-8"))
        return self._outcome(manifest)

    def _train(
        self, round_: Round, callbacks: Sequence[TrainerCallback], stop: StopOnSignal
    ) -> tuple[Path, dict[str, float]]:
        """Train one round, or the rest of it; return its last checkpoint and the measures."""
        found = newest_complete(round_.output)
        with one_process() as is_first:
            if is_first:
                claim_output(round_.output, self._identity_of(round_))
                drop_broken(found, self._events.say)
                self._say_where_it_starts(round_, found)
        if found.path is not None and is_last(found.path) and not self.measures_after:
            return found.path, self._measure(found.path, None)

        name = f"round {round_.number}" if len(self.rounds) > 1 else "steps"
        with self._events.training(name) as observer:
            ours = [stop, self.clock, *self._callbacks(), StepRelay(observer)]
            with self._trainer([*ours, *callbacks], round_) as trainer:
                checkpoint = train_onwards(trainer, found, stop)
                return checkpoint, self._measure(checkpoint, trainer)

    def _say_where_it_starts(self, round_: Round, found: Found) -> None:
        several = len(self.rounds) > 1
        name = f"round {round_.number} of {len(self.rounds)}: " if several else ""
        if found.path is not None:
            self._events.say(f"{name}going on from {found.path}")
        elif several:
            self._events.say(f"{name}reference {self.recipe.models[0]}, aligned {round_.aligned}")

    def _publish(self, round_: Round, checkpoint: Path, measures: dict[str, float]) -> None:
        """Make the round's folder a complete model: weights, tokenizer, card, manifest."""
        facts = self._facts_of(round_, trainer_state(checkpoint), measures)
        if self.renamed:
            facts["renamed"] = [token._asdict() for token in self.renamed]
        card = model_card(
            self.recipe,
            command=self._command,
            facts=facts,
            curve=read_curve(round_.output),
            round_number=round_.number,
            effective=facts.get("effective_lambda"),
        )
        publish(
            checkpoint,
            round_.output,
            card,
            **facts,
            recipe=self.recipe.to_tree(),
            command=self._command,
            versions=versions_in_use(),
        )

    # The parts that depend on the kind of run.

    @abstractmethod
    def _trainer(
        self, callbacks: list[TrainerCallback], round_: Round
    ) -> AbstractContextManager[Any]:
        """Load the models and return a context with their trainer."""

    @abstractmethod
    def _describe_models(self, prints: list[str | None]) -> dict[str, Any]:
        """Return what identifies the models in ``run.json``, by key.

        Args:
            prints: The models' fingerprints.
        """

    def _plan_rounds(self) -> list[Round]:
        return plan_rounds(None, self.output, 1)

    def _identity_of(self, round_: Round) -> dict[str, Any]:
        return dict(self._identity)

    def _callbacks(self) -> list[TrainerCallback]:
        """Return the callbacks of this kind of run."""
        return []

    def _facts_of(
        self, round_: Round, state: dict[str, Any], measures: dict[str, float]
    ) -> dict[str, Any]:
        """Return the facts of a finished round, for the manifest and the card."""
        facts = {name: value for name, value in self._facts.items() if name != "task"}
        return {"steps": state["global_step"], "measures": measures, **facts}

    def _measure(self, checkpoint: Path, trainer: Any) -> dict[str, float]:
        """Return the measures of a finished round.

        Args:
            checkpoint: Its last checkpoint.
            trainer: Its trainer; None if nothing was left to train.
        """
        losses = [row["loss"] for row in trainer_state(checkpoint)["log_history"] if "loss" in row]
        return {"loss": float(losses[-1])} if losses else {}

    def _outcome(self, manifest: dict[str, Any]) -> Outcome:
        return Outcome(self.output, manifest["steps"], measures=manifest["measures"])


# The steps of a run: find the newest complete checkpoint, train, publish the result.

# Files of a checkpoint that are not of the model: the state of the trainer, FSDP and DeepSpeed.
_TRAINER_FILES = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "pytorch_model_fsdp*",
    "global_step*",
    "latest",
    "zero_to_*.py",
    "trainer_state.json",
    "training_args.bin",
    MANIFEST,
)


@contextmanager
def one_process() -> Iterator[bool]:
    """Yield whether this is the first of several processes. All enter and leave the block together."""
    state = PartialState()
    state.wait_for_everyone()
    yield state.is_main_process
    state.wait_for_everyone()


def drop_broken(found: Found, say: Callable[[str], None]) -> None:
    """Delete checkpoints that cannot be used, and report the reasons with `say`."""
    for path, reason in found.passed_over:
        say(f"passed over {path}: {reason}")
        shutil.rmtree(path, ignore_errors=True)


def train_onwards(trainer: Any, found: Found, stop: StopOnSignal) -> Path:
    """Train from a checkpoint, or from the start, to the end. Return the last checkpoint.

    Args:
        trainer: A trainer with sealed checkpoints, which has `stop` among its callbacks.
        found: The newest complete checkpoint of its output folder, if there is one.
        stop: Ends training early on a signal.

    Raises:
        Stopped: If a signal ended training early.
        CheckpointError: If there is no checkpoint at the end, or another process is lost.
    """
    for printer in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printer)
    output = Path(trainer.args.output_dir)
    with stop.listening(), _reporting_lost_process(output):
        trainer.train(resume_from_checkpoint=str(found.path) if found.path else None)

    checkpoint = newest_complete(output).path
    if checkpoint is None:
        raise CheckpointError(f"training ended without a checkpoint in {output}.")
    if stop.requested and not is_last(checkpoint):
        raise Stopped(checkpoint)
    return checkpoint


@contextmanager
def _reporting_lost_process(output: Path) -> Iterator[None]:
    """Report the loss of another process of the run.

    Raises:
        CheckpointError: If the connection to another process is lost inside the block.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FlexAlignError) or not _is_lost_connection(error):
            raise
        raise CheckpointError(
            f"another process of this run ended or cannot be reached "
            f"({' '.join(str(error).split())[:200]}); {what_stands(output)}: start all processes "
            "again, the run goes on from there."
        ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    # Gloo raises plain RuntimeErrors, whose messages begin with a path in its source.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def publish(checkpoint: Path, output: Path, card: str, **facts: Any) -> None:
    """Make the run's folder a complete model.

    Args:
        checkpoint: The last checkpoint; its weights and tokenizer are copied.
        output: The run's folder.
        card: The text of the model card.
        **facts: More for the manifest.

    Raises:
        CheckpointError: If the folder cannot be written to.
    """
    with writing("the model", output):
        leave_out = shutil.ignore_patterns(*_TRAINER_FILES)
        shutil.copytree(
            checkpoint,
            output,
            ignore=leave_out,
            copy_function=shutil.copyfile,  # a checkpoint of an earlier version may be private
            dirs_exist_ok=True,
        )
        name_base_by_id(output)
        write_text(output / "README.md", card)
        seal(output, **facts)


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return the trainer's state of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    return state


def is_last(checkpoint: Path) -> bool:
    """Return whether a checkpoint is of the run's last step."""
    state = trainer_state(checkpoint)
    return bool(state["global_step"] >= state["max_steps"])
