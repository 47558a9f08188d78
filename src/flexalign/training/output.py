"""One folder, one run: which run an output folder belongs to, and whether it is done."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from flexalign._storage import write_json
from flexalign.errors import CheckpointError, ConfigError
from flexalign.training.checkpoints import MANIFEST, fault_of

RUN = "run.json"
"""The file that says whose folder it is: everything that decides the trained weights."""

State = Literal["new", "unfinished", "done"]


def state_of_output(output: Path, identity: Mapping[str, Any]) -> State:
    """Say whether a run may write to a folder, and how far an earlier start came.

    Args:
        output: The folder; it need not exist.
        identity: Everything that decides the result: settings, fingerprints of pair and data.

    Returns:
        ``"new"`` for a missing or empty folder, ``"unfinished"`` or ``"done"`` for this same run.

    Raises:
        ConfigError: If the folder holds another run (naming the first differences) or files that
            are of no run.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output} is a file; name a folder.")
    if is_unused(output):
        return "new"
    try:
        before = json.loads((output / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"output {output} holds files that are of no realignment; name a new or empty folder."
        ) from None
    except ValueError:
        raise ConfigError(f"{output / RUN} cannot be read; name another output folder.") from None
    unlike = list(differences(before, json.loads(json.dumps(identity))))
    if unlike:
        raise ConfigError(
            f"output {output} holds another run ({'; '.join(unlike[:3])}); "
            "name another output, or delete that folder."
        )
    return "done" if (output / MANIFEST).exists() and fault_of(output) is None else "unfinished"


def is_unused(folder: Path) -> bool:
    """Whether a folder is missing, empty, or holds only what a killed start left half written."""
    return not folder.is_dir() or all(
        path.name.startswith(".") and path.name.endswith(".partial") for path in folder.iterdir()
    )


def claim_output(output: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder and write down whose it is, atomically.

    Raises:
        CheckpointError: If the folder cannot be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RUN, dict(identity))
    except OSError as error:
        raise CheckpointError(
            f"output {output} cannot be written to ({error.strerror}); "
            "name another folder or mend its permissions."
        ) from error


def differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """Say what differs between two identities: "lambda was 1.0, now 2.0"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            inner = f"{key}.{name}" if key else name
            yield from differences(before.get(name), now.get(name), inner)
    elif before != now:
        yield f"{key} was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
