"""Sampling settings beside temperature and top_p: limits on tokens, penalties and biases.

The limits (``top_k``, ``min_p``) remove unlikely tokens, and
:class:`~flexalign.generation.seeded.SeededSampling` applies them. The penalties and the biases
change logits, also for greedy decoding. Top-k, min-p, the repetition penalty and the biases are
transformers' processors. The presence and the frequency penalty, which transformers does not have,
are OpenAI's.
"""

import copy
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from flexalign.errors import ConfigError


@dataclass(frozen=True)
class LogitsSettings:
    """How a distribution is changed before a token is chosen from it.

    Attributes:
        top_k: Number of likeliest tokens to choose from; 0 for all.
        min_p: Least probability of a token, as a share of the likeliest one's; 0 for none.
        repetition_penalty: Logits of tokens in the prompt or the response are divided by it if
            positive, and multiplied if negative (Keskar et al. 2019); 1 for none.
        presence_penalty: Subtracted from the logits of tokens in the response.
        frequency_penalty: Subtracted once for each time that a token is in the response.
        logit_bias: Pairs (token id, number added to its logit).

    Raises:
        ConfigError: If a value is out of its range.
    """

    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ConfigError(f"top_k must be a whole number ≥ 0 (0: all), got {self.top_k!r}.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be between 0 and 1, got {self.min_p!r}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty must be a number above 0, got {self.repetition_penalty!r}."
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} must be a finite number, got {getattr(self, name)!r}.")

    @property
    def has_penalties(self) -> bool:
        """Whether logits are changed before tokens are limited: penalties or biases."""
        limits = {"top_k", "min_p"}
        return any(name not in limits for name in self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the settings that have an effect, by name."""
        given = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        changed = {name: value for name, (value, default) in given.items() if value != default}
        if self.logit_bias:
            changed["logit_bias"] = {str(token): bias for token, bias in self.logit_bias}
        return changed

    def processors(self, prompt_tokens: int) -> LogitsProcessorList:
        """Return transformers' processors for the penalties and the biases, without the limits.

        Args:
            prompt_tokens: Tokens of the prompt, padding included, at the start of ``input_ids``.
        """
        processors = LogitsProcessorList()
        if self.logit_bias:
            bias = {(token,): value for token, value in self.logit_bias}
            processors.append(SequenceBiasLogitsProcessor(bias))
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.presence_penalty or self.frequency_penalty:
            processors.append(
                OccurrencePenalty(prompt_tokens, self.presence_penalty, self.frequency_penalty)
            )
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
        self, settings: LogitsSettings, prompt_lengths: Tensor, width: int | None = None
    ) -> None:
        """Create the penalties of a batch.

        Args:
            settings: The penalties and biases.
            prompt_lengths: Tokens of each prompt without padding, shape ``(B,)``.
            width: Tokens of each prompt with padding; those of the longest if not given.
        """
        lengths = prompt_lengths.tolist()
        width = max(lengths) if width is None else width
        # Of each row: where its prompt begins, and its processors.
        self._rows = [(width - length, settings.processors(length)) for length in lengths]

    def keep(self, rows: Tensor) -> "RowPenalties":
        """Return the same penalties for some of the rows."""
        kept = copy.copy(self)
        kept.__dict__.update(_rows=[self._rows[row] for row in rows.tolist()])
        return kept

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the changed scores, shape ``(B, V)``."""
        changed = [
            processors(ids[None, start:], row[None])
            for (start, processors), ids, row in zip(
                self._rows, input_ids, scores.clone(), strict=True
            )
        ]
        return torch.cat(changed)
