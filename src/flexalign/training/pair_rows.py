"""Rows under two prompts: the data of a pair that is one model asked in two ways.

The student is asked under the reference's prompt, so a row's response is what it must write from
there, fitted to that prompt's opening as :meth:`flexalign.data.rendering.Rendering.row` does. The
aligned teacher sees its own prompt, followed by the same tokens. The two prompts may differ in their
length, their system message and the arguments of the chat template.

Nothing is fitted a second time. Where the two prompts open the thinking differently, the aligned
teacher sees the response's tags as they are. This is what equation 5 does while decoding, where both
streams read the token that was drawn. Rows where the response contradicts the aligned prompt's
opening are counted and named (:meth:`PairSurvey.cautions`).

A batch has the aligned side's prompts as one more tensor, and :func:`under_aligned_prompt` makes that
side's inputs of it, for responses of the data and for those that the student has sampled.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from flexalign.data.files import place_of
from flexalign.data.prompting import PromptSettings
from flexalign.data.rendering import (
    Opening,
    RenderedPrompt,
    RenderedRow,
    Rendering,
    chat_template_of,
    map_rows,
)
from flexalign.data.template import replace_template
from flexalign.data.thinking import ThinkingTags
from flexalign.data.tools import tools_of
from flexalign.errors import DataError
from flexalign.models.loading import load_config
from flexalign.models.prompted import (
    PairRendering,
    PromptedModel,
    PromptPair,
    context_of,
    prompted_messages,
    without_system,
)
from flexalign.models.sources import resolve

ALIGNED_PROMPT = "aligned_prompt_ids"
"""The column of the aligned side's prompt as token ids, and its key in a batch: (B, P), filled up
with −1 on the right."""

_NOTHING = -1


@dataclass(frozen=True)
class PairRow:
    """A row under two prompts.

    Attributes:
        reference: The row as the student and the reference see it.
        aligned: The prompt of the aligned side; the same response tokens follow it.
    """

    reference: RenderedRow
    aligned: RenderedPrompt

    @property
    def longer_prompt(self) -> int:
        """Tokens of the longer of the two prompts."""
        return max(len(self.reference.prompt.ids), len(self.aligned.ids))

    def kept(self, max_length: int | None) -> list[int]:
        """Return the response tokens that stay if neither side's sequence may be longer."""
        response = self.reference.response_ids
        return (
            response if max_length is None else response[: max(max_length - self.longer_prompt, 0)]
        )


