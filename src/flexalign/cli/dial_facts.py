"""What the folder of a trained dial says of it, as ``flexalign inspect`` shows it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexalign.errors import ConfigError
from flexalign.models.sources import INRA_FILE, LORA_DIAL_FILE, resolve_adapter

if TYPE_CHECKING:
    from flexalign.generation.dial_config import DialConfig


@dataclass(frozen=True)
class DialFacts:
    """A trained dial on disk.

    Attributes:
        name: The name or path that the user gave.
        folder: Its folder.
        settings: Its settings: an ``InRaConfig`` or a ``LoRADialConfig``.
    """

    name: str
    folder: Path
    settings: "DialConfig"

    @property
    def is_lora(self) -> bool:
        """Whether it is a LoRA dial, and not an InRa adapter."""
        return self.settings.CONFIG_FILE == LORA_DIAL_FILE

    def to_json(self) -> dict[str, Any]:
        """Return what it is, and its settings as its folder has them."""
        return {
            "name": self.name,
            "kind": self.settings.KIND,
            **json.loads(self.settings.to_text()),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return a label and a text for each setting that a user acts on."""
        settings = self.settings
        low, high = settings.lambda_range
        only_ends = getattr(settings, "only_ends", False)
        told = f"{low:g} and {high:g} alone" if only_ends else f"{low:g} to {high:g}"
        rows = [("kind", settings.KIND), ("base", settings.base or "(not known)")]
        rows.append(("base's fingerprint", settings.base_fingerprint or "(not known)"))

        layers = getattr(settings, "adapter_layers", None)
        if layers is not None:
            count = "1 layer" if layers == 1 else f"{layers} layers"
            rows.append(("place", f"{count} before the base's first"))
        rows += [("λ permitted", told), ("default λ", f"{settings.default_lambda:g}")]
        if self.is_lora:
            gate = getattr(settings, "gate", None)
            rows.append(("gate of training", "none" if gate is None else f"{gate:g}"))
        if settings.thinking_tags is not None:
            rows.append(("thinking", " … ".join(settings.thinking_tags)))
        if arguments := (settings.rendering or {}).get("arguments"):
            rows.append(("template arguments", json.dumps(arguments, ensure_ascii=False)))
        return [*rows, ("calibration", _describe_calibration(settings.calibration))]


def read_dial_facts(name: str) -> DialFacts | None:
    """Read what a trained dial's folder says; None if the name is of something else.

    Raises:
        CheckpointError: If the folder is damaged.
    """
    try:
        folder = resolve_adapter(name)
    except ConfigError:
        return None
    if not any((folder / file).is_file() for file in (INRA_FILE, LORA_DIAL_FILE)):
        return None
    from flexalign.systems.dials import read_dial

    return DialFacts(name, folder, read_dial(name))


def _describe_calibration(stored: dict[str, Any] | None) -> str:
    """Say on what a dial was calibrated, and what its efforts cover."""
    from flexalign.calibration.effort import Calibration

    if stored is None:
        return "none; flexalign calibrate measures it"
    try:
        found = Calibration.from_json(stored)
    except ConfigError as error:
        return str(error)
    asked = f" on {found.questions:,} questions of {found.task}" if found.task else ""
    low, high = found.lambda_range
    return f"efforts 0 to {found.largest_effort:g}{asked}, λ from {low:g} to {high:g}"
