"""The low-rank terms of a LoRA at inference, in fewer products than PEFT's modules make.

PEFT computes for every layer ``x·Aᵀ``, that times ``Bᵀ``, that times the scaling, and a sum, and
each is a module call or a new tensor of the layer's output. When one token is decoded, these calls
and tensors cost more than the products do. :class:`LoRAProjections` computes the same sum with less:

* layers with the same input (queries, keys and values; gate and up) multiply it once, by their A
  matrices stacked on each other;
* that product, the smallest tensor, is multiplied once by λ, of each row or token;
* the product with B is added into the base's output by the same call (``addmm_``);
* on a CPU, a few tokens in half precision are multiplied in float32, where such products are faster;
* where λ is 0 in all rows, nothing is computed beside the base.

The base's own product does not change, and 0 times B is added to it in rows with λ = 0, so these
rows are the base bit for bit. Which layers have the same input is found by running two tokens
(:func:`shared_inputs`), and checked in every forward by the identity of the tensor.

With gradients, dropout, autocast, an adapter that is switched off, or λ = 1 in all rows, PEFT's own
forward runs, with λ by :class:`~flexalign.lora_dial.scaling.LoRAScale`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from flexalign._modes import evaluating
from flexalign.fusion import Lambda
from flexalign.lambdas import finite_lambda
from flexalign.lora_dial.scaling import LoRAScale

FEW_TOKENS = 32
"""Up to so many tokens, a CPU multiplies with A and B faster in float32 than in half precision: there
torch arranges the matrices anew for every product, which takes longer than a small product does."""


class LoRAProjections:
    """The inference path of one LoRA with a strength λ.

    Not thread-safe: a model has one λ at a time.

    Attributes:
        scale: λ on PEFT's own modules, for the forwards that this path does not serve.
        groups: The names of the layers that share an input, group by group.
        merged_lambda: The λ at which merged weights are kept; None if none are.
    """

    def __init__(self, model: PeftModel, adapter: str = "default") -> None:
        """Put the path into a model's LoRA layers. It is used inside :meth:`at` alone.

        Args:
            model: A model with the adapter, not merged.
            adapter: The adapter's name in the model.

        Raises:
            ConfigError: If the model has no such adapter, or it is merged.
            UnsupportedModelError: As :class:`~flexalign.lora_dial.scaling.LoRAScale` does.
        """
        self.scale = LoRAScale(model, adapter)
        self.groups = shared_inputs(model, self.scale.layers)
        self.merged_lambda: float | None = None

        self._model = model
        self._adapter = adapter
        self._strength = _Strength()
        self._groups = [
            _Group([self.scale.layers[name] for name in names], adapter, self._strength)
            for names in self.groups
        ]
        self.refresh()

    @contextmanager
    def at(self, lam: Lambda, rows: int, tokens: int) -> Iterator[None]:
        """Use λ in the forwards inside the block, each of ``rows · tokens`` tokens.

        Whether gradients are wanted is read at the beginning of the block.

        Args:
            lam: λ: one number, a tensor of one, ``(B,)``, or ``(B, T)``.
            rows: B, the number of rows.
            tokens: T, the number of tokens in each row.

        Raises:
            LambdaError: If one number is not finite, or a tensor has more than two dimensions. A
                tensor that does not fit the tokens is refused by the first layer.
        """
        lam = _simplest(lam, rows, tokens)
        with self.scale.at(lam):
            if not self._serves():
                yield
                return
            self._strength.set(lam, rows, tokens, self.merged_lambda)
            try:
                yield
            finally:
                self._strength.clear()
                for group in self._groups:
                    group.forget()

    def refresh(self) -> None:
        """Read the adapter's weights again.

        :meth:`at` calls it if a weight was written, moved or cast. Call it yourself after weights
        were replaced by other parameters, or written through ``.data``.
        """
        for group in self._groups:
            group.refresh()
        self._weights = [weight for group in self._groups for weight in group.weights()]
        self._stamp = _stamp(self._weights)
        self._is_held = not any(weight.is_meta for weight in self._weights)
        self.merge(self.merged_lambda)

    def merge(self, lam: float | None) -> None:
        """Keep a second copy of the adapted weights, with the LoRA at one λ in it.

        Forwards whose rows all have this λ use it, and take as long as the base's. All others use
        the base's weights, which do not change. The copy takes as much memory as the weights that
        the LoRA adapts, and is made by this method alone: λ of a request never makes one.

        Args:
            lam: λ, or None to free the copy.

        Raises:
            LambdaError: If λ is not finite.
        """
        at = None if lam is None else finite_lambda(lam, "λ")
        for group in self._groups:
            for projection in group.projections:
                projection.merge(at)
        self.merged_lambda = at

    def remove(self) -> None:
        """Take the path and λ out of the model: its forward is PEFT's own again."""
        for group in self._groups:
            for projection in group.projections:
                del projection.layer.forward
        self.scale.remove()

    def _serves(self) -> bool:
        """Whether this path computes what PEFT's modules would; makes its weights current."""
        layer = self._groups[0].projections[0].layer
        is_plain = (
            self._is_held  # not offloaded
            and not torch.is_grad_enabled()
            and not self._model.training
            and not torch.is_autocast_enabled("cpu")
            and not torch.is_autocast_enabled(layer.base_layer.weight.device.type)
            and not layer.disable_adapters
            and not layer.merged
            and layer.active_adapters == [self._adapter]
        )
        if is_plain and _stamp(self._weights) != self._stamp:
            self.refresh()
        return is_plain


