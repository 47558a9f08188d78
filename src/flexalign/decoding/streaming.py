"""A response as it is written: token by token into text, the thinking told from the answer."""

from typing import TYPE_CHECKING, NamedTuple

from flexalign.data.thinking import ThinkingTags
from flexalign.decoding.text import ResponseText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Piece", "StreamedText"]

_INCOMPLETE = "\ufffd"
"""What tokens decode to that end inside a character."""


class Piece(NamedTuple):
    """A piece of a response.

    Attributes:
        text: Never empty; thinking tags are left out.
        is_thinking: Whether it stands between the thinking tags.
    """

    text: str
    is_thinking: bool


class StreamedText:
    """Reads one response while it is written.

    Put together, the pieces are the two parts that :meth:`ThinkingTags.split` finds, but for a
    response that closes a thinking it has not opened: what was handed out as its answer stays so.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags, *, opened: bool = False
    ) -> None:
        """Start to read.

        Args:
            tokenizer: The model's.
            tags: The tags around its thinking.
            opened: Whether the prompt has opened the thinking.
        """
        self._text = ResponseText(tokenizer, tags)
        self._tags = tags
        self._tokens: list[int] = []
        self._from = self._told = 0  # decoded anew for the next piece; handed on as text
        self._held = ""
        self._is_begun, self._is_thinking = opened, opened

    def put(self, token: int) -> list[Piece]:
        """Take the next token; return what can be told by now."""
        self._tokens.append(token)
        return self._sort_out(self._decode(), is_last=False)

    def end(self) -> list[Piece]:
        """Return what was held back, as no token follows."""
        return self._sort_out(self._decode(is_last=True), is_last=True)

    def _decode(self, *, is_last: bool = False) -> str:
        """Decode the new tokens beside those before them, as words need their neighbours."""
        before = self._text.read(self._tokens[self._from : self._told])
        now = self._text.read(self._tokens[self._from :])
        if now.endswith(_INCOMPLETE) and not is_last:
            return ""
        self._from, self._told = self._told, len(self._tokens)
        return now[len(before) :]

    def _sort_out(self, text: str, *, is_last: bool) -> list[Piece]:
        self._held += text
        if not self._is_begun:
            start = self._held.lstrip()
            if self._tags.open.startswith(start) and start != self._tags.open and not is_last:
                return []
            self._is_begun = True
            self._is_thinking = start.startswith(self._tags.open)
            self._held = start.removeprefix(self._tags.open) if self._is_thinking else self._held
        pieces = []
        if self._is_thinking:
            thinking, closed, rest = self._held.partition(self._tags.close)
            if not closed and not is_last:
                kept = _overlap(thinking, self._tags.close)
                thinking, rest = thinking[: len(thinking) - kept], thinking[len(thinking) - kept :]
            pieces.append(Piece(thinking, True))
            self._held = rest
            self._is_thinking = not closed
        if not self._is_thinking:
            pieces.append(Piece(self._held, False))
            self._held = ""
        return [piece for piece in pieces if piece.text]


def _overlap(text: str, tag: str) -> int:
    """Return how many of the last characters may be the beginning of a tag."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
