"""Penalties and biases of logits, by transformers' processors.

Top-k, min-p, the repetition penalty and the biases are transformers' processors. The presence and the
frequency penalty, which transformers does not have, are OpenAI's. The limits on the thinking are
those of :mod:`~flexalign.generation.thinking_limits`. The limits on tokens (``top_k``, ``min_p``) are
applied by :class:`~flexalign.generation.seeded.SeededSampling`, or by ``generate`` itself.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from flexalign.data.logits import LogitsSettings
from flexalign.generation.thinking_limits import ClosingTokens, ThinkingLimits


def logits_processors(
    settings: LogitsSettings,
    prompt_tokens: int,
    closing: ClosingTokens | None = None,
    *,
    opened: bool | None = None,
) -> LogitsProcessorList:
    """Return the processors for the penalties and the biases, without the limits on tokens.

    Args:
        settings: The penalties and biases.
        prompt_tokens: Tokens of the prompt, padding included, at the start of ``input_ids``.
        closing: The tokens that close the thinking; needed if the settings limit the thinking.
        opened: Whether the prompt leaves the thinking open; None to read it from its tokens.
    """
    processors = LogitsProcessorList()
    if settings.logit_bias:
        bias = {(token,): value for token, value in settings.logit_bias}
        processors.append(SequenceBiasLogitsProcessor(bias))
    if settings.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
    if settings.presence_penalty or settings.frequency_penalty:
        processors.append(
            OccurrencePenalty(prompt_tokens, settings.presence_penalty, settings.frequency_penalty)
        )
    if settings.limits_thinking and closing is not None:
        # The last one: a token that it forces is not changed by a penalty.
        processors.append(ThinkingLimits(settings, closing, prompt_tokens, opened=opened))
    return processors


class OccurrencePenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's penalties: logit − presence·[count > 0] − frequency·count, over the response."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        """Create the penalty of a batch.

        Args:
            prompt_tokens: Tokens of the prompts, padding included; they are not counted.
            presence: Subtracted from the logits of tokens that occur.
            frequency: Subtracted for each occurrence.
        """
        self._prompt_tokens = prompt_tokens
        self._presence, self._frequency = presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the penalised scores, shape ``(B, V)``."""
        written = input_ids[:, self._prompt_tokens :]
        ones = torch.ones_like(written, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add(1, written, ones)
        occurs = (counts > 0).to(scores)
        return scores - self._presence * occurs - self._frequency * counts


class RowPenalties(LogitsProcessor):  # type: ignore[misc]
    """The penalties and biases of a left-padded batch, each row without its padding.

    A padding token is often a token that ends a response. Transformers would count it as repeated,
    so a row would depend on the other rows of its batch.
    """

    def __init__(
        self,
        settings: LogitsSettings,
        prompt_lengths: Tensor,
        width: int | None = None,
        closing: ClosingTokens | None = None,
        opened: Sequence[bool | None] | None = None,
    ) -> None:
        """Create the penalties of a batch.

        Args:
            settings: The penalties and biases.
            prompt_lengths: Tokens of each prompt without padding, shape ``(B,)``.
            width: Tokens of each prompt with padding; those of the longest if not given.
            closing: The tokens that close the thinking; needed if the settings limit the thinking.
            opened: For each prompt, whether it leaves the thinking open; None to read it from its
                tokens.
        """
        lengths = prompt_lengths.tolist()
        width = max(lengths) if width is None else width
        opened = [None] * len(lengths) if opened is None else opened
        # Of each row: where its prompt begins, and its processors.
        self._rows = [
            (width - length, logits_processors(settings, length, closing, opened=is_open))
            for length, is_open in zip(lengths, opened, strict=True)
        ]

    def keep(self, rows: Tensor, moved: Sequence[int] | None = None) -> "RowPenalties":
        """Return the same penalties for some of the rows.

        Args:
            rows: The rows, shape ``(n,)``.
            moved: Per kept row, the columns of padding that its next batch has before it, more than
                this one; by default none.
        """
        kept_rows = [self._rows[row] for row in rows.tolist()]
        shifts = [0] * len(kept_rows) if moved is None else moved
        kept = copy.copy(self)
        kept.__dict__.update(
            _rows=[
                (start + shift, processors)
                for (start, processors), shift in zip(kept_rows, shifts, strict=True)
            ]
        )
        return kept

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the changed scores, shape ``(B, V)``; each prompt may have several rows."""
        repeats = len(scores) // len(self._rows)
        rows = [row for row in self._rows for _ in range(repeats)]
        changed = [
            processors(ids[None, start:], row[None])
            for (start, processors), ids, row in zip(rows, input_ids, scores.clone(), strict=True)
        ]
        return torch.cat(changed)
