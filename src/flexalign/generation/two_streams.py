"""One model whose two streams are the two ends of λ, run as rows of one batch.

An InRa model has a stream with its adapter and one without; one model under two prompts has a stream
for each prompt. What they have in common is here: a row runs in the streams that its λ needs, all
streams take one pass (:mod:`flexalign.generation.stream_cache`), and their logits are fused. A
subclass says what the second stream is.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexalign.errors import ConfigError, LambdaError
from flexalign.fusion import Lambda, fuse_hidden, fuse_logits
from flexalign.generation.adapted import BasedModel
from flexalign.generation.fused import positions_of
from flexalign.generation.inherited import refuse_inner_outputs
from flexalign.generation.interface import Phase
from flexalign.generation.row_lambdas import RowDials
from flexalign.generation.stream_cache import BOTH, FIRST, SECOND, StackPlan, StreamCache
from flexalign.heads import Head, can_mix_hidden, decoder_of


class TwoStreamModel(BasedModel):
    """A model in two streams, and a λ between them.

    ``forward`` returns ``λ·second + (1−λ)·first`` of their logits (equation 5).

    Attributes:
        head: The base's head.
    """

    head: Head

    def __init__(self, base: PreTrainedModel, *more: Any) -> None:
        """Keep a model.

        Args:
            base: The model.
            *more: Further arguments of :class:`~flexalign.generation.adapted.BasedModel`.

        Raises:
            UnsupportedModelError: If it has no plain head.
        """
        super().__init__(base, *more)
        self.head = Head.of(base)
        self._takes_positions = (
            "position_ids" in inspect.signature(self._decoder.forward).parameters
        )

    # What a subclass defines: its second stream.

    def new_cache(self) -> StreamCache:
        """Return an empty cache for both streams."""
        return StreamCache(self.base.config)

    def _running(self, plan: StackPlan) -> AbstractContextManager[Any]:
        """Return the context in which the stack of a plan runs through the decoder."""
        return nullcontext()

    def _second_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Take the second stream's own inputs out of ``inputs``, and return them by decoder name.

        They are ``input_ids``, ``attention_mask`` and ``position_ids``, each in the shape of the
        first stream's; a stream without inputs of its own has the first one's.
        """
        return {}

    # The two streams, run as rows of one batch up to their fused logits.

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StreamCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        lam: Any = None,
        gate: float | None = None,
        streams: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        lam_checked: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the fused logits of a batch.

        Args:
            input_ids: Shape ``(B, T)``.
            attention_mask: Shape ``(B, T)``, or ``(B, T_cached + T)`` with a cache.
            position_ids: As the base takes them.
            past_key_values: A cache of ``new_cache()``, or of an earlier call.
            inputs_embeds: Embeddings instead of ``input_ids``, shape ``(B, T, H)``.
            use_cache: Keep keys and values; by default only if a cache is given.
            logits_to_keep: As in transformers: a number of last positions (0 for all), or their
                indices.
            lam: A number, a list, ``(B,)`` or ``(B, T)``; the model's default if not given.
            gate: As in :func:`flexalign.fusion.fuse`.
            streams: Per row: the streams that it needs for the whole sequence, for the first use
                of a cache: FIRST, SECOND or BOTH of ``flexalign.generation.stream_cache``; by
                default BOTH.
            labels: Shape ``(B, T)``, −100 where nothing is counted, for the loss of the fused
                logits.
            return_dict: False for a tuple.
            lam_checked: λ has been checked already, as ``generate`` does before the first token.
            **kwargs: Other arguments of the base's decoder, and the second stream's own inputs.

        Returns:
            A ``CausalLMOutputWithPast``, or a tuple: ``logits`` of shape ``(B, T, V)``, or
            ``(B, kept, V)``; ``past_key_values``; and ``loss`` if there are labels.

        Raises:
            LambdaError: If λ is not finite or does not fit the batch.
            ConfigError: If the cache does not hold a stream that λ needs, or hidden states or
                attentions are asked for.
        """
        refuse_inner_outputs(kwargs, self.base.config)
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ConfigError("forward needs input_ids or inputs_embeds.")
        if not lam_checked:
            lam = self._checked_lambda(lam)

        # A cache may be continued at another λ, so its first use fills both streams by default.
        needed = needed_streams(lam, len(given))
        cache = self.new_cache() if past_key_values is None and use_cache else past_key_values
        if streams is None:
            streams = needed if cache is None else torch.full_like(needed, BOTH)
        plan = self._plan(streams, given, cache)
        if not plan.has(needed):
            raise ConfigError(
                "the cache does not hold a stream that this λ needs; generate catches up where it "
                "is given the whole sequence along with the cache."
            )

        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        kwargs |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds}
        hidden = self._run(plan, cache, kwargs)

        # The head is the most expensive product, so it is applied only to the kept positions.
        kept: Any = logits_to_keep
        kept = slice(-kept, None) if isinstance(kept, int) else kept
        if isinstance(lam, Tensor) and lam.ndim == 2 and lam.shape[1] == hidden.shape[1]:
            lam = lam.to(hidden.device)[:, kept]
        logits = self._fused_logits(plan, hidden[:, kept], lam, gate)
        return self.fused_output(logits, cache, labels, return_dict)

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

        A row that runs in one stream only has that stream's states in both.

        Args:
            input_ids: Shape ``(B, T)``.
            attention_mask: Shape ``(B, T)``, or ``(B, T_cached + T)`` with a cache.
            streams: FIRST, SECOND or BOTH, for all rows or for each. Ignored with a cache in use,
                which has its own.
            cache: A cache of :meth:`new_cache`, or of an earlier call.
            **inputs: Other arguments of the base's decoder, and the second stream's own inputs.
        """
        plan = self._plan(streams, input_ids, cache)
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        return plan.split(self._run(plan, cache, inputs))

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        streams: Tensor | int = BOTH,
        **inputs: Any,
    ) -> StreamCache:
        """Run prompts and return their cache, for ``generate`` or ``forward``.

        Args:
            input_ids: Shape ``(B, T)``, left padded.
            attention_mask: Shape ``(B, T)``. Positions are counted as ``generate`` counts them.
            streams: FIRST, SECOND or BOTH, for all rows or for each.
            **inputs: The second stream's own inputs.
        """
        cache = self.new_cache()
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if attention_mask is not None:
            inputs["position_ids"] = positions_of(attention_mask)
        self._run(self._plan(streams, input_ids, cache), cache, inputs)
        return cache

    @property
    def _decoder(self) -> Any:
        return decoder_of(self.base)

    def _plan(self, streams: Tensor | int, given: Tensor, cache: StreamCache | None) -> StackPlan:
        """Return the stacking of the rows of ``given``. A cache keeps that of its first use."""
        if cache is not None and cache.plan is not None:
            return cache.plan

        if isinstance(streams, int):
            streams = torch.full((len(given),), streams)
        plan = StackPlan(streams, given.device)
        if cache is not None:
            cache.plan = plan
        return plan

    def _run(self, plan: StackPlan, cache: StreamCache | None, inputs: dict[str, Any]) -> Tensor:
        """Run the stack up to the head; return its hidden states (N, T, H)."""
        second = self._second_inputs(inputs)
        if not self._takes_positions:
            inputs.pop("position_ids", None)
        stacked = {
            key: plan.stack(value, second.get(key))
            for key, value in inputs.items()
            if value is not None
        }
        stacked |= {"past_key_values": cache, "use_cache": cache is not None, "return_dict": True}

        with self._running(plan):
            hidden: Tensor = self._decoder(**stacked)[0]
        return hidden

    def _fused_logits(
        self, plan: StackPlan, hidden: Tensor, lam: Lambda, gate: float | None
    ) -> Tensor:
        """Return the fused logits (B, T, V) of the stack's hidden states (N, T, H).

        The head is applied once: to the fused hidden states if it is linear, else to the stack.
        """
        if not plan.is_mixed:
            return self.head(plan.split(hidden)[0])
        if can_mix_hidden(self.head, self.head, gate):
            return self.head(fuse_hidden(*plan.split(hidden), lam))
        return fuse_logits(*plan.split(self.head(hidden)), lam, gate)

    # Generation: which streams a prompt needs, its cache, and sweeps of λ.

    def _prefill_sweep(
        self, input_ids: Tensor, mask: Tensor, dials: RowDials, options: dict[str, Any]
    ) -> None:
        """Prefill each prompt once, in every stream that one of its λ needs."""
        if input_ids.shape[1] == 1 or self.generation_option("use_cache", options) is False:
            return

        self.check_options(options)
        prompts, repeats = len(input_ids), len(dials.ends) // len(input_ids)
        streams = self._streams(dials, options)
        grid = streams.reshape(prompts, repeats)
        union = (grid & FIRST).amax(1) | (grid & SECOND).amax(1)

        # The last token is left out, because generate must be given at least one token that is not
        # in the cache.
        own = {name: options[name][:, :-1] for name in self.row_inputs if name in options}
        cache = self.prefill(input_ids[:, :-1], mask[:, :-1], union, **own)
        cache.take(torch.arange(prompts).repeat_interleave(repeats), streams)
        options["past_key_values"] = cache

    def prefill_phases(
        self, input_ids: Tensor, attention_mask: Tensor, phases: Sequence[Phase], **inputs: Tensor
    ) -> StreamCache:
        """Run prompts, ``(B, T)``, once, each in the streams that any of the phases needs."""
        streams = torch.zeros(len(input_ids), dtype=torch.long)
        for rows, dials in phases:
            streams[rows] |= _streams_of(dials)
        return self.prefill(input_ids, attention_mask, streams, **inputs)

    def fork_cache(self, cache: StreamCache, rows: Tensor, dials: RowDials) -> StreamCache:
        """Return a new cache of some rows, with the streams that their dials need."""
        return cache.fork(rows, _streams_of(dials))

    def _decoding_inputs(self, dials: RowDials, options: dict[str, Any]) -> dict[str, Any]:
        """Return the model inputs of a generation: a new cache, and the streams of each prompt."""
        streams = self._streams(dials, options)
        if self.generation_option("use_cache", options) is False:
            return {"streams": streams}

        cache = options.get("past_key_values")
        if cache is None:
            return {"past_key_values": self.new_cache(), "streams": streams}
        if not isinstance(cache, StreamCache):
            raise ConfigError(
                f"past_key_values is a {type(cache).__name__}; this model's cache has two streams: "
                "take that of new_cache, prefill or an earlier generate."
            )
        if cache.plan is None:
            # The caller keeps this cache, and may continue from it at another λ.
            return {"streams": torch.full_like(streams, BOTH)}
        self._continue(cache, cache.plan.streams, streams, options)
        return {}

    def _streams(self, dials: RowDials, options: dict[str, Any]) -> Tensor:
        """Return the streams that each prompt needs; both if the cache is returned to the caller."""
        if self.generation_option("return_dict_in_generate", options):
            return torch.full((len(dials.ends),), BOTH)
        return _streams_of(dials)

    def _continue(
        self, cache: StreamCache, held: Tensor, streams: Tensor, options: dict[str, Any]
    ) -> None:
        """Adapt the cache of an earlier call: add missing streams, and repeat rows."""
        ids, mask = options.get("input_ids"), options.get("attention_mask")
        past = cache.get_seq_length()
        if ids is None or len(held) != len(streams) or ids.shape[1] <= past:
            raise ConfigError(
                f"the cache holds {len(held)} rows of {past} tokens; give generate input_ids that "
                "begin with them, and at least one token more."
            )

        missing = streams & ~held
        if bool(missing.any()):
            mask = mask if mask is None else mask[:, :past]
            own = {name: options[name][:, :past] for name in self.row_inputs if name in options}
            cache.join(self.prefill(ids[:, :past], mask, missing, **own))

        repeats = self._repeats(options)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)


def needed_streams(lam: Lambda, rows: int) -> Tensor:
    """Return the streams that each row needs: one only if its λ is 0, or 1, at all positions.

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
    first, second = (per_row == 0).all(1), (per_row == 1).all(1)
    both = torch.full((rows,), BOTH)
    return both.masked_fill(first, FIRST).masked_fill(second, SECOND)


def _streams_of(dials: RowDials) -> Tensor:
    """Return the streams that each prompt needs: one only if its λ is always 0, or always 1."""
    codes = {None: BOTH, 0.0: FIRST, 1.0: SECOND}
    return torch.tensor([codes[end] for end in dials.ends])
