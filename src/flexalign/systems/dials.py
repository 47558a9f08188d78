"""Trained dials by their folders: an InRa adapter or a LoRA, told apart by the files that are there.

An InRa adapter's folder has ``inra_config.json``. A LoRA's has PEFT's ``adapter_config.json``; with
``lora_dial.json`` beside it, it is a LoRA dial, and without it a dial of λ = 0 and λ = 1 alone.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from flexalign.errors import CheckpointError, ConfigError
from flexalign.generation.adapted import AdaptedModel, Base
from flexalign.generation.dial_config import DialConfig
from flexalign.inra import configuration as inra
from flexalign.inra.modeling import InRaModel
from flexalign.lora_dial import configuration as lora
from flexalign.lora_dial.modeling import GATE_REFUSED, LoRADial
from flexalign.models.sources import resolve_adapter


def read_dial(adapter: str | Path) -> DialConfig:
    """Read a dial's settings and check that its files are complete, without loading the weights.

    Args:
        adapter: The dial's folder, or a known name.

    Returns:
        An ``InRaConfig`` or a ``LoRADialConfig``.

    Raises:
        CheckpointError: If the folder holds no dial, or a file is missing, truncated or corrupt.
        UnsupportedModelError: If it is a PEFT adapter whose strength cannot be λ.
    """
    folder = resolve_adapter(adapter)
    return lora.check_folder(folder) if _is_lora(folder) else inra.check_folder(folder)


def read_scaled_lora(adapter: str | Path) -> lora.LoRADialConfig:
    """Read a plain PEFT LoRA that is taken at any strength, without loading the weights.

    It was trained at one strength; its scale is λ, as for the adapters of arXiv 2502.09601.

    Args:
        adapter: The LoRA's folder.

    Raises:
        CheckpointError: If the folder holds no LoRA, or a file is missing, truncated or corrupt.
        ConfigError: If it is an InRa adapter, or a LoRA that was trained as a dial.
        UnsupportedModelError: If it is a PEFT adapter whose strength cannot be λ.
    """
    settings = read_dial(adapter)
    if not isinstance(settings, lora.LoRADialConfig) or not settings.only_ends:
        raise ConfigError(
            f"{adapter} was trained as a dial, whose range of λ is known; name it dial:BASE,ADAPTER. "
            "lora: scales a LoRA that was trained at one strength."
        )
    return replace(settings, only_ends=False)


def load_dial(
    base: Base, adapter: str | Path, *, any_base: bool = False, **loading: Any
) -> AdaptedModel:
    """Load a dial's folder onto its base.

    Args:
        base: A known name, a folder, or a loaded model.
        adapter: The dial's folder, or a known name.
        any_base: Accept another base than the dial was made for, if the shapes fit.
        **loading: Options of ``flexalign.models.loading.load_model``, for a name or a folder.

    Returns:
        An ``InRaModel`` or a ``LoRADial``.

    Raises:
        CheckpointError: If the folder holds no dial, or is damaged.
        PairMismatchError: If the dial was made for another base.
        UnsupportedModelError: If the base or the adapter cannot be run in this way.
    """
    kind = LoRADial if _is_lora(resolve_adapter(adapter)) else InRaModel
    return kind.from_pretrained(base, adapter, any_base=any_base, **loading)


def dial_files(settings: DialConfig, folder: Path) -> list[str]:
    """Return the names of the files that make up a dial's folder."""
    names = [settings.WEIGHTS_FILE, settings.CONFIG_FILE]
    if isinstance(settings, lora.LoRADialConfig):
        names.insert(1, lora.ADAPTER_FILE)
    return [name for name in names if (folder / name).is_file()]


def require_gate(settings: DialConfig | None, gate: float | None) -> None:
    """Refuse a gate for a LoRA dial.

    Raises:
        ConfigError: If both are given.
    """
    if gate is not None and isinstance(settings, lora.LoRADialConfig):
        raise ConfigError(f"--gate: {GATE_REFUSED}")


def _is_lora(folder: Path) -> bool:
    """Whether a folder is a LoRA's, and not an InRa adapter's.

    Raises:
        CheckpointError: If it is both, or neither.
    """
    is_inra = (folder / inra.CONFIG_FILE).is_file()
    lora_files = (lora.ADAPTER_FILE, lora.LoRADialConfig.CONFIG_FILE)
    is_lora = any((folder / name).is_file() for name in lora_files)
    if is_inra and is_lora:
        raise CheckpointError(
            f"{folder} holds an InRa adapter ({inra.CONFIG_FILE}) and a LoRA "
            f"({lora.ADAPTER_FILE}); keep one of them in a folder of its own."
        )
    if not is_inra and not is_lora:
        missing = f"{inra.CONFIG_FILE} is missing, and {lora.ADAPTER_FILE} too"
        if (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} holds no dial ({missing}), as it is a whole model; two whole models are "
                "pair:REF,ALIGNED, or --aligned instead of --adapter."
            )
        raise CheckpointError(
            f"{folder} holds no dial ({missing}); "
            "give a folder that flexalign adapt, flexalign realign with lora, or PEFT wrote."
        )
    return is_lora
