"""Generated tokens as text: special tokens are left out, thinking tags are kept.

:class:`ResponseText` decodes a whole response. :class:`StreamedResponse` decodes one token by token
and separates the thinking from the answer.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from flexalign.data.thinking import ThinkingTags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""The last character of decoded tokens that end inside a character."""


class ResponseText:
    """Decodes responses as they are shown to a user.

    Attributes:
        tags: The thinking tags; None if none are known.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags | None = None
    ) -> None:
        """Decode with a tokenizer.

        Args:
            tokenizer: The model's tokenizer.
            tags: The tags around its thinking. None: those detected in the tokenizer.
        """
        self.tags = tags or ThinkingTags.detect(tokenizer)
        self._tokenizer = tokenizer

        # Thinking tags are shown even if they are special tokens, one or several.
        shown: set[int] = set()
        for tag in (self.tags.open, self.tags.close) if self.tags else ():
            shown.update(tokenizer(tag, add_special_tokens=False)["input_ids"])
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        self._hidden = special - shown

    def hides(self, token: int) -> bool:
        """Return whether a token is left out of the text."""
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
        """Return whether a prompt ends inside the thinking."""
        return self.tags is not None and self.tags.opened_by(self.read(prompt))


class Piece(NamedTuple):
    """A part of a response's text.

    Attributes:
        text: The text, without thinking tags; not empty.
        is_thinking: Whether it is between the thinking tags.
    """

    text: str
    is_thinking: bool


class StreamedResponse:
    """Decodes one response while it is generated, token by token."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags, *, opened: bool = False
    ) -> None:
        """Start a response.

        Args:
            tokenizer: The model's tokenizer.
            tags: The tags around its thinking.
            opened: Whether the prompt has opened the thinking.
        """
        self._text = StreamedText(ResponseText(tokenizer, tags))
        self._split = StreamedSplit(tags, opened=opened)

    def put(self, token: int) -> list[Piece]:
        """Take the next token; return the pieces that later tokens cannot change."""
        return self._split.put(self._text.put(token))

    def end(self) -> list[Piece]:
        """Return what was held back, as no token follows."""
        return self._split.put(self._text.end(), is_last=True)


