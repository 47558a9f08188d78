"""Suggestions for unknown names, for messages."""

from collections.abc import Iterable
from difflib import get_close_matches

_OTHER_NAMES = {"lam": "lambda", "λ": "lambda"}
"""Synonyms that are not spelt alike."""

_MOST_TOLD = 20
"""The most names that a message lists; of more, it gives only the nearest, with a lower cutoff."""


def nearest(
    name: object, known: Iterable[str], *, prefix: str = "", otherwise: str | None = None
) -> str:
    """Return the end of a sentence about an unknown name, with its full stop.

    It suggests the nearest known name, or lists all of them.

    Args:
        name: The unknown name.
        known: The known names.
        prefix: Text before each known name in the user's file, such as the section.
        otherwise: Advice if none is near, instead of the list.
    """
    names = list(known)
    is_long = len(names) > _MOST_TOLD
    meant = _closest(name, names, 0.5 if is_long else 0.6)
    if meant is not None:
        return f"; did you mean {prefix + meant!r}?"
    if otherwise is None and is_long:
        otherwise = f"none of the {len(names)} known is like it"
    return f"; {otherwise or 'known are ' + ', '.join(names)}."


def misspelt(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that this one almost equals; None if there is none."""
    return _closest(name, list(known), 0.8)


def _closest(name: object, known: list[str], likeness: float) -> str | None:
    text = str(name).casefold()
    other = _OTHER_NAMES.get(text)
    if other in known:
        return other
    return next(iter(get_close_matches(text, known, n=1, cutoff=likeness)), None)