class PairRows:
    """Renders rows under two prompts of one tokenizer.

    Attributes:
        prompts: The two prompts.
        tokenizer: The tokenizer as the student is asked: the reference's prompt is bound to it.
        common: What holds for both sides.
        limit: Tokens that a prompt must be shorter than; None for any length.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: PromptPair,
        *,
        common: PromptSettings | None = None,
        limit: int | None = None,
    ) -> None:
        """Check both prompts against the chat template.

        Args:
            tokenizer: The pair's; not changed. What is bound to its template holds for both sides.
            prompts: The two prompts.
            common: The system message of conversations that have none, on both sides; a side's own
                follows it. Its template arguments are bound to `tokenizer` already.
            limit: The cut-off of a row, or the model's context if that is less.

        Raises:
            ConfigError: As :class:`~flexalign.models.prompted.PairRendering` does.
        """
        self.prompts, self.limit = prompts, limit
        self.common = common or PromptSettings()
        self._pair = PairRendering(tokenizer, prompts)
        self.tokenizer: Any = self._pair.tokenizers["reference"]
        self._rendering = Rendering(self.tokenizer)
        self._tags = ThinkingTags.of(self._pair.tokenizers["aligned"])

    @classmethod
    def of_run(
        cls,
        tokenizer: Any,
        prompts: PromptPair,
        args: Any,
        model: Any,
        common: PromptSettings | None = None,
    ) -> "PairRows":
        """Make the rows' renderer of a run.

        Args:
            tokenizer: As in the constructor.
            prompts: The two prompts.
            args: The trainer's settings: the cut-off, and another chat template.
            model: A module, or what :func:`~flexalign.models.sources.resolve` takes; its context is
                the limit where it is less than the cut-off.
            common: As in the constructor.
        """
        if args.chat_template_path is not None:
            tokenizer = copy.deepcopy(tokenizer)
            replace_template(tokenizer, chat_template_of(tokenizer, args.chat_template_path))
        config: Any = model.config if isinstance(model, nn.Module) else load_config(resolve(model))
        limits = [limit for limit in (args.max_length, context_of(config)) if limit is not None]
        return cls(tokenizer, prompts, common=common, limit=min(limits, default=None))

    @property
    def system(self) -> str | None:
        """The system message that the student is asked with where a conversation has none."""
        parts = [self.common.system, self.prompts.reference.system]
        return "\n\n".join(part for part in parts if part is not None) or None

    def with_system(self, row: Mapping[str, Any], number: int = 1) -> list[dict[str, Any]]:
        """Return a row's prompt as the student is asked: with the reference's system message.

        Raises:
            DataError: If the prompt is plain text, the response was sampled without the message, or
                the row's own message is not the one of both sides.
        """
        prompt, place = row["prompt"], place_of(row, number)
        if isinstance(prompt, str):
            raise DataError(
                f"{place}: the prompt is plain text, which is the same under both prompts; "
                "give messages, which the chat template renders for each."
            )
        messages = [dict(message) for message in prompt]
        # A response that was sampled as the student is asked has the reference's message already.
        bare = without_system(self.prompts.reference, messages)
        base = self.common.with_system({**row, "prompt": bare}, number)
        asked = prompted_messages(self.prompts.reference, base)
        if asked != messages and row.get("response_ids") is not None:
            raise DataError(
                f"{place}: its response was sampled without the reference's system message; "
                "sample again with it (flexalign sample --system), or leave it out."
            )
        return asked

    def apply(self, dataset: Any) -> Any:
        """Return the rows with their prompts as the student is asked; see :meth:`with_system`."""
        rows = dataset.to_list()
        for number, row in enumerate(rows, start=1):
            row["prompt"] = self.with_system(row, number)
        return type(dataset).from_list(rows)

    def row(self, row: Mapping[str, Any], number: int = 1) -> PairRow:
        """Render a row under both prompts.

        Args:
            row: As :meth:`flexalign.data.rendering.Rendering.row` takes it. A system message that is
                the reference's is replaced by the aligned side's there.
            number: The row's number from 1, for error messages.

        Raises:
            DataError: If the row cannot be rendered on a side, a prompt has no token, or the prompt
                of one side alone leaves no room for a response.
        """
        asked = self.with_system(row, number)
        place = place_of(row, number)
        reference = self._rendering.row({**row, "prompt": asked}, number)
        told = without_system(self.prompts.reference, asked)
        try:
            aligned = self._pair.render("aligned", told, tools=tools_of(row))
        except DataError as error:
            raise DataError(f"{place}, under the aligned prompt: {error}") from error

        sizes = {"reference": len(reference.prompt.ids), "aligned": len(aligned.ids)}
        if not all(sizes.values()):
            raise DataError(f"{place}: its prompt has no token; give it a prompt.")
        if self.limit is not None:
            over = [side for side, size in sizes.items() if size >= self.limit]
            if len(over) == 1:
                raise DataError(
                    f"{place}: its {over[0]} prompt has {sizes[over[0]]} tokens and leaves no "
                    f"room for a response within {self.limit} (training.max_length, or the model's "
                    "context), but the other side's does; shorten that prompt, raise max_length, "
                    "or take the row out."
                )
        return PairRow(reference, aligned)

    def contradiction(self, row: PairRow) -> str | None:
        """Say how a response contradicts the opening of the aligned prompt; None if it does not."""
        text, tags = row.reference.text, self._tags
        closes = tags.close in text
        opens = tags.open in text.partition(tags.close)[0]
        match row.aligned.opening:
            case Opening.CLOSED if opens or closes:
                return "the aligned prompt has closed the thinking, and the response thinks"
            case Opening.OPENED if opens:
                return "the aligned prompt has opened the thinking, and the response opens it again"
            case Opening.OPENED if not closes and row.reference.is_whole:
                return (
                    "the aligned prompt has opened the thinking, and the response never closes it"
                )
            case Opening.FREE if closes and not opens:
                return "the response closes a thinking that the aligned prompt has not opened"
        return None

    def survey(self, dataset: Iterable[Mapping[str, Any]]) -> "PairSurvey":
        """Render all rows; return their lengths and how they contradict the aligned prompt.

        Raises:
            DataError: As in :meth:`row`.
        """
        sizes: list[tuple[int, int]] = []
        found: Counter[str] = Counter()
        first: dict[str, int] = {}
        for number, row in enumerate(dataset, start=1):
            rendered = self.row(row, number)
            sizes.append((rendered.longer_prompt, len(rendered.reference.response_ids)))
            doubt = self.contradiction(rendered)
            if doubt is not None:
                found[doubt] += 1
                first.setdefault(doubt, number)
        return PairSurvey(sizes, [(doubt, first[doubt], count) for doubt, count in found.items()])

    def tokenize(self, dataset: Any, max_length: int | None) -> Any:
        """Turn prompts with responses into token ids under both prompts.

        A response is cut where the longer side reaches `max_length`, so that both sides see the
        same tokens of it.

        Args:
            dataset: A data set of `prompt` and `completion`, or of token ids that has the column
                `ALIGNED_PROMPT` already, which is returned unchanged.
            max_length: Tokens of a sequence at most; None for any number.

        Returns:
            A data set of `input_ids` and `completion_mask` as the student sees them, and
            `ALIGNED_PROMPT`.

        Raises:
            DataError: If a row cannot be rendered, or rows are token ids without `ALIGNED_PROMPT`.
        """
        columns = list(dataset.column_names or next(iter(dataset)))
        if not {"prompt", "completion"} <= set(columns):
            if ALIGNED_PROMPT in columns:
                return dataset
            raise DataError(
                f"two prompts need rows of `prompt` and `completion`, got {', '.join(columns)}; "
                f"token ids need the aligned side's prompt too, as the column `{ALIGNED_PROMPT}`."
            )

        def render(row: dict[str, Any], index: int) -> dict[str, Any]:
            rendered = self.row(row, index + 1)
            prompt, response = rendered.reference.prompt.ids, rendered.kept(max_length)
            return {
                "input_ids": prompt + response,
                "completion_mask": [0] * len(prompt) + [1] * len(response),
                ALIGNED_PROMPT: rendered.aligned.ids,
            }

        return map_rows(dataset, render, columns)


def split_sides(reference: Any, aligned: Any) -> tuple[Any, Any, PromptPair | None]:
    """Split the sides of a pair into their models and their prompts.

    Args:
        reference: A model in any form, or a `PromptedModel`.
        aligned: An aligned model in any form, or a `PromptedModel`.

    Returns:
        Both models, and the two prompts; None if neither side has a prompt.
    """
    sides = [side if isinstance(side, PromptedModel) else None for side in (reference, aligned)]
    models = [
        given if side is None else side.model
        for side, given in zip(sides, (reference, aligned), strict=True)
    ]
    if not any(side is not None and side.has_prompt for side in sides):
        return models[0], models[1], None
    prompts = [PromptSettings() if side is None else side.prompt for side in sides]
    return models[0], models[1], PromptPair(*prompts)


@dataclass(frozen=True)
class PairSurvey:
    """The rows of a data set under two prompts.

    Attributes:
        sizes: Of each row, the tokens of the longer prompt and those of the response.
        doubts: How responses contradict the aligned prompt: what, the first row, how many rows.
    """

    sizes: Sequence[tuple[int, int]]
    doubts: Sequence[tuple[str, int, int]]

    def cautions(self) -> list[str]:
        """Return one sentence for each doubt; it names the first row."""
        return [
            f"row {first}{f' and {count - 1:,} more' if count > 1 else ''}: {doubt}, so the aligned "
            "teacher reads text there that it would not write; let the student sample the "
            "responses (`rollouts: 1`), or give responses that fit both prompts."
            for doubt, first, count in self.doubts
        ]


# Batches.


class PairCollator:
    """TRL's collator, extended by the aligned side's prompts under `ALIGNED_PROMPT`."""

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        """Create the collator.

        Args:
            collate: TRL's collator, which pads on the right.
        """
        self._collate = collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch of prepared rows."""
        prompts = [torch.tensor(row[ALIGNED_PROMPT]) for row in rows]
        padded = pad_sequence(prompts, batch_first=True, padding_value=_NOTHING)
        return {**self._collate(rows), ALIGNED_PROMPT: padded}


@dataclass(frozen=True)
class AlignedInputs:
    """A batch's responses after the aligned side's prompts.

    Attributes:
        inputs: `input_ids` and `attention_mask`, each (B, T′), padded on the right.
        source: For each position of the student's sequence, the position of the aligned side's that
            predicts the same response token, (B, T). It has a meaning at counted positions only.
    """

    inputs: dict[str, Tensor]
    source: Tensor

    def as_student(self, hidden: Tensor) -> Tensor:
        """Move hidden states (B, T′, H) of the aligned side to the student's positions, (B, T, H)."""
        index = self.source[..., None].expand(-1, -1, hidden.shape[-1])
        return hidden.gather(1, index)


def prompt_lengths(prompts: Tensor) -> Tensor:
    """Return the number of tokens of each prompt of a batch's `ALIGNED_PROMPT`, (B,)."""
    return (prompts != _NOTHING).sum(1)


def under_aligned_prompt(
    input_ids: Tensor, attention_mask: Tensor, mask: Tensor, prompts: Tensor
) -> AlignedInputs:
    """Put the responses of a batch after the aligned side's prompts.

    Args:
        input_ids: The student's sequences, (B, T), padded on the right.
        attention_mask: Their mask, (B, T).
        mask: Shape (B, T − 1); True where the next token is of the response. A response goes on to
            the end of its row.
        prompts: The aligned side's prompts, as in `ALIGNED_PROMPT`.
    """
    ends = attention_mask.sum(1)
    # argmax finds the first true position. A row without any has no response.
    begins = torch.where(mask.any(1), mask.int().argmax(1) + 1, ends)
    own = prompt_lengths(prompts)
    shift = (own - begins)[:, None]

    lengths = own + ends - begins
    positions = torch.arange(int(lengths.max()), device=input_ids.device)[None]
    within = positions < lengths[:, None]
    padded = _to_width(prompts, positions.shape[1])
    response = input_ids.gather(1, (positions - shift).clamp(0, input_ids.shape[1] - 1))
    ids = torch.where(positions < own[:, None], padded, response)

    columns = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return AlignedInputs(
        inputs={
            "input_ids": torch.where(within, ids, 0),
            "attention_mask": within.to(attention_mask.dtype),
        },
        source=(columns + shift).clamp(0, positions.shape[1] - 1),
    )


def _to_width(prompts: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(prompts, (0, max(width - prompts.shape[1], 0)))[:, :width]
