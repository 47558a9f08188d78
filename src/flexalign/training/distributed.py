"""Weights that several processes hold in parts: placed like the student's, made whole when read.

ZeRO-3 cuts weights up as they are loaded, long before its engine gathers them for a forward pass,
so whoever runs a model before that (a probe at the start) must gather them: :func:`runnable`. With
FSDP's frugal loading only the first process of a machine reads the weights at all; the others
hold the meta device's until the models are sharded: :func:`is_empty`.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl.models import prepare_deepspeed, prepare_fsdp


def place_teacher(
    model: nn.Module, accelerator: Accelerator, *, deepspeed: bool, fsdp: bool
) -> nn.Module:
    """Place a frozen model as the student is placed: moved, or sharded like it.

    Under FSDP2 that is layer by layer, so that one layer is whole at a time; TRL's own way for
    reference models makes one unit of all layers.

    Args:
        model: A model of its own, frozen.
        accelerator: The trainer's.
        deepspeed: Whether it shards by DeepSpeed.
        fsdp: Whether it shards by FSDP.

    Returns:
        What to call: the model itself, or what wraps it.
    """
    if deepspeed:
        engine: nn.Module = prepare_deepspeed(model, accelerator)
        return engine
    if fsdp:
        prepare = fsdp2_prepare_model if accelerator.is_fsdp2 else _prepare_fsdp1
        sharded: nn.Module = prepare(accelerator, model)
        return sharded
    return model.to(accelerator.device)


@contextmanager
def runnable(model: nn.Module) -> Iterator[None]:
    """Let a model run whose weights ZeRO-3 has cut up and no engine gathers yet.

    Its output layer is whole throughout, every other module's own weights while it runs; all
    processes must do the same in there. For a model that lies whole nothing changes.
    """
    with ExitStack() as stack:
        if any(_is_partitioned(parameter) for parameter in model.parameters()):
            output: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
            stack.enter_context(gathered(list(output.parameters())))
            for module in model.modules():
                _gather_while_it_runs(module, stack)
        yield


@contextmanager
def gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Make those of some parameters whole that ZeRO-3 holds in parts, for the block."""
    parts = [parameter for parameter in parameters if _is_missing(parameter)]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


def whole(weight: Tensor) -> Tensor:
    """Return a frozen weight without its graph, gathered if FSDP2 has cut it up."""
    full: Tensor = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return full.detach()


def is_empty(model: nn.Module) -> bool:
    """Whether another process reads this model's weights, which come when it is sharded."""
    return any(parameter.is_meta for parameter in model.parameters())


def _prepare_fsdp1(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    sharded: nn.Module = prepare_fsdp(model, accelerator)
    return sharded


def _gather_while_it_runs(module: nn.Module, stack: ExitStack) -> None:
    own = list(module.parameters(recurse=False))
    if not any(map(_is_missing, own)):
        return

    # One for each call that is under way: what gathers is a context, and hooks come in pairs.
    opened: list[ExitStack] = []

    def before(*_: Any) -> None:
        opened.append(ExitStack())
        opened[-1].enter_context(gathered(own))

    def after(*_: Any) -> None:
        opened.pop().close()

    # First before all other hooks, and closed even if the module raises.
    stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
    stack.callback(module.register_forward_hook(after, always_call=True).remove)


def _is_partitioned(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def _is_missing(parameter: Any) -> bool:
    """Whether ZeRO-3 holds it in parts at this moment."""
    return _is_partitioned(parameter) and parameter.ds_status.name != "AVAILABLE"
