"""Whether students of several λ were trained alike, from the ``run.json`` in their folders.

A difference between students of one pair is a difference of λ only if nothing else differs between
their trainings: twice the steps at one of the λ's look like a merit of that λ. Compared is the
section ``training``, without seeds, the device and what saves memory. What else a recipe says (λ,
gate, divergence, LoRA, rounds) is not compared. Adapters of a whole range of λ are not students of one.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexalign.training.output import RUN

_EQUAL = ("seed", "data_seed", "use_cpu", "gradient_checkpointing", "activation_checkpointing")
"""Prefixes of the fields that choose among equal trainings: chance, device and memory."""

_UNKNOWN = "the default"
"""A field that a run did not record, and whose default is not known."""


def training_differences(students: Mapping[str, Path]) -> str | None:
    """Return the fields of ``training`` in which students of one pair differ, with their values.

    Fields that one of them did not record count with their defaults.

    Args:
        students: Folders of models by name. Those without a readable ``run.json`` of a
            realignment, and those whose pair no other one has, are ignored.

    Returns:
        Text such as ``max_steps 100 (half, one) and 200 (two)``, fields separated by semicolons;
        None if there is no difference.
    """
    by_pair: dict[str, dict[str, dict[str, Any]]] = {}
    for name, folder in students.items():
        run = _read_run(folder)
        if run is not None:
            by_pair.setdefault(json.dumps(run["pair"]), {})[name] = run["training"]

    found = [text for trainings in by_pair.values() for text in _compare(trainings)]
    return "; ".join(found) or None


def training_notes(students: Mapping[str, Path]) -> list[str]:
    """Return the sentence that names the differences, for a report; none if there are none."""
    found = training_differences(students)
    return [] if found is None else [f"Students of one pair were trained differently: {found}."]


def sweep_students(label: str, environment: Mapping[str, Any] | None) -> dict[str, Path]:
    """Return the folders of the models that a finished sweep measured, by name.

    Args:
        label: Put in front of each system's name, with a slash.
        environment: The ``environment`` of the sweep's summary.
    """
    systems = ((environment or {}).get("run") or {}).get("systems", ())
    return {
        f"{label}/{system['name']}": Path(system["parts"][0]["name"])
        for system in systems
        if system.get("kind") == "model" and system.get("parts")
    }


def _read_run(folder: Path) -> dict[str, Any] | None:
    """Return the record of a realignment to one λ; None if the folder has none."""
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(run, dict) or not isinstance(run.get("training"), dict):
        return None
    lam = run.get("lambda")
    is_range = isinstance(lam, dict) and "low" in lam
    return None if is_range or "pair" not in run else run


def _compare(trainings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a text for each field in which some of these trainings differ."""
    fields = sorted({name for training in trainings.values() for name in training})
    for field in fields:
        raw = {_text(one.get(field)) for one in trainings.values()}
        if field.startswith(_EQUAL) or len(raw) == 1:
            continue
        members: dict[str, list[str]] = {}
        for name, training in trainings.items():
            value = training[field] if field in training else _default(field)
            members.setdefault(_text(value), []).append(name)
        if len(members) > 1:
            values = [f"{value} ({', '.join(names)})" for value, names in members.items()]
            yield f"{field} {', '.join(values[:-1])} and {values[-1]}"


def _default(field: str) -> Any:
    """Return a field's default, read from the trainer's settings, which take seconds to import."""
    from flexalign.training.config import TrRaConfig

    return getattr(TrRaConfig, field, _UNKNOWN)


def _text(value: Any) -> str:
    """Return a value as it is shown and compared: 1 and 1.0 are one number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
