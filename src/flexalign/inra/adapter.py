"""The adapter: copies of a model's first decoder layer that start as the identity.

:func:`identity_adapter` copies layer 0; :func:`make_identity` sets parameters of each copy so that
it returns its input. :class:`AdapterHook` runs the rows of the adapter stream through the copies.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexalign._modes import evaluating
from flexalign.errors import FlexAlignError, UnsupportedModelError
from flexalign.models.loading import other_towers

_PROBE_ROWS, _PROBE_TOKENS = 2, 24

_HIDDEN = "hidden_states"
"""The keyword of a layer's input, for models that pass it by keyword."""

_STEP = 1e-3
_LINEAR = (2.0, 8.0)
"""Bounds of the ratio between the movements of a layer by a step and by one four times as large.
A smooth layer has about 4; a ratio of 1 is a jump, and 16 is movement of second order only."""


@torch.no_grad()
def identity_adapter(model: nn.Module, adapter_layers: int, name: str) -> nn.ModuleList:
    """Make the adapter of a model: copies of its layer 0, each of which returns its input.

    Raises:
        UnsupportedModelError: If the model's layers cannot be copied or made the identity.
    """
    copies = copy_first_layer(model, adapter_layers, name)
    dtype = next(copies[0].parameters()).dtype

    # In float32, so that the comparison of output and input does not depend on rounding.
    with refusing(name, "its first layer cannot be run by itself"), evaluating(copies):
        call = _record_call(model, decoder_layers(model, name)[0])
        for layer in copies:
            make_identity(layer.float(), call, name)
            layer.to(dtype)
    return copies


def copy_first_layer(model: nn.Module, adapter_layers: int, name: str) -> nn.ModuleList:
    """Copy layer 0 once for each adapter layer. The copies' cache indices follow the model's layers.

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
            # deepcopy copies hooks too, such as the hook of an adapter that the model already has.
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
            if hasattr(module, "layer_idx"):
                module.layer_idx = len(layers) + index
        copies.append(layer.requires_grad_(True))
    return copies


def decoder_layers(model: nn.Module, name: str) -> nn.ModuleList:
    """Return a model's decoder layers: the module list whose length is the number of layers.

    Lists in towers that are no text, such as those of images, are not considered.

    Raises:
        UnsupportedModelError: If there is no such list.
    """
    config: Any = model.config
    depth = config.get_text_config(decoder=True).num_hidden_layers
    others = tuple(type(getattr(config, key)) for key in other_towers(config))
    for module in _text_modules(model, others):
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UnsupportedModelError(
        f"{name}: no stack of {depth} decoder layers was found in it; "
        "InRa needs a decoder-only transformer."
    )


def _text_modules(module: nn.Module, others: tuple[type, ...]) -> Iterator[nn.Module]:
    """Yield a module and those inside it, but for parts whose configuration is of another tower."""
    if isinstance(getattr(module, "config", None), others):
        return
    yield module
    for part in module.children():
        yield from _text_modules(part, others)


class LayerCall(NamedTuple):
    """The arguments of one call of a layer. Hidden states are the first argument or a keyword."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The layer's input, shape ``(B, T, H)``."""
        hidden: Tensor = self.args[0] if self.args else self.kwargs[_HIDDEN]
        return hidden

    def of(self, layer: nn.Module) -> Tensor:
        """Call a layer with these arguments; return its output, shape ``(B, T, H)``."""
        output = _first(layer(*self.args, **self.kwargs))
        if not isinstance(output, Tensor):
            raise TypeError(f"a layer returned a {type(output).__name__}")
        return output


