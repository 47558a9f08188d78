"""Limits on the thinking of a response: a budget of its tokens, and a bias on its end.

Both are the simplest dials of one stream, and need no training. With a budget, the thinking is closed
after so many tokens (budget forcing, arXiv 2501.19393): the closing tag is written, and then the text
that the chat template writes between the tag and the answer. With a bias, one number is added to the
logit of the closing tag's first token while the model thinks.

Tokens of thinking are counted as a thinking schedule counts them: from the opening tag, also if the
prompt has it. If a response thinks several times, the tokens of all its thinking are counted.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from flexalign.data.logits import LogitsSettings
from flexalign.data.thinking import ThinkingTags, text_after_closing
from flexalign.errors import ConfigError
from flexalign.generation.row_lambdas import TagTokens, tag_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ClosingTokens:
    """The tokens that close a model's thinking, for a logits processor, which sees token ids alone.

    Early exits read text, and refuse fewer tags: ``flexalign.generation.early_exit.ExitTokens``.

    Attributes:
        tags: The tokens of the two tags.
        after: The tokens that the chat template writes between the closing tag and the answer.
    """

    tags: TagTokens
    after: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags | None = None
    ) -> "ClosingTokens":
        """Find them.

        Args:
            tokenizer: The model's tokenizer.
            tags: The thinking tags; those that the tokenizer shows if not given.

        Raises:
            ConfigError: If the tokenizer shows no tags, or a tag cannot be found in token ids.
        """
        found = tags or ThinkingTags.detect(tokenizer)
        if found is None:
            raise ConfigError(
                "thinking_budget and end_of_thinking_bias need the tags around a model's thinking, "
                "and neither the chat template nor the vocabulary of this model shows any; leave "
                "them out."
            )
        tokens = TagTokens(tokenizer, found, "a limit on the thinking")
        return cls(tokens, closing_ids(tokenizer, found)[1])


def closing_ids(
    tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of the closing tag, and those that the chat template writes after it.

    The second is empty if the text after the tag changes the tokens of the tag.
    """
    text = tags.close + text_after_closing(tokenizer, tags)
    tag, whole = (
        tuple(int(token) for token in tokenizer(one, add_special_tokens=False)["input_ids"])
        for one in (tags.close, text)
    )
    return tag, whole[len(tag) :] if whole[: len(tag)] == tag else ()


class _PromptThinking(NamedTuple):
    """Whether the thinking is open at a prompt's end, and the tokens of thinking after the tag."""

    is_open: bool
    spent: int


class ThinkingLimits(LogitsProcessor):  # type: ignore[misc]
    """The budget of the thinking and the bias on its end, for responses to one prompt.

    What is forced or biased is found in the token ids alone, so rows may be repeated and reordered.
    """

    def __init__(
        self,
        settings: LogitsSettings,
        closing: ClosingTokens,
        prompt_tokens: int,
        *,
        opened: bool | None = None,
    ) -> None:
        """Create the limits of the responses to a prompt.

        Args:
            settings: The budget and the bias.
            closing: The tokens that close the thinking.
            prompt_tokens: Tokens of the prompt at the start of ``input_ids``.
            opened: Whether the thinking is open at the prompt's end; None to read it from its
                tokens.
        """
        self._budget = settings.thinking_budget
        self._bias = settings.end_of_thinking_bias
        self._closing, self._after = closing.tags.closing, closing.after
        self._tags = closing.tags
        self._prompt_tokens = prompt_tokens
        self._opened = opened
        self._prompt: _PromptThinking | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the changed scores.

        Args:
            input_ids: The prompt and the responses, without padding before it, ``(B, T)``.
            scores: Shape ``(B, V)``.
        """
        if self._prompt is None:
            self._prompt = self._read_prompt(input_ids[:1, : self._prompt_tokens])
        scores = scores.clone()
        for row, ids in enumerate(input_ids):
            written = ids[None, self._prompt_tokens :].cpu()  # one transfer, not one for each look
            forced, is_biased = self._next(written, self._prompt)
            if forced is not None:
                scores[row] = -torch.inf
                scores[row, forced] = 0.0
            elif is_biased:
                scores[row, self._closing[0]] += self._bias
        return scores

    def _read_prompt(self, prompt: Tensor) -> _PromptThinking:
        (inside,), (spent,) = self._tags.place(prompt)
        if self._opened is None or self._opened == inside:
            return _PromptThinking(inside, spent if inside else 0)
        # Of two prompts the other one decides, and it is not among these tokens.
        return _PromptThinking(self._opened, 0)

    def _next(self, written: Tensor, prompt: _PromptThinking) -> tuple[int | None, bool]:
        """Return the token that must come next, or None; and whether the closing tag is biased.

        Args:
            written: The response so far, shape ``(1, T)``.
            prompt: The thinking at the prompt's end.
        """
        opened, closed = (tag_ends(written, tag) for tag in (self._tags.opening, self._closing))
        positions = torch.arange(written.shape[1], device=written.device)
        # Of every token: is the last tag up to it an opening one?
        last = torch.where(opened | closed, positions, -1)
        last = last.cummax(-1).values if last.numel() else last
        inside = torch.where(last < 0, prompt.is_open, opened.gather(1, last.clamp(min=0)))

        # A tag of several tokens counts as thinking until its last token is there.
        spent = prompt.spent + int((inside & ~opened).sum())
        is_inside = bool(inside[0, -1]) if written.shape[1] else prompt.is_open
        is_over = self._budget is not None and spent >= self._budget
        if is_inside:
            begun = self._begun(written[0, -len(self._closing) :].tolist())
            return (self._closing[begun], False) if is_over else (None, begun == 0)

        # Only a forced tag can have ended a thinking that had reached its budget.
        end = int(last[0, -1]) if written.shape[1] else -1
        if is_over and end >= 0 and (bool(inside[0, end - 1]) if end else prompt.is_open):
            since = written.shape[1] - 1 - end
            if since < len(self._after):
                return self._after[since], False
        return None, False

    def _begun(self, written: list[int]) -> int:
        """Return how many of the closing tag's tokens the response ends with, without all."""
        for count in range(len(self._closing) - 1, 0, -1):
            if written[-count:] == self._closing[:count]:
                return count
        return 0
