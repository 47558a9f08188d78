"""Which λ each row of a training step gets, where one LoRA learns a whole range of them.

A step of N rows divides the range into N equal parts. Each row gets a part of its own and a λ at
random inside it, so every step covers the range. The draw depends only on the seed, the step and
the row's place in the step, so a resumed run draws the same. Places are counted in the order of the
data, over accumulation and processes: the same rows have the same λ for every number of processes,
as long as a step has as many rows.

Documents that share a row (packing) each have a λ. That of the first is the row's, and each
further document moves on by the golden ratio, modulo the range. So the n-th documents of all rows
cover the range, and so do the documents of one row.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexalign.lambdas import LambdaRange, TrainingLambda
from flexalign.lora_dial.scaling import LoRAScale

if TYPE_CHECKING:
    from trl import SFTTrainer as _SFTTrainer
else:
    _SFTTrainer = object

LAMBDAS = "lambda"
"""The batch's key of its λ: one per row, shape (B,), or one per token, shape (B, T)."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""The step between two documents of one row, as a share of the range."""


def draw_shares(seed: int, step: int, rows: int) -> list[float]:
    """Return a place in [0, 1) for each row of a step, one in each of `rows` equal parts.

    Args:
        seed: The run's seed.
        step: Number of optimizer steps done.
        rows: Rows of the step, over accumulation and processes.
    """
    draw = random.Random(f"{seed} {step} lambda")
    parts = list(range(rows))
    draw.shuffle(parts)
    return [(part + draw.random()) / rows for part in parts]


def spread_over_documents(shares: Tensor, position_ids: Tensor) -> Tensor:
    """Return the place of every token whose row may hold several documents.

    Args:
        shares: The places of the rows, shape (B,), in [0, 1).
        position_ids: Shape (B, T). A position of 0 begins a document.

    Returns:
        Places in [0, 1), shape (B, T), equal within a document.
    """
    starts = (position_ids == 0).cumsum(1)
    documents = (starts - 1).clamp(min=0).to(shares.dtype)
    return (shares[:, None] + documents * GOLDEN) % 1.0


class RowLambdas(_SFTTrainer):  # type: ignore[misc]
    """A mix-in of `SFTTrainer` that draws a λ of a range for each row of a step's batches.

    With a number or a schedule instead of a range it does nothing.

    Attributes:
        scale: The strength of the student's LoRA, which is λ; None without a range.
    """

    scale: LoRAScale | None = None

    @property
    def lambda_range(self) -> LambdaRange | None:
        """The range from which rows draw their λ; None if all rows have the step's λ."""
        lam: TrainingLambda = self.args.schedule
        return lam if isinstance(lam, LambdaRange) else None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return a step's batches, each with its λ under `LAMBDAS`, and their number of tokens."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.lambda_range is not None and batches:
            self._give_lambdas(batches, self.lambda_range)
        return batches, num_items

    def at_lambda(self, lam: float | Tensor | None) -> AbstractContextManager[None]:
        """Return a context in which the student runs at a λ; without a range it changes nothing."""
        return nullcontext() if self.scale is None else self.scale.at(lam)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Take a forward and a backward, and restore the stock strength of the student's LoRA."""
        try:
            loss: Tensor = super().training_step(model, *args, **kwargs)
        finally:
            if self.scale is not None:
                self.scale.set(None)
        return loss

    def _give_lambdas(self, batches: Sequence[dict[str, Any]], within: LambdaRange) -> None:
        """Put the λ of each row, or of each token of packed rows, into the batches."""
        processes, process = self.accelerator.num_processes, self.accelerator.process_index

        # Without padding, the rows of a batch are joined in one. The last batch may be smaller.
        rows = 1 if self.padding_free else self._train_batch_size
        places = rows * processes * len(batches)
        shares = draw_shares(self.args.seed, self.state.global_step, places)

        for number, batch in enumerate(batches):
            # Processes take the data's batches in turn.
            first = (number * processes + process) * rows
            own = torch.tensor(
                shares[first : first + len(batch["input_ids"])],
                dtype=torch.float64,
                device=batch["input_ids"].device,
            )
            if "position_ids" in batch:
                own = spread_over_documents(own, batch["position_ids"])
            batch[LAMBDAS] = within.low + (within.high - within.low) * own.float()
