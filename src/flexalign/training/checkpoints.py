"""Complete checkpoints: a manifest, written last, seals a folder."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from flexalign._storage import following_umask, write_json
from flexalign.errors import CheckpointError
from flexalign.models.adapters import make_bases_absolute

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


MANIFEST = "manifest.json"
"""The file that makes a folder complete: the checksums of all others."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# The model card is not listed, because users edit it.
_UNLISTED = (MANIFEST, f".{MANIFEST}.partial", "README.md")


@dataclass(frozen=True)
class Found:
    """The result of a search for a checkpoint.

    Attributes:
        path: The newest complete checkpoint; None if there is none.
        passed_over: Newer checkpoints that cannot be used, each with the reason.
    """

    path: Path | None
    passed_over: list[tuple[Path, str]] = field(default_factory=list)


def seal(folder: Path, **facts: Any) -> None:
    """Seal a folder: flush its files to disk, then write the manifest with their checksums.

    The manifest is written by an atomic rename after all other files are on the disk. So a folder
    with a manifest was complete at that time, and later damage shows in the checksums.

    Args:
        folder: The folder. Its files at any depth are listed, except those of nested checkpoints
            and rounds, which have their own manifests.
        **facts: More entries of the manifest.
    """
    files = {name: _flush_and_hash(folder / name) for name in _files_of(folder)}
    write_json(folder / MANIFEST, {**facts, "files": files})
    _flush_folder(folder)


def fault_of(folder: Path) -> str | None:
    """Return what is wrong with a sealed folder; None if it is complete."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): entry["sha256"] for name, entry in files.items()}
    except FileNotFoundError:
        return "half written (it has no manifest)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    for name, checksum in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _hash(path) != checksum:
            return f"{name} is corrupt (its checksum differs)"
    return None


def newest_complete(output: Path) -> Found:
    """Find the newest complete checkpoint of a run; skip incomplete and corrupt ones.

    Args:
        output: The folder that holds ``checkpoint-<step>`` folders; it need not exist.
    """
    passed_over: list[tuple[Path, str]] = []
    for path in reversed(_checkpoints(output)):
        fault = fault_of(path)
        if fault is None:
            return Found(path, passed_over)
        passed_over.append((path, fault))
    return Found(None, passed_over)


def what_stands(output: Path) -> str:
    """Return a phrase for messages that names the newest complete checkpoint of a run."""
    stands = newest_complete(output).path
    return f"{stands} stands" if stands else "there is no complete checkpoint yet"


@contextlib.contextmanager
def writing(what: str, output: Path, *, remains: str | None = None) -> Iterator[None]:
    """Report a failure to write inside the block, and what is still usable.

    Args:
        what: What is written, for the message.
        output: The run's folder.
        remains: What is still usable, for the message. None: the newest complete checkpoint.

    Raises:
        CheckpointError: If the disk is full, the folder is read-only, or writing failed otherwise.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_write_failure(error):
            raise
        raise CheckpointError(
            f"{what} could not be written to {output} ({_reason(error, output)}); "
            f"{remains or what_stands(output)}: "
            "mend that and run the same command again, it goes on from there."
        ) from error


class SealedCheckpoints(_Trainer):  # type: ignore[misc]
    """A mix-in for a transformers ``Trainer`` that seals every checkpoint it writes.

    ``train(resume_from_checkpoint=True)`` resumes from the newest complete checkpoint, or starts
    from the beginning if there is none. A checkpoint that is given as a path must be complete.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; see ``transformers.Trainer.train``.

        Raises:
            CheckpointError: If the given checkpoint is not complete, or one cannot be written.
        """
        if resume_from_checkpoint is True:
            found = newest_complete(Path(self.args.output_dir))
            resume_from_checkpoint = str(found.path) if found.path else None
        elif resume_from_checkpoint:
            fault = fault_of(Path(resume_from_checkpoint))
            if fault:
                raise CheckpointError(
                    f"{resume_from_checkpoint} cannot be resumed from: {fault}; "
                    "name an earlier one, or resume_from_checkpoint=True for the newest whole one."
                )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        make_bases_absolute(self.model)
        folder = Path(output_dir or self.args.output_dir)
        # One process writes; the others must not look at its files.
        with following_umask(folder) if self.args.should_save else contextlib.nullcontext():
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(self.args.output_dir)
        folder = output / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with writing(folder.name, output):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    seal(folder, step=self.state.global_step)
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()


def _checkpoints(output: Path) -> list[Path]:
    if not output.is_dir():
        return []
    steps = {
        int(match.group(1)): path
        for path in output.iterdir()
        if path.is_dir() and (match := _CHECKPOINT.fullmatch(path.name))
    }
    return [steps[step] for step in sorted(steps)]


def _files_of(folder: Path) -> list[str]:
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not re.fullmatch(r"(checkpoint|round)-\d+", name)
        )
        names += [str((Path(root) / name).relative_to(folder)) for name in sorted(files)]
    return [name for name in names if name not in _UNLISTED]


def _flush_and_hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "bytes": path.stat().st_size,
        }


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_write_failure(error: Exception) -> bool:
    # torch.save reports a full disk as a RuntimeError of its zip writer.
    writer = ("PytorchStreamWriter", "inline_container", "unexpected pos")
    return isinstance(error, OSError | SafetensorError) or any(
        part in str(error) for part in writer
    )


def _reason(error: Exception, output: Path) -> str:
    codes = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up"}
    codes |= {errno.EROFS: "the folder is read-only", errno.EACCES: "permission denied"}
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in codes:
            return codes[cause.errno]
        if "os error 28" in str(cause):
            return codes[errno.ENOSPC]
        cause = cause.__cause__ or cause.__context__
    with contextlib.suppress(OSError):
        if shutil.disk_usage(output).free < 2**20:
            return codes[errno.ENOSPC]
    return " ".join(str(error).split())[:200]
