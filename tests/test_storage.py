"""Files that appear under their name when they are whole, with the permissions of the umask."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexalign._storage import following_umask
from flexalign.models.weights import write_tensors


@pytest.fixture
def umask() -> Iterator[int]:
    """A umask that lets the group read."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_a_block_writes_has_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "new"
    with following_umask(folder):
        folder.mkdir()
        for name in ("private", "open"):
            (folder / name).write_text("text")
        (folder / "private").chmod(0o600)
        (folder / "open").chmod(0o666)
    assert [mode(folder / name) for name in ("private", "open")] == [0o666 & ~umask] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["open", "private"]


@pytest.mark.usefixtures("umask")
def test_what_a_block_does_not_write_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (tmp_path / "secret").chmod(0o600)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("text")
    elsewhere.chmod(0o640)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "secret").write_text("key")
    (folder / "secret").chmod(0o600)
    with following_umask(folder):
        (folder / "link").symlink_to(elsewhere)
        (folder / "written").write_text("text")
    assert mode(folder / "secret") == mode(tmp_path / "secret") == 0o600
    assert mode(elsewhere) == 0o640


def test_weights_may_be_read_by_whoever_may_read_the_folder(tmp_path: Path, umask: int) -> None:
    path, tensors = tmp_path / "weights.safetensors", {"a": torch.arange(3.0)}
    save_file(tensors, path)  # as an earlier version left it
    write_tensors(path, tensors)
    assert mode(path) == 0o666 & ~umask
    assert torch.equal(load_file(path)["a"], tensors["a"])
