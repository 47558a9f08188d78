import errno
from pathlib import Path
from typing import Any

import pytest

from flexalign.errors import CheckpointError, ConfigError
from flexalign.training.checkpoints import seal
from flexalign.training.output import claim_output, state_of_output

IDENTITY: dict[str, Any] = {"lambda": 2.0, "training": {"max_steps": 4}, "pair": ["a", "b"]}


def test_a_folder_goes_from_new_to_unfinished_to_done(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    assert state_of_output(output, IDENTITY) == "new"
    claim_output(output, IDENTITY)
    assert state_of_output(output, IDENTITY) == "unfinished"
    (output / "model.safetensors").write_bytes(b"x")
    seal(output)
    assert state_of_output(output, IDENTITY) == "done"
    (output / "README.md").write_text("edited")
    assert state_of_output(output, IDENTITY) == "done"
    (output / "model.safetensors").write_bytes(b"y")
    assert state_of_output(output, IDENTITY) == "unfinished"


def test_another_run_is_refused_by_naming_the_difference(tmp_path: Path) -> None:
    claim_output(tmp_path, IDENTITY)
    other = IDENTITY | {"training": {"max_steps": 5, "seed": 1}}
    with pytest.raises(ConfigError, match=r"training\.max_steps was 4, now 5") as caught:
        state_of_output(tmp_path, other)
    assert "training.seed was null, now 1" in str(caught.value)


def test_files_of_no_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="files that are of no realignment"):
        state_of_output(tmp_path, IDENTITY)
    with pytest.raises(ConfigError, match="is a file"):
        state_of_output(tmp_path / "notes.txt", IDENTITY)


def test_a_start_that_died_while_claiming_its_folder_leaves_it_new(tmp_path: Path) -> None:
    (tmp_path / ".run.json.partial").write_text("{")
    assert state_of_output(tmp_path, IDENTITY) == "new"
    claim_output(tmp_path, IDENTITY)
    assert state_of_output(tmp_path, IDENTITY) == "unfinished"


def test_a_folder_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        claim_output(tmp_path / "out", IDENTITY)


def test_a_damaged_note_of_the_run_is_one_sentence(tmp_path: Path) -> None:
    claim_output(tmp_path, IDENTITY)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json cannot be read; name another output folder"):
        state_of_output(tmp_path, IDENTITY)
