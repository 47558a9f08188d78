"""Responses on the terminal: the thinking dimmed between its tags, then the answer."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flexalign.cli._shared import result_console

if TYPE_CHECKING:
    from flexalign.data.thinking import ThinkingTags
    from flexalign.decoding.streaming import Piece


class ResponsePrinter:
    """Prints one response, as a whole or while it is written."""

    def __init__(self, tags: "ThinkingTags") -> None:
        self._tags = tags
        self._is_thinking = self._has_printed = False

    def write(self, pieces: "Iterable[Piece]") -> None:
        """Print what comes next."""
        for text, is_thinking in pieces:
            if is_thinking and not self._is_thinking:
                self._print(self._tags.open, is_dim=True)
            if self._is_thinking and not is_thinking:
                self._print(self._tags.close, is_dim=True)
            self._is_thinking = is_thinking
            self._print(text, is_dim=is_thinking)

    def end(self) -> None:
        """End the line."""
        if self._has_printed:
            self._print("\n")

    def _print(self, text: str, *, is_dim: bool = False) -> None:
        self._has_printed = True
        style = "dim" if is_dim else None
        result_console.print(text, end="", style=style, markup=False, soft_wrap=True)


def print_response(text: str, tags: "ThinkingTags") -> None:
    """Print a whole response."""
    from flexalign.decoding.streaming import Piece

    parts = tags.split(text)
    pieces = [Piece(parts.thinking, True), Piece(parts.answer, False)]
    printer = ResponsePrinter(tags)
    printer.write(piece for piece in pieces if piece.text)
    printer.end()
