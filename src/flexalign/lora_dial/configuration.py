"""A LoRA dial's folder: a plain PEFT LoRA (two files), and ``lora_dial.json`` beside it.

:class:`LoRADialConfig` is the content of the third file. Other tools load the folder as the LoRA
that it is, at the strength λ = 1. A PEFT folder without the third file is a dial of two settings:
λ = 0, the base, and λ = 1, the adapter.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

from flexalign._storage import replacing
from flexalign.errors import CheckpointError, ConfigError
from flexalign.fusion import as_gate
from flexalign.generation.dial_config import DialConfig, require_whole
from flexalign.lambdas import OnlyEnds
from flexalign.lora_dial.scaling import require_linear
from flexalign.models.adapters import read_adapter_config
from flexalign.models.sources import LORA_DIAL_FILE, Source, read_json

ADAPTER_FILE = "adapter_config.json"
"""PEFT's settings of the LoRA."""


@dataclass(frozen=True)
class LoRADialConfig(DialConfig):
    """A LoRA dial's settings. Change them with ``dataclasses.replace``, or edit the file.

    Attributes:
        gate: The gate of training, as in :func:`flexalign.fusion.fuse`; None: no gate. It is a
            record: the LoRA has learnt the gated teacher, and no gate applies while it is used.
        only_ends: Whether only the two ends of ``lambda_range`` are permitted, as for a LoRA that
            was trained at λ = 1 alone.

    The others are those of :class:`~flexalign.generation.dial_config.DialConfig`.
    ``default_lambda`` is 1 by default, and ``lambda_range`` is the range of training.

    Raises:
        ConfigError: If a value is malformed.
        LambdaError: If a λ is not finite, or the range is empty.
    """

    CONFIG_FILE: ClassVar[str] = LORA_DIAL_FILE
    WEIGHTS_FILE: ClassVar[str] = "adapter_model.safetensors"
    OPTIONAL: ClassVar[tuple[str, ...]] = ("only_ends", "rendering")
    KIND: ClassVar[str] = "LoRA dial"
    WRITER: ClassVar[str] = "LoRADial.save_pretrained or flexalign realign --lambda LOW:HIGH"

    default_lambda: float = field(default=1.0, kw_only=True)
    gate: float | None = field(default=None, kw_only=True)
    only_ends: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate is not None:
            object.__setattr__(self, "gate", as_gate(self.gate))
        if not isinstance(self.only_ends, bool):
            raise ConfigError(f"only_ends must be true or false, got {self.only_ends!r}.")
        limits = self.lambda_range
        object.__setattr__(
            self, "lambda_range", OnlyEnds(limits) if self.only_ends else tuple(limits)
        )

    def widened(self, lambda_range: tuple[float, float]) -> Self:
        """Return these settings with a range that includes another one too, and all between."""
        own = self if isinstance(lambda_range, OnlyEnds) else replace(self, only_ends=False)
        return super(LoRADialConfig, own).widened(lambda_range)

    def save(self, folder: Path) -> None:
        """Write ``lora_dial.json`` beside the LoRA, under a temporary name that is then renamed."""
        with replacing(folder / self.CONFIG_FILE) as file:
            file.write_text(self.to_text(), encoding="utf-8")


def nearest_default(low: float, high: float) -> float:
    """Return the default λ of a new dial: 1, or the nearest end of its range."""
    return min(max(1.0, low), high)


def check_folder(folder: Path) -> LoRADialConfig:
    """Read a dial's settings and check its other files, without loading the weights.

    Args:
        folder: A PEFT LoRA's folder, with or without ``lora_dial.json``.

    Raises:
        CheckpointError: If a file is missing, truncated or corrupt.
        UnsupportedModelError: If the adapter's effect is not linear in its strength.
    """
    if not (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds no complete LoRA dial ({ADAPTER_FILE} is missing); give a folder that "
            f"{LoRADialConfig.WRITER} wrote, or that of a PEFT LoRA."
        )
    named = read_json(folder / ADAPTER_FILE).get("base_model_name_or_path")
    try:
        require_linear(read_adapter_config(Source(str(folder), folder)), str(folder))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error

    if (folder / LoRADialConfig.CONFIG_FILE).is_file():
        settings = LoRADialConfig.load(folder)
    else:
        settings = LoRADialConfig(str(named or ""), "", only_ends=True)
    require_whole(settings, folder)
    return settings
