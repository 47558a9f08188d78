"""Weights on disk: their files, the headers of the files, and fingerprints."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flexalign.errors import CheckpointError, ConfigError
from flexalign.models.hub import require_weights

_SAMPLED_VALUES = 64
"""Values of each tensor that enter the fingerprint, evenly spaced."""

_SAMPLED_BLOCKS, _BLOCK = 64, 4096
"""Blocks of a GGUF file that enter its fingerprint, evenly spaced, and their size in bytes."""


class TensorInfo(NamedTuple):
    """A tensor on disk: its shape, its dtype as safetensors names it, and its file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model or of a PEFT adapter; all of them exist.

    Those of a repository at the hub are fetched.

    Raises:
        ConfigError: If the folder has no safetensors, or they cannot be fetched.
        CheckpointError: If its index is damaged or names files that are missing.
    """
    require_weights(folder)
    for name in ("model", "adapter_model"):
        whole, index = (folder / f"{name}.safetensors{end}" for end in ("", ".index.json"))
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _shards(index)
    raise ConfigError(
        f"{folder} has no weights as safetensors (model.safetensors or its index); "
        "give the folder that save_pretrained wrote."
    )


def tensor_infos(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of a folder's weights: shapes and dtypes by name, no values.

    Raises:
        ConfigError: As in `weight_files`.
        CheckpointError: As in `weight_files`, or if a file is cut off or damaged.
    """
    infos = {}
    for file in weight_files(folder):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                part = tensors.get_slice(name)
                infos[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype(), file)
    return infos


def fingerprint_folder(folder: Path) -> str:
    """Fingerprint the safetensors of a folder; see `flexalign.models.loading.fingerprint`."""
    return _fingerprint(_stored(folder))


def fingerprint_module(model: nn.Module) -> str:
    """Fingerprint a module; the result is that of the folder it would be saved as.

    For a PEFT wrapper, the base is fingerprinted.
    """
    return _fingerprint(_held(model))


def same_folder(one: Path, other: Path) -> bool:
    """Return whether two folders have equal tensors; read whole only if fingerprints are equal."""
    return fingerprint_folder(one) == fingerprint_folder(other) and _same(
        _stored(one), _stored(other)
    )


def same_module(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules have equal tensors; compared only if fingerprints are equal."""
    return fingerprint_module(one) == fingerprint_module(other) and _same(_held(one), _held(other))


def fingerprint_file(file: Path) -> str:
    """Fingerprint a file as a whole (GGUF, a dial's weights) by its size and blocks of its bytes."""
    require_weights(file.parent)
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as data:
        for block in range(_SAMPLED_BLOCKS):
            data.seek(size * block // _SAMPLED_BLOCKS)
            digest.update(data.read(_BLOCK))
    return digest.hexdigest()[:16]


def _fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        count = min(_SAMPLED_VALUES, tensor.numel())
        places = torch.arange(count, device=tensor.device) * tensor.numel() // max(count, 1)
        values = tensor.detach().reshape(-1)[places].to(torch.bfloat16).cpu()
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _same(one: Iterable[tuple[str, Tensor]], other: Iterable[tuple[str, Tensor]]) -> bool:
    """Compare tensors, in bf16 where their dtypes differ."""
    for (_, first), (_, second) in zip(one, other, strict=True):
        if first.dtype != second.dtype:
            first, second = first.to(torch.bfloat16), second.to(torch.bfloat16)
        if not torch.equal(first.cpu(), second.cpu()):
            return False
    return True


def _held(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's tensors by the names that they are saved under; tied tensors once."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return _held(model.get_base_model())  # type: ignore[operator]

    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if _is_of_an_adapter(name) or (place in seen and tensor.numel()):
            continue
        seen.add(place)
        tensors[name.replace(".base_layer.", ".")] = tensor

    if hasattr(model, "config"):
        from transformers.core_model_loading import revert_weight_conversion

        # In some families the names in the module differ from those in the file.
        tensors = revert_weight_conversion(model, tensors)
    return sorted(tensors.items())


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    infos = tensor_infos(folder)
    files: dict[Path, Any] = {}
    for name in sorted(infos):
        file = infos[name].file
        if file not in files:
            files[file] = _opened(file)
        yield name, files[file].get_tensor(name)


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{index} is damaged ({type(error).__name__}: {error}); copy the model again."
        ) from error

    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {', '.join(missing)}, named in {index.name}; "
            "copy the model again."
        )
    return sorted(index.parent / name for name in names)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is cut off or damaged ({error}); copy the model again."
        ) from error


def _is_of_an_adapter(name: str) -> bool:
    return any(mark in name for mark in (".lora_", ".modules_to_save.", ".ia3_", ".hada_"))