class _Strength:
    """λ of the forward that runs, as the layers use it.

    Attributes:
        is_on: Whether the path is used; if not, PEFT's forward runs.
        is_base: λ is 0 in all rows.
        is_merged: λ is in all rows that of the merged weights.
        tokens: The number of tokens that λ is for; 0 if it is one number for all.
        number: λ if it is one number for all, else 1.
    """

    def __init__(self) -> None:
        self.is_on = self.is_base = self.is_merged = False
        self.tokens = 0
        self.number = 1.0
        self._each = torch.empty(0)
        self._factors: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def set(self, lam: float | Tensor, rows: int, tokens: int, merged_lambda: float | None) -> None:
        """Use λ for forwards of ``rows · tokens`` tokens, until :meth:`clear`."""
        if not isinstance(lam, Tensor):
            # At 1 throughout PEFT's modules run, so that a plain LoRA is what PEFT makes of it.
            self.is_on = lam != 1.0 or lam == merged_lambda
            self.is_base, self.is_merged = lam == 0.0, lam == merged_lambda
            self.number, self.tokens = lam, 0
            return

        # λ of another shape is left to PEFT's forward, where LoRAScale refuses it.
        self.is_on = lam.shape in ((rows,), (rows, tokens))
        self.is_base = self.is_merged = False
        if self.is_on:
            self.number, self.tokens = 1.0, rows * tokens
            self._each = lam.reshape(rows, -1).expand(rows, tokens).reshape(-1, 1)
            self._factors = {}

    def clear(self) -> None:
        """Leave all following forwards to PEFT's modules."""
        self.is_on = False

    def factor(self, kind: tuple[torch.device, torch.dtype]) -> Tensor:
        """Return λ of each token, ``(N, 1)``, on this device and in this dtype."""
        factor = self._factors.get(kind)
        if factor is None:
            factor = self._factors[kind] = self._each.to(*kind)
        return factor


