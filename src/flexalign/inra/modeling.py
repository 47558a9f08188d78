"""The InRa model: a base model, an adapter before its layer 0, and λ between the two streams."""

import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from flexalign._modes import evaluating
from flexalign.errors import ConfigError, LambdaError, UnsupportedModelError
from flexalign.fusion import Lambda, fuse_hidden, fuse_logits
from flexalign.generation.adapted import (
    AdaptedModel,
    Base,
    load_base,
    load_own_base,
    model_name,
    sweep_dials,
)
from flexalign.generation.fused import positions_of
from flexalign.generation.interface import Phase
from flexalign.generation.row_lambdas import RowDials
from flexalign.heads import Head, can_mix_hidden
from flexalign.inra.adapter import (
    AdapterHook,
    copy_first_layer,
    decoder_layers,
    identity_adapter,
    refusing,
)
from flexalign.inra.cache import ADAPTER, BASE, BOTH, StackPlan, StreamCache
from flexalign.inra.configuration import (
    InRaConfig,
    check_folder,
    load_weights,
    save_adapter,
)
from flexalign.models.loading import fingerprint
from flexalign.models.sources import resolve_adapter


class InRaModel(AdaptedModel):
    """A base model, a layer adapter before its layer 0, and a λ between the two streams.

    The base stream is the base model; the adapter stream is the base model with the adapter's
    layers in front. ``forward`` returns ``λ·adapter + (1−λ)·base`` of their logits (equation 5).
    The base is frozen, and can still be used alone. Attributes that this class does not have
    (``config``, ``device``, …) are the base's.

    Example:
        >>> model = InRaModel.create("miniature")                             # doctest: +SKIP
        >>> model.generate(**tokenizer(prompts), lam=[0.0, 0.5, 1.0])         # doctest: +SKIP

    Attributes:
        base: The base model, a causal language model of transformers.
        adapter: The adapter's layers.
        head: The base's head.
        adapter_hook: The hook that runs the adapter stream's rows through the adapter.
        inra_config: The adapter's settings; the same as ``dial_config``.
        tokenizer: The base's tokenizer; None if it is not known.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        adapter: nn.ModuleList,
        inra_config: InRaConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Join a base and its adapter. Use :meth:`create` or :meth:`from_pretrained` instead.

        Raises:
            UnsupportedModelError: If the base has no plain head, has recurrent layers, or its
                streams cannot run as one batch.
        """
        super().__init__(base, inra_config, tokenizer)
        name = model_name(base)
        self.adapter = adapter
        self.head = Head.of(base)
        self._takes_positions = (
            "position_ids" in inspect.signature(self._decoder.forward).parameters
        )

        self.adapter_hook = AdapterHook(decoder_layers(base, name)[0], adapter)
        weakref.finalize(self, self.adapter_hook.handle.remove)

        self.new_cache()  # raises if a layer caches anything other than keys and values
        probe_streams(self, name)
        base.requires_grad_(False)  # last, so that a refused base is not changed

    @classmethod
    def create(cls, base: Base, *, adapter_layers: int = 1, **loading: Any) -> "InRaModel":
        """Put a new adapter before a base model. It is the identity, so each λ gives the base.

        Args:
            base: A known name, a folder, or a loaded model.
            adapter_layers: Number of layers; the paper found one to be best.
            **loading: Options of ``flexalign.models.loading.load_model``, for a name or a folder.

        Raises:
            UnsupportedModelError: If the base cannot have an adapter (post-LN, recurrent,
                quantised).
        """
        model, tokenizer, source = load_base(base, loading)
        settings = InRaConfig(source, fingerprint(model), adapter_layers)
        adapter = identity_adapter(model, adapter_layers, model_name(model))
        return cls(model, adapter, settings, tokenizer)

    @classmethod
    def from_pretrained(
        cls, base: Base, adapter: str | Path, *, any_base: bool = False, **loading: Any
    ) -> "InRaModel":
        """Load an adapter's folder onto its base.

        Args:
            base: A known name, a folder, or a loaded model.
            adapter: The folder that :meth:`save_pretrained` wrote, or a known name.
            any_base: Accept another base than the adapter was made for, if the shapes fit.
            **loading: Options of ``flexalign.models.loading.load_model``, for a name or a folder.

        Raises:
            CheckpointError: If the adapter's files are missing, truncated or corrupt.
            PairMismatchError: If the adapter was made for another base.
        """
        folder = resolve_adapter(adapter)
        settings = check_folder(folder)

        model, tokenizer = load_own_base(base, settings, folder, any_base=any_base, loading=loading)
        layers = copy_first_layer(model, settings.adapter_layers, model_name(model))
        load_weights(layers, folder)
        return cls(model, layers, settings, tokenizer)

    @property
    def inra_config(self) -> InRaConfig:
        """The adapter's settings."""
        return cast("InRaConfig", self.dial_config)

    @inra_config.setter
    def inra_config(self, settings: InRaConfig) -> None:
        self.dial_config = settings

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Save only the adapter: its settings and one file with its layers' weights."""
        save_adapter(self.adapter, self.inra_config, Path(folder))

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
        lam_checked: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
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
            lam: A number, a list, ``(B,)`` or ``(B, T)``; the adapter's default if not given.
            gate: As in :func:`flexalign.fusion.fuse`.
            streams: Per row: the streams that it needs for the whole sequence, for the first use
                of a cache: BASE, ADAPTER or BOTH of ``flexalign.inra.cache``; by default BOTH.
            lam_checked: λ has been checked already, as ``generate`` does before the first token.
            **kwargs: Other arguments of the base's decoder.

        Returns:
            ``logits`` of shape ``(B, T, V)``, or ``(B, kept, V)``, and ``past_key_values``.

        Raises:
            LambdaError: If λ is not finite or does not fit the batch.
            ConfigError: If the cache does not hold a stream that λ needs.
        """
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
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    # The two streams, run as rows of one batch up to their fused logits.

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

        A row that runs in one stream only has that stream's states in both.

        Args:
            input_ids: Shape ``(B, T)``.
            attention_mask: Shape ``(B, T)``, or ``(B, T_cached + T)`` with a cache.
            streams: BASE, ADAPTER or BOTH, for all rows or for each. Ignored with a cache in use,
                which has its own.
            cache: A cache of :meth:`new_cache`, or of an earlier call.
            **inputs: Other arguments of the base's decoder.
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
        if not self._takes_positions:
            inputs.pop("position_ids", None)
        stacked = {key: plan.stack(value) for key, value in inputs.items() if value is not None}
        stacked |= {"past_key_values": cache, "use_cache": cache is not None, "return_dict": True}

        with self.adapter_hook.enabled(len(plan.rows), plan.adapter_start):
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
            lams: The n settings, each as :meth:`generate` takes it as ``lam``.
            **options: As in :meth:`generate`.

        Returns:
            As :meth:`generate`, with ``B·n`` rows: prompt 0 at every λ, then prompt 1, and so on.

        Raises:
            LambdaError: If there is no λ, or one is not finite.
            ConfigError: If an option is not available here.
        """
        settings = sweep_dials(lams, options)
        prompts, repeats = len(input_ids), len(settings)
        dials = RowDials.following(settings * prompts)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask

        # Each prompt is prefilled once, in every stream that one of its λ needs. Its last token is
        # left out, because generate must be given at least one token that is not in the cache.
        if input_ids.shape[1] > 1 and self.generation_option("use_cache", options) is not False:
            self.check_options(options)
            streams = self._streams(dials, options)
            grid = streams.reshape(prompts, repeats)
            union = (grid & BASE).amax(1) | (grid & ADAPTER).amax(1)
            cache = self.prefill(input_ids[:, :-1], mask[:, :-1], union)
            cache.take(torch.arange(prompts).repeat_interleave(repeats), streams)
            options["past_key_values"] = cache

        return self.generate(
            input_ids=input_ids.repeat_interleave(repeats, 0),
            attention_mask=mask.repeat_interleave(repeats, 0),
            lam=dials,
            **options,
        )

    def prefill_phases(
        self, input_ids: Tensor, attention_mask: Tensor, phases: Sequence[Phase]
    ) -> StreamCache:
        """Run prompts, ``(B, T)``, once, each in the streams that any of the phases needs."""
        streams = torch.zeros(len(input_ids), dtype=torch.long)
        for rows, dials in phases:
            streams[rows] |= _streams_of(dials)
        return self.prefill(input_ids, attention_mask, streams)

    def fork_cache(self, cache: StreamCache, rows: Tensor, dials: RowDials) -> StreamCache:
        """Return a new cache of some rows, with the streams that their dials need."""
        return cache.fork(rows, _streams_of(dials))

    def _decoding_inputs(self, dials: RowDials, options: dict[str, Any]) -> dict[str, Any]:
        """Return the model inputs of a generation: a new cache, and the streams of each prompt."""
        self._note_range(dials.least, dials.largest)
        streams = self._streams(dials, options)
        if self.generation_option("use_cache", options) is False:
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
            cache.join(self.prefill(ids[:, :past], mask, missing))

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
    base, adapter = (per_row == 0).all(1), (per_row == 1).all(1)
    both = torch.full((rows,), BOTH)
    return both.masked_fill(base, BASE).masked_fill(adapter, ADAPTER)


