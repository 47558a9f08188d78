"""The output folder of a run: the run that it belongs to, and whether that run is done."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from flexalign._differences import differences
from flexalign._storage import write_json
from flexalign.errors import CheckpointError, ConfigError, FlexAlignError
from flexalign.lambdas import Schedule
from flexalign.models.hub import is_waiting
from flexalign.training.checkpoints import MANIFEST, fault_of

RUN = "run.json"
"""The file with the identity of the folder's run: everything that decides the trained weights."""

_PRINTS = ("pair", "models")
"""The keys of the fingerprints of a run's models."""

State = Literal["new", "unfinished", "done"]


def state_of_output(output: Path, identity: Mapping[str, Any]) -> State:
    """Check that a run may write to a folder; return the state of the run there.

    Args:
        output: The folder; it need not exist.
        identity: Everything that decides the result: settings, fingerprints of pair and data.

    Returns:
        ``"new"`` for a missing or empty folder, ``"unfinished"`` or ``"done"`` for this same run.

    Raises:
        ConfigError: If the folder holds another run (names the first differences) or files that do
            not belong to a run.
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
    if not isinstance(before, dict):
        raise ConfigError(f"{output / RUN} cannot be read; name another output folder.")

    now = json.loads(json.dumps(identity))
    if before.get("lambda") != now.get("lambda"):
        before = _in_current_form(before)
    if is_waiting():  # fingerprints of weights that are still at the hub are not known yet
        before, now = ({k: v for k, v in run.items() if k not in _PRINTS} for run in (before, now))
    unlike = list(differences(before, now))
    if unlike:
        raise ConfigError(
            f"output {output} holds another run ({'; '.join(unlike[:3])}); "
            "name another output, or delete that folder."
        )

    return "done" if (output / MANIFEST).exists() and fault_of(output) is None else "unfinished"


def is_unused(folder: Path) -> bool:
    """Return whether a folder is missing, empty, or holds only partial files of a killed process."""
    return not folder.is_dir() or all(
        path.name.startswith(".") and path.name.endswith(".partial") for path in folder.iterdir()
    )


def claim_output(output: Path, identity: Mapping[str, Any]) -> None:
    """Create the folder and write the run's identity to it, atomically.

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


def _in_current_form(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a folder's `run.json` in the current form.

    Earlier versions wrote λ as the user gave it. A constant schedule is now written as a number,
    and a null in a schedule is left out.
    """
    lam = identity.get("lambda")
    if not isinstance(lam, dict):
        return identity
    try:
        return identity | {"lambda": Schedule.parse(lam).to_json()}
    except FlexAlignError:
        return identity  # the message then shows λ as it is in the file
