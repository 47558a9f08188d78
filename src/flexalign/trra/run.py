"""One recipe from start to finish: rounds, resumption, and a model folder that explains itself."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from flexalign.data import data_fingerprint
from flexalign.loading import load_adapter, load_model
from flexalign.trra.cache import HiddenStateCache
from flexalign.trra.callbacks import StopOnSignal, read_curve
from flexalign.trra.card import model_card, versions_in_use
from flexalign.trra.checkpoints import MANIFEST, Found, newest_complete, seal, writing
from flexalign.trra.output import claim_output, state_of_output
from flexalign.trra.recipe import Recipe
from flexalign.trra.rounds import Round, effective_lambda, plan_rounds
from flexalign.trra.stages import (
    Stopped,
    drop_broken,
    is_last,
    one_process,
    publish,
    train_onwards,
    trainer_state,
)
from flexalign.trra.trainer import TrRaTrainer

__all__ = ["Outcome", "Realignment", "Stopped"]


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