def _streams_of(dials: RowDials) -> Tensor:
    """Return the streams that each prompt needs: one only if its λ is always 0, or always 1."""
    codes = {None: BOTH, 0.0: BASE, 1.0: ADAPTER}
    return torch.tensor([codes[end] for end in dials.ends])


# The test of a model's two streams when it is loaded. Model families pass different arguments to
# their layers. Instead of keeping a list of families, a few tokens are run through both streams,
# stacked and separately, and compared. A model whose results differ is refused.

_ROWS, _TOKENS, _PADDING = 2, 4, 1
"""The stack has as many rows as tokens, so that an input that is cut by tokens instead of by rows
gives a wrong result here."""

_TOLERANCE = 1e-4

_FAILING = "its two streams cannot run as rows of one batch"
_STACKED = "its two streams disturb each other when they run as rows of one batch"
_CACHED = "its streams come out differently with a cache than without"


@torch.no_grad()
def probe_streams(model: InRaModel, name: str) -> None:
    """Check that stacked and separate streams agree, and that cached and uncached runs agree.

    Raises:
        UnsupportedModelError: If they differ by more than rounding.
    """
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, model.head.vocab_size, (_ROWS, _TOKENS), generator=generator)
    tokens = tokens.to(device)
    mask = torch.ones_like(tokens)
    mask[-1, :_PADDING] = 0

    perturbed = _perturbed(list(model.adapter.parameters()))
    with refusing(name, _FAILING), evaluating(model), perturbed:
        _compare(model, tokens, mask, name)


