"""What came of asking: right or wrong and how long, by question and sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from flexalign.errors import DataError

__all__ = ["Ask", "Ledger", "Outcomes"]


@dataclass(frozen=True)
class Outcomes:
    """Answers of one setting to n questions, k samples each.

    Attributes:
        correct: Whether each is right, shape (n, k), bool.
        tokens: Length of each, shape (n, k).

    Raises:
        DataError: If the two differ in shape, or are not (n, k).
    """

    correct: NDArray[np.bool_]
    tokens: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.correct.ndim != 2 or self.correct.shape != self.tokens.shape:
            raise DataError(
                "outcomes need `correct` and `tokens` of one shape (questions, samples), got "
                f"{self.correct.shape} and {self.tokens.shape}."
            )

    @property
    def questions(self) -> int:
        """How many questions were asked."""
        return len(self.correct)

    @property
    def samples(self) -> int:
        """How many answers there are in all."""
        return int(self.correct.size)

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.correct.mean())

    @property
    def mean_tokens(self) -> float:
        """Mean tokens an answer."""
        return float(self.tokens.mean())

    @property
    def clusters(self) -> list[int]:
        """The question of each sample, for intervals over the flattened values."""
        n, k = self.correct.shape
        return np.repeat(np.arange(n), k).tolist()

    def rows(self, places: Sequence[int]) -> "Outcomes":
        """The outcomes at these places, in this order."""
        return Outcomes(self.correct[places], self.tokens[places])

    def joined(self, other: "Outcomes") -> "Outcomes":
        """These outcomes and then another's, of as many samples."""
        return Outcomes(
            np.concatenate([self.correct, other.correct]),
            np.concatenate([self.tokens, other.tokens]),
        )

    def share_right(self) -> NDArray[np.float64]:
        """Share of right answers a question, shape (n,)."""
        return np.asarray(self.correct.mean(1), dtype=np.float64)


Ask: TypeAlias = Callable[[str, Sequence[str], int], Outcomes]
"""`ask(setting, questions, samples)`: put each question `samples` times, in this order."""


class Ledger:
    """Asks each question of a setting once, and counts what that took.

    Args:
        ask: How samples are drawn.
        samples: Samples a question.
    """

    def __init__(self, ask: Ask, samples: int) -> None:
        self._ask = ask
        self._samples = samples
        self._places: dict[str, dict[str, int]] = {}
        self._known: dict[str, Outcomes] = {}
        self.spent: dict[str, int] = {}
        """Samples drawn so far, by setting."""

    def outcomes(self, setting: str, questions: Sequence[str]) -> Outcomes:
        """Return the answers to these questions, asking those that are new.

        Raises:
            DataError: If what was asked came back in another shape.
        """
        places = self._places.setdefault(setting, {})
        new = [question for question in questions if question not in places]
        if new:
            answers = self._ask(setting, new, self._samples)
            if answers.correct.shape != (len(new), self._samples):
                raise DataError(
                    f"{setting}: asked {len(new)} questions {self._samples} times each, got "
                    f"outcomes of shape {answers.correct.shape}."
                )
            places.update(zip(new, range(len(places), len(places) + len(new)), strict=True))
            known = self._known.get(setting)
            self._known[setting] = answers if known is None else known.joined(answers)
            self.spent[setting] = self.spent.get(setting, 0) + answers.samples
        return self._known[setting].rows([places[question] for question in questions])
