import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from flexalign.errors import CheckpointError
from flexalign.training.checkpoints import MANIFEST, fault_of, newest_complete, seal, writing


def _checkpoint(output: Path, step: int, *, sealed: bool = True) -> Path:
    folder = output / f"checkpoint-{step}"
    (folder / "parts").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(step)))
    (folder / "parts" / "rng.pth").write_bytes(b"rng")
    if sealed:
        seal(folder, step=step)
    return folder


def test_a_sealed_folder_lists_every_file_and_is_whole(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path, 3)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"model.safetensors", "parts/rng.pth"}
    assert manifest["files"]["model.safetensors"]["bytes"] == 3
    assert fault_of(folder) is None


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: _flip(folder / "model.safetensors"), "model.safetensors is corrupt"),
        (lambda folder: (folder / "parts" / "rng.pth").unlink(), "rng.pth is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "half written"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"a": 1}}'), "cannot be read"),
    ],
)
def test_damage_is_found_and_the_checkpoint_before_is_taken(
    tmp_path: Path, damage: Any, fault: str
) -> None:
    older, newer = _checkpoint(tmp_path, 9), _checkpoint(tmp_path, 10)
    assert newest_complete(tmp_path).path == newer
    damage(newer)
    found = newest_complete(tmp_path)
    assert found.path == older
    [(path, reason)] = found.passed_over
    assert path == newer
    assert fault in reason


def test_the_newest_is_by_step_and_nothing_else_counts(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        _checkpoint(tmp_path, step)
    _checkpoint(tmp_path, 200, sealed=False)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    found = newest_complete(tmp_path)
    assert found.path == tmp_path / "checkpoint-100"
    assert [path.name for path, _ in found.passed_over] == ["checkpoint-200"]
    assert newest_complete(tmp_path / "nowhere").path is None


def test_a_run_is_sealed_without_its_checkpoints_rounds_and_card(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 5)
    (tmp_path / "round-1").mkdir()
    (tmp_path / "round-1" / "model.safetensors").write_bytes(b"1")
    (tmp_path / "README.md").write_text("to be edited")
    (tmp_path / "model.safetensors").write_bytes(b"2")
    seal(tmp_path)
    assert set(json.loads((tmp_path / MANIFEST).read_text())["files"]) == {"model.safetensors"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "the folder is read-only"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "the disk is full",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64"), "enforce"),
    ],
)
def test_a_failure_to_write_says_what_stands(tmp_path: Path, error: Exception, reason: str) -> None:
    _checkpoint(tmp_path, 4)
    with pytest.raises(CheckpointError, match=reason) as caught, writing("checkpoint-8", tmp_path):
        raise error
    assert "checkpoint-8 could not be written" in str(caught.value)
    assert "checkpoint-4 stands" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_failures_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), writing("checkpoint-8", tmp_path):
        raise RuntimeError("CUDA out of memory")


def test_a_disk_that_is_full_by_now_is_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="the disk is full"), writing("model", tmp_path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3")
