"""The differences between two runs, as sentences for the message that refuses the second one."""

import json
from collections.abc import Iterator
from typing import Any

_LONGEST = 80
"""The most characters of a value in a message."""


def differences(
    before: Any, now: Any, key: str = "", *, form: str = "{key} was {before}, now {now}"
) -> Iterator[str]:
    """Yield a sentence for each difference of two JSON values, in the order of their keys.

    Mappings are compared key by key, and lists of equal length that contain mappings item by item;
    everything else is compared as a whole.

    Args:
        before: The recorded value.
        now: The new value; a key that one of the two lacks counts as null.
        key: The name of the values; the names of inner values follow it.
        form: The sentence, a format string.

    Example:
        >>> list(differences({"lambda": 1.0, "seed": 0}, {"lambda": 2.0, "seed": 0}))
        ['lambda was 1.0, now 2.0']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            inner = f"{key}.{name}" if key else name
            yield from differences(before.get(name), now.get(name), inner, form=form)
    elif _hold_mappings(before, now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{key}[{index}]", form=form)
    elif before != now:
        yield form.format(key=key, before=_short(before), now=_short(now))


def _hold_mappings(before: Any, now: Any) -> bool:
    are_lists = isinstance(before, list) and isinstance(now, list) and len(before) == len(now)
    return are_lists and any(isinstance(item, dict) for item in [*before, *now])


def _short(value: Any) -> str:
    """Return a value as short JSON; of a list of mappings, only their ids or names."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = [item.get("id", item.get("name", item)) for item in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "…"
