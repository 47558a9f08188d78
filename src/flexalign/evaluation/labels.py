"""Short names for folders that stand side by side."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["tell_apart"]


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
