"""Generated tokens as text: special tokens go, thinking tags stay."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flexalign.data.thinking import ThinkingTags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ResponseText"]


class ResponseText:
    """Reads responses as a user sees them."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", tags: ThinkingTags | None = None
    ) -> None:
        """Prepare for a tokenizer; the tags are those that it shows where none are given."""
        self.tags = tags or ThinkingTags.detect(tokenizer)
        self._tokenizer = tokenizer
        names = [self.tags.open, self.tags.close] if self.tags else []
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        self._hidden = special - set(tokenizer.convert_tokens_to_ids(names))

    def hides(self, token: int) -> bool:
        """Whether a token is not shown."""
        return token in self._hidden

    def read(self, tokens: Iterable[int]) -> str:
        """Return the text of a response's tokens."""
        shown = [token for token in tokens if token not in self._hidden]
        return str(self._tokenizer.decode(shown, clean_up_tokenization_spaces=False))

    def answer(self, tokens: Iterable[int], *, opened: bool = False) -> str:
        """Return the part after the thinking, white space and case evened out.

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
