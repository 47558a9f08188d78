"""An answer's text up to a stop text: nothing is sent that a later token could cut off."""

from collections.abc import Sequence

from flexalign.decoding.streaming import StreamedText
from flexalign.decoding.text import ResponseText

__all__ = ["StoppedText"]


class StoppedText:
    """Turns tokens into text, piece by piece, and ends before the first stop text.

    What may be the beginning of a stop text waits until it is none.

    Attributes:
        has_stopped: Whether a stop text was found.
    """

    def __init__(self, reader: ResponseText, stops: Sequence[str]) -> None:
        self.has_stopped = False
        self._text = StreamedText(reader)
        self._stops = stops
        self._held = ""

    def put(self, token: int) -> str:
        """Take the next token; return the text that is certain by now."""
        return self._until_stop(self._text.put(token))

    def end(self) -> str:
        """Return what was held back, as no token follows."""
        if self.has_stopped:
            return ""
        text = self._until_stop(self._text.end()) + self._held
        self._held = ""
        return text

    def _until_stop(self, new: str) -> str:
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.has_stopped, self._held = True, ""
            return text[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        start = max(0, len(text) - longest)
        while start < len(text) and not any(s.startswith(text[start:]) for s in self._stops):
            start += 1
        self._held = text[start:]
        return text[:start]
