"""Generation over two streams: which of them a prompt needs, its cache, and sweeps of λ."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexalign.decoding.dials import RowDials
from flexalign.decoding.fused import FusedDecoding
from flexalign.errors import ConfigError, LambdaError
from flexalign.inra.kv import StreamCache
from flexalign.inra.stacked import StackedStreams
from flexalign.inra.streams import ADAPTER, BASE, BOTH

__all__ = ["StreamDecoding"]


class StreamDecoding(FusedDecoding, StackedStreams):
    """`generate` and `sweep` for stacked streams."""

    def sweep(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        lams: Sequence[Any] | Tensor,
        **options: Any,
    ) -> Any:
        """Generate from every prompt at several λ: one prefill, then all λ as one batch.

        Args:
            input_ids: Prompts, shape ``(B, T)``, left padded.
            attention_mask: Shape ``(B, T)``.
            lams: What :meth:`generate` takes as ``lam``, one for each of the n settings.
            **options: As in :meth:`generate`.

        Returns:
            What :meth:`generate` returns, with ``B·n`` rows: prompt 0 at every λ, then prompt 1.

        Raises:
            LambdaError: If there is no λ, or one is not finite.
            ConfigError: If an option is not available here.
        """
        settings = lams.tolist() if isinstance(lams, Tensor) else list(lams)
        if not settings:
            raise LambdaError("a sweep needs at least one λ.")
        if options.get("past_key_values") is not None:
            raise ConfigError("a sweep fills a cache of its own; leave past_key_values out.")
        prompts, repeats = len(input_ids), len(settings)
        dials = RowDials.of(settings * prompts, prompts * repeats)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.shape[1] > 1 and self._setting("use_cache", options) is not False:
            self._check_options(options)
            streams = self._streams(dials, options)
            grid = streams.reshape(prompts, repeats)
            union = (grid & BASE).amax(1) | (grid & ADAPTER).amax(1)
            cache = self.prefill(input_ids[:, :-1], mask[:, :-1], union)
            cache.take(torch.arange(prompts).repeat_interleave(repeats), streams)
            options["past_key_values"] = cache
        return self.generate(
            input_ids=input_ids.repeat_interleave(repeats, 0),
            attention_mask=mask.repeat_interleave(repeats, 0),
            lam=settings * prompts,
            **options,
        )

    def _decoding_inputs(self, dials: RowDials, options: dict[str, Any]) -> dict[str, Any]:
        """Return the cache, or what to make one of: the streams that each prompt needs."""
        streams = self._streams(dials, options)
        if self._setting("use_cache", options) is False:
            return {"streams": streams}
        cache = options.get("past_key_values")
        if cache is None:
            return {"past_key_values": self.new_cache(), "streams": streams}
        if not isinstance(cache, StreamCache):
            raise ConfigError(
                f"past_key_values is a {type(cache).__name__}; an InRa model's cache has one layer "
                "more and both streams: take that of new_cache, prefill or an earlier generate."
            )
        if cache.plan is None:
            return {"streams": torch.full_like(streams, BOTH)}
        self._continue(cache, cache.plan.streams, streams, options)
        return {}

    def _streams(self, dials: RowDials, options: dict[str, Any]) -> Tensor:
        """Return the streams that each prompt needs; both where the cache may outlive the call."""
        if self._setting("return_dict_in_generate", options):
            return torch.full((len(dials.ends),), BOTH)
        return _codes(dials)

    def _prefill_for(
        self, input_ids: Tensor, attention_mask: Tensor, needs: Sequence[tuple[Tensor, RowDials]]
    ) -> StreamCache:
        streams = torch.zeros(len(input_ids), dtype=torch.long)
        for rows, dials in needs:
            streams[rows] |= _codes(dials)
        return self.prefill(input_ids, attention_mask, streams)

    def _fork(self, cache: StreamCache, rows: Tensor, dials: RowDials) -> StreamCache:
        return cache.fork(rows, _codes(dials))

    def _continue(
        self, cache: StreamCache, held: Tensor, streams: Tensor, options: dict[str, Any]
    ) -> None:
        """Make an earlier call's cache fit this one: missing streams, repeated rows."""
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
            cache.join(self.prefill(ids[:, :past], mask, missing))
        repeats = self._repeats(options)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)


def _codes(dials: RowDials) -> Tensor:
    """Return the streams that each prompt needs: one alone where its λ is that end throughout."""
    codes = {None: BOTH, 0.0: BASE, 1.0: ADAPTER}
    return torch.tensor([codes[end] for end in dials.ends])