def _compare(model: InRaModel, tokens: Tensor, mask: Tensor, name: str) -> None:
    positions = positions_of(mask)
    whole: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
    base, adapter = model.stream_hidden(tokens, **whole)
    base_alone, _ = model.stream_hidden(tokens, streams=BASE, **whole)
    _, adapter_alone = model.stream_hidden(tokens, streams=ADAPTER, **whole)
    _require_equal(base, base_alone, mask, _STACKED, name)
    _require_equal(adapter, adapter_alone, mask, _STACKED, name)

    cache = model.prefill(tokens[:, :-1], mask[:, :-1])
    last: dict[str, Any] = {"attention_mask": mask, "position_ids": positions[:, -1:]}
    step = model.stream_hidden(tokens[:, -1:], cache=cache, **last)
    for cached, uncached in zip(step, (base, adapter), strict=True):
        _require_equal(cached, uncached[:, -1:], mask[:, -1:], _CACHED, name)


@contextmanager
def _perturbed(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Add noise to an adapter's parameters inside the block, so that the two streams differ."""
    generator = torch.Generator().manual_seed(2)
    originals = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
    try:
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.copy_(original)


def _require_equal(found: Tensor, expected: Tensor, mask: Tensor, problem: str, name: str) -> None:
    """Check that hidden states (B, T, H) agree where the mask (B, T) is set.

    Raises:
        UnsupportedModelError: If their relative distance is larger than rounding.
    """
    kept = mask.bool()
    allowed = max(_TOLERANCE, 8 * torch.finfo(expected.dtype).eps)
    found, expected = found[kept].float(), expected[kept].float()
    off = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
    if not off <= allowed:
        raise UnsupportedModelError(
            f"{name}: {problem} (off by {off:.1%}); InRa cannot serve this model."
        )
