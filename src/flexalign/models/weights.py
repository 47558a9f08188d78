"""Weights on disk: their files, the headers of the files, and fingerprints.

What is read from headers, and the fingerprint of a folder, need no torch.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
from safetensors import SafetensorError, safe_open

from flexalign._storage import follow_umask
from flexalign.errors import CheckpointError, ConfigError
from flexalign.models.hub import require_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

_SAMPLED_VALUES = 64
"""Values of each tensor that enter the fingerprint, evenly spaced."""

_SAMPLED_BLOCKS, _BLOCK = 64, 4096
"""Blocks of a GGUF file that enter its fingerprint, evenly spaced, and their size in bytes."""


_NUMPY_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"},
}
"""Types of safetensors that numpy reads; bfloat16 as the 16 bits that it is."""


class TensorInfo(NamedTuple):
    """A tensor on disk.

    Attributes:
        shape: Its shape.
        dtype: Its type, as safetensors names it.
        file: Its file.
        start: Where its values begin in the file, in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int

    @property
    def size(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def is_known_to_numpy(self) -> bool:
        """Whether its values can be read without torch."""
        return self.dtype in _NUMPY_DTYPES


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
        with _opened(file, "numpy"):  # this checks the file
            pass
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start = 8 + length + entry["data_offsets"][0]
            infos[name] = TensorInfo(tuple(entry["shape"]), entry["dtype"], file, start)
    return infos


def stored_tensors(folder: Path) -> "Iterator[tuple[str, Tensor]]":
    """Read a folder's weights one tensor at a time, in the order of their names.

    Raises:
        ConfigError: As in `weight_files`.
        CheckpointError: As in `tensor_infos`.
    """
    infos = tensor_infos(folder)
    files: dict[Path, Any] = {}
    for name in sorted(infos):
        file = infos[name].file
        if file not in files:
            files[file] = _opened(file)
        yield name, files[file].get_tensor(name)


def write_tensors(
    path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Args:
        path: The file; one that exists is replaced.
        tensors: The tensors by name; contiguous, no two of one storage.
        metadata: The file's metadata; by default that of a model's weights.
    """
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"} if metadata is None else metadata)
    follow_umask(path)


def fingerprint_folder(folder: Path) -> str:
    """Fingerprint the safetensors of a folder; see `flexalign.models.loading.fingerprint`."""
    infos = tensor_infos(folder)
    return _fingerprint(
        (name, infos[name].shape, _sample_stored(name, infos[name])) for name in sorted(infos)
    )


def fingerprint_module(model: "nn.Module") -> str:
    """Fingerprint a module; the result is that of the folder it would be saved as.

    For a PEFT wrapper, the base is fingerprinted.
    """
    return _fingerprint((name, tuple(held.shape), _sample(held)) for name, held in _held(model))


def same_folder(one: Path, other: Path) -> bool:
    """Return whether two folders have equal tensors; read whole only if fingerprints are equal."""
    return fingerprint_folder(one) == fingerprint_folder(other) and _same(
        stored_tensors(one), stored_tensors(other)
    )


def same_module(one: "nn.Module", other: "nn.Module") -> bool:
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


def _fingerprint(samples: Iterable[tuple[str, tuple[int, ...], bytes]]) -> str:
    """Return the fingerprint of tensors, each given by name, shape and sampled values."""
    digest = hashlib.sha256()
    for name, shape, values in samples:
        digest.update(f"{name}{shape}".encode())
        digest.update(values)
    return digest.hexdigest()[:16]


def _sample(tensor: "Tensor") -> bytes:
    """Return a tensor's sampled values, rounded to bfloat16."""
    import torch

    count = min(_SAMPLED_VALUES, tensor.numel())
    places = torch.arange(count, device=tensor.device) * tensor.numel() // max(count, 1)
    values = tensor.detach().reshape(-1)[places].to(torch.bfloat16).cpu()
    return values.view(torch.int16).numpy().tobytes()


def _sample_stored(name: str, info: TensorInfo) -> bytes:
    """Return the same of a tensor on disk, of which only these values are read."""
    count = min(_SAMPLED_VALUES, info.size)
    if not count:
        return b""
    if not info.is_known_to_numpy:
        with _opened(info.file) as tensors:
            return _sample(tensors.get_tensor(name))

    places = numpy.arange(count) * info.size // count
    dtype = numpy.dtype(_NUMPY_DTYPES[info.dtype])
    values = numpy.memmap(info.file, dtype, "r", info.start, (info.size,))[places]
    if info.dtype == "BF16":
        return values.tobytes()

    # The upper half of a float32, rounded to the nearest, and to the even one of two equally near.
    with numpy.errstate(over="ignore"):
        bits = values.astype("<f4").view("<u4")
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return bytes(rounded.astype("<u2").tobytes())


def _same(one: "Iterable[tuple[str, Tensor]]", other: "Iterable[tuple[str, Tensor]]") -> bool:
    """Compare tensors, in bf16 where their dtypes differ."""
    import torch

    for (_, first), (_, second) in zip(one, other, strict=True):
        if first.dtype != second.dtype:
            first, second = first.to(torch.bfloat16), second.to(torch.bfloat16)
        if not torch.equal(first.cpu(), second.cpu()):
            return False
    return True


def _held(model: "nn.Module") -> "list[tuple[str, Tensor]]":
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


def _opened(file: Path, framework: str = "pt") -> Any:
    try:
        return safe_open(file, framework=framework)
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is cut off or damaged ({error}); copy the model again."
        ) from error


def _is_of_an_adapter(name: str) -> bool:
    return any(mark in name for mark in (".lora_", ".modules_to_save.", ".ia3_", ".hada_"))
