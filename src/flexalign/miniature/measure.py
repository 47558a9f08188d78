"""Measures a model's habits in the small world, from its probabilities or from its traces.

There are two methods. *Teacher-forced*: the probability that a model (or a fused pair) gives to the
habit's event at each branch of given traces, without sampling noise. *Counted*: how often the event
happened in sampled traces, with their accuracy and tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flexalign.miniature.build import encode
from flexalign.miniature.closed_form import HabitsOutcome
from flexalign.miniature.world import Branch, Habit, Habits, Question, branches

Logits: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(input_ids (B, T), attention_mask (B, T)) → logits (B, T, V)."""


@dataclass(frozen=True)
class BranchValues:
    """One habit's values at all its branches.

    Attributes:
        values: Probabilities of the event, or 0 and 1 for counted ones, shape (N,).
        questions: Index of each branch's question, shape (N,), as the cluster of intervals.
    """

    values: NDArray[np.float64]
    questions: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """The habit's mean over all branches; NaN if there are none."""
        return float(self.values.mean()) if self.values.size else float("nan")


def split_trace(text: str) -> list[str]:
    """Split a decoded response into the world's tokens."""
    return text.split()


def is_right(question: Question, trace: Sequence[str]) -> bool:
    """Whether the trace ends with ``</think>`` and the right answer."""
    return list(trace[-2:]) == ["</think>", str(question.answer)]


def outcome(questions: Sequence[Question], traces: Sequence[Sequence[str]]) -> HabitsOutcome:
    """Return the accuracy and the mean tokens of sampled traces."""
    right = [is_right(question, trace) for question, trace in zip(questions, traces, strict=True)]
    return HabitsOutcome(float(np.mean(right)), float(np.mean([len(trace) for trace in traces])))


def count_branches(
    questions: Sequence[Question], traces: Sequence[Sequence[str]]
) -> dict[Habit, BranchValues]:
    """Return for each habit whether its event happened, at each branch of the traces."""
    return _collect(
        (branch.habit, float(branch.happened), index)
        for index, (question, trace) in enumerate(zip(questions, traces, strict=True))
        for branch in branches(question, trace)
    )


@torch.no_grad()
def branch_probabilities(
    logits: Mapping[str, Logits],
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    traces: Sequence[Sequence[str]],
    batch_size: int = 128,
) -> dict[str, dict[Habit, BranchValues]]:
    """Compute the probability of each habit's event at each branch of the traces, teacher-forced.

    Args:
        logits: The models to measure, by name; each sees the same batches.
        tokenizer: The miniature's tokenizer.
        questions: The questions, one for each trace.
        traces: The traces that the models are given.
        batch_size: Traces in each forward pass; they are sorted by length.

    Returns:
        The values by name and then by habit; all names have the same branches in the same order.
    """
    found: dict[str, list[tuple[Habit, float, int]]] = {name: [] for name in logits}
    order = sorted(range(len(traces)), key=lambda index: len(traces[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, attention, places = _batch(
            tokenizer, [questions[i] for i in chosen], [traces[i] for i in chosen]
        )
        for name, function in logits.items():
            probabilities = torch.softmax(function(ids, attention).double(), dim=-1)
            for row, position, branch in places:
                event = _event_probability(tokenizer, branch, probabilities[row, position])
                found[name].append((branch.habit, event, chosen[row]))
    return {name: _collect(values) for name, values in found.items()}


def told(logits: Logits, tokenizer: PreTrainedTokenizerFast, system: str) -> Logits:
    """Return the logits of the same model under a system message.

    Example:
        >>> logits = {"default": hybrid, "told": told(hybrid, tokenizer, SYSTEM)}

    Args:
        logits: The model. Its batches begin with ``<bos>`` and are padded on the right.
        tokenizer: The miniature's tokenizer.
        system: The system message, which stands between ``<bos>`` and the question.

    Returns:
        A function of the batches without the message. It gives the logits of their positions, so
        that both ways can be measured in one call of :func:`branch_probabilities`.
    """
    words = torch.tensor(tokenizer.convert_tokens_to_ids(system.split()))

    def function(ids: Tensor, attention: Tensor) -> Tensor:
        inserted = words.expand(len(ids), -1)
        found = logits(
            torch.cat([ids[:, :1], inserted, ids[:, 1:]], dim=1),
            torch.cat([attention[:, :1], torch.ones_like(inserted), attention[:, 1:]], dim=1),
        )
        return torch.cat([found[:, :1], found[:, 1 + len(words) :]], dim=1)

    return function


def mean_habits(values: Mapping[Habit, BranchValues]) -> Habits:
    """Return the habits' means as `Habits`, for the closed form."""
    return Habits(**{f.name: _mean(values, f.name) for f in fields(Habits)})  # type: ignore[arg-type]


def _event_probability(
    tokenizer: PreTrainedTokenizerFast, branch: Branch, probabilities: Tensor
) -> float:
    if branch.habit == "error":
        return 1 - float(probabilities[tokenizer.convert_tokens_to_ids(branch.otherwise)])
    return float(probabilities[tokenizer.convert_tokens_to_ids(list(branch.event))].sum())


def _mean(values: Mapping[Habit, BranchValues], habit: Habit) -> float:
    return values[habit].mean if habit in values else float("nan")


def _batch(
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    traces: Sequence[Sequence[str]],
) -> tuple[Tensor, Tensor, list[tuple[int, int, Branch]]]:
    """Return right-padded ids, their mask, and each branch with its row and position.

    The position is that of the logits that predict the branch's token.
    """
    rows, places = [], []
    for row, (question, trace) in enumerate(zip(questions, traces, strict=True)):
        asked, answered = encode(tokenizer, question.text, list(trace))
        rows.append(asked + answered)
        places += [
            (row, len(asked) + branch.position - 1, branch) for branch in branches(question, trace)
        ]

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    attention = torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attention[row, : len(tokens)] = 1
    return ids, attention, places


def _collect(triples: Iterable[tuple[Habit, float, int]]) -> dict[Habit, BranchValues]:
    by_habit: dict[Habit, list[tuple[float, int]]] = {}
    for habit, value, question in triples:
        by_habit.setdefault(habit, []).append((value, question))
    return {
        habit: BranchValues(
            np.array([value for value, _ in pairs]), np.array([question for _, question in pairs])
        )
        for habit, pairs in by_habit.items()
    }
