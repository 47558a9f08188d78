"""Atomic writing of files: a file is complete or does not exist.

Content is written to a hidden file or folder beside its path, flushed to the disk, and moved to its
path in one step. A reader never sees a part of it, and a failure removes the part.

Every file has the permissions that the umask gives, also where a library writes it for its owner
alone (:func:`following_umask`).
"""

import json
import os
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and move it to ``path`` at the end of the block.

    Args:
        path: The path of the file or folder. An existing file is replaced; an existing folder must
            be empty.

    Yields:
        A hidden path beside it, with host and process in its name, so that two writers do not
        conflict.

    Raises:
        OSError: If it cannot be written or moved; the temporary path is removed.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        # The disk may be full, and the part is hidden: it must not stay.
        with suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise


@contextmanager
def following_umask(folder: Path) -> Iterator[None]:
    """Give files that the block writes to a folder the permissions that the umask gives.

    safetensors (since 0.8) writes to a temporary file, which its owner alone may read, and moves
    it to its name. Files that the block does not write keep their permissions.

    Args:
        folder: The folder; it need not exist before. Folders inside it are not looked at.
    """
    before = _versions(folder)
    yield
    written = [file for file, version in _versions(folder).items() if before.get(file) != version]
    if written:
        follow_umask(*written)


def follow_umask(*files: Path) -> None:
    """Give files of one folder the permissions that the umask gives to a new file there.

    A process has no way to read its umask without changing it, for all its threads; so a new file is
    made and removed.
    """
    writer = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    probe = files[0].with_name(f".umask.{writer}.partial")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()

    for file in files:
        # Another process may have moved its file meanwhile; some file systems have no permissions.
        with suppress(FileNotFoundError):
            if stat.S_IMODE(file.stat().st_mode) != mode:
                file.chmod(mode)


def _versions(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return what identifies the content of each file of a folder; links are left out."""
    versions = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                versions[path] = (found.st_ino, found.st_mtime_ns)
    return versions


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def flush(path: Path) -> None:
    """Flush a file that a library wrote to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; it is flushed to the disk before this returns."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a text file in UTF-8; line ends stay ``\\n`` on every system."""
    write_bytes(path, text.encode("utf-8", errors))


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file; non-ASCII characters such as λ are not escaped."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")
