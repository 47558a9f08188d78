"""One recipe from start to finish: rounds, resumption, and a model folder that explains itself."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from flexalign.data import data_fingerprint
from flexalign.errors import CheckpointError
from flexalign.loading import load_model
from flexalign.trra.callbacks import StopOnSignal, read_curve
from flexalign.trra.card import model_card, versions_in_use
from flexalign.trra.checkpoints import MANIFEST, Found, newest_complete, seal, writing
from flexalign.trra.output import claim_output, state_of_output
from flexalign.trra.recipe import Recipe
from flexalign.trra.rounds import Round, effective_lambda, plan_rounds
from flexalign.trra.trainer import TrRaTrainer

__all__ = ["Outcome", "Realignment", "Stopped"]

# What a checkpoint holds beside the model: the trainer's own state.
_TRAINER_FILES = (
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    MANIFEST,
)


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the run after a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(str(checkpoint))
        self.checkpoint = checkpoint


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

    def to_dict(self) -> dict[str, Any]:
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
        extrapolate: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.recipe = recipe
        self.traces, self.tokenizer = traces, tokenizer
        self._command, self._say = command, say
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
        with _one_process() as is_first:
            if is_first:
                claim_output(last.output, self._identity_of(last))
        for round_ in self.rounds:
            if state_of_output(round_.output, self._identity_of(round_)) != "done":
                checkpoint = self._train(round_, callbacks(round_), stop)
                with _one_process() as is_first:
                    if is_first:
                        self._finish(round_, checkpoint)
        merged = Path(self.recipe.output) / "merged" if self.recipe.merge else None
        if merged is not None:
            with _one_process() as is_first:
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
        with _one_process() as is_first:
            if is_first:
                claim_output(round_.output, self._identity_of(round_))
                self._say_where_it_starts(round_, found)
        if found.path is not None and _is_last(found.path):
            return found.path
        trainer = TrRaTrainer(
            reference=self.recipe.reference,
            aligned=round_.aligned,
            args=args,
            train_dataset=self.traces,
            processing_class=self.tokenizer,
            peft_config=self.recipe.peft_config(),
            callbacks=[stop, *callbacks],
        )
        for printer in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(printer)
        with stop.listening():
            trainer.train(resume_from_checkpoint=str(found.path) if found.path else None)
        checkpoint = newest_complete(round_.output).path
        if checkpoint is None:
            raise CheckpointError(f"training ended without a checkpoint in {round_.output}.")
        if stop.requested and not _is_last(checkpoint):
            raise Stopped(checkpoint)
        return checkpoint

    def _say_where_it_starts(self, round_: Round, found: Found) -> None:
        for path, reason in found.passed_over:
            self._say(f"passed over {path}: {reason}")
            shutil.rmtree(path, ignore_errors=True)
        name = f"round {round_.number} of {len(self.rounds)}: " if len(self.rounds) > 1 else ""
        if found.path is not None:
            self._say(f"{name}going on from {found.path}")
        elif name:
            self._say(f"{name}reference {self.recipe.reference}, aligned {round_.aligned}")

    def _finish(self, round_: Round, checkpoint: Path) -> None:
        """Make the round's folder a complete model: weights, tokenizer, card, manifest."""
        state = _trainer_state(checkpoint)
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
        with writing("the model", round_.output):
            leave_out = shutil.ignore_patterns(*_TRAINER_FILES)
            shutil.copytree(checkpoint, round_.output, ignore=leave_out, dirs_exist_ok=True)
            (round_.output / "README.md").write_text(card, encoding="utf-8")
            seal(
                round_.output,
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
        from peft import PeftModel

        self._say(f"merging the adapter into a plain model, {merged}")
        model = load_model(self.recipe.reference)
        model = PeftModel.from_pretrained(model, self.recipe.output).merge_and_unload()
        with writing("the merged model", Path(self.recipe.output)):
            model.save_pretrained(merged)
            self.tokenizer.save_pretrained(merged)
            seal(merged, recipe=self.recipe.to_tree(), versions=versions_in_use())


@contextmanager
def _one_process() -> Iterator[bool]:
    """Tell the first of several processes that it is; all leave the block together."""
    state = PartialState()
    state.wait_for_everyone()
    yield state.is_main_process
    state.wait_for_everyone()


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    return state


def _is_last(checkpoint: Path) -> bool:
    state = _trainer_state(checkpoint)
    return bool(state["global_step"] >= state["max_steps"])
