"""Files that are there whole or not at all.

Whatever is written goes to a hidden file or folder beside its place, is flushed to the disk, and is
moved to its place in one step. A reader never sees half of it, and a failure takes the part away.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a place to write to, and move what was written to ``path`` at the end.

    Args:
        path: Where the file or folder is to be. A file there is replaced; a folder there must be
            empty.

    Yields:
        A hidden path beside it, named by host and process, so that two writers do not meet.

    Raises:
        OSError: If it cannot be written or moved; nothing of it is left then.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        # What was written would fill a disk that is full, and nobody would look for it.
        with suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; it is on the disk when this returns."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a file of text in UTF-8, with ``\\n`` at the ends of lines."""
    write_bytes(path, text.encode("utf-8", errors))


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON, indented, with λ as λ."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")
