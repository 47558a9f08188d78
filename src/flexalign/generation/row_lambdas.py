"""The λ of every row of a batch, at every generated token.

Transformers' ``generate`` repeats rows (beams, several samples per prompt) before it decodes.
Therefore the dials are parsed before it starts, one per prompt (:func:`read_dials`), and the λ of
each repeated row is looked up by its prompt (:class:`RowDials`). Nothing is parsed or checked while
tokens are generated.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, LambdaError
from flexalign.fusion import as_lambda
from flexalign.lambdas import Dial, Fixed, Policy, Schedule, extremes, parse_dial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_dials(lam: Any, rows: int) -> list[Dial]:
    """Parse one dial for all prompts, or a list with one for each; return one for each.

    Dials that have been parsed already are not changed.

    Raises:
        LambdaError: If a λ is not finite, or their number is not that of the prompts.
        ConfigError: If a schedule or a policy is malformed.
    """
    if not isinstance(lam, list | tuple):
        return [_read_dial(lam)] * rows

    if len(lam) != rows:
        raise LambdaError(
            f"{len(lam)} λ for {rows} prompts; give one number, or one for each prompt."
        )
    return [_read_dial(one) for one in lam]


def _read_dial(given: Any) -> Dial:
    if isinstance(given, Dial):
        return given
    return parse_dial(given.item() if isinstance(given, Tensor) else given)


class RowDials:
    """One checked dial per prompt of a batch. :meth:`at` returns the λ of a token.

    Attributes:
        least: The smallest λ of all dials.
        largest: The largest λ of all dials.
        ends: Per prompt: 0.0 or 1.0 if its λ has this value at every token, else None.
        first: λ of the first generated token of each prompt, shape ``(B,)``. For a schedule that
            follows the thinking it is right only after :meth:`begin`.
    """

    def __init__(self, table: Tensor, schedules: Sequence[Schedule | None]) -> None:
        """Create them of a table and schedules; :meth:`of` and :meth:`following` are simpler.

        Args:
            table: λ by generated token for prompts without a schedule, shape ``(B, K)``. The last
                column is used for all later tokens.
            schedules: Per prompt its schedule, or None.
        """
        self._table = table
        self._schedules = list(schedules)
        self._is_scheduled = any(schedules)

        limits = [
            (float(row.min()), float(row.max())) if schedule is None else extremes(schedule)
            for row, schedule in zip(table, schedules, strict=True)
        ]
        self.least = min(low for low, _ in limits)
        self.largest = max(high for _, high in limits)
        self.ends = [low if low == high and low in (0.0, 1.0) else None for low, high in limits]

        started = [
            float(row[0]) if schedule is None else schedule.at(0)
            for row, schedule in zip(table, schedules, strict=True)
        ]
        self.first = torch.tensor(started, dtype=torch.float64)

    @classmethod
    def of(cls, lam: Any, rows: int) -> "RowDials":
        """Parse and check the λ of a batch.

        Args:
            lam: One dial for all (a number, a schedule, a policy or its JSON form), a list with
                one for each prompt, or a tensor: 0-dimensional, ``(B,)``, or ``(B, K)`` with λ by
                generated token, the last column for all later tokens.
            rows: Number of prompts.

        Raises:
            LambdaError: If a λ is not finite, or their number is not that of the prompts.
            ConfigError: If a schedule or a policy is malformed, or a policy has no λ per token.
        """
        if not isinstance(lam, Tensor):
            return cls.following(read_dials(lam, rows))

        table = torch.as_tensor(as_lambda(lam)).detach().to("cpu", torch.float64)
        if table.ndim == 0:
            table = table.expand(rows)
        if table.ndim > 2 or len(table) != rows or table.numel() == 0:
            raise LambdaError(
                f"λ of shape {tuple(lam.shape)} does not fit {rows} prompts; give one number, "
                f"({rows},), or ({rows}, K) with one λ per generated token."
            )
        return cls(table.reshape(rows, -1), [None] * rows)

    @classmethod
    def following(cls, dials: Sequence[Dial]) -> "RowDials":
        """Create them of parsed dials, one for each prompt.

        Raises:
            ConfigError: If a dial is a policy that has no λ per token.
        """
        for dial in dials:
            if isinstance(dial, Policy):
                raise ConfigError(
                    f"{dial} chooses a way for a whole response, and what is wanted here is a λ "
                    "for every token; give a number or a schedule, or use generate."
                )

        constants = [dial.lam if isinstance(dial, Fixed) else 0.0 for dial in dials]
        return cls(
            torch.tensor(constants, dtype=torch.float64).reshape(len(dials), 1),
            [dial if isinstance(dial, Schedule) else None for dial in dials],
        )

    @property
    def follow_thinking(self) -> bool:
        """Whether any schedule depends on the position of the thinking."""
        return any(
            schedule is not None and schedule.follows_thinking for schedule in self._schedules
        )

    def begin(self, prompts: Tensor, tags: "TagTokens | None") -> "RowDials":
        """Look up λ of the first generated token of each prompt, and return these dials.

        Args:
            prompts: The whole prompts, shape ``(B, T)``.
            tags: The tokens of the thinking tags; required if :attr:`follow_thinking`.
        """
        self.first = self.at(torch.arange(len(prompts)), 0, prompts, tags)
        return self

    def at(
        self, rows: Tensor, index: int, input_ids: Tensor, tags: "TagTokens | None" = None
    ) -> Tensor:
        """Return λ of the next token of every row, shape ``(len(rows),)``, on the CPU.

        Args:
            rows: The prompt's index of each row of the decoding batch, which may repeat prompts.
            index: Number of tokens generated so far.
            input_ids: Prompts and generated tokens of the decoding batch, ``(len(rows), T)``.
            tags: The tokens of the thinking tags; required if :attr:`follow_thinking`.
        """
        rows = rows.to("cpu")
        lam = self._table[rows, min(index, self._table.shape[1] - 1)]
        if not self._is_scheduled:
            return lam

        inside, thinking = tags.place(input_ids) if tags else ([False] * len(rows), [0] * len(rows))
        for row, prompt in enumerate(rows.tolist()):
            schedule = self._schedules[prompt]
            if schedule is not None:
                lam[row] = schedule.at(index, inside=inside[row], thinking_tokens=thinking[row])
        return lam


class TagTokens:
    """The token ids of the thinking tags, and the position of the thinking in token ids.

    Attributes:
        opening: The tokens of the opening tag.
        closing: The tokens of the closing tag.
        open: The token that completes the opening tag.
        close: The token that completes the closing tag.
        are_single: Whether each tag is one token.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        tags: ThinkingTags,
        purpose: str = "a thinking schedule",
    ) -> None:
        """Look up the two tags.

        Args:
            tokenizer: The model's tokenizer.
            tags: The tags.
            purpose: What needs the tokens, for the message.

        Raises:
            ConfigError: If a tag is several tokens of ordinary text. They may be merged with the
                text around them, and then the tag cannot be found in token ids.
        """
        self.opening, self.closing = (
            _tokens_of(tokenizer, tag, purpose) for tag in (tags.open, tags.close)
        )
        self.open, self.close = self.opening[-1], self.closing[-1]
        self.are_single = len(self.opening) == len(self.closing) == 1

    def place(self, input_ids: Tensor) -> tuple[list[bool], list[int]]:
        """Return for the next token of every row whether it is thinking, and its thinking index.

        Args:
            input_ids: Prompts and all generated tokens, shape ``(B, T)``. An opening tag in the
                prompt counts.
        """
        opened = _last_end(input_ids, self.opening)
        inside = opened > _last_end(input_ids, self.closing)
        thinking_index = input_ids.shape[1] - 1 - opened
        return inside.tolist(), thinking_index.tolist()


def tag_ends(input_ids: Tensor, tag: list[int]) -> Tensor:
    """Return whether a tag ends at each token of each row: (B, T) → (B, T)."""
    ends = torch.zeros_like(input_ids, dtype=torch.bool)
    length = len(tag)
    if input_ids.shape[1] >= length:
        windows = input_ids.unfold(1, length, 1)
        ends[:, length - 1 :] = (windows == torch.tensor(tag, device=ends.device)).all(-1)
    return ends


def _last_end(input_ids: Tensor, tag: list[int]) -> Tensor:
    """Return the last position at which a tag ends in each row, −1 if none: (B, T) → (B,)."""
    ends = tag_ends(input_ids, tag)
    positions = torch.arange(ends.shape[1], device=ends.device)
    return torch.where(ends, positions, -1).amax(-1)


def _tokens_of(tokenizer: "PreTrainedTokenizerBase", tag: str, purpose: str) -> list[int]:
    """Return a tag's tokens: one, or several that begin with a token of its own.

    A channel's beginning (``<|channel|>analysis<|message|>``) is several; its first token is an
    added one, which merges with nothing.
    """
    tokens = [int(token) for token in tokenizer(tag, add_special_tokens=False)["input_ids"]]
    if len(tokens) != 1 and (not tokens or tokens[0] not in tokenizer.added_tokens_decoder):
        raise ConfigError(
            f"{purpose} needs tags that are one token each; {tag!r} is {len(tokens)} "
            "tokens here. Name the model's own tags, or use a schedule over the token index."
        )
    return tokens
