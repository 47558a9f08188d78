"""Finds models and adapters by what users write: known names, folders, GGUF files, and hub ids.

A folder goes before a repository of the hub with the same name. Of a repository, only the small files
are fetched here (see `flexalign.models.hub`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexalign._packages import require_packages
from flexalign._storage import write_json
from flexalign.errors import CheckpointError, ConfigError
from flexalign.models.hub import HubName, locate, name_of
from flexalign.models.names import known_name, known_names

INRA_FILE = "inra_config.json"
"""The file by which a folder is an InRa adapter."""

LORA_DIAL_FILE = "lora_dial.json"
"""The file beside a PEFT LoRA by which it is a LoRA dial."""


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
"""A known name (`flexalign.models.names`), a folder, a GGUF file, the id of a repository at the hub
(``org/name`` or ``org/name@revision``, as text), or a result of `resolve`."""


def resolve(model: Model) -> Source:
    """Find a model: a known name, a folder, a GGUF file, or a repository at the hub.

    A folder with the name of a known model is given as ``./name``. Of a repository, the weights are
    fetched once something reads them.

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
        if not (path / INRA_FILE).is_file():
            return _source_of(name, path)
    else:
        at_hub = _at_hub(model)
        path = Path(name).expanduser() if at_hub is None else locate(at_hub)

    if path.is_file() and path.suffix == ".gguf":
        return _source_of(name, path)
    if not path.is_dir():
        examples = ", ".join(model for entry in known_names() for model in entry.models)
        raise ConfigError(
            f"there is no model {name!r}: it is no folder here, and no known name ({examples}); "
            "name a folder that is there, or a model at the hub, as org/name."
        )

    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return Source(name, path)
    if (path / INRA_FILE).is_file():
        raise ConfigError(
            f"{name} is an InRa adapter and no model of its own; give its base as the model, and "
            "the adapter as adapter."
        )

    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) == 1:
        return Source(name, path, files[0])
    if files:
        raise ConfigError(f"{name} has {len(files)} GGUF files; name one: {', '.join(files)}.")
    if name_of(path) is not None:
        raise ConfigError(
            f"{name} has no config.json at the hub, so it is no model; if it has GGUF files, fetch "
            f"one and name it: hf download {name.partition('@')[0]} FILE.gguf --local-dir models."
        )
    raise ConfigError(f"{name} has no config.json, so it is no model; give a model's folder.")


def resolve_adapter(adapter: str | Path) -> Path:
    """Return a dial's folder, from a part of a known name, a path, or a repository at the hub.

    Returns:
        The folder; that of a path may not exist. The weights of a repository are fetched once
        something reads them.

    Raises:
        ConfigError: If it has the form of a hub id and is neither a folder nor a repository.
    """
    name = str(adapter)
    known = known_name(name)
    if known is not None and known[1]:
        entry, part = known
        return entry.locate(part)
    at_hub = _at_hub(adapter)
    return Path(name).expanduser() if at_hub is None else locate(at_hub, "adapter")


def hub_id(model: Model) -> str | None:
    """Return the repository that a model is from, ``org/name``; None for a folder or a known name."""
    if isinstance(model, Source):
        found = name_of(model.path)
    else:
        found = None if known_name(str(model)) is not None else _at_hub(model)
    return None if found is None else found.repo


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


def require_gguf(purpose: str = "reading GGUF") -> None:
    """Require the package that reads and writes GGUF files.

    Args:
        purpose: What needs it, as the beginning of a sentence.

    Raises:
        ConfigError: If it is not installed.
    """
    require_packages(purpose, "gguf", install="'flexalign[gguf]'")


def base_of(adapter: Source) -> Source:
    """Return the base that a PEFT adapter names.

    Raises:
        ConfigError: If the base is neither here nor at the hub.
        CheckpointError: If the adapter's configuration is damaged.
    """
    name = read_json(adapter.path / "adapter_config.json").get("base_model_name_or_path")
    try:
        return resolve(str(name))
    except ConfigError as error:
        if hub_id(str(name)) is not None:
            raise ConfigError(
                f"{adapter} is a PEFT adapter on {name!r}: {str(error).rstrip('.')}; or name its "
                "base as the model (in a pair: as the reference)."
            ) from error
        raise ConfigError(
            f"{adapter} is a PEFT adapter on {name!r}, which is not there; name its base as the "
            "model (in a pair: as the reference), or set base_model_name_or_path in its "
            "adapter_config.json."
        ) from error


def name_base_by_id(adapter: Path) -> None:
    """Name the base of a saved PEFT adapter by its id, if it was loaded from the hub.

    PEFT names the folder in the hub's cache, which is another one on another machine.

    Args:
        adapter: The adapter's folder; any other folder is left as it is.
    """
    file = adapter / "adapter_config.json"
    settings = read_json(file) if file.is_file() else {}
    found = name_of(Path(str(settings.get("base_model_name_or_path"))))
    if found is not None:
        named = {"base_model_name_or_path": found.repo, "revision": found.revision}
        write_json(file, settings | named)


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


def _at_hub(model: str | Path) -> HubName | None:
    """Return the repository that a text names, if nothing on disk has that name."""
    if isinstance(model, Path) or Path(model).exists():
        return None
    return HubName.parse(model)
