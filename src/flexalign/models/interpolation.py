"""Weights between two models: (1−λ)·θ_ref + λ·θ_al, one file at a time."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flexalign._storage import replacing
from flexalign.errors import ConfigError, LambdaError, PairMismatchError
from flexalign.fusion import as_lambda
from flexalign.models.loading import load_config, load_model, load_tokenizer
from flexalign.models.sources import Model, Source, resolve
from flexalign.models.weights import TensorInfo, tensor_infos, write_tensors

_OF_NO_MATTER = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}
"""Entries of a configuration that may differ: shapes and the meaning of weights do not depend on them."""

_NOT_COPIED = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".pt", ".pth")


def interpolate(reference: Model, aligned: Model, lam: float, output: str | Path) -> Path:
    """Write a model whose weights are between those of two models, or beyond one of them.

    Every tensor is (1−λ)·θ_ref + λ·θ_al, computed in float32 and stored in its own data type
    (in float32 where the two differ). λ=0 and λ=1 give the two models' tensors bit for bit. One
    file of the reference is in memory at a time; a GGUF file or a PEFT adapter is first written
    as a whole model (the adapter merged into its base). The rest of the folder is copied from the
    reference: configuration, tokenizer, chat template.

    Args:
        reference: The model of λ=0.
        aligned: The model of λ=1, of the same shape, or a PEFT adapter.
        lam: Any finite λ.
        output: The folder to write; it must not exist, or must be empty. Nothing appears under
            this name before all of it is written.

    Returns:
        The folder.

    Raises:
        LambdaError: If λ is not a finite number.
        ConfigError: If a model does not exist, or the output is not empty.
        PairMismatchError: If the two differ in tensors, in shapes, or in a configuration that
            changes what weights mean.
    """
    lam = _number(lam)
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is there already; move it away or name another output.")

    with ExitStack() as stack:
        first, second = (
            stack.enter_context(_as_folder(resolve(model))) for model in (reference, aligned)
        )
        names = f"{reference} and {aligned}"

        _require_one_meaning(first, second, names)
        pairs = _paired(tensor_infos(first), tensor_infos(second), _is_tied(first), names)

        output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as written:
            _write(first, pairs, lam, written)
    return output


def _number(lam: object) -> float:
    value = as_lambda(lam)
    if isinstance(value, Tensor):
        raise LambdaError("weights are interpolated at one λ; give a number.")
    return value


@contextmanager
def _as_folder(source: Source) -> Iterator[Path]:
    """Yield a model's folder of safetensors; another format is written to a temporary folder."""
    load_config(source)
    if source.gguf_file is None and not source.is_adapter:
        yield source.path
        return

    with TemporaryDirectory(prefix="flexalign-") as scratch:
        model: Any = load_model(source)
        if source.is_adapter:
            model = model.merge_and_unload()
        model.save_pretrained(scratch)
        load_tokenizer(source).save_pretrained(scratch)
        del model
        yield Path(scratch)


def _require_one_meaning(reference: Path, aligned: Path, names: str) -> None:
    one, other = (
        load_config(Source(str(folder), folder)).to_dict() for folder in (reference, aligned)
    )
    keys = sorted((one.keys() | other.keys()) - _OF_NO_MATTER)
    different = [key for key in keys if one.get(key) != other.get(key)]
    if different:
        details = "; ".join(f"{key}: {one.get(key)!r} and {other.get(key)!r}" for key in different)
        raise PairMismatchError(
            f"{names} are not of one shape ({details}); weights can be interpolated only between "
            "models of one architecture. Mix their logits instead, with TwoModelDecoder."
        )


def _is_tied(folder: Path) -> bool:
    return bool(load_config(Source(str(folder), folder)).get_text_config().tie_word_embeddings)


def _paired(
    reference: dict[str, TensorInfo], aligned: dict[str, TensorInfo], tied: bool, names: str
) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """Return the tensors of both by name, without a tied head that only one of them stores."""
    alone = reference.keys() ^ aligned.keys()
    if tied:
        alone = {name for name in alone if not name.endswith("lm_head.weight")}
    if alone:
        first = min(alone)
        where = "the reference" if first in reference else "the aligned model"
        raise PairMismatchError(
            f"{names} have other tensors: {first} is in {where} alone"
            + (f", and {len(alone) - 1} more" if len(alone) > 1 else "")
            + ". Give two models of one architecture."
        )

    pairs = {name: (reference[name], aligned[name]) for name in reference if name in aligned}
    for name, (one, other) in pairs.items():
        if one.shape != other.shape:
            raise PairMismatchError(
                f"{names}: {name} is {one.shape} in the reference and {other.shape} in the "
                "aligned model. Mix their logits instead, with TwoModelDecoder."
            )
    return pairs


def _write(
    reference: Path, pairs: dict[str, tuple[TensorInfo, TensorInfo]], lam: float, output: Path
) -> None:
    """Write a copy of the reference's folder with the new weights, in files of the same names."""
    output.mkdir()
    for path in reference.iterdir():
        if path.is_file() and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, output / path.name)  # not the permissions of the reference

    by_file: dict[Path, list[str]] = {}
    for name, (one, _) in pairs.items():
        by_file.setdefault(one.file, []).append(name)

    size = 0
    places: dict[str, str] = {}
    for file, names in by_file.items():
        with ExitStack() as stack:
            reading = _TensorReader(stack)
            tensors = {}
            for name in names:
                one, other = pairs[name]
                tensors[name] = _between(
                    reading.read(name, one), reading.read(name, other), lam, name
                )
        write_tensors(output / file.name, tensors)
        size += sum(tensor.nbytes for tensor in tensors.values())
        places |= dict.fromkeys(names, file.name)

    if len(by_file) > 1 or "model.safetensors" not in places.values():
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


class _TensorReader:
    """Reads tensors; each file is opened once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, Any] = {}

    def read(self, name: str, info: TensorInfo) -> Tensor:
        if info.file not in self._files:
            self._files[info.file] = self._stack.enter_context(safe_open(info.file, "pt"))
        tensor: Tensor = self._files[info.file].get_tensor(name)
        return tensor


def _between(reference: Tensor, aligned: Tensor, lam: float, name: str) -> Tensor:
    if lam in (0.0, 1.0):
        return (aligned if lam else reference).clone()
    if not reference.is_floating_point():
        if torch.equal(reference, aligned):
            return reference.clone()
        raise PairMismatchError(
            f"{name} holds whole numbers and differs between the two; there is nothing between."
        )

    dtype = torch.promote_types(reference.dtype, aligned.dtype)
    working = torch.promote_types(dtype, torch.float32)
    stored = reference.dtype if reference.dtype == aligned.dtype else working
    return torch.lerp(reference.to(working), aligned.to(working), lam).to(stored)
