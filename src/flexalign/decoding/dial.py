"""λ of every row of a batch, as a function of the token that is generated next."""

from collections.abc import Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, LambdaError
from flexalign.fusion import as_lambda
from flexalign.schedules import Schedule

__all__ = ["Dial", "DialSetting"]

DialSetting: TypeAlias = float | Schedule | Tensor | Sequence[float | Schedule]
"""One λ or schedule for the whole batch, or one for each row."""


class Dial:
    """λ of each row over the generated tokens, the first of them 0.

    It goes through transformers' ``generate`` as one object, beside a tensor of row numbers that
    ``generate`` expands for beams and for several samples of one prompt.
    """

    def __init__(
        self,
        setting: DialSetting,
        rows: int,
        prompt_tokens: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Read a setting for a batch.

        Args:
            setting: A λ, a schedule, a tensor of shape ``(B,)``, or a list of λ's and schedules.
            rows: B, prompts in the batch.
            prompt_tokens: Width of the prompts, padding included.
            tokenizer: Tells where thinking begins and ends; asked only if a schedule follows it.

        Raises:
            LambdaError: If a λ is not finite, or there is not one for each row.
            ConfigError: If a schedule follows the thinking and there is no tokenizer.
        """
        per_row = _per_row(setting, rows)
        self._schedules = [part if isinstance(part, Schedule) else None for part in per_row]
        self._constant = torch.tensor(
            [0.0 if isinstance(part, Schedule) else part for part in per_row]
        )
        self._values = [part.values if isinstance(part, Schedule) else (part,) for part in per_row]
        self._prompt_tokens = prompt_tokens
        self._tags: tuple[Tensor, Tensor] | None = None
        if any(part is not None and part.follows_thinking for part in self._schedules):
            self._tags = _tag_tokens(tokenizer)

    @property
    def needs_reference(self) -> bool:
        """Whether any row ever has a λ other than 1."""
        return any(value != 1 for values in self._values for value in values)

    @property
    def needs_aligned(self) -> bool:
        """Whether any row ever has a λ other than 0."""
        return any(value != 0 for values in self._values for value in values)

    def at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return λ of the token that comes next.

        Args:
            rows: Which prompt each sequence belongs to, shape ``(N,)``.
            tokens: Prompts and what was generated so far, shape ``(N, L)``.

        Returns:
            Shape ``(N,)``, float32.
        """
        lam = self._constant.to(rows.device)[rows]
        if all(schedule is None for schedule in self._schedules):
            return lam
        step = tokens.shape[1] - self._prompt_tokens
        inside, thinking_tokens = self._thinking(tokens)
        for place, row in enumerate(rows.tolist()):
            schedule = self._schedules[row]
            if schedule is not None:
                lam[place] = schedule.at(
                    step, inside=inside[place], thinking_tokens=thinking_tokens[place]
                )
        return lam

    def _thinking(self, tokens: Tensor) -> tuple[list[bool], list[int]]:
        """Say of each row whether the next token is inside the thinking, and its index there."""
        if self._tags is None:
            return [False] * len(tokens), [0] * len(tokens)
        opened, closed = (_end_of_last(tokens, tag.to(tokens.device)) for tag in self._tags)
        begun = opened.clamp(min=self._prompt_tokens)
        return (opened > closed).tolist(), (tokens.shape[1] - begun).tolist()


def _per_row(setting: DialSetting, rows: int) -> list[float | Schedule]:
    if isinstance(setting, Tensor):
        setting = _values(setting, rows)
    if isinstance(setting, Schedule):
        return [setting] * rows
    if not isinstance(setting, list | tuple):
        return [_number(setting)] * rows
    if len(setting) != rows:
        raise LambdaError(
            f"λ has {len(setting)} values for {rows} prompts; give one, or one for each."
        )
    return [part if isinstance(part, Schedule) else _number(part) for part in setting]


def _values(lam: Tensor, rows: int) -> float | list[float]:
    if lam.ndim > 1:
        raise LambdaError(
            f"λ of shape {tuple(lam.shape)} is not one for each prompt; give one number, a tensor "
            f"of shape ({rows},), or a schedule over the generated tokens."
        )
    values: float | list[float] = cast("Tensor", as_lambda(lam)).tolist()
    return values


def _number(value: object) -> float:
    return float(as_lambda(value))


def _tag_tokens(tokenizer: PreTrainedTokenizerBase | None) -> tuple[Tensor, Tensor]:
    if tokenizer is None:
        raise ConfigError(
            "a thinking schedule must see where the thinking is; give the model's tokenizer."
        )
    tags = ThinkingTags.detect(tokenizer) or ThinkingTags()
    opening, closing = (
        torch.tensor(tokenizer(tag, add_special_tokens=False)["input_ids"])
        for tag in (tags.open, tags.close)
    )
    return opening, closing


def _end_of_last(tokens: Tensor, tag: Tensor) -> Tensor:
    """Return where the last occurrence of a tag ends in each row, −1 where there is none."""
    if tokens.shape[1] < len(tag):
        return tokens.new_full((len(tokens),), -1)
    found = (tokens.unfold(1, len(tag), 1) == tag).all(-1)
    ends = torch.arange(found.shape[1], device=tokens.device) + len(tag)
    return torch.where(found, ends, -1).amax(-1)
