"""The small world: sums of a few numbers, with thinking whose habits are probabilities.

A question is a sum of 3 to 5 numbers from 1 to 9. The trace adds one number at a time, in numbered
lines. A *line* ``#k a + b = s`` is wrong by ±1 with probability `error`. With probability `check` a
*pass* follows, which writes the line again: a right line is confirmed; a wrong one is corrected
with probability `catch`, and else repeated. After each pass another one follows with probability
`again`: it is redundant if the line is right, and another chance if it is wrong. ``;`` ends the
line. Before each further line the trace gives up with probability `quit`, although numbers are
left. At the end come ``</think>`` and the running sum as the answer::

    3 + 8 + 5 ?  <think> #1 3 + 8 = 10 check 3 + 8 = 11 ; #2 11 + 5 = 16 ; </think> 16

Each number is one token, so each habit is decided at one token, and equation 5 has a closed form
(:mod:`flexalign.miniature.closed_form`).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

TERMS = (3, 4, 5)
"""The numbers of terms of a question, equally likely."""

LARGEST_TERM = 9
LARGEST_NUMBER = 49
"""The largest sum: 5 × 9, plus 1 for each of four lines that may be wrong by +1."""

LINE_TOKENS = 6
"""Tokens of a line, ``#k a + b = s``."""
PASS_TOKENS = 6
"""Tokens of a pass, ``check a + b = v``."""
END_TOKENS = 1
"""Tokens of the end of a line, ``;``."""
FRAME_TOKENS = 3
"""Tokens of ``<think>``, ``</think>`` and the answer; the end-of-sequence token is not counted."""

Habit: TypeAlias = Literal["error", "check", "again", "catch", "quit"]


@dataclass(frozen=True)
class Habits:
    """The habits of a model: five probabilities.

    Attributes:
        error: ε, the probability that a line is written wrong (by +1 or −1, equally likely).
        check: c, the probability that a line is checked at least once.
        again: r, the probability that another pass follows a pass.
        catch: q, the probability that a pass over a wrong line corrects it.
        quit: The probability that the trace gives up before a further line.
    """

    error: float
    check: float
    again: float
    catch: float
    quit: float


REFERENCE = Habits(error=0.35, check=0.995, again=0.7, catch=0.45, quit=0.003)
ALIGNED = Habits(error=0.24, check=0.99, again=0.55, catch=0.45, quit=0.006)
CONCISE = replace(REFERENCE, again=ALIGNED.again)
"""The reference with fewer passes, and with the same skill: λ < 0 gives more passes and nothing else,
so it corrects more lines."""

SYSTEM = "check ;"
"""The system message under which the *hybrid* has the aligned habits, in the world's own words:
check, then end the line. Without it the hybrid has the reference's habits."""


@dataclass(frozen=True)
class Question:
    """A question: a sum of numbers.

    Attributes:
        terms: The numbers.
    """

    terms: tuple[int, ...]

    @property
    def text(self) -> str:
        """The question as a user types it."""
        return " + ".join(map(str, self.terms)) + " ?"

    @property
    def answer(self) -> int:
        """The right sum."""
        return sum(self.terms)


@dataclass(frozen=True)
class Branch:
    """A position in a trace where a habit decides the next token.

    Attributes:
        habit: The habit.
        position: Index of the token in the trace.
        event: The tokens of the habit's event, equally likely.
        otherwise: The token if the event does not happen.
        happened: Whether the event happened in the trace. For `error`, any token except the right
            sum counts.
    """

    habit: Habit
    position: int
    event: tuple[str, ...]
    otherwise: str
    happened: bool

    def distribution(self, habits: Habits) -> dict[str, float]:
        """Return the probability of each possible token at this position, under given habits."""
        chance: float = getattr(habits, self.habit)
        return {self.otherwise: 1 - chance} | {
            token: chance / len(self.event) for token in self.event
        }


def sample_question(rng: random.Random) -> Question:
    """Draw a question: 3 to 5 numbers from 1 to 9, all equally likely."""
    return Question(tuple(rng.randint(1, LARGEST_TERM) for _ in range(rng.choice(TERMS))))


def sample_trace(question: Question, habits: Habits, rng: random.Random) -> list[str]:
    """Draw a response to the question, as tokens, from ``<think>`` to the answer."""
    tokens = ["<think>"]
    total, *rest = question.terms
    for index, term in enumerate(rest):
        if index and rng.random() < habits.quit:
            break

        right = total + term
        written = right + rng.choice((-1, 1)) if rng.random() < habits.error else right
        line = [str(total), "+", str(term), "="]
        tokens += [f"#{index + 1}", *line, str(written)]

        word, continues = "check", rng.random() < habits.check
        while continues:
            if written != right and rng.random() < habits.catch:
                written = right
            tokens += [word, *line, str(written)]
            word, continues = "again", rng.random() < habits.again

        tokens.append(";")
        total = written
    return [*tokens, "</think>", str(total)]


def branches(question: Question, trace: Sequence[str]) -> Iterator[Branch]:
    """Find all positions of a trace where a habit decided.

    The trace may be sampled from a model: at the first token outside the grammar the search ends,
    and the branches before it are kept.
    """
    position = 0
    total, *rest = question.terms
    if not _reads(trace, position, ["<think>"]):
        return
    position += 1

    for done in range(len(rest)):
        if done and position < len(trace):
            quits = trace[position] == "</think>"
            yield Branch("quit", position, ("</think>",), f"#{done + 1}", quits)
            if quits:
                return

        line = [str(total), "+", str(rest[done]), "="]
        if not _reads(trace, position, [f"#{done + 1}", *line]):
            return
        position += LINE_TOKENS

        sum_ = int(line[0]) + int(line[2])
        right, slips = str(sum_), (str(sum_ - 1), str(sum_ + 1))
        written = _at(trace, position - 1)
        if not written.isdigit():
            return
        yield Branch("error", position - 1, slips, right, written != right)

        habit: Habit = "check"
        while _at(trace, position) in (habit, ";"):
            continues = trace[position] == habit
            yield Branch(habit, position, (habit,), ";", continues)
            if not continues or not _reads(trace, position + 1, line):
                break
            position += PASS_TOKENS
            before, written = written, _at(trace, position - 1)
            if before != right:
                yield Branch("catch", position - 1, (right,), before, written == right)
            habit = "again"

        if _at(trace, position) != ";" or not written.isdigit():
            return
        position += END_TOKENS
        total = int(written)


def _at(trace: Sequence[str], position: int) -> str:
    return trace[position] if position < len(trace) else ""


def _reads(trace: Sequence[str], position: int, expected: list[str]) -> bool:
    return list(trace[position : position + len(expected)]) == expected