def _record_call(model: nn.Module, layer: nn.Module) -> LayerCall:
    """Run a few tokens through the model; return the arguments of a layer's call, in float32."""
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
    """Convert every floating-point tensor in a layer's inputs to float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_widened(part) for part in value)
    if isinstance(value, dict):
        return {key: _widened(part) for key, part in value.items()}
    return value


@torch.no_grad()
def make_identity(layer: nn.Module, call: LayerCall, name: str) -> None:
    """Set the fewest parameters of a layer that make it return its input.

    The parameters are found by the layer's behaviour, not by the names of its modules. A layer adds
    the outputs of its blocks to its input, so it returns its input when these outputs are zero. The
    modules are tried in the reverse order of their execution. A module is silenced if that changes
    the layer's output, until the layer returns its input.

    A module is silenced by setting the fewest of its own parameters that make its output zero: the
    weight and bias of an output projection to 0; of experts, the last projection to 0; and where a
    block ends in a normalisation, the scale of that to 0 (or −1 where the module adds 1 to it). A
    projection that is *followed* by a normalisation must not be silenced, because a small step from
    there would move the layer by a jump. The normalisation runs later, so it is tried first and the
    projection is not changed.

    Args:
        layer: A decoder layer in evaluation mode, in float32. Changed in place.
        call: A call of the layer on a few tokens, in float32, without a cache.
        name: The model's name, for error messages.

    Raises:
        UnsupportedModelError: If no such setting is found (post-LN layers normalise the sum), or
            if a small step from it would not move the layer by a small amount.
    """
    silenced: list[dict[nn.Parameter, Tensor]] = []
    for module, inputs in reversed(_calls(layer, call)):
        before = call.of(layer)
        if torch.equal(before, call.hidden):
            break
        originals = _silence(module, inputs)
        if originals and torch.equal(call.of(layer), before):
            _restore(originals)
        elif originals:
            silenced.append(originals)

    if not torch.equal(call.of(layer), call.hidden):
        raise UnsupportedModelError(
            f"{name}: a copy of its first layer cannot be made the identity, because the layer "
            "does not end in a sum with its own input (post-LN layers normalise after it); "
            "InRa cannot serve this model."
        )

    _restore_unneeded(layer, call, silenced)
    _require_smoothness(layer, call, [p for originals in silenced for p in originals], name)


def _calls(layer: nn.Module, call: LayerCall) -> list[tuple[nn.Module, LayerCall]]:
    """Return the modules with parameters of their own and their calls, in the order they finish."""
    found: list[tuple[nn.Module, LayerCall]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        found.append((module, LayerCall(args, kwargs)))

    owners = [m for m in layer.modules() if next(m.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in owners]
    try:
        call.of(layer)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _silence(module: nn.Module, inputs: LayerCall) -> dict[nn.Parameter, Tensor]:
    """Make a module's output zero by setting the fewest of its own parameters.

    Returns:
        The changed parameters with their original values. Empty, with nothing changed, if no
        setting makes the output zero.
    """
    own = list(module.parameters(recurse=False))
    originals = {parameter: parameter.detach().clone() for parameter in own}

    # A vector may be the scale of a normalisation that adds 1 to it, so −1 is tried as well as 0.
    for values in product(*((0.0, -1.0) if p.ndim == 1 else (0.0,) for p in own)):
        for parameter, value in zip(own, values, strict=True):
            parameter.fill_(value)
        if not _is_silent(module, inputs):
            continue

        # Restore each parameter that the module's silence does not depend on.
        for parameter, value in zip(own, values, strict=True):
            parameter.copy_(originals[parameter])
            if _is_silent(module, inputs):
                del originals[parameter]
            else:
                parameter.fill_(value)
        return originals

    _restore(originals)
    return {}


def _is_silent(module: nn.Module, inputs: LayerCall) -> bool:
    output = _first(module(*inputs.args, **inputs.kwargs))
    return isinstance(output, Tensor) and not output.any()


def _restore_unneeded(
    layer: nn.Module, call: LayerCall, silenced: list[dict[nn.Parameter, Tensor]]
) -> None:
    """Restore silenced parameters that the identity does not depend on (of a gate, for example)."""
    for originals in list(silenced):
        values = {parameter: parameter.detach().clone() for parameter in originals}
        _restore(originals)
        if torch.equal(call.of(layer), call.hidden):
            silenced.remove(originals)
        else:
            _restore(values)


def _require_smoothness(
    layer: nn.Module, call: LayerCall, parameters: Iterable[nn.Parameter], name: str
) -> None:
    """Check that a small step of the parameters moves the layer's output by a small amount.

    Raises:
        UnsupportedModelError: If it does not.
    """
    generator = torch.Generator().manual_seed(0)
    steps = {p: torch.randn(p.shape, generator=generator).to(p) for p in parameters}

    moved = []
    for size in (_STEP, 4 * _STEP):
        originals = {parameter: parameter.detach().clone() for parameter in steps}
        for parameter, step in steps.items():
            parameter.add_(size * step)
        moved.append(float(torch.linalg.vector_norm(call.of(layer) - call.hidden)))
        _restore(originals)

    if not moved[0] > 0 or not _LINEAR[0] <= moved[1] / moved[0] <= _LINEAR[1]:
        raise UnsupportedModelError(
            f"{name}: its first layer leaves the identity by a jump or not at all (steps of 1 and "
            f"4 move it by {moved[0]:.1e} and {moved[1]:.1e}), so an adapter made of it cannot be "
            "trained; InRa cannot serve this model."
        )


def _restore(originals: dict[nn.Parameter, Tensor]) -> None:
    for parameter, value in originals.items():
        parameter.copy_(value)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


class AdapterHook:
    """The hook before layer 0 that runs rows through the adapter.

    It receives layer 0's inputs, which include masks, rotary tables and the cache. So one code path
    serves every decoder with rotary or learned positions. The hook does nothing unless it is
    enabled in the same context (thread or task): all other callers get the base model. While it is
    `always_on`, as in training, all rows run through the adapter where :meth:`enabled` does not
    select rows.

    Attributes:
        always_on: Whether the hook runs all rows where no context has enabled it.
        handle: The handle that removes the hook.
    """

    def __init__(self, layer: nn.Module, adapters: Sequence[nn.Module] | nn.ModuleList) -> None:
        """Register the hook.

        Args:
            layer: The model's layer 0.
            adapters: The adapter's layers, in order.
        """
        self.always_on = False
        self._adapters = adapters
        self.handle = layer.register_forward_pre_hook(self._run_adapter, with_kwargs=True)

    @contextmanager
    def enabled(self, rows: int, first: int) -> Iterator[None]:
        """Run the rows from ``first`` on, of a stack of ``rows``, through the adapter.

        If the two are equal, no row runs through it.
        """
        token = _ENABLED.set((self, rows, first))
        try:
            yield
        finally:
            _ENABLED.reset(token)

    def _run_adapter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hook, rows, first = _ENABLED.get()
        if hook is not self:
            if not self.always_on:
                return None
            rows = first = 0
        elif first == rows:
            return None

        # Models pass the hidden states by position or by keyword.
        given, named = (args[0], args[1:]) if args else (kwargs[_HIDDEN], ())
        own = {key: _rows_from(v, rows, first) for key, v in kwargs.items() if key != _HIDDEN}
        own_named = tuple(_rows_from(value, rows, first) for value in named)

        hidden = given[first:]
        for adapter in self._adapters:
            output = adapter(hidden, *own_named, **own)
            hidden = output[0] if isinstance(output, tuple) else output
        if first:
            hidden = torch.cat([given[:first], hidden])
        return ((hidden, *named), kwargs) if args else (args, {**kwargs, _HIDDEN: hidden})


_ENABLED: ContextVar[tuple[AdapterHook | None, int, int]] = ContextVar(
    "enabled adapter hook", default=(None, 0, 0)
)


def _rows_from(value: Any, rows: int, first: int) -> Any:
    """Cut a layer's input to the rows from ``first`` on; leave what has not one entry per row."""
    if not first:
        return value
    if isinstance(value, Tensor):
        return value[first:] if value.ndim > 0 and len(value) == rows else value
    if isinstance(value, tuple | list):
        return type(value)(_rows_from(part, rows, first) for part in value)
    if isinstance(value, dict):
        return {key: _rows_from(part, rows, first) for key, part in value.items()}
    return value


@contextmanager
def refusing(name: str, problem: str) -> Iterator[None]:
    """Report a failure of the block as an unsupported model.

    Out-of-memory errors and this library's own errors are not changed.

    Args:
        name: The model's name.
        problem: What the block could not do, for the message.

    Raises:
        UnsupportedModelError: If the block fails.
    """
    try:
        yield
    except (FlexAlignError, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{name}: {problem} ({reason}); InRa cannot serve this model."
        ) from error
