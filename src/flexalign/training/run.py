"""One recipe from start to finish: rounds, resumption, and a model folder that explains itself."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from flexalign._storage import write_text
from flexalign.data import data_fingerprint
from flexalign.errors import CheckpointError, ConfigError, FlexAlignError
from flexalign.lambdas import Schedule
from flexalign.models.loading import load_adapter, load_model
from flexalign.training.callbacks import StopOnSignal, read_curve
from flexalign.training.card import model_card, versions_in_use
from flexalign.training.checkpoints import (
    MANIFEST,
    Found,
    newest_complete,
    seal,
    what_stands,
    writing,
)
from flexalign.training.hidden_cache import HiddenStateCache
from flexalign.training.output import claim_output, state_of_output
from flexalign.training.recipes import Recipe
from flexalign.training.trainer import TrRaTrainer

# The stages of every training run: go on from what is whole, train, publish the result.

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


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the run after a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


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
            f"({' '.join(str(error).split())[:200]}); {what_stands(output)}: start all processes again, "
            "the run goes on from there."
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


# TrRa-iter: realign the reference again and again, each time from the last round's result.

LARGEST_EFFECTIVE_LAMBDA = 4.0
"""How far extrapolation goes without a word: several rounds beyond it are allowed only on request,
and one beyond it without a gate gets a caution. Measured on the miniature without a gate, an
effective λ of 4 still has more accuracy than the reference, and λ = 5 less (docs/results.md)."""


@dataclass(frozen=True)
class Round:
    """One realignment of the original reference.

    Attributes:
        number: From 1.
        aligned: Path or name of the aligned model of this round.
        output: Folder of its result, a complete model.
    """

    number: int
    aligned: str
    output: Path


def plan_rounds(aligned: str, output: str | Path, rounds: int) -> list[Round]:
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
    """What λ several rounds amount to in exact algebra: λ^rounds.

    With h the logits, a round gives r + λ(a − r); the next one, with that in the place of a, gives
    r + λ²(a − r). A schedule counts by its end value.

    Args:
        lam: A number or a schedule.
        rounds: How many.
        extrapolate: Allow several rounds beyond `LARGEST_EFFECTIVE_LAMBDA`.

    Raises:
        ConfigError: If it is beyond that and not allowed. A single round takes any λ.
    """
    end = Schedule.parse(lam).end_value
    effective = float(end**rounds)
    if rounds > 1 and abs(effective) > LARGEST_EFFECTIVE_LAMBDA and not extrapolate:
        raise ConfigError(
            f"{rounds} rounds at λ={end:g} amount to λ={effective:g}, beyond "
            f"{LARGEST_EFFECTIVE_LAMBDA:g}, where models usually break; take fewer rounds or a "
            "smaller λ, or allow it with --extrapolate."
        )
    return effective


@dataclass(frozen=True)
class Outcome:
    """A finished realignment.

    Attributes:
        output: The model's folder.
        merged: The plain model of a LoRA student, if asked for.
        effective_lambda: λ^rounds.
        steps: Optimizer steps of the last round.
        tokens_seen: Its input tokens, without padding.
        curve: What the watcher measured in it.
    """

    output: Path
    merged: Path | None
    effective_lambda: float
    steps: int
    tokens_seen: int
    curve: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "output": str(self.output),
            "merged": str(self.merged) if self.merged else None,
            "effective_lambda": self.effective_lambda,
            "steps": self.steps,
            "tokens_seen": self.tokens_seen,
            "curve": self.curve,
        }


class Realignment:
    """A recipe with its data, ready to run or to go on where it stopped.

    Making one decides whether the output folder may be used, before anything expensive.

    Args:
        recipe: What to do.
        traces: The training data, from ``flexalign.data.load_traces``.
        tokenizer: The pair's.
        pair: Fingerprints of reference and aligned model.
        command: The command line, for the model card.
        cache: Opens the teachers' hidden states, making what is missing of them, for a recipe with
            ``teacher: cached``; None: they are in the recipe's folder already.
        extrapolate: Allow several rounds beyond an effective λ of 4.
        say: Is given one line at a time for people.

    Raises:
        ConfigError: If the folder holds another run, or the effective λ is too large.
    """

    def __init__(
        self,
        recipe: Recipe,
        traces: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pair: tuple[str | None, str | None],
        command: str,
        cache: Callable[[], HiddenStateCache] | None = None,
        extrapolate: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.recipe = recipe
        self.traces, self.tokenizer = traces, tokenizer
        self._command, self._say, self._cache = command, say, cache
        effective_lambda(recipe.lam, recipe.rounds, extrapolate=extrapolate)
        self.rounds = plan_rounds(recipe.aligned, recipe.output, recipe.rounds)
        self._identity = recipe.identity() | {
            "pair": list(pair),
            "data": data_fingerprint(traces),
        }
        self.state = state_of_output(self.rounds[-1].output, self._identity_of(self.rounds[-1]))

    def run(
        self, callbacks: Callable[[Round], Sequence[TrainerCallback]], stop: StopOnSignal
    ) -> Outcome:
        """Train all rounds that are not done yet, and return what came of it.

        Args:
            callbacks: Makes a round's callbacks (watcher, progress).
            stop: Ends training early on a signal.

        Raises:
            Stopped: If it did.
            CheckpointError: If the output folder cannot be written to.
        """
        last = self.rounds[-1]
        with one_process() as is_first:
            if is_first:
                claim_output(last.output, self._identity_of(last))
        for round_ in self.rounds:
            if state_of_output(round_.output, self._identity_of(round_)) != "done":
                checkpoint = self._train(round_, callbacks(round_), stop)
                with one_process() as is_first:
                    if is_first:
                        self._finish(round_, checkpoint)
        merged = Path(self.recipe.output) / "merged" if self.recipe.merge else None
        if merged is not None:
            with one_process() as is_first:
                if is_first:
                    self._merge(merged)
        manifest = json.loads((last.output / MANIFEST).read_text(encoding="utf-8"))
        return Outcome(
            output=last.output,
            merged=merged,
            effective_lambda=effective_lambda(
                self.recipe.lam, self.recipe.rounds, extrapolate=True
            ),
            steps=manifest["steps"],
            tokens_seen=manifest["tokens_seen"],
            curve=read_curve(last.output),
        )

    def _identity_of(self, round_: Round) -> dict[str, Any]:
        return self._identity | {"round": round_.number}

    def _train(
        self, round_: Round, callbacks: Sequence[TrainerCallback], stop: StopOnSignal
    ) -> Path:
        """Train one round, or what is left of it; return its last checkpoint."""
        args = self.recipe.training_arguments(round_.output)
        found = newest_complete(round_.output)
        with one_process() as is_first:
            if is_first:
                claim_output(round_.output, self._identity_of(round_))
                self._say_where_it_starts(round_, found)
        if found.path is not None and is_last(found.path):
            return found.path
        trainer = TrRaTrainer(
            reference=self.recipe.reference,
            aligned=round_.aligned,
            args=args,
            train_dataset=self.traces,
            processing_class=self.tokenizer,
            peft_config=self.recipe.peft_config(),
            cache=self._cache() if self._cache and args.teacher == "cached" else None,
            callbacks=[stop, *callbacks],
        )
        return train_onwards(trainer, found, stop)

    def _say_where_it_starts(self, round_: Round, found: Found) -> None:
        drop_broken(found, self._say)
        name = f"round {round_.number} of {len(self.rounds)}: " if len(self.rounds) > 1 else ""
        if found.path is not None:
            self._say(f"{name}going on from {found.path}")
        elif name:
            self._say(f"{name}reference {self.recipe.reference}, aligned {round_.aligned}")

    def _finish(self, round_: Round, checkpoint: Path) -> None:
        """Make the round's folder a complete model: weights, tokenizer, card, manifest."""
        state = trainer_state(checkpoint)
        facts = {
            "steps": state["global_step"],
            "tokens_seen": state["num_input_tokens_seen"],
            "pair": self._identity["pair"],
            "data": self._identity["data"],
        }
        effective = effective_lambda(self.recipe.lam, round_.number, extrapolate=True)
        card = model_card(
            self.recipe,
            command=self._command,
            facts=facts,
            curve=read_curve(round_.output),
            round_number=round_.number,
            effective=effective,
        )
        publish(
            checkpoint,
            round_.output,
            card,
            **facts,
            round=round_.number,
            effective_lambda=effective,
            recipe=self.recipe.to_tree(),
            command=self._command,
            versions=versions_in_use(),
        )

    def _merge(self, merged: Path) -> None:
        if (merged / MANIFEST).exists():
            return
        self._say(f"merging the adapter into a plain model, {merged}")
        model = load_model(self.recipe.reference, allow_pickle=self.recipe.allow_pickle)
        model = load_adapter(model, self.recipe.output).merge_and_unload()
        with writing("the merged model", Path(self.recipe.output)):
            model.save_pretrained(merged)
            self.tokenizer.save_pretrained(merged)
            seal(merged, recipe=self.recipe.to_tree(), versions=versions_in_use())
