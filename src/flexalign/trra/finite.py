"""A loss or a weight that is no number ends a run at once, with what is needed to look into it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexalign.errors import FlexAlignError
from flexalign.trra.checkpoints import what_stands, writing

__all__ = ["BATCH", "require_finite_loss", "require_finite_weights"]

BATCH = "nan-batch.safetensors"
"""The batch whose loss was no number: its token ids, labels and masks."""


def require_finite_loss(
    loss: Tensor, inputs: Mapping[str, Any], lam: float, step: int, output: Path
) -> None:
    """Stop on a loss that is no number; its batch is saved beside the checkpoints.

    Args:
        loss: Of one batch.
        inputs: That batch.
        lam: λ of the step.
        step: Optimizer steps that are done.
        output: The run's folder.

    Raises:
        FlexAlignError: If the loss is NaN or infinite; names the batch's file and the checkpoint
            that stands.
    """
    if torch.isfinite(loss):
        return
    batch = {
        name: value.detach().cpu().contiguous()
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }
    with writing("the batch", output):
        output.mkdir(parents=True, exist_ok=True)
        save_file(batch, output / BATCH, metadata={"step": str(step), "lambda": str(lam)})
    _stop(
        f"the loss is {float(loss.detach())} in step {step + 1} (λ={lam:g}); its batch is saved in "
        f"{output / BATCH}",
        output,
    )


def require_finite_weights(model: nn.Module, step: int, output: Path) -> None:
    """Keep weights that are no numbers out of a checkpoint; each process looks at what it holds.

    Args:
        model: The student; what is frozen is not looked at.
        step: Optimizer steps that are done.
        output: The run's folder.

    Raises:
        FlexAlignError: If a trained weight is NaN or infinite; names it.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not torch.isfinite(weight.detach().sum()):
            _stop(f"after step {step} the weight {name} is no number any more", output)


def _stop(problem: str, output: Path) -> NoReturn:
    raise FlexAlignError(
        f"{problem}; {what_stands(output)}. Lower the learning rate or λ, or set max_grad_norm, and look at the "
        "data; another setting is another run, so name another output."
    )
