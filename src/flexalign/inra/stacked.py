"""The two streams of a base model and an adapter, run as one batch up to their fused logits."""

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexalign.decoding.fused import positions_of
from flexalign.errors import LambdaError
from flexalign.fusion import Lambda, fuse
from flexalign.heads import Head, can_mix_hidden
from flexalign.inra.adapter import decoder_layers
from flexalign.inra.kv import StreamCache
from flexalign.inra.streams import ADAPTER, BASE, BOTH, Entry, Plan

__all__ = ["StackedStreams", "needed_streams"]


class StackedStreams(nn.Module):
    """A frozen base, an adapter before its layer 0, and the pass that serves both streams.

    Attributes:
        base: The base model, a causal language model of transformers.
        adapter: The adapter's layers.
        head: The base's head.
        entry: Where the adapter stream turns off.
    """

    def __init__(self, base: PreTrainedModel, adapter: nn.ModuleList, name: str) -> None:
        """Join the two.

        Raises:
            UnsupportedModelError: If the base has no plain head, or layers that are recurrent.
        """
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.head = Head.of(base)
        self._takes_positions = (
            "position_ids" in inspect.signature(self._decoder.forward).parameters
        )
        self.entry = Entry(decoder_layers(base, name)[0], adapter)
        weakref.finalize(self, self.entry.handle.remove)
        self.new_cache()

    def new_cache(self) -> StreamCache:
        """Return an empty cache for both streams."""
        return StreamCache(self.base.config, len(self.adapter))

    def stream_hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        streams: Tensor | int = BOTH,
        cache: StreamCache | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return both streams' final hidden states, before the head: each ``(B, T, H)``.

        A row that travels by one stream only has that stream's in both.

        Args:
            input_ids: Shape ``(B, T)``.
            attention_mask: Shape ``(B, T)``, or ``(B, T_cached + T)`` with a cache.
            streams: BASE, ADAPTER or BOTH, for all rows or for each; a cache in use has its own.
            cache: Of :meth:`new_cache`, or of an earlier call.
            **inputs: Whatever else the base's decoder takes.
        """
        plan = self._plan(streams, input_ids, cache)
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        return plan.split(self._run(plan, cache, inputs))

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, streams: Tensor | int = BOTH
    ) -> StreamCache:
        """Run prompts and return their cache, for ``generate`` or ``forward``.

        Args:
            input_ids: Shape ``(B, T)``, left padded.
            attention_mask: Shape ``(B, T)``. Positions are counted as ``generate`` counts them.
            streams: BASE, ADAPTER or BOTH, for all rows or for each.
        """
        cache = self.new_cache()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if attention_mask is not None:
            inputs["position_ids"] = positions_of(attention_mask)
        self._run(self._plan(streams, input_ids, cache), cache, inputs)
        return cache

    @property
    def _decoder(self) -> Any:
        return self.base.get_decoder()

    def _plan(self, streams: Tensor | int, given: Tensor, cache: StreamCache | None) -> Plan:
        """Return how the rows of ``given`` are stacked; a cache decides once and for all."""
        if cache is not None and cache.plan is not None:
            return cache.plan
        if isinstance(streams, int):
            streams = torch.full((len(given),), streams)
        plan = Plan(streams, given.device)
        if cache is not None:
            cache.plan = plan
        return plan

    def _run(self, plan: Plan, cache: StreamCache | None, inputs: dict[str, Any]) -> Tensor:
        """Run the stack up to the head: (N, T, H)."""
        if not self._takes_positions:
            inputs.pop("position_ids", None)
        stacked = {key: plan.stack(value) for key, value in inputs.items() if value is not None}
        stacked |= {"past_key_values": cache, "use_cache": cache is not None, "return_dict": True}
        with self.entry.open(len(plan.rows), plan.entry):
            hidden: Tensor = self._decoder(**stacked)[0]
        return hidden

    def _fused_logits(self, plan: Plan, hidden: Tensor, lam: Lambda, gate: float | None) -> Tensor:
        """Return the fused logits (B, T, V) of the stack's hidden states (N, T, H).

        The head is applied once: to the fused hidden states where it is linear, else to the stack.
        """
        if not plan.is_mixed:
            return self.head(plan.split(hidden)[0])
        if can_mix_hidden(self.head, self.head, gate):
            return self.head(fuse(*plan.split(hidden), lam))
        return fuse(*plan.split(self.head(hidden)), lam, gate)


def needed_streams(lam: Lambda, rows: int) -> Tensor:
    """Return, per row, the streams that a λ needs: one alone only where it is 0 or 1 throughout.

    Raises:
        LambdaError: If λ is neither one number nor has a value for each row.
    """
    if isinstance(lam, Tensor) and lam.ndim > 0:
        if len(lam) not in (1, rows):
            raise LambdaError(
                f"λ of shape {tuple(lam.shape)} does not fit {rows} rows; give one number, one per "
                "row, or one per row and position."
            )
        per_row = lam.detach().cpu().reshape(len(lam), -1).expand(rows, -1)
    else:
        per_row = torch.as_tensor(lam, dtype=torch.float64).cpu().expand(rows, 1)
    base, adapter = (per_row == 0).all(1), (per_row == 1).all(1)
    both = torch.full((rows,), BOTH)
    return both.masked_fill(base, BASE).masked_fill(adapter, ADAPTER)
