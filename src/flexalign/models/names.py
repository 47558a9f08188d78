"""Known names: words for models, adapters, tasks and data that can be given instead of a path.

A model that ships with a name registers it (:func:`register`) in its own module, which is imported
when a name is first looked up. Such a module defines what the name means and imports large packages
inside its functions. No other module contains any of the names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

_PROVIDERS = ("flexalign.miniature.names", "flexalign.models.smollm2")
"""Modules that register names, in the order in which messages list them."""


@dataclass(frozen=True)
class KnownName:
    """What one name means. ``NAME:PART`` is one of its parts, if it has any.

    Attributes:
        name: The name.
        locate: Returns the path of a part (empty for the bare name): a model's folder, a GGUF
            file, or an adapter's folder. Raises ConfigError if it is not installed.
        models: Names of models that messages give as examples.
        has_parts: Whether ``NAME:PART`` is known too.
        pair: The reference and the aligned model that the bare name means as a pair.
        dial: The base and the adapter that the bare name means as a dial.
        task: Returns the evaluation task of a part and a limit (None for the task's own).
        accuracy: The expected share of right answers in that task, for planning.
        traces: Returns rows of training data, in a form of `flexalign.data.load_traces`.
        prompts: Returns this many prompts with their answers, in a form of
            `flexalign.data.load_prompts`, drawn separately from the traces.
    """

    name: str
    locate: Callable[[str], Path]
    models: tuple[str, ...]
    has_parts: bool = False
    pair: tuple[str, str] | None = None
    dial: tuple[str, str] | None = None
    task: Callable[[str, int | None], Any] | None = None
    accuracy: float | None = None
    traces: Callable[[], list[dict[str, Any]]] | None = None
    prompts: Callable[[int], list[dict[str, Any]]] | None = None

    def parts_of(self, kind: str) -> tuple[str, str] | None:
        """Return the two models that the bare name means in a system of a kind, if any."""
        return {"dial": self.dial, "pair": self.pair, "interpolate": self.pair}.get(kind)


_REGISTERED: dict[str, KnownName] = {}


def register(entry: KnownName) -> None:
    """Register a known name."""
    _REGISTERED[entry.name] = entry


def known_names() -> list[KnownName]:
    """Return all known names, in the order of their providers."""
    _load_providers()
    return list(_REGISTERED.values())


def known_name(text: str) -> tuple[KnownName, str] | None:
    """Look a name up.

    Example:
        >>> entry, part = known_name("miniature:aligned")
        >>> entry.name, part
        ('miniature', 'aligned')

    Args:
        text: What the user wrote: ``NAME``, ``NAME:PART``, or something else.

    Returns:
        The entry of the name, and the part, empty for the bare name; None if it is not known.
    """
    _load_providers()
    name, colon, part = text.partition(":")
    entry = _REGISTERED.get(name)
    if entry is None or (colon and not entry.has_parts):
        return None
    return entry, part


@cache
def _load_providers() -> None:
    for module in _PROVIDERS:
        import_module(module)
