"""Generated tokens as text: special tokens are left out, thinking tags stay.

:class:`ResponseText` reads a whole response. :class:`StreamedResponse` reads one token by token and
separates the thinking from the answer as it goes.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from flexalign.data.thinking import ThinkingTags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What tokens decode to that end inside a character."""


class ResponseText:
    """Reads responses as a user sees them.

    Attributes:
        tags: The thinking tags; None if none are known.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags | None = None
    ) -> None:
        """Read with a tokenizer; where no tags are given, those that it shows.

        Args:
            tokenizer: The model's.
            tags: The tags around its thinking.
        """
        self.tags = tags or ThinkingTags.detect(tokenizer)
        self._tokenizer = tokenizer

        # Thinking tags may be special tokens, one or several, and are shown all the same.
        shown: set[int] = set()
        for tag in (self.tags.open, self.tags.close) if self.tags else ():
            shown.update(tokenizer(tag, add_special_tokens=False)["input_ids"])
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        self._hidden = special - shown

    def hides(self, token: int) -> bool:
        """Whether a token is not shown."""
        return token in self._hidden

    def read(self, tokens: Iterable[int]) -> str:
        """Return the text of a response's tokens."""
        shown = [token for token in tokens if token not in self._hidden]
        return str(self._tokenizer.decode(shown, clean_up_tokenization_spaces=False))

    def answer(self, tokens: Iterable[int], *, opened: bool = False) -> str:
        """Return the part after the thinking, in lower case, with single spaces.

        Args:
            tokens: A response.
            opened: Whether its prompt had already opened the thinking.
        """
        text = self.read(tokens)
        text = self.tags.split(text, opened=opened).answer if self.tags else text
        return " ".join(text.split()).casefold()

    def is_opened_by(self, prompt: Iterable[int]) -> bool:
        """Whether a prompt's tokens leave the thinking open."""
        return self.tags is not None and self.tags.opened_by(self.read(prompt))


class Piece(NamedTuple):
    """A piece of a response.

    Attributes:
        text: Never empty; thinking tags are left out.
        is_thinking: Whether it stands between the thinking tags.
    """

    text: str
    is_thinking: bool


class StreamedResponse:
    """Reads one response while it is written, token by token."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags, *, opened: bool = False
    ) -> None:
        """Start to read.

        Args:
            tokenizer: The model's.
            tags: The tags around its thinking.
            opened: Whether the prompt has opened the thinking.
        """
        self._text = StreamedText(ResponseText(tokenizer, tags))
        self._split = StreamedSplit(tags, opened=opened)

    def put(self, token: int) -> list[Piece]:
        """Take the next token; return the pieces that are certain by now."""
        return self._split.put(self._text.put(token))

    def end(self) -> list[Piece]:
        """Return what was held back, as no token follows."""
        return self._split.put(self._text.end(), is_last=True)


class StreamedText:
    """Decodes tokens that arrive one by one; the texts joined are the text of them all."""

    def __init__(self, reader: ResponseText) -> None:
        """Start to read."""
        self._reader = reader
        self._tokens: list[int] = []
        self._from = 0  # the first token that is decoded again for the next text
        self._returned = 0  # tokens whose text has been returned

    def put(self, token: int) -> str:
        """Take the next token; return the text that is certain by now."""
        if self._reader.hides(token):
            return ""

        self._tokens.append(token)
        text = self._unread()
        if text.endswith(_INCOMPLETE):
            return ""
        self._from, self._returned = self._returned, len(self._tokens)
        return text

    def end(self) -> str:
        """Return what was held back, as no token follows."""
        text = self._unread()
        self._from = self._returned = len(self._tokens)
        return text

    def _unread(self) -> str:
        """Return the text of the new tokens.

        They are decoded together with those before them: a tokenizer may write a token in another
        way at the start of a text, without its space, for example.
        """
        before = self._reader.read(self._tokens[self._from : self._returned])
        return self._reader.read(self._tokens[self._from :])[len(before) :]


class StreamedSplit:
    """Separates the thinking from the answer in a text that arrives in parts.

    Joined, the pieces are the two parts that :meth:`ThinkingTags.split` finds. A response that
    closes a thinking it has not opened is the exception: what was returned as its answer stays so.
    """

    def __init__(self, tags: ThinkingTags, *, opened: bool = False) -> None:
        """Start to read.

        Args:
            tags: The tags around the thinking.
            opened: Whether the prompt has opened the thinking.
        """
        self._tags = tags
        self._is_begun, self._is_thinking = opened, opened
        self._held = ""

    def put(self, text: str, *, is_last: bool = False) -> list[Piece]:
        """Take more text and return the pieces that are certain by now.

        Args:
            text: The next part of the response.
            is_last: No more follows, so what was held back is returned too.
        """
        self._held += text
        if not self._is_begun and not self._begin(is_last):
            return []

        pieces = []
        if self._is_thinking:
            thinking, closed, rest = self._held.partition(self._tags.close)
            if not closed and not is_last:
                # The end may be the beginning of the closing tag.
                certain = len(thinking) - _overlap(thinking, self._tags.close)
                thinking, rest = thinking[:certain], thinking[certain:]
            pieces.append(Piece(thinking, True))
            self._held = rest
            self._is_thinking = not closed

        if not self._is_thinking:
            pieces.append(Piece(self._held, False))
            self._held = ""
        return [piece for piece in pieces if piece.text]

    def _begin(self, is_last: bool) -> bool:
        """Decide whether the response opens with thinking; return whether that is known by now."""
        start, tag, answer = self._held.lstrip(), self._tags.open, self._tags.answer
        if not is_last and any(
            len(start) < len(mark) and mark.startswith(start) for mark in (tag, answer)
        ):
            return False
        self._is_begun, self._is_thinking = True, start.startswith(tag)
        if self._is_thinking:
            self._held = start.removeprefix(tag)
        elif answer and start.startswith(answer):
            self._held = start.removeprefix(answer)
        return True


def _overlap(text: str, tag: str) -> int:
    """Return how many of the last characters may be the beginning of a tag."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
