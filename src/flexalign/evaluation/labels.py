"""What tables and pictures call things: measured settings, and folders that stand side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["row_label", "setting_label", "tell_apart"]


def setting_label(setting: str, effort: float | None) -> str:
    """Name a setting by the effort that it was asked for as, with what that means behind it.

    Example:
        >>> setting_label("λ=0.42", 50)
        'effort 50 (λ=0.42)'

    Args:
        setting: Its id.
        effort: None if it was asked for by itself.
    """
    return setting if effort is None else f"effort {effort:g} ({setting})"


def row_label(row: Mapping[str, Any]) -> str:
    """Name the setting of one of a summary's rows or means."""
    return setting_label(row["setting"], row.get("effort"))


def tell_apart(folders: Sequence[Path]) -> list[str]:
    """Return the fewest trailing parts of each path that make all of them differ.

    Example:
        >>> tell_apart([Path("a/out"), Path("b/out")])
        ['a/out', 'b/out']

    Args:
        folders: Resolved, at least one, none twice.
    """
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest + 1):
        labels = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels
