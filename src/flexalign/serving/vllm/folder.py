"""The folder that vLLM loads: a base model and an InRa adapter or a LoRA dial on it, as one model.

It holds the base's configuration under another architecture, its tokenizer, links to its weights
(no second copy of them), and the adapter's tensors in a file of their own. The adapter's own
settings lie beside them as they are, for the server in front of the engine: those of an InRa
adapter in the folder itself, those of a LoRA dial in a folder inside it.
"""

import logging
import math
import shutil
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from flexalign._storage import following_umask, write_json
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import CheckpointError, ConfigError, UnsupportedModelError
from flexalign.generation.dial_config import DialConfig, require_base
from flexalign.generation.row_lambdas import TagTokens
from flexalign.inra.configuration import InRaConfig
from flexalign.lora_dial.configuration import ADAPTER_FILE, LoRADialConfig
from flexalign.models.adapters import read_adapter_config
from flexalign.models.loading import fingerprint, load_config, load_model, load_tokenizer
from flexalign.models.sources import Model, Source, read_json, resolve, resolve_adapter
from flexalign.models.weights import TensorInfo, tensor_infos, weight_files, write_tensors
from flexalign.serving.vllm.lambdas import (
    ARCHITECTURES,
    CONFIG_KEY,
    LORA_ARCHITECTURES,
    DialSettings,
)
from flexalign.systems.dials import read_dial

_INRA_FILE = "model-inra-adapter.safetensors"
_LORA_FILE = "model-lora-dial.safetensors"
_LORA_FOLDER = "lora_dial"
_INDEX_FILE = "model.safetensors.index.json"
_FIRST_LAYER = "model.layers.0."
_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_OWN_FILES = ("config.json", _INDEX_FILE, InRaConfig.CONFIG_FILE, "params.json")

_PEFT_PREFIX = "base_model.model."
_MERGED = {
    "q_proj": ("qkv_proj", 0, 3),
    "k_proj": ("qkv_proj", 1, 3),
    "v_proj": ("qkv_proj", 2, 3),
    "o_proj": ("o_proj", 0, 1),
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
}
"""For each linear layer of a base: vLLM's layer that it is part of, which part, and of how many."""

_Matrices: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""A LoRA's A, and its B times its scaling, by the name of the linear layer."""

_log = logging.getLogger("flexalign.serving")


def prepare_folder(
    model: Model, adapter: str | Path, output: str | Path, *, any_base: bool = False
) -> Path:
    """Write the folder that vLLM serves a base and its adapter from.

    The base's weights are linked, so they must stay where they are. A GGUF file is the exception:
    it is de-quantised and written out. A folder that was prepared before is written anew.

    Args:
        model: The base: a known name, a folder or a GGUF file.
        adapter: The folder of an InRa adapter, a LoRA dial or a plain PEFT LoRA, or a known name.
        output: Where to; made if it is not there.
        any_base: Take another base than the adapter was made for, if the shapes fit.

    Returns:
        ``output``, as an absolute path. Serve it with ``vllm serve``, or ``vllm.LLM``.

    Raises:
        ConfigError: If a part is not there, or ``output`` is a folder with something else in it.
        CheckpointError: If the adapter's files are missing, truncated or corrupt.
        PairMismatchError: If the adapter was made for another base.
        UnsupportedModelError: If the base is of a family that the plugin does not serve, or a LoRA
            changes what it does not serve.
    """
    source, adapter = resolve(model), resolve_adapter(adapter)
    settings = read_dial(adapter)
    if source.is_adapter:
        raise UnsupportedModelError(
            f"{source} is a PEFT adapter and no base; merge it (merge_and_unload), save the merged "
            "model and give that."
        )
    is_lora = isinstance(settings, LoRADialConfig)
    architecture = _architecture(str(source), load_config(source), is_lora=is_lora)
    matrices = _read_lora(adapter) if is_lora else {}
    if source.gguf_file is None:
        if not any_base:
            require_base(settings, fingerprint(source), str(source), adapter)
        _require_fit(matrices, tensor_infos(source.path), adapter)

    output = _emptied(Path(output).expanduser().absolute())
    if source.gguf_file is None:
        _link_base(source.path, output)
        base = source.path
    else:
        _log.info("%s is a GGUF file: its weights are written to %s, de-quantised.", source, output)
        loaded = load_model(source)
        if not any_base:
            require_base(settings, fingerprint(loaded), str(source), adapter)
        with following_umask(output):
            loaded.save_pretrained(output)
        load_tokenizer(source).save_pretrained(output)
        base = output

    if settings.rendering and settings.rendering.get("arguments"):
        tokenizer = load_tokenizer(source)
        settings.bind(tokenizer)
        tokenizer.save_pretrained(output)

    config, infos = read_json(base / "config.json"), tensor_infos(base)
    common: dict[str, Any] = {
        "default_lambda": settings.default_lambda,
        "thinking_tokens": _thinking_tokens(settings, source),
    }
    if isinstance(settings, InRaConfig):
        files = dict.fromkeys(_write_inra(adapter, infos, output), _INRA_FILE)
        dial = DialSettings(settings.adapter_layers, **common)
    else:
        _require_fit(matrices, infos, adapter)
        ranks, names = _write_lora(matrices, adapter, output)
        files = dict.fromkeys(names, _LORA_FILE)
        dial = DialSettings(**common, ranks=ranks)

    _write_index(infos, files, output)
    config |= {"architectures": [architecture], CONFIG_KEY: dial.to_json()}
    write_json(output / "config.json", config)
    return output


def is_prepared(folder: Path) -> bool:
    """Whether a folder is one that :func:`prepare_folder` wrote."""
    config = folder / "config.json"
    return config.is_file() and CONFIG_KEY in read_json(config)


def prepared_dial(folder: Path) -> DialConfig:
    """Read the settings of the adapter in a prepared folder.

    Raises:
        CheckpointError: If it holds none.
    """
    inside = folder / _LORA_FOLDER
    return read_dial(inside) if inside.is_dir() else InRaConfig.load(folder)


def _architecture(name: str, config: Any, *, is_lora: bool) -> str:
    architectures = LORA_ARCHITECTURES if is_lora else ARCHITECTURES
    if config.model_type not in architectures:
        raise UnsupportedModelError(
            f"{name} is of the family {config.model_type}, and vLLM serves a dial on "
            f"{', '.join(architectures)} alone; serve it with --engine local."
        )
    return architectures[config.model_type]


def _emptied(output: Path) -> Path:
    """Make the folder, without what an earlier call left in it."""
    if output.is_dir() and any(output.iterdir()):
        if not is_prepared(output):
            raise ConfigError(
                f"{output} has files of something else in it; name a folder that is new or empty."
            )
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    return output


def _link_base(base: Path, output: Path) -> None:
    """Link a base's weights, and copy its tokenizer and what else is small."""
    for file in weight_files(base):
        (output / file.name).symlink_to(file.resolve())
    for file in sorted(base.iterdir()):
        if file.is_file() and file.suffix in _SMALL_FILES and file.name not in _OWN_FILES:
            shutil.copyfile(file, output / file.name)


def _write_inra(adapter: Path, base: dict[str, TensorInfo], output: Path) -> list[str]:
    """Write an InRa adapter's settings, and its tensors under the names that the model has for them.

    Returns:
        The names.

    Raises:
        CheckpointError: If one has no counterpart of its shape in the base's first layer.
    """
    path = adapter / InRaConfig.WEIGHTS_FILE
    tensors = load_file(path)
    for name, tensor in tensors.items():
        original = base.get(_FIRST_LAYER + name.partition(".")[2])
        if original is None or original.shape != tuple(tensor.shape):
            found = "none" if original is None else original.shape
            raise CheckpointError(
                f"{path} does not fit this base: {name!r} is {tuple(tensor.shape)}, and the base's "
                f"first layer has {found} there."
            )

    named = {f"model.adapter.{name}": tensor for name, tensor in tensors.items()}
    write_tensors(output / _INRA_FILE, named)
    shutil.copyfile(adapter / InRaConfig.CONFIG_FILE, output / InRaConfig.CONFIG_FILE)
    return list(named)


