"""What may have been meant by a name that is not known, for messages."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["nearest"]


def nearest(name: object, known: Iterable[str]) -> str:
    """Return the end of a sentence, its full stop included, with the nearest known name or all."""
    names = list(known)
    close = get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}."
