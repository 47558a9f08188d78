"""Weights that are partitioned over several processes: placing teachers, and gathering weights.

ZeRO-3 partitions weights when they are loaded, and only its engine, which is created later, gathers
them for a forward pass. A model that must run before (for a check at the start) needs
:func:`runnable`. With FSDP's memory-saving loading, only the first process of a machine reads the
weights. On the others they are on the meta device until the models are sharded: :func:`is_empty`.
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
    """Move or shard a frozen model as the student is.

    With FSDP2 each layer is a unit, so that only one layer at a time is gathered. TRL's function
    for reference models makes one unit of all layers.

    Args:
        model: A frozen model that is not the student's module.
        accelerator: The trainer's accelerator.
        deepspeed: Whether it shards with DeepSpeed.
        fsdp: Whether it shards with FSDP.

    Returns:
        The module to call: the model itself, or its wrapper.
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
    """Make a model usable inside the block whose weights ZeRO-3 has partitioned.

    The output layer is gathered for the whole block, and the weights of every other module while it
    runs. All processes must do the same inside the block. A model whose weights are not partitioned
    is not changed.
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
    """Gather, for the block, those of some parameters that ZeRO-3 has partitioned."""
    parts = [parameter for parameter in parameters if _is_missing(parameter)]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


def whole(weight: Tensor) -> Tensor:
    """Return a frozen weight without its graph, gathered if FSDP2 has sharded it."""
    full: Tensor = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return full.detach()


def is_empty(model: nn.Module) -> bool:
    """Return whether this process has no weights of a model: they come when it is sharded."""
    return any(parameter.is_meta for parameter in model.parameters())


def _prepare_fsdp1(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    sharded: nn.Module = prepare_fsdp(model, accelerator)
    return sharded


def _gather_while_it_runs(module: nn.Module, stack: ExitStack) -> None:
    own = list(module.parameters(recurse=False))
    if not any(map(_is_missing, own)):
        return

    # Gathering is a context, which the hook before a call enters and the hook after it leaves. Calls
    # may be nested, so there is a stack of contexts.
    opened: list[ExitStack] = []

    def before(*_: Any) -> None:
        opened.append(ExitStack())
        opened[-1].enter_context(gathered(own))

    def after(*_: Any) -> None:
        opened.pop().close()

    # Gather before all other hooks run, and leave the context even if the module raises.
    stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
    stack.callback(module.register_forward_hook(after, always_call=True).remove)


def _is_partitioned(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def _is_missing(parameter: Any) -> bool:
    """Return whether ZeRO-3 has partitioned a parameter and not gathered it at this moment."""
    return _is_partitioned(parameter) and parameter.ds_status.name != "AVAILABLE"