class _Group:
    """LoRA layers that have the same input, and the product of this input with all A matrices."""

    def __init__(self, layers: list[Linear], adapter: str, strength: _Strength) -> None:
        self.strength = strength
        self.projections = [
            _Projection(layer, adapter, self, place) for place, layer in enumerate(layers)
        ]
        self._input: Tensor | None = None
        self._products: tuple[Tensor, ...] = ()
        self._uses = 0

    def weights(self) -> list[Tensor]:
        """Return the A and B matrices, which this path has copies and views of."""
        return [weight for one in self.projections for weight in one.weights()[:2]]

    def refresh(self) -> None:
        """Stack the A matrices, each times its scaling."""
        downs = [projection.refresh() for projection in self.projections]
        self._ranks = [len(down) for down in downs]
        precise = torch.cat(downs).T
        self._down = precise.to(self.projections[0].dtype)
        self._kind = precise.device, precise.dtype

        has_few = precise.device.type == "cpu" and precise.dtype != self._down.dtype
        self._precise_down = precise if has_few else None

    def products(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Return s·A·x of each layer, ``(N, r)``, times λ where tokens differ in it.

        Returns:
            Nothing if λ is for another number of tokens. They are in float32 where float32 is faster.
        """
        products = self._products
        if hidden is not self._input:
            tokens = hidden.reshape(-1, hidden.shape[-1])
            if self._precise_down is not None and len(tokens) <= FEW_TOKENS:
                product = torch.mm(tokens.to(self._precise_down.dtype), self._precise_down)
            else:
                product = torch.mm(tokens, self._down)
            strength = self.strength
            if strength.tokens:
                if strength.tokens != len(product):
                    return ()
                product.mul_(strength.factor(self._kind))
            products = (product,)
            if len(self._ranks) > 1:
                products = torch.split(product, self._ranks, 1)
            self._input, self._products, self._uses = hidden, products, 0

        # The last layer of the group frees the tensors.
        self._uses += 1
        if self._uses == len(self._ranks):
            self.forget()
        return products

    def forget(self) -> None:
        self._input, self._products = None, ()


class _Projection:
    """The forward of one LoRA layer, in place of PEFT's. Hooks on PEFT's module are still called."""

    def __init__(self, layer: Linear, adapter: str, group: _Group, place: int) -> None:
        self.layer = layer
        self._place = place
        self._width = layer.out_features
        self._adapter = adapter
        self._group = group
        self._strength = group.strength
        self._merged: Tensor | None = None
        self._base: Any = layer.base_layer
        self._peft_forward: Callable[..., Tensor] = layer.forward
        layer.forward = self

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, B and W."""
        layer = self.layer
        a, b = (part[self._adapter].weight for part in (layer.lora_A, layer.lora_B))
        return a, b, self._base.weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of W."""
        return self._up.dtype

    @torch.no_grad()
    def refresh(self) -> Tensor:
        """Read the layer's weights again; return A times the scaling, ``(r, H)``, in float32."""
        a, b, weight = self.weights()
        self._up = b.detach().to(weight.dtype).T
        self._precise_up = _precise(b).T if b.device.type == "cpu" else self._up
        # accelerate puts a forward of its own into a module whose weights it moves.
        is_plain = type(self._base) is nn.Linear and "forward" not in vars(self._base)
        self._weight = weight if is_plain else None
        self._bias = self._base.bias
        scaling: float = self.layer.scaling[self._adapter]
        return _precise(a) * scaling

    @torch.no_grad()
    def merge(self, lam: float | None) -> None:
        """Keep W + λ·s·B·A, ``(out, in)``, or free it."""
        self._merged = None
        if lam is not None:
            a, b, weight = self.weights()
            base = weight.T if isinstance(self._base, Conv1D) else weight
            term = _precise(b) @ _precise(a) * (lam * self.layer.scaling[self._adapter])
            self._merged = (_precise(base) + term).to(weight.dtype)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        strength = self._strength
        if not strength.is_on or args or kwargs:
            return self._peft_forward(hidden, *args, **kwargs)
        if strength.is_merged and self._merged is not None:
            return functional.linear(hidden, self._merged, self._bias)

        # Calling the base's module takes as long as a small product; only hooks need the call, and
        # what they have seen must not be written to.
        base = self._base
        if base._forward_hooks or base._forward_pre_hooks:
            output: Tensor = base(hidden).clone()
        elif self._weight is None:
            output = base(hidden)
        else:
            output = functional.linear(hidden, self._weight, self._bias)
        if strength.is_base:
            return output

        products = self._group.products(hidden)
        if not products:
            return self._peft_forward(hidden)
        if not output.is_contiguous():
            output = output.contiguous()
        product, rows = products[self._place], output.view(-1, self._width)
        if product.dtype == rows.dtype:
            rows.addmm_(product, self._up, alpha=strength.number)
        else:
            rows.add_(torch.mm(product, self._precise_up), alpha=strength.number)
        return output


def shared_inputs(model: PeftModel, layers: dict[str, Linear]) -> list[list[str]]:
    """Return the names of layers that get the same tensor as their input, group by group.

    Two tokens are run. Layers are in one group if their input is one tensor object that is not
    written in between. A layer that does not run, or runs several times, is a group by itself.

    Args:
        model: The model that has the layers.
        layers: LoRA layers by name.
    """
    calls: list[tuple[str, Tensor, int]] = []

    def record(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append((name, inputs[0], inputs[0]._version))  # noqa: SLF001

    hooks = [
        layer.register_forward_pre_hook(partial(record, name)) for name, layer in layers.items()
    ]
    base = model.get_base_model()
    device = base.get_input_embeddings().weight.device
    try:
        # In inference mode, tensors do not count how often they are written.
        with evaluating(model), torch.inference_mode(False), torch.no_grad():
            base(input_ids=torch.zeros((1, 2), dtype=torch.long, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()

    # The list of calls holds all inputs, so that no two of them have the same id.
    runs = Counter(name for name, _, _ in calls)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor, version in calls:
        if runs[name] == 1:
            groups.setdefault((id(tensor), version), []).append(name)
    alone = [[name] for name in layers if runs[name] != 1]
    return [*groups.values(), *alone]


def _simplest(lam: Lambda, rows: int, tokens: int) -> float | Tensor:
    """Return one number if λ is the same for all rows and tokens, else the tensor."""
    if not isinstance(lam, Tensor):
        return lam
    if lam.numel() != 1 and (lam.shape not in ((rows,), (rows, tokens)) or not lam.numel()):
        return lam  # LoRAScale refuses it
    first = float(lam.reshape(-1)[0])
    return first if bool((lam == first).all()) else lam.detach()


def _stamp(weights: list[Tensor]) -> tuple[list[int], list[int]]:
    """Return what changes when one of the weights is written, moved or cast."""
    try:
        versions = [weight._version for weight in weights]  # noqa: SLF001  # torch has no other
    except RuntimeError:  # made in inference mode, without a version
        versions = []
    return [weight.data_ptr() for weight in weights], versions


def _precise(weight: Tensor) -> Tensor:
    """Return a weight in float32, or in its own higher precision."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
