"""What a training run tells while it goes, and who listens. Needs no torch."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StepObserver:
    """Is told of a training's steps, as transformers' ``TrainerCallback`` is; this one is silent."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The steps begin, at ``state.global_step`` of ``state.max_steps``."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Figures are logged: ``loss``, ``divergence``, ``lambda``, …."""


class Events:
    """Is told of a run; derive from it and override what you want to hear.

    Notes and cautions become warnings; everything else is silent.
    """

    def say(self, line: str) -> None:
        """A run goes on from a checkpoint, passes one over, or merges: one line for people."""

    def note(self, line: str) -> None:
        """There is something that people may want to act on."""
        warnings.warn(line, stacklevel=3)

    def caution(self, line: str) -> None:
        """A setting is likely to make a poor model."""
        warnings.warn(line, stacklevel=3)

    def begin(self, run: Any) -> None:
        """A run is about to train what is left of it; `run` has its `recipe` and its `state`."""

    def measured(self, row: dict[str, Any]) -> None:
        """The student answered the recipe's prompts: a row of ``curve.jsonl``."""

    @contextmanager
    def training(self, name: str) -> Iterator[StepObserver]:
        """Surround one training; give what is told of its steps.

        Args:
            name: ``"steps"``, or which round it is.
        """
        yield StepObserver()

    @contextmanager
    def filling(self, tokens: int) -> Iterator[Callable[[int], None]]:
        """Surround the filling of a cache; give what is told how many tokens are there.

        Args:
            tokens: How many there are to be.
        """
        yield lambda done: None
