"""Running the loss inside the forward of a wrapped model.

DistributedDataParallel, `fully_shard` and ZeRO-3 gather the weights and prepare the reduction of
gradients in hooks around a module's ``forward``. A loss that reads the head's weights must
therefore run *inside* the forward. :func:`run_inside` calls the wrapper, and for that call replaces
the inner module's forward by a function. :func:`run_with_head` does the same with the output layer,
which may be sharded as a separate unit.
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
    """The parameters of a head without its weights, which may be moved or sharded later.

    Attributes:
        scale: The factor of the product.
        softcap: The bound of the logits, by a tanh; None: no bound.
        vocab_size: Number of tokens. Rows of the weight beyond it are padding.
    """

    scale: float
    softcap: float | None
    vocab_size: int

    @classmethod
    def of(cls, model: nn.Module, vocab_size: int) -> "HeadForm":
        """Read and check a model's head, as :meth:`flexalign.heads.Head.of` does.

        Weights that ZeRO-3 has partitioned are gathered for the check. If another process holds
        the weights, only that process checks the head.
        """
        with runnable(inner_model(model)):
            head = Head.of(model, probe=not is_empty(model))
        return cls(head.scale, head.softcap, vocab_size)

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """Return the head with these weights, without padding."""
        return Head(weight, bias, self.scale, self.softcap).cut(self.vocab_size)


def run_inside(
    wrapper: nn.Module, module: nn.Module, function: Callable[..., R], *args: Any, **inputs: Any
) -> R:
    """Call ``wrapper(*args, **inputs)`` with `function` instead of ``module.forward``.

    The hooks of the wrapper and of the module run as in a normal forward pass. `function` gets the
    arguments that the wrapper passes on, except those that are None.

    Args:
        wrapper: The callable: `module` itself, or its wrapper (DDP, DeepSpeed, PEFT).
        module: The module whose forward is replaced for this call.
        function: The replacement, which may itself call `module`.

    Returns:
        The result of `function`.
    """
    own = module.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own

    # The original is restored before `function` runs, because `function` may call the module.
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

    Inside it, the weight is complete and its gradient is reduced as the sharding requires, also if
    `fully_shard` or ZeRO-3 handles the layer as a separate unit.

    Args:
        model: A transformers causal language model.
        form: The form of its head.
        hidden: The hidden states that the head takes, shape ``(..., H)``.
        function: The function to call.

    Returns:
        The result of `function`.
    """
    output = _output_layer(model)

    def inside(hidden: Tensor) -> R:
        return function(hidden, form.head(output.weight, getattr(output, "bias", None)))

    return run_inside(output, output, inside, hidden)


@contextmanager
def gathered_head(model: nn.Module, form: HeadForm) -> Iterator[Head]:
    """Yield a frozen model's head with complete weights, gathered once for the block."""
    output = _output_layer(inner_model(model))
    weight, bias = output.weight, getattr(output, "bias", None)
    with gathered([part for part in (weight, bias) if part is not None]):
        yield form.head(whole(weight), None if bias is None else whole(bias))


def require_plain_head(model: nn.Module) -> None:
    """Refuse a PEFT adapter that the loss would ignore.

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
