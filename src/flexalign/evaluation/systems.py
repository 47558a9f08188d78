"""The samples that a sweep requests from a system, and the settings of each kind of system."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from flexalign.lambdas import AS_IT_IS, Exit, Fixed, Ladder, Setting, unique_settings
from flexalign.systems import Answer, Failure, Messages, System

_DEFAULT_LAMBDAS = (0.0, 0.5, 1.0)


class Key(NamedTuple):
    """The key of a sample, unique among the samples of a system."""

    setting: str
    task: str
    question: str
    sample: int


@dataclass(frozen=True)
class Cell:
    """One sample to be drawn: a :class:`flexalign.systems.Request` with a task's question.

    Attributes:
        setting: The setting of the system's dial.
        task: The task's name.
        question: The question's id in its task.
        sample: The number of the sample among those of the question, from 0.
        seed: Seed of its sampling; the same at every setting.
        messages: The messages that ask the question.
    """

    setting: Setting
    task: str
    question: str
    sample: int
    seed: int
    messages: Messages

    @property
    def key(self) -> Key:
        """Its key among the system's samples."""
        return Key(self.setting.id, self.task, self.question, self.sample)

    @property
    def prompt(self) -> tuple[str, str]:
        """The key of its question: task and question id."""
        return self.task, self.question

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"question {self.question} of {self.task}"


Outcome: TypeAlias = tuple[Cell, Answer | Failure]
"""A requested sample, with its answer or the failure."""


def settings_of(system: System, asked: Sequence[Setting]) -> list[Setting]:
    """Return those of the requested settings that a system supports, or its defaults.

    A model has the setting ``as it is``, and exit policies. Interpolated weights support numbers and
    ladders, which no other system does. If no setting is requested, a local dial is measured at λ = 0, 0.5 and 1, and a server
    ``as it is``.
    """
    if system.kind == "model":
        return [AS_IT_IS, *(setting for setting in asked if isinstance(setting.dial, Exit))]
    if system.kind == "url" and not asked:
        return [AS_IT_IS]
    settings = list(asked) or unique_settings(_DEFAULT_LAMBDAS)
    if system.kind == "interpolate":
        return [setting for setting in settings if isinstance(setting.dial, Fixed | Ladder)]
    return [setting for setting in settings if not isinstance(setting.dial, Ladder)]


def tell_apart(folders: Sequence[Path]) -> list[str]:
    """Return the fewest trailing parts of each path that make all of them differ.

    Example:
        >>> tell_apart([Path("a/out"), Path("b/out")])
        ['a/out', 'b/out']

    Args:
        folders: Resolved paths, at least one, none twice.
    """
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest + 1):
        labels = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels
