"""A training run from start to finish, whatever it trains: rounds, resumption, publication.

A run is a recipe with its data. Making one decides, before anything expensive, whether its output
folder may be used: the folder is new, or it holds this very run. Running it trains each round from
the newest complete checkpoint, makes the result a folder that explains itself, and returns an
`Outcome`. A realignment may have several rounds; everything else has one.
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
from flexalign.lambdas import Schedule
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
    """A signal stopped the run after a checkpoint; the same call goes on from there.

    Attributes:
        checkpoint: Its folder.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        output: The folder of what was trained; of several λ, the one that holds their folders.
        steps: Optimizer steps (of a realignment, of the last round).
        measures: What an adapter's training, or a baking, measured: the last logged loss and, of a
            baking, the divergences on rows held out.
        trained_parameters: Of an adapter's training, how many there are.
        merged: The plain model of a LoRA student, if asked for.
        effective_lambda: Of a realignment, λ^rounds.
        tokens_seen: Of a realignment, the last round's input tokens, without padding.
        curve: What the watcher measured in it.
        students: Of several λ, the outcome of each.
        report: Of several λ, what ``report.json`` says of them.
    """

    output: Path
    steps: int
    measures: dict[str, float] = field(default_factory=dict)
    trained_parameters: int | None = None
    merged: Path | None = None
    effective_lambda: float | None = None
    tokens_seen: int | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    students: tuple["Outcome", ...] = ()
    report: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        if self.students:
            return self.report
        if self.effective_lambda is None:
            return {"output": str(self.output), "steps": self.steps, **self.measures}
        return {
            "output": str(self.output),
            "merged": str(self.merged) if self.merged else None,
            "effective_lambda": self.effective_lambda,
            "steps": self.steps,
            "tokens_seen": self.tokens_seen,
            "curve": self.curve,
        }


class RunOptions(TypedDict, total=False):
    """What `realign`, `adapt` and `bake` take beside a recipe; see there."""

    skip_bad_rows: bool
    events: Events | None
    callbacks: Sequence[TrainerCallback]
    command: str


# Rounds. TrRa-iter realigns the reference again and again, each time from the last one's result.

LARGEST_EFFECTIVE_LAMBDA = 4.0
"""How far extrapolation goes without a word: several rounds beyond it are allowed only on request,
and one beyond it without a gate gets a caution. Measured on the miniature without a gate, an
effective λ of 4 still has more accuracy than the reference, and λ = 5 less (docs/results.md)."""


@dataclass(frozen=True)
class Round:
    """One training of a run.

    Attributes:
        number: From 1.
        aligned: Path or name of the aligned model of this round; None where there is none.
        output: Folder of its result, a complete model.
    """

    number: int
    aligned: str | None
    output: Path


def plan_rounds(aligned: str | None, output: str | Path, rounds: int) -> list[Round]:
    """Lay out the rounds: round i takes the result of round i−1 as the aligned model.

    The last one writes to `output`, the others to ``output/round-1``, ``output/round-2``, ….
    """
    output = Path(output)
    folders = [output / f"round-{number}" for number in range(1, rounds)] + [output]
    teachers = [aligned, *map(str, folders[:-1])]
    return [
        Round(number, teacher, folder)
        for number, (teacher, folder) in enumerate(zip(teachers, folders, strict=True), start=1)
    ]


def effective_lambda(lam: Any, rounds: int, *, extrapolate: bool = False) -> float:
    """Return what λ several rounds amount to in exact algebra: λ^rounds.

    With h the logits, a round gives r + λ(a − r); the next one, with that in the place of a, gives
    r + λ²(a − r). A schedule counts by its end value.

    Args:
        lam: A number or a schedule.
        rounds: How many.
        extrapolate: Allow several rounds beyond `LARGEST_EFFECTIVE_LAMBDA`.

    Raises:
        ConfigError: If it is beyond that and not allowed. A single round takes any λ.
    """
    end = (lam if isinstance(lam, Schedule) else Schedule.parse(lam)).end_value
    effective = float(end**rounds)
    if rounds > 1 and abs(effective) > LARGEST_EFFECTIVE_LAMBDA and not extrapolate:
        raise ConfigError(
            f"{rounds} rounds at λ={end:g} amount to λ={effective:g}, beyond "
            f"{LARGEST_EFFECTIVE_LAMBDA:g}, where models usually break; take fewer rounds or a "
            "smaller λ, or allow it with --extrapolate."
        )
    return effective


class TrainingRun(ABC):
    """A recipe with its data, ready to run or to go on where it stopped.

    Args:
        recipe: What to do.
        data: The training data as it is trained on.
        tokenizer: The models'.
        models: Fingerprints of all models and adapters that take part.
        command: The command line, for the model card.
        events: Is told what happens.

    Attributes:
        state: ``"new"``, ``"unfinished"`` or ``"done"``, as the output folder was found.
        clock: Seconds of the steps that were taken.

    Raises:
        ConfigError: If the folder holds another run.
    """

    measures_after: ClassVar[bool] = False
    """Whether a trainer is needed even if nothing is left to train, to measure what came of it."""

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
        """Train what is not trained yet, and return what came of it.

        Args:
            callbacks: More callbacks for the trainers.
            stop: Ends training early on a signal.

        Raises:
            Stopped: If it did.
            CheckpointError: If the output folder cannot be written to.
        """
        stop = stop or StopOnSignal()
        self._events.begin(self)
        with one_process() as is_first:
            # Before the first of several rounds: their folders lie inside this one.
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
        """Train one round, or what is left of it; return its last checkpoint and the measures."""
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
            self._events.say(f"{name}reference {self.recipe.reference}, aligned {round_.aligned}")

    def _publish(self, round_: Round, checkpoint: Path, measures: dict[str, float]) -> None:
        """Make the round's folder a complete model: weights, tokenizer, card, manifest."""
        facts = self._facts_of(round_, trainer_state(checkpoint), measures)
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

    # What depends on the kind of run.

    @abstractmethod
    def _trainer(
        self, callbacks: list[TrainerCallback], round_: Round
    ) -> AbstractContextManager[Any]:
        """Load the models and give their trainer."""

    @abstractmethod
    def _describe_models(self, prints: list[str | None]) -> dict[str, Any]:
        """Return what of the models decides the weights, by its name in ``run.json``."""

    def _plan_rounds(self) -> list[Round]:
        return plan_rounds(None, self.output, 1)

    def _identity_of(self, round_: Round) -> dict[str, Any]:
        return dict(self._identity)

    def _callbacks(self) -> list[TrainerCallback]:
        """Return what is to happen beside the steps."""
        return []

    def _facts_of(
        self, round_: Round, state: dict[str, Any], measures: dict[str, float]
    ) -> dict[str, Any]:
        """Return what the manifest and the card say of a round that is done."""
        facts = {name: value for name, value in self._facts.items() if name != "task"}
        return {"steps": state["global_step"], "measures": measures, **facts}

    def _measure(self, checkpoint: Path, trainer: Any) -> dict[str, float]:
        """Measure what came of it; without a trainer if there was nothing left to train."""
        losses = [row["loss"] for row in trainer_state(checkpoint)["log_history"] if "loss" in row]
        return {"loss": float(losses[-1])} if losses else {}

    def _outcome(self, manifest: dict[str, Any]) -> Outcome:
        return Outcome(self.output, manifest["steps"], measures=manifest["measures"])