class StreamedText:
    """Decodes tokens one by one; the returned texts, joined, are the text of all tokens."""

    def __init__(self, reader: ResponseText) -> None:
        """Start a response, decoded by `reader`."""
        self._reader = reader
        self._tokens: list[int] = []
        self._from = 0  # the first token that is decoded again for the next text
        self._returned = 0  # tokens whose text has been returned

    def copy(self) -> "StreamedText":
        """Return the same response so far, to be continued in another way."""
        other = copy.copy(self)
        other.__dict__.update(_tokens=list(self._tokens))
        return other

    def put(self, token: int) -> str:
        """Take the next token; return the new text that later tokens cannot change."""
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

        They are decoded together with the tokens before them, because a tokenizer may decode a
        token differently at the start of a text, for example without its space.
        """
        before = self._reader.read(self._tokens[self._from : self._returned])
        return self._reader.read(self._tokens[self._from :])[len(before) :]


class StreamedSplit:
    """Separates the thinking from the answer in a text that arrives in parts.

    Joined, the pieces are the two parts that :meth:`ThinkingTags.split` returns. The exception is a
    response that closes a thinking it has not opened: text that was returned as the answer is not
    returned again as thinking. A thinking that begins inside the answer is held back until it is
    closed: without its closing tag it is text.
    """

    def __init__(self, tags: ThinkingTags, *, opened: bool = False) -> None:
        """Start a response.

        Args:
            tags: The tags around the thinking.
            opened: Whether the prompt has opened the thinking.
        """
        self._tags = tags
        self._is_begun, self._is_thinking = opened, opened
        self._held = ""

    def put(self, text: str, *, is_last: bool = False) -> list[Piece]:
        """Take more text; return the pieces that later text cannot change.

        Args:
            text: The next part of the response.
            is_last: Whether no more text follows, so that held-back text is returned too.
        """
        self._held += text
        if not self._is_begun and not self._begin(is_last):
            return []

        pieces = []
        while self._held:
            if self._is_thinking:
                piece = self._until(self._tags.close, is_last)
                pieces.append(Piece(piece, True))
                if self._held.startswith(self._tags.close):
                    self._held = self._held.removeprefix(self._tags.close)
                    self._is_thinking = False
                    continue
                break

            pieces.append(Piece(self._until(self._tags.open, is_last), False))
            if not self._held.startswith(self._tags.open):
                break
            if self._tags.close in self._held:
                self._held = self._held.removeprefix(self._tags.open)
                self._is_thinking = True
            elif is_last:
                pieces.append(Piece(self._held, False))
                self._held = ""
            else:
                break
        return [piece for piece in pieces if piece.text]

    def _until(self, tag: str, is_last: bool) -> str:
        """Take the text before a tag, or before what may be the beginning of one."""
        text, found, _ = self._held.partition(tag)
        if not found and not is_last:
            text = text[: len(text) - overlap(text, tag)]
        self._held = self._held[len(text) :]
        return text

    def _begin(self, is_last: bool) -> bool:
        """Remove what stands before the response's first text; return whether that is clear."""
        start = self._held.lstrip()
        marks = (self._tags.open, self._tags.answer)
        if not is_last and any(len(start) < len(m) and m.startswith(start) for m in marks):
            return False
        self._is_begun = True
        self._held = self._tags.begun(self._held)
        self._is_thinking = self._held.startswith(self._tags.open)
        if self._is_thinking:
            self._held = self._held.removeprefix(self._tags.open)
        return True


class StopSearch:
    """Looks for stop texts, outside the thinking, in a text that arrives in parts.

    Text that may be the beginning of a stop text is held back until it is clear that it is not, so that
    no text is returned that a later part could remove.

    Attributes:
        found: The stop text that was found; None so far.
    """

    def __init__(
        self, stops: Sequence[str], tags: ThinkingTags | None = None, *, opened: bool = False
    ) -> None:
        """Begin an answer.

        Args:
            stops: The stop texts.
            tags: The tags around a thinking in which no stop text is looked for; None: there is
                none.
            opened: Whether the prompt has opened the thinking.
        """
        self.found: str | None = None
        self._stops = stops
        self._tags = tags
        self._is_thinking = opened and tags is not None
        self._held = ""

    def put(self, new: str, *, may_stop: bool = True) -> str:
        """Add text; return what has become final, up to a stop text.

        Args:
            new: The next part of the text.
            may_stop: Whether a stop text that this part completes is one.
        """
        if not self._stops:
            return new
        text, self._held = self._held + new, ""
        stops = list(self._stops) if may_stop else []
        final = ""

        while text:
            marks = [self._tags.close] if self._tags and self._is_thinking else list(stops)
            if self._tags and not self._is_thinking:
                marks.append(self._tags.open)
            places = [(place, mark) for mark in marks if (place := text.find(mark)) >= 0]
            if not places:
                # The end of the text may be the beginning of a mark.
                longest = max((overlap(text, mark) for mark in marks), default=0)
                self._held = text[len(text) - longest :]
                return final + text[: len(text) - longest]

            # The first to be complete, which does not depend on how the text is cut into parts.
            place, mark = min(places, key=lambda found: (found[0] + len(found[1]), found[0]))
            if not self._is_thinking and mark in stops:
                self.found = mark
                return final + text[:place]
            final, text = final + text[: place + len(mark)], text[place + len(mark) :]
            self._is_thinking = not self._is_thinking
        return final

    def end(self) -> str:
        """Return the text that was held back; nothing follows."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, tag: str) -> int:
    """Return how many of the text's last characters may be the beginning of a tag."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)
