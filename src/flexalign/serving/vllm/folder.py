"""The folder that vLLM loads: a base model and an InRa adapter on it, as one model.

It holds the base's configuration under another architecture, its tokenizer, links to its weights
(no second copy of them), and the adapter's tensors in a file of their own. The adapter's own
settings lie beside them as they are, for the server in front of the engine.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from flexalign._storage import write_json
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import CheckpointError, ConfigError, UnsupportedModelError
from flexalign.generation.dial_config import require_base
from flexalign.generation.row_lambdas import TagTokens
from flexalign.inra.configuration import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    InRaConfig,
    check_folder,
)
from flexalign.models.loading import fingerprint, load_config, load_model, load_tokenizer
from flexalign.models.sources import Model, read_json, resolve, resolve_adapter
from flexalign.models.weights import TensorInfo, tensor_infos, weight_files
from flexalign.serving.vllm.lambdas import ARCHITECTURES, CONFIG_KEY, DialSettings

_ADAPTER_FILE = "model-inra-adapter.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_FIRST_LAYER = "model.layers.0."
_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_OWN_FILES = ("config.json", _INDEX_FILE, CONFIG_FILE, "params.json")

_log = logging.getLogger("flexalign.serving")


def prepare_folder(
    model: Model, adapter: str | Path, output: str | Path, *, any_base: bool = False
) -> Path:
    """Write the folder that vLLM serves a base and its adapter from.

    The base's weights are linked, so they must stay where they are. A GGUF file is the exception:
    it is de-quantised and written out. A folder that was prepared before is written anew.

    Args:
        model: The base: a known name, a folder or a GGUF file.
        adapter: The InRa adapter's folder, or a known name.
        output: Where to; made if it is not there.
        any_base: Take another base than the adapter was made for, if the shapes fit.

    Returns:
        ``output``, as an absolute path. Serve it with ``vllm serve``, or ``vllm.LLM``.

    Raises:
        ConfigError: If a part is not there, or ``output`` is a folder with something else in it.
        CheckpointError: If the adapter's files are missing, truncated or corrupt.
        PairMismatchError: If the adapter was made for another base.
        UnsupportedModelError: If the base is of a family that the plugin does not serve.
    """
    source, adapter = resolve(model), resolve_adapter(adapter)
    settings = check_folder(adapter)
    if source.is_adapter:
        raise UnsupportedModelError(
            f"{source} is a PEFT adapter, which would be in both streams; merge it "
            "(merge_and_unload), save the merged model and give that."
        )
    architecture = _architecture(str(source), load_config(source))
    if source.gguf_file is None and not any_base:
        require_base(settings, fingerprint(source), str(source), adapter)

    output = _emptied(Path(output).expanduser().absolute())
    if source.gguf_file is None:
        _link_base(source.path, output)
        base = source.path
    else:
        _log.info("%s is a GGUF file: its weights are written to %s, de-quantised.", source, output)
        loaded = load_model(source)
        if not any_base:
            require_base(settings, fingerprint(loaded), str(source), adapter)
        loaded.save_pretrained(output)
        load_tokenizer(source).save_pretrained(output)
        base = output

    if settings.rendering and settings.rendering.get("arguments"):
        tokenizer = load_tokenizer(source)
        settings.bind(tokenizer)
        tokenizer.save_pretrained(output)

    config = read_json(base / "config.json")
    _write_index(tensor_infos(base), _write_adapter(adapter, tensor_infos(base), output), output)
    shutil.copyfile(adapter / CONFIG_FILE, output / CONFIG_FILE)

    dial = DialSettings(
        settings.adapter_layers, settings.default_lambda, _thinking_tokens(settings, source)
    )
    config |= {"architectures": [architecture], CONFIG_KEY: dial.to_json()}
    write_json(output / "config.json", config)
    return output


def is_prepared(folder: Path) -> bool:
    """Whether a folder is one that :func:`prepare_folder` wrote."""
    config = folder / "config.json"
    return config.is_file() and CONFIG_KEY in read_json(config)


def _architecture(name: str, config: Any) -> str:
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{name} is of the family {config.model_type}, and vLLM serves a dial on "
            f"{', '.join(ARCHITECTURES)} alone; serve it with --engine local."
        )
    return ARCHITECTURES[config.model_type]


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


def _write_adapter(adapter: Path, base: dict[str, TensorInfo], output: Path) -> list[str]:
    """Write the adapter's tensors under the names that the model has for them; return the names.

    Raises:
        CheckpointError: If one has no counterpart of its shape in the base's first layer.
    """
    tensors = load_file(adapter / WEIGHTS_FILE)
    for name, tensor in tensors.items():
        original = base.get(_FIRST_LAYER + name.partition(".")[2])
        if original is None or original.shape != tuple(tensor.shape):
            found = "none" if original is None else original.shape
            raise CheckpointError(
                f"{adapter / WEIGHTS_FILE} does not fit this base: {name!r} is "
                f"{tuple(tensor.shape)}, and the base's first layer has {found} there."
            )

    named = {f"model.adapter.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, output / _ADAPTER_FILE, metadata={"format": "pt"})
    return list(named)


def _write_index(base: dict[str, TensorInfo], adapter: list[str], output: Path) -> None:
    """Write which file each tensor is in, so that vLLM looks for the adapter's too."""
    files = {name: info.file.name for name, info in base.items()}
    files |= dict.fromkeys(adapter, _ADAPTER_FILE)
    write_json(output / _INDEX_FILE, {"metadata": {}, "weight_map": files})


def _thinking_tokens(settings: InRaConfig, source: Model) -> tuple[int, int] | None:
    """Return the tokens of the thinking's tags; None where they are not one token each."""
    tokenizer = load_tokenizer(source)
    try:
        tokens = TagTokens(tokenizer, settings.tags or ThinkingTags.of(tokenizer))
    except ConfigError:
        return None
    return (tokens.open, tokens.close) if tokens.are_single else None
