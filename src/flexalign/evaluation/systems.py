"""Systems as a sweep measures them: the samples that it asks for, and the settings of each kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from flexalign.lambdas import AS_IT_IS, Fixed, Setting, unique_settings
from flexalign.systems import Answer, Failure, Messages, System

_DEFAULT_LAMBDAS = (0.0, 0.5, 1.0)


class Key(NamedTuple):
    """What tells a system's samples apart."""

    setting: str
    task: str
    question: str
    sample: int


@dataclass(frozen=True)
class Cell:
    """One sample that is to be made: a :class:`flexalign.systems.Request` of a task's question.

    Attributes:
        setting: The dial.
        task: The task's name.
        question: The question's id in its task.
        sample: Which of the question's samples, from 0.
        seed: Of its sampling; the same at every setting.
        messages: The question as it is put.
    """

    setting: Setting
    task: str
    question: str
    sample: int
    seed: int
    messages: Messages

    @property
    def key(self) -> Key:
        """What tells it from the system's other samples."""
        return Key(self.setting.id, self.task, self.question, self.sample)

    @property
    def prompt(self) -> tuple[str, str]:
        """What tells its question from the others."""
        return self.task, self.question

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"question {self.question} of {self.task}"


Outcome: TypeAlias = tuple[Cell, Answer | Failure]
"""A sample that was asked for, with what came of it."""


def settings_of(system: System, asked: Sequence[Setting]) -> list[Setting]:
    """Choose the settings that a system can be asked at.

    A model has none but itself. Weights are interpolated at one number. Where nothing is asked a
    dial on this machine is measured at λ = 0, 0.5 and 1, and a server as it is.
    """
    if system.kind == "model" or (system.kind == "url" and not asked):
        return [AS_IT_IS]
    settings = list(asked) or unique_settings(_DEFAULT_LAMBDAS)
    if system.kind == "interpolate":
        return [setting for setting in settings if isinstance(setting.dial, Fixed)]
    return settings


def tell_apart(folders: Sequence[Path]) -> list[str]:
    """Return the fewest trailing parts of each path that make all of them differ.

    Example:
        >>> tell_apart([Path("a/out"), Path("b/out")])
        ['a/out', 'b/out']

    Args:
        folders: Resolved, at least one, none twice.
    """
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest + 1):
        labels = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels
