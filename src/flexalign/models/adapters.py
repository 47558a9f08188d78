"""PEFT adapters: switching those of one base, and checking whether one fits a base."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from flexalign.errors import ConfigError, UnsupportedModelError
from flexalign.models.loading import skeleton
from flexalign.models.sources import Source, absolute_name
from flexalign.models.weights import TensorInfo, tensor_infos


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    if isinstance(model, PeftModel):
        base: nn.Module = model.get_base_model()
        return base
    return model


def make_bases_absolute(model: nn.Module) -> None:
    """Name the base of each adapter by a path that holds in every folder, where it has one.

    Other tools take a path that is not there for a repository of a hub.

    Args:
        model: A PEFT wrapper; nothing is done to any other module.
    """
    if isinstance(model, PeftModel):
        for config in model.peft_config.values():
            if config.base_model_name_or_path:
                config.base_model_name_or_path = absolute_name(config.base_model_name_or_path)


class AdapterSwitch:
    """Switches the adapters of a PEFT wrapper without changing whether they are trainable.

    PEFT's own methods make the adapters that they turn on trainable, and a frozen one must stay
    frozen. Not thread-safe: a module has one state.
    """

    def __init__(self, model: PeftModel) -> None:
        """Collect the layers that have adapters now."""
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._layers = [layer for layer in model.modules() if isinstance(layer, kinds)]

    @contextmanager
    def use(self, names: tuple[str, ...]) -> Iterator[None]:
        """Turn these adapters on and all others off in the block; restore the state after it."""
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = not names
            if names:
                layer._active_adapter = list(names)
        try:
            yield
        finally:
            for layer, (active, disabled) in zip(self._layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled


def read_adapter_config(source: Source) -> Any:
    """Read a PEFT adapter's configuration.

    Raises:
        ConfigError: If PEFT cannot read it.
        UnsupportedModelError: If the adapter adds virtual tokens to the input.
    """
    try:
        config = PeftConfig.from_pretrained(source.path)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{source}: PEFT cannot read its adapter_config.json ({error}); save the adapter again."
        ) from error

    if config.is_prompt_learning:
        raise UnsupportedModelError(
            f"{source} is an adapter of type {config.peft_type}, which adds virtual tokens to the "
            "input; use one that changes weights, such as LoRA."
        )
    return config


def unfit_tensor(
    base_config: Any, adapter_config: Any, tensors: Mapping[str, TensorInfo]
) -> str | None:
    """Describe the first of an adapter's tensors that does not fit a base; None if all do.

    Args:
        base_config: The base's transformers configuration; it is built without storage.
        adapter_config: The adapter's, from `read_adapter_config`.
        tensors: The adapter's, from the headers of its file.
    """
    model = skeleton(base_config)
    with torch.device("meta"):
        try:
            model = get_peft_model(model, replace(adapter_config, base_model_name_or_path=None))
        except ValueError as error:
            return " ".join(str(error).split())[:300]

    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, info in sorted(tensors.items()):
        if name not in wanted:
            return f"it changes {name}, which that base does not have"
        if tuple(wanted[name].shape) != info.shape:
            return f"{name} is {info.shape} where that base needs {tuple(wanted[name].shape)}"

    missing = sorted(wanted.keys() - tensors.keys())
    return f"it lacks {missing[0]}" if missing else None


def adds_nothing(adapter: Path) -> bool:
    """Return whether all B matrices of a LoRA are zero, as they are before training."""
    infos = tensor_infos(adapter)
    seconds = [name for name in infos if ".lora_B" in name or ".lora_embedding_B" in name]
    if not seconds or any(".lora_" not in name for name in infos):
        return False
    for name in seconds:
        with safe_open(infos[name].file, framework="pt") as tensors:
            if bool(tensors.get_tensor(name).any()):
                return False
    return True
