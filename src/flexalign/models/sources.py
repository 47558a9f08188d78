"""Finds models and adapters on disk: known names, folders, GGUF files, and bases of adapters."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexalign._packages import require_packages
from flexalign.errors import CheckpointError, ConfigError
from flexalign.models.names import known_name, known_names


@dataclass(frozen=True)
class Source:
    """Where a model is on disk.

    Attributes:
        name: The name or path that the user gave.
        path: Its folder.
        gguf_file: The name of the model's GGUF file in the folder; None for safetensors.
    """

    name: str
    path: Path
    gguf_file: str | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT adapter."""
        return self.gguf_file is None and (self.path / "adapter_config.json").is_file()

    def __str__(self) -> str:
        return self.name


Model = str | Path | Source
"""A known name (`flexalign.models.names`), a folder, a GGUF file, or a result of `resolve`."""


def resolve(model: Model) -> Source:
    """Find a model: a known name, a folder, or a GGUF file.

    A folder with the name of a known model is given as ``./name``.

    Raises:
        ConfigError: If there is no such model; its message says what is missing and how to get it.
    """
    if isinstance(model, Source):
        return model
    name = str(model)
    known = known_name(name)
    if known is not None:
        entry, part = known
        path = entry.locate(part)
        if not (path / "inra_config.json").is_file():
            return _source_of(name, path)
    else:
        path = Path(name).expanduser()

    if path.is_file() and path.suffix == ".gguf":
        return _source_of(name, path)
    if not path.is_dir():
        examples = ", ".join(model for entry in known_names() for model in entry.models)
        raise ConfigError(
            f"there is no model {name!r}: it is no folder here, and no known name ({examples}). "
            f"Models are read from disk; {_how_to_get(name)}"
        )

    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return Source(name, path)
    if (path / "inra_config.json").is_file():
        raise ConfigError(
            f"{name} is an InRa adapter and no model of its own; give its base as the model, and "
            "the adapter as adapter."
        )

    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) == 1:
        return Source(name, path, files[0])
    if files:
        raise ConfigError(f"{name} has {len(files)} GGUF files; name one: {', '.join(files)}.")
    raise ConfigError(f"{name} has no config.json, so it is no model; give a model's folder.")


def resolve_adapter(adapter: str | Path) -> Path:
    """Return an InRa adapter's folder, from a part of a known name or a path; it may not exist."""
    name = str(adapter)
    known = known_name(name)
    if known is not None and known[1]:
        entry, part = known
        return entry.locate(part)
    return Path(name).expanduser()


def absolute_name(name: str) -> str:
    """Return a model's name so that it means the same model in every folder.

    The path of a file or folder that is there becomes absolute; any other name stays as it is.
    """
    path = Path(name).expanduser()
    return str(path.absolute()) if known_name(name) is None and path.exists() else name


def aligned_beside(reference: Model) -> str | None:
    """Return the aligned model of a known name that is a pair; None for any other model."""
    known = known_name(str(reference)) if isinstance(reference, str) else None
    if known is None:
        return None
    entry, part = known
    return entry.pair[1] if entry.pair is not None and not part else None


def require_gguf() -> None:
    """Require the package that reads GGUF files.

    Raises:
        ConfigError: If it is not installed.
    """
    require_packages("reading GGUF", "gguf", install="'flexalign[gguf]'")


def base_of(adapter: Source) -> Source:
    """Return the base that a PEFT adapter names.

    Raises:
        ConfigError: If the base does not exist.
        CheckpointError: If the adapter's configuration is damaged.
    """
    name = read_json(adapter.path / "adapter_config.json").get("base_model_name_or_path")
    try:
        return resolve(str(name))
    except ConfigError as error:
        raise ConfigError(
            f"{adapter} is a PEFT adapter on {name!r}, which is not there; name its base as the "
            "model (in a pair: as the reference), or set base_model_name_or_path in its "
            "adapter_config.json."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a model's JSON file.

    Raises:
        CheckpointError: If it is damaged.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy the model again.") from error


def _source_of(name: str, path: Path) -> Source:
    """Return the source of a model's folder, or of its GGUF file."""
    if path.suffix == ".gguf":
        return Source(name, path.parent, path.name)
    return Source(name, path)


def _how_to_get(name: str) -> str:
    """Return the advice for a model that does not exist, for messages."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        folder = name.partition("/")[2]
        return f"fetch one first, such as with: hf download {name} --local-dir models/{folder}"
    return "name a folder that is there, or fetch one first with: hf download"
