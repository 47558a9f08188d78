"""The events of a training run, and their observers. Does not import torch."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StepObserver:
    """Receives the steps of a training, as transformers' ``TrainerCallback`` does.

    The methods of this class do nothing. Override those that you need.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the first step, at ``state.global_step`` of ``state.max_steps``."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after each step."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Called with logged figures: ``loss``, ``divergence``, ``lambda``, …."""


class Events:
    """Receives the events of a run. Derive from it and override the methods that you need.

    In this class notes and cautions become warnings, and the other methods do nothing.
    """

    def say(self, line: str) -> None:
        """Called with a message of one line, for example that a run resumes from a checkpoint."""

    def note(self, line: str) -> None:
        """Called with a message on which the user may want to act."""
        warnings.warn(line, stacklevel=3)

    def caution(self, line: str) -> None:
        """Called with a message that a setting is likely to give a poor model."""
        warnings.warn(line, stacklevel=3)

    def begin(self, run: Any) -> None:
        """Called before a run trains; `run` has its `recipe` and its `state`."""

    def measured(self, row: dict[str, Any]) -> None:
        """Called with each measurement of the student's answers: a row of ``curve.jsonl``."""

    @contextmanager
    def training(self, name: str) -> Iterator[StepObserver]:
        """Surround one training; yield the observer of its steps.

        Args:
            name: ``"steps"``, or the name of the round.
        """
        yield StepObserver()

    @contextmanager
    def filling(self, tokens: int) -> Iterator[Callable[[int], None]]:
        """Surround the filling of a cache; yield a function that is called with the tokens written.

        Args:
            tokens: The number of tokens in all.
        """
        yield lambda done: None
