"""What may have been meant by a name that is not known, for messages."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["nearest"]


def nearest(name: object, known: Iterable[str]) -> str:
    """Return the end of a sentence that names the nearest known name, or all of them."""
    names = list(known)
    close = get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}"