def _write_lora(
    matrices: _Matrices, adapter: Path, output: Path
) -> tuple[dict[str, list[int]], list[str]]:
    """Write a LoRA's settings, and its matrices under the names that the model has for them.

    B is written with as many columns as the largest rank among the parts of vLLM's layer.

    Returns:
        The rank of every part of every layer of vLLM's with a LoRA, and the names of the tensors.
    """
    ranks: dict[str, list[int]] = {}
    for module, (down, _) in matrices.items():
        parent, _, name = module.rpartition(".")
        layer, part, parts = _MERGED[name]
        ranks.setdefault(f"{parent}.{layer}", [0] * parts)[part] = len(down)

    named = {}
    for module, (down, up) in matrices.items():
        parent, _, name = module.rpartition(".")
        width = max(ranks[f"{parent}.{_MERGED[name][0]}"])
        named[f"{module}.lora_a.weight"] = down
        named[f"{module}.lora_b"] = torch.nn.functional.pad(up, (0, width - up.shape[1]))
    write_tensors(output / _LORA_FILE, named)

    inside = output / _LORA_FOLDER
    inside.mkdir()
    for file in (ADAPTER_FILE, LoRADialConfig.CONFIG_FILE):
        if (adapter / file).is_file():
            shutil.copyfile(adapter / file, inside / file)
    weights = (adapter / LoRADialConfig.WEIGHTS_FILE).resolve()
    (inside / LoRADialConfig.WEIGHTS_FILE).symlink_to(weights)
    return ranks, list(named)


def _read_lora(adapter: Path) -> _Matrices:
    """Read a LoRA's matrices.

    Raises:
        CheckpointError: If one is without its other.
        UnsupportedModelError: If one is of another layer than the plugin serves.
    """
    config = read_adapter_config(Source(str(adapter), adapter))
    path = adapter / LoRADialConfig.WEIGHTS_FILE
    tensors = load_file(path)
    found: _Matrices = {}
    for key in sorted(tensors):
        name, _, matrix = key.removeprefix(_PEFT_PREFIX).rpartition(".lora_")
        if matrix not in ("A.weight", "B.weight") or name.rpartition(".")[2] not in _MERGED:
            raise UnsupportedModelError(
                f"{path} has {key}, and vLLM serves a LoRA dial on {', '.join(_MERGED)} alone; "
                "serve it with --engine local."
            )
        down, up = (tensors.get(f"{_PEFT_PREFIX}{name}.lora_{one}.weight") for one in "AB")
        if down is None or up is None:
            raise CheckpointError(f"{path} has {key} without its other matrix; save it again.")
        found[name] = down, (up.float() * _scaling(config, name, len(down))).to(up.dtype)
    return found


def _require_fit(matrices: _Matrices, base: dict[str, TensorInfo], adapter: Path) -> None:
    """Refuse a LoRA whose shapes are not those of a base.

    Raises:
        CheckpointError: If one is not.
    """
    for name, (down, up) in matrices.items():
        weight = base.get(f"{name}.weight")
        if weight is None or weight.shape != (len(up), down.shape[1]):
            raise CheckpointError(
                f"{adapter} does not fit this base: its matrices of {name} are {tuple(down.shape)} "
                f"and {tuple(up.shape)}, and the base has {weight and weight.shape} there."
            )


def _scaling(config: Any, module: str, rank: int) -> float:
    """Return by what PEFT multiplies ``B·A`` of a layer."""
    pattern = get_pattern_key(config.alpha_pattern.keys(), module)
    alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _write_index(base: dict[str, TensorInfo], adapter: dict[str, str], output: Path) -> None:
    """Write which file each tensor is in, so that vLLM looks for the adapter's too."""
    files = {name: info.file.name for name, info in base.items()} | adapter
    write_json(output / _INDEX_FILE, {"metadata": {}, "weight_map": files})


def _thinking_tokens(settings: DialConfig, source: Model) -> tuple[int, int] | None:
    """Return the tokens of the thinking's tags; None where they are not one token each."""
    tokenizer = load_tokenizer(source)
    try:
        tokens = TagTokens(tokenizer, settings.tags or ThinkingTags.of(tokenizer))
    except ConfigError:
        return None
    return (tokens.open, tokens.close) if tokens.are_single else None