# The steps of a run: go on from what is whole, train, publish the result.

# What a checkpoint holds beside the model: the trainer's own state, FSDP's and DeepSpeed's.
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
    """Tell the first of several processes that it is; all leave the block together."""
    state = PartialState()
    state.wait_for_everyone()
    yield state.is_main_process
    state.wait_for_everyone()


def drop_broken(found: Found, say: Callable[[str], None]) -> None:
    """Remove checkpoints that cannot be used, and say why."""
    for path, reason in found.passed_over:
        say(f"passed over {path}: {reason}")
        shutil.rmtree(path, ignore_errors=True)


def train_onwards(trainer: Any, found: Found, stop: StopOnSignal) -> Path:
    """Train from a checkpoint, or from the start, to the end; return the last checkpoint.

    Args:
        trainer: A trainer with sealed checkpoints, which has `stop` among its callbacks.
        found: The newest complete checkpoint of its output folder, if there is one.
        stop: Ends training early on a signal.

    Raises:
        Stopped: If it did.
        CheckpointError: If there is no checkpoint at the end, or another process is lost.
    """
    for printer in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(printer)
    output = Path(trainer.args.output_dir)
    with stop.listening(), _together(output):
        trainer.train(resume_from_checkpoint=str(found.path) if found.path else None)

    checkpoint = newest_complete(output).path
    if checkpoint is None:
        raise CheckpointError(f"training ended without a checkpoint in {output}.")
    if stop.requested and not is_last(checkpoint):
        raise Stopped(checkpoint)
    return checkpoint


@contextmanager
def _together(output: Path) -> Iterator[None]:
    """Turn the loss of another process of the run into one sentence."""
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
    # Gloo's are plain RuntimeErrors that begin with the place in its source.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def publish(checkpoint: Path, output: Path, card: str, **facts: Any) -> None:
    """Make the run's folder a complete model: weights, tokenizer, card, manifest with facts.

    Raises:
        CheckpointError: If the folder cannot be written to.
    """
    with writing("the model", output):
        leave_out = shutil.ignore_patterns(*_TRAINER_FILES)
        shutil.copytree(checkpoint, output, ignore=leave_out, dirs_exist_ok=True)
        write_text(output / "README.md", card)
        seal(output, **facts)


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read the trainer's state out of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    return state


def is_last(checkpoint: Path) -> bool:
    """Whether nothing is left to train after a checkpoint."""
    state = trainer_state(checkpoint)
    return bool(state["global_step"] >= state["max_steps"])
