"""Loads configurations, tokenizers, models and PEFT adapters.

What `resolve` names is read from disk; the weights of a repository at the hub are fetched first.
Weights are read from safetensors (or GGUF, de-quantised) unless the caller permits pickles, and code
in a checkpoint runs only if the caller permits it.
"""

import copy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flexalign.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedModelError,
    WeightsWaitError,
)
from flexalign.models.hub import fetch_weights, pickled_weights
from flexalign.models.sources import (
    Model,
    Source,
    base_of,
    read_json,
    require_gguf,
    resolve,
)
from flexalign.models.weights import (
    fingerprint_file,
    fingerprint_folder,
    fingerprint_module,
    tensor_infos,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_NO_TEXT_MODEL = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)


def load_config(model: Model, *, trust_remote_code: bool = False) -> Any:
    """Read a model's configuration and refuse a model that cannot be realigned.

    No weights are read. For a PEFT adapter, the configuration of its base is returned.

    Raises:
        ConfigError: If the model does not exist.
        CheckpointError: If its configuration is damaged.
        UnsupportedModelError: If it is not a decoder-only text model, is quantised, or contains
            code that is not permitted.
    """
    source = resolve(model)
    if source.is_adapter:
        return load_config(base_of(source), trust_remote_code=trust_remote_code)

    if source.gguf_file is not None:
        require_gguf()
        config = _gguf_config(source.path / source.gguf_file)
    else:
        raw = read_json(source.path / "config.json")
        if not trust_remote_code and "auto_map" in raw and not _is_known(raw):
            raise UnsupportedModelError(
                f"{source} brings its own code ({raw['auto_map']}), which would run here; if you "
                "trust it, permit it: trust_remote_code=True in Python, training.trust_remote_code "
                "in a recipe, --trust-remote-code with flexalign inspect."
            )
        try:
            config = AutoConfig.from_pretrained(
                source.path, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (ValueError, KeyError) as error:
            raise UnsupportedModelError(
                f"{source}: transformers cannot read its configuration "
                f"({' '.join(str(error).split())[:300]}); give a causal language model."
            ) from error

    _require_text_model(source, config)
    return config


def _gguf_config(file: Path) -> Any:
    """Return the configuration in a GGUF file, which is read once: its whole vocabulary is parsed."""
    found = file.stat()
    return copy.deepcopy(_read_gguf_config(file, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=8)
def _read_gguf_config(file: Path, size: int, changed: int) -> Any:
    """Read it; size and time of change tell an exchanged file from the one before."""
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def has_tokenizer(source: Source) -> bool:
    """Return whether a model's folder has a tokenizer of its own."""
    return source.gguf_file is not None or any(
        (source.path / name).is_file() for name in _TOKENIZER_FILES
    )


def load_tokenizer(model: Model, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; for a PEFT adapter without one, that of its base.

    Raises:
        ConfigError: If the folder has no tokenizer.
    """
    source = resolve(model)
    if source.gguf_file is not None:
        require_gguf()
        return AutoTokenizer.from_pretrained(source.path, gguf_file=source.gguf_file)

    if not has_tokenizer(source):
        if source.is_adapter:
            return load_tokenizer(base_of(source), trust_remote_code=trust_remote_code)
        raise ConfigError(
            f"{source} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); copy the "
            "tokenizer's files into the folder."
        )
    return AutoTokenizer.from_pretrained(
        source.path, trust_remote_code=trust_remote_code, local_files_only=True
    )


def load_model(
    model: Model,
    *,
    dtype: "torch.dtype | str" = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Any:
    """Load a causal language model, in evaluation mode.

    A GGUF file is de-quantised. A PEFT adapter is returned as a PEFT wrapper of its base.

    Args:
        model: A known name, a folder, a GGUF file, a hub id, or a :class:`Source`.
        dtype: Data type of the weights; ``"auto"`` is the stored one.
        device_map: As in transformers.
        trust_remote_code: Permit code in the checkpoint to run.
        allow_pickle: Permit pickled weights, whose loading can run code.

    Raises:
        ConfigError: If the model does not exist, or has only pickled weights.
        CheckpointError: If weights are missing or damaged.
        UnsupportedModelError: As in `load_config`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    source = resolve(model)
    if source.is_adapter:
        base = load_model(
            base_of(source),
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        return load_adapter(base, source, allow_pickle=allow_pickle).eval()

    config = load_config(source, trust_remote_code=trust_remote_code)
    where: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "config": config}
    if source.gguf_file is not None:
        where["gguf_file"] = source.gguf_file
        if dtype == "auto":
            where["dtype"] = torch.float32  # its blocks are de-quantised to float32
    else:
        _require_weights(source, allow_pickle)
        where |= {"trust_remote_code": trust_remote_code}
        where |= {"local_files_only": True, "use_safetensors": None if allow_pickle else True}

    try:
        # Absolute, because an adapter that is trained on it names its base by this path.
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source.path.absolute(), output_loading_info=True, **where
        )
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "mismatched" not in str(error):
            raise
        raise CheckpointError(
            f"{source}: its weights do not fit its config.json "
            f"({' '.join(str(error).split())[:300]}); copy the model again."
        ) from error

    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{source} lacks {len(missing)} of its tensors, such as {missing[0]}; they would be "
            "random. Copy the model again."
        )

    if source.gguf_file is not None:
        _forget_quantisation(loaded)
    return loaded.eval()


def load_adapter(
    base: Any,
    adapter: Model,
    *,
    name: str = "default",
    trainable: bool = False,
    allow_pickle: bool = False,
) -> Any:
    """Put a PEFT adapter on a base.

    Args:
        base: A transformers model, or a PEFT wrapper of one, which gets another adapter.
        adapter: The adapter's folder or hub id.
        name: The adapter's name in the wrapper.
        trainable: Whether it will be trained.
        allow_pickle: Permit pickled weights, whose loading can run code.

    Returns:
        The PEFT wrapper.

    Raises:
        ConfigError: If the adapter does not exist, or has only pickled weights.
        CheckpointError: If it is damaged.
    """
    from peft import PeftModel

    source = resolve(adapter)
    _require_weights(source, allow_pickle)
    if isinstance(base, PeftModel):
        base.load_adapter(source.path, name, is_trainable=trainable)
        return base
    return PeftModel.from_pretrained(base, source.path, adapter_name=name, is_trainable=trainable)


def skeleton(config: Any) -> Any:
    """Build a causal language model on the meta device.

    This also holds under ZeRO-3, where transformers would partition it and allocate its values.

    Args:
        config: A transformers configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import set_zero3_state

    with torch.device("meta"), set_zero3_state():
        return AutoModelForCausalLM.from_config(config)


def fingerprint(model: "Model | nn.Module") -> str:
    """Fingerprint weights by tensor names, shapes and sampled values rounded to bf16.

    It does not change with a cast to bfloat16 or with other sharding, and a module has the same
    fingerprint as the folder that `save_pretrained` writes of it. For the folder of a PEFT adapter
    it is that of the adapter; for a PEFT wrapper, that of the base. That of a GGUF file is computed
    from the file's bytes.

    Returns:
        16 hexadecimal digits.

    Raises:
        ConfigError: If there are no weights in safetensors or GGUF.
        CheckpointError: If files are missing or damaged.
    """
    if not isinstance(model, Model):
        return fingerprint_module(model)
    source = resolve(model)
    if source.gguf_file is not None:
        return fingerprint_file(source.path / source.gguf_file)
    return fingerprint_folder(source.path)


def known_fingerprint(model: Model) -> str | None:
    """Fingerprint as `fingerprint` does; None for weights that `downloads_wait` leaves at the hub."""
    try:
        return fingerprint(model)
    except WeightsWaitError:
        return None


def _is_known(raw: dict[str, Any]) -> bool:
    return raw.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _require_text_model(source: Source, config: Any) -> None:
    family = config.model_type
    architecture = next(iter(config.architectures or []), "")
    called = f"{source} ({architecture or family})"
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{called} is an encoder–decoder; realignment needs a decoder-only language model."
        )

    quantisation = getattr(config, "quantization_config", None)
    if quantisation and source.gguf_file is None:
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else "?"
        raise UnsupportedModelError(
            f"{called} is quantised ({method}); give its original weights. (A GGUF file is "
            "de-quantised while loading.)"
        )

    if architecture.endswith(_NO_TEXT_MODEL):
        raise UnsupportedModelError(
            f"{called} is no causal language model: it was trained for something else."
        )

    # One rule for all families, also for models that see or hear: text is what transformers loads
    # as a causal language model, the whole model or its text tower alone.
    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "auto_map"):
        return

    towers = other_towers(config)
    if towers:
        text = config.get_text_config()
        kind = "vision-language" if "vision" in " ".join(towers) else "multimodal"
        raise UnsupportedModelError(
            f"{called} is a {kind} model ({', '.join(towers)}), and transformers loads no causal "
            f"language model of it; its text tower (family {text.model_type}) is a language model of "
            "its own only once it is saved as one, so give a text model."
        )
    raise UnsupportedModelError(
        f"{called}: transformers has no causal language model of the family {family!r}."
    )


def other_towers(config: Any) -> list[str]:
    """Return the keys of a configuration whose parts are no text, such as ``vision_config``.

    Args:
        config: A transformers configuration.
    """
    text = config.get_text_config(decoder=True)
    return [
        name
        for name in config.sub_configs
        if getattr(config, name, None) is not None and getattr(config, name) is not text
    ]


def _require_weights(source: Source, allow_pickle: bool) -> None:
    try:
        tensor_infos(source.path)
    except WeightsWaitError:
        raise
    except ConfigError:
        name = "adapter_model.bin" if source.is_adapter else "pytorch_model*.bin"
        pickled = sorted(file.name for file in source.path.glob(name))
        pickled = pickled or pickled_weights(source.path)
        if not pickled:
            raise
        if not allow_pickle:
            raise ConfigError(
                f"{source} has its weights as pickles alone ({pickled[0]}), and loading a "
                "pickle can run code; if you trust it, load it once in Python with allow_pickle=True "
                "and save it with save_pretrained, as safetensors. flexalign realign, cache and "
                "inspect take it as it is with --allow-pickle."
            ) from None
        fetch_weights(source.path, pickled=True)


def _forget_quantisation(model: Any) -> None:
    """Remove the quantisation settings of a de-quantised model, with which it cannot be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
