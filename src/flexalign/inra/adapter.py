"""The adapter: copies of a model's first decoder layer, made the identity."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from flexalign._modes import evaluating
from flexalign.errors import UnsupportedModelError
from flexalign.inra.identity import LayerCall, make_identity
from flexalign.inra.refusal import refusing

__all__ = ["copy_first_layer", "decoder_layers", "identity_adapter"]

_PROBE_ROWS, _PROBE_TOKENS = 2, 24


def decoder_layers(model: nn.Module, name: str) -> nn.ModuleList:
    """Return a model's stack of decoder layers: a list with as many modules as it has layers.

    Raises:
        UnsupportedModelError: If there is none.
    """
    config: Any = model.config
    depth = config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UnsupportedModelError(
        f"{name}: no stack of {depth} decoder layers was found in it; "
        "InRa needs a decoder-only transformer."
    )


def copy_first_layer(model: nn.Module, adapter_layers: int, name: str) -> nn.ModuleList:
    """Copy layer 0, as it is, for each adapter layer; its cache index follows the model's layers.

    The copies share the model's configuration, so a change of its attention implementation
    reaches them too.

    Raises:
        UnsupportedModelError: If the model has no decoder stack, or is quantised.
    """
    layers = decoder_layers(model, name)
    for parameter in layers[0].parameters():
        if not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"{name}: its weights are quantised ({parameter.dtype}), and an adapter is a layer "
                "to train; load the model de-quantised."
            )
    config: Any = model.config
    shared = {id(part): part for part in (config, config.get_text_config(decoder=True))}
    copies = nn.ModuleList()
    for index in range(adapter_layers):
        layer = copy.deepcopy(layers[0], dict(shared))
        module: Any
        for module in layer.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
            if hasattr(module, "layer_idx"):
                module.layer_idx = len(layers) + index
        copies.append(layer.requires_grad_(True))
    return copies


@torch.no_grad()
def identity_adapter(model: nn.Module, adapter_layers: int, name: str) -> nn.ModuleList:
    """Make the adapter of a model: that many copies of its layer 0, each the identity.

    Raises:
        UnsupportedModelError: If the model's layers cannot be copied or made the identity.
    """
    copies = copy_first_layer(model, adapter_layers, name)
    dtype = next(copies[0].parameters()).dtype
    with refusing(name, "its first layer cannot be run by itself"), evaluating(copies):
        call = _record_call(model, decoder_layers(model, name)[0])
        for layer in copies:
            make_identity(layer.float(), call, name)
            layer.to(dtype)
    return copies


def _record_call(model: nn.Module, layer: nn.Module) -> LayerCall:
    """Run a few tokens through the model and return how it calls a layer, in float32."""
    calls: list[LayerCall] = []
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(LayerCall(args, kwargs)), with_kwargs=True
    )
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    shape = (_PROBE_ROWS, _PROBE_TOKENS)
    tokens = torch.randint(1, weight.shape[0], shape, generator=generator).to(weight.device)
    try:
        with evaluating(model):
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    finally:
        handle.remove()
    (call,) = calls
    return LayerCall(_widened(call.args), _widened(call.kwargs))


def _widened(value: Any) -> Any:
    """Bring every floating tensor in a layer's inputs to float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_widened(part) for part in value)
    if isinstance(value, dict):
        return {key: _widened(part) for key, part in value.items()}
    return value
