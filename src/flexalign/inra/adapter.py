"""The adapter: copies of a model's first decoder layer, made the identity, and how they are run.

:func:`identity_adapter` copies layer 0 and makes each copy return its input, by
:func:`make_identity`; :class:`AdapterHook` lets the adapter stream's rows through the copies.
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

_PROBE_ROWS, _PROBE_TOKENS = 2, 24

_HIDDEN = "hidden_states"
"""The name of a layer's input, where a model gives it by name."""

_STEP = 1e-3
_LINEAR = (2.0, 8.0)
"""A step four times as large must move the layer about four times as far: 1 is a jump, 16 no
first-order movement at all."""


@torch.no_grad()
def identity_adapter(model: nn.Module, adapter_layers: int, name: str) -> nn.ModuleList:
    """Make the adapter of a model: that many copies of its layer 0, each the identity.

    Raises:
        UnsupportedModelError: If the model's layers cannot be copied or made the identity.
    """
    copies = copy_first_layer(model, adapter_layers, name)
    dtype = next(copies[0].parameters()).dtype

    # In float32, so that "returns its input" is not a matter of rounding.
    with refusing(name, "its first layer cannot be run by itself"), evaluating(copies):
        call = _record_call(model, decoder_layers(model, name)[0])
        for layer in copies:
            make_identity(layer.float(), call, name)
            layer.to(dtype)
    return copies


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
            # Hooks are copied too, among them the one of an adapter that the model already has.
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
            if hasattr(module, "layer_idx"):
                module.layer_idx = len(layers) + index
        copies.append(layer.requires_grad_(True))
    return copies


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


class LayerCall(NamedTuple):
    """One call of a layer, as its model makes it: the hidden states come first or by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The layer's input, shape ``(B, T, H)``."""
        hidden: Tensor = self.args[0] if self.args else self.kwargs[_HIDDEN]
        return hidden

    def of(self, layer: nn.Module) -> Tensor:
        """Return a layer's output for this call, shape ``(B, T, H)``."""
        output = _first(layer(*self.args, **self.kwargs))
        if not isinstance(output, Tensor):
            raise TypeError(f"a layer returned a {type(output).__name__}")
        return output


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


@torch.no_grad()
def make_identity(layer: nn.Module, call: LayerCall, name: str) -> None:
    """Set as few parameters of a layer as make it return its input.

    What is set is found by what the layer does, not by what its parts are called. A layer adds the
    outputs of its blocks to its input. Going through its modules from the last that finishes to the
    first, those are silenced whose silence changes the layer, until the layer returns its input.
    Silent means that a module's own output is zero, by the fewest of its parameters: an output
    projection's weight and bias at 0, of experts the last projection, and where a block ends in a
    normalisation, that one's scale (at 0, or at −1 where the module adds 1 to it). A projection
    *behind* which a normalisation stands would leave the identity by a jump, so the normalisation,
    which finishes later, is silenced and the projection left alone.

    Args:
        layer: A decoder layer in evaluation mode, in float32. Changed in place.
        call: A call of it on ordinary tokens, in float32, without a cache.
        name: The model's name, for messages.

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

    _restore_the_needless(layer, call, silenced)
    _require_smoothness(layer, call, [p for originals in silenced for p in originals], name)


def _calls(layer: nn.Module, call: LayerCall) -> list[tuple[nn.Module, LayerCall]]:
    """Return the modules with parameters of their own, in the order in which they finish."""
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
    """Zero a module's output by the fewest of its own parameters; return those as they were.

    Empty, with nothing changed, if no setting of them does.
    """
    own = list(module.parameters(recurse=False))
    originals = {parameter: parameter.detach().clone() for parameter in own}

    # A vector may be the scale of a normalisation that adds 1 to it: −1 is tried beside 0.
    for values in product(*((0.0, -1.0) if p.ndim == 1 else (0.0,) for p in own)):
        for parameter, value in zip(own, values, strict=True):
            parameter.fill_(value)
        if not _is_silent(module, inputs):
            continue

        # Restore what the silence does not need.
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


def _restore_the_needless(
    layer: nn.Module, call: LayerCall, silenced: list[dict[nn.Parameter, Tensor]]
) -> None:
    """Restore what was silenced on the way and turns out not to be needed (a gate, for example)."""
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
    """Check that small steps of the parameters move the layer by small amounts.

    Raises:
        UnsupportedModelError: If they do not.
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
    """The hook before layer 0 that sends rows through the adapter.

    It stands on layer 0's own inputs, so the layer's masks, rotary tables and cache are at hand, and
    every decoder with rotary or learned positions shares one code path. It does nothing unless it
    has been enabled in the same context (thread, task): the base model stays itself for everybody
    else. While it is `always_on`, as in training, every row goes through the adapter except where
    :meth:`enabled` says otherwise.

    Attributes:
        always_on: Whether it is enabled, for all rows, where no context has enabled it.
        handle: What removes the hook.
    """

    def __init__(self, layer: nn.Module, adapters: Sequence[nn.Module] | nn.ModuleList) -> None:
        """Put the hook before a model's layer 0."""
        self.always_on = False
        self._adapters = adapters
        self.handle = layer.register_forward_pre_hook(self._run_adapter, with_kwargs=True)

    @contextmanager
    def enabled(self, rows: int, first: int) -> Iterator[None]:
        """Send the rows from ``first`` on, of a stack of ``rows``, through the adapter.

        Where the two are equal, no row goes through it.
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

        # Models give the hidden states by position or by name.
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
    """Cut a layer's input to the rows from ``first`` on, wherever it has one for each row."""
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
    """Turn a failure inside into a refusal of the model; a lack of memory stays one.

    Raises:
        UnsupportedModelError: If what runs inside fails.
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
