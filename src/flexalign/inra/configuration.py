"""An InRa adapter's folder: ``inra_config.json`` and ``inra_adapter.safetensors``.

:class:`InRaConfig` is the content of the first file. The functions below it write, read and check
the folder. The files do not have PEFT's names, because ``AutoModel.from_pretrained`` would then
load the folder as LoRA.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_file
from torch import Tensor, nn

from flexalign._storage import replacing
from flexalign.errors import CheckpointError, ConfigError
from flexalign.generation.dial_config import DialConfig, require_whole
from flexalign.models.sources import INRA_FILE
from flexalign.models.weights import write_tensors


@dataclass(frozen=True)
class InRaConfig(DialConfig):
    """An adapter's settings. Change them with ``dataclasses.replace``, or edit the file.

    Attributes:
        adapter_layers: Number of layers in the adapter.

    The others are those of :class:`~flexalign.generation.dial_config.DialConfig`. At creation,
    ``default_lambda`` is 0 and ``lambda_range`` is [0, 1].

    Raises:
        ConfigError: If a value is malformed.
        LambdaError: If a λ is not finite, or the range is empty.
    """

    CONFIG_FILE: ClassVar[str] = INRA_FILE
    WEIGHTS_FILE: ClassVar[str] = "inra_adapter.safetensors"
    KIND: ClassVar[str] = "InRa adapter"
    WRITER: ClassVar[str] = "InRaModel.save_pretrained or flexalign adapt"

    adapter_layers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.adapter_layers
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            raise ConfigError(f"adapter_layers must be a whole number ≥ 1, got {layers!r}.")


CONFIG_FILE = InRaConfig.CONFIG_FILE
WEIGHTS_FILE = InRaConfig.WEIGHTS_FILE
FORMAT_VERSION = InRaConfig.FORMAT


def save_adapter(adapter: nn.Module, settings: InRaConfig, folder: Path) -> None:
    """Write an adapter's folder. Each file is written under a temporary name and then renamed.

    Args:
        adapter: The adapter's layers.
        settings: The adapter's settings.
        folder: The folder; created if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter.state_dict().items()}

    # Both files are complete before either is renamed.
    with replacing(folder / CONFIG_FILE) as config, replacing(folder / WEIGHTS_FILE) as weights:
        write_tensors(weights, tensors)
        config.write_text(settings.to_text(), encoding="utf-8")


def check_folder(folder: Path) -> InRaConfig:
    """Read an adapter's settings and check that its weights file is complete, without loading it.

    Raises:
        CheckpointError: If a file is missing, truncated or corrupt.
    """
    settings = InRaConfig.load(folder)
    require_whole(settings, folder)
    return settings


def load_weights(adapter: nn.Module, folder: Path) -> None:
    """Load an adapter's weights from its folder.

    Raises:
        CheckpointError: If the file is missing, truncated or corrupt, or holds other tensors.
    """
    require_whole(InRaConfig, folder)
    path = folder / WEIGHTS_FILE

    weights = load_file(path)
    expected = adapter.state_dict()
    keys = expected.keys() | weights.keys()
    wrong = sorted(key for key in keys if _shape(expected, key) != _shape(weights, key))
    if wrong:
        raise CheckpointError(
            f"{path} does not fit this base: {len(wrong)} tensors are missing, unknown or of "
            f"another shape, the first of them {wrong[0]!r} (here {_shape(weights, wrong[0])}, in "
            f"the base {_shape(expected, wrong[0])})."
        )

    adapter.load_state_dict(weights)


def _shape(tensors: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(tensors[key].shape) if key in tensors else None
