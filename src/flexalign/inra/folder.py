"""An adapter's folder: ``inra_config.json`` and ``inra_adapter.safetensors``."""

import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexalign.errors import CheckpointError, LambdaError, PairMismatchError
from flexalign.inra.config import CONFIG_FILE, InRaConfig
from flexalign.policies import Dial, extremes

__all__ = [
    "WEIGHTS_FILE",
    "check_folder",
    "load_weights",
    "require_base",
    "require_range",
    "save_adapter",
]

WEIGHTS_FILE = "inra_adapter.safetensors"


def save_adapter(adapter: nn.Module, settings: InRaConfig, folder: Path) -> None:
    """Write an adapter's folder; each file is written beside its place and then moved there."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter.state_dict().items()}
    weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    partial = {path: path.with_name(f".{path.name}.partial") for path in (weights, config)}
    save_file(tensors, partial[weights], metadata={"format": "pt"})
    partial[config].write_text(settings.to_text(), encoding="utf-8")
    for path, written in partial.items():
        os.replace(written, path)


def check_folder(folder: Path) -> InRaConfig:
    """Read an adapter's settings and see that its weights are whole, without loading them.

    Raises:
        CheckpointError: If a file is missing, truncated or corrupt.
    """
    settings = InRaConfig.load(folder)
    _require_whole(folder / WEIGHTS_FILE)
    return settings


def load_weights(adapter: nn.Module, folder: Path) -> None:
    """Load an adapter's weights from its folder.

    Raises:
        CheckpointError: If the file is missing, truncated or corrupt, or holds other tensors.
    """
    path = folder / WEIGHTS_FILE
    _require_whole(path)
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


def require_base(settings: InRaConfig, found: str, name: str, folder: Path) -> None:
    """Refuse a base that an adapter was not made for.

    Raises:
        PairMismatchError: If the base's fingerprint is not the one in the adapter's settings.
    """
    if found != settings.base_fingerprint:
        raise PairMismatchError(
            f"the adapter {folder} was made for {settings.base} (fingerprint "
            f"{settings.base_fingerprint}), and {name} has {found}: other weights. Give its own "
            "base, or insist with --any-base (any_base=True)."
        )


def require_range(
    permitted: tuple[float, float], asked: Sequence[tuple[str, Dial]], whose: str
) -> None:
    """Refuse dials that may use a λ outside the range that is permitted.

    Args:
        permitted: The least and the largest λ.
        asked: Each with its name.
        whose: Whose range it is, such as ``the adapter out/fast``.

    Raises:
        LambdaError: If there is one; says how to permit it.
    """
    low, high = permitted
    reached = [(name, *extremes(dial)) for name, dial in asked]
    outside = [name for name, least, largest in reached if least < low or largest > high]
    if outside:
        raise LambdaError(
            f"{', '.join(outside)}: outside the range [{low:g}, {high:g}] of {whose}; if "
            "you mean it, start with --lambda-range LEAST,LARGEST."
        )


def _require_whole(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the folder holds no complete InRa adapter.")
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): truncated or corrupt; copy or save it again."
        ) from error


def _shape(tensors: dict[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(tensors[key].shape) if key in tensors else None
