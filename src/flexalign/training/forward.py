"""How the loss runs inside a wrapped model's own forward.

DistributedDataParallel, `fully_shard` and ZeRO-3 do their work (gather the weights, arm the
gradient reduction) in the hooks around a module's ``forward``. A loss that reads the head's
weights must therefore run *in* there. :func:`run_inside` calls the wrapper and puts a function in
the place of the inner module's forward for that one call; :func:`run_with_head` does the same
once more around the output layer, which may be a unit of sharding by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from peft import PeftModel
from torch import Tensor, nn

from flexalign.errors import UnsupportedModelError
from flexalign.heads import Head
from flexalign.models.adapters import inner_model
from flexalign.training.distributed import gathered, is_empty, runnable, whole

R = TypeVar("R")


@dataclass(frozen=True)
class HeadForm:
    """What a head does beside its product, without a hold on weights that may move or be sharded.

    Attributes:
        scale: What the product is multiplied with.
        softcap: The bound that a tanh keeps the logits within, or None.
        vocab_size: Tokens that count; rows of the weight beyond it are padding.
    """

    scale: float
    softcap: float | None
    vocab_size: int

    @classmethod
    def of(cls, model: nn.Module, vocab_size: int) -> "HeadForm":
        """Read and prove a model's head, as :meth:`flexalign.heads.Head.of` does.

        Weights that ZeRO-3 holds in parts are gathered for it; where another process reads them,
        that one does the proving.
        """
        with runnable(inner_model(model)):
            head = Head.of(model, probe=not is_empty(model))
        return cls(head.scale, head.softcap, vocab_size)

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """Return the head that these weights make, less padding."""
        return Head(weight, bias, self.scale, self.softcap).cut(self.vocab_size)


def run_inside(
    wrapper: nn.Module, module: nn.Module, function: Callable[..., R], *args: Any, **inputs: Any
) -> R:
    """Call ``wrapper(*args, **inputs)`` with `function` in the place of ``module.forward``.

    The hooks of the wrapper and of the module run as in any forward pass. Arguments reach
    `function` as the wrapper passes them on; those that it added as None are left out.

    Args:
        wrapper: What is called: `module` itself, or what holds it (DDP, DeepSpeed, PEFT).
        module: The module whose forward is replaced for this one call.
        function: What runs in its place; it may call `module` in turn.

    Returns:
        What `function` returned.
    """
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own

    # Whatever happens, the replacement serves one call: `function` itself may call the module.
    def forward(*args: Any, **given: Any) -> R:
        restore()
        return function(*args, **{key: value for key, value in given.items() if value is not None})

    module.forward = forward
    try:
        result: R = wrapper(*args, **inputs)
    finally:
        restore()
    return result


def run_with_head(
    model: nn.Module, form: HeadForm, hidden: Tensor, function: Callable[[Tensor, Head], R]
) -> R:
    """Call ``function(hidden, head)`` inside the forward of the model's output layer.

    There the weight is whole and its gradient goes where the sharding expects it, also if the
    layer is a unit of `fully_shard` or ZeRO-3 by itself.

    Args:
        model: A transformers causal language model.
        form: The form of its head.
        hidden: The hidden states that the head takes, shape ``(..., H)``.
        function: What runs there.
    """
    output = _output_layer(model)

    def inside(hidden: Tensor) -> R:
        return function(hidden, form.head(output.weight, getattr(output, "bias", None)))

    return run_inside(output, output, inside, hidden)


@contextmanager
def gathered_head(model: nn.Module, form: HeadForm) -> Iterator[Head]:
    """Give a frozen model's head with whole weights, gathered once for the block."""
    output = _output_layer(inner_model(model))
    weight, bias = output.weight, getattr(output, "bias", None)
    with gathered([part for part in (weight, bias) if part is not None]):
        yield form.head(whole(weight), None if bias is None else whole(bias))


def require_plain_head(model: nn.Module) -> None:
    """Refuse a PEFT adapter that the loss would pass by.

    Raises:
        UnsupportedModelError: If an adapter changes the output layer, replaces it
            (`modules_to_save`), or adds virtual tokens to the input.
    """
    if not isinstance(model, PeftModel):
        return

    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise UnsupportedModelError(
                f"adapter {name!r} is of type {config.peft_type}, which adds virtual tokens to "
                "the input; use an adapter that changes weights, such as LoRA."
            )

    if type(_output_layer(inner_model(model))).__module__.startswith("peft."):
        raise UnsupportedModelError(
            "a PEFT adapter changes lm_head, which the loss reads as one plain matrix; leave "
            "lm_head out of target_modules and of modules_to_save."
        )


def _output_layer(model: nn.Module) -> Any:
    return model.get_output_embeddings()  # type: ignore[operator]
