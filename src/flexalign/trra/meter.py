"""Sums over batches and processes, for the log and for the count of tokens."""

import torch
from accelerate import Accelerator
from torch import Tensor

from flexalign.losses import DivergenceMetrics

__all__ = ["Meter"]

_NAMES = ("divergence", "kl_reference", "kl_aligned")


class Meter:
    """Adds up batches without waiting for the device; reading it is the one collective.

    Every process must read when the others do, and count as many batches in between.
    """

    def __init__(self) -> None:
        self._window: Tensor | None = None  # (4,): nats of the three names, response tokens
        self._input_tokens: Tensor | None = None

    def add(
        self,
        loss: Tensor,
        metrics: DivergenceMetrics,
        num_items: Tensor,
        response_tokens: Tensor,
        input_tokens: Tensor,
    ) -> None:
        """Count one batch.

        Args:
            loss: The batch's sum divided by `num_items`, as the `metrics` are.
            metrics: Of the same batch.
            num_items: The denominator of both.
            response_tokens: Tokens of this batch that the loss counts.
            input_tokens: Tokens of this batch, without padding.
        """
        means = torch.stack([loss.detach(), metrics.kl_reference, metrics.kl_aligned]).double()
        row = torch.cat([means * num_items, response_tokens.double()[None]])
        self._window = row if self._window is None else self._window + row
        self._input_tokens = (
            input_tokens if self._input_tokens is None else self._input_tokens + input_tokens
        )

    def take_means(self, accelerator: Accelerator) -> dict[str, float]:
        """Give the three means since the last call, nats per response token, and start anew.

        Empty if no batch, or no response token, was counted.
        """
        if self._window is None:
            return {}
        *nats, tokens = accelerator.reduce(self._window, "sum").tolist()
        self._window = None
        if not tokens:
            return {}
        return {name: total / tokens for name, total in zip(_NAMES, nats, strict=True)}

    def take_input_tokens(self, accelerator: Accelerator) -> int:
        """Give the tokens, without padding, since the last call, and start anew."""
        if self._input_tokens is None:
            return 0
        tokens = int(accelerator.reduce(self._input_tokens, "sum"))
        self._input_tokens = None
        return tokens
