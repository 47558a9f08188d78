"""Decoding with equation 5 over two models, each with its own cache."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from flexalign.data.rendering import end_ids
from flexalign.errors import ConfigError, UnsupportedModelError
from flexalign.fusion import Lambda, as_lambda, fuse_logits
from flexalign.generation.fused import (
    FusedDecoding,
    forward_inputs,
    positions_of,
    taken_inputs,
)
from flexalign.generation.inherited import refuse_inner_outputs
from flexalign.generation.interface import Phase
from flexalign.generation.row_lambdas import RowDials, TagTokens
from flexalign.models.adapters import inner_model
from flexalign.models.pair import SIDES, ModelPair, Side


class TwoModelConfig(PreTrainedConfig):  # type: ignore[misc]
    """The configuration that transformers' ``generate`` needs."""

    model_type = "flexalign_two_models"


@dataclass
class PairCache:
    """The caches of two models, as one cache for transformers' ``generate``.

    Attributes:
        reference: The cache of the reference; None if it does not run.
        aligned: The cache of the aligned model; None if it does not run.
    """

    reference: Any = None
    aligned: Any = None

    # Attributes that transformers' ``generate`` reads.
    is_compileable = False
    is_croppable = False

    def caches(self) -> list[Any]:
        """Return the caches of the models that run."""
        return [cache for cache in (self.reference, self.aligned) if cache is not None]

    def get_seq_length(self) -> int:
        """Return the number of tokens in both caches, padding included."""
        return int(self.caches()[0].get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row ``beam_idx[i]``, in both caches."""
        for cache in self.caches():
            cache.reorder_cache(beam_idx)


class TwoModelDecoder(FusedDecoding, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A model whose logits are the fusion of a pair's, for transformers' ``generate``.

    Example::

        decoder = TwoModelDecoder(ModelPair.load("models/base", "models/concise"))
        decoder.generate(**inputs, lam=2.0, gate=0.01, max_new_tokens=200)

    Sampling, beams, several samples of a prompt, stop strings and streaming are transformers'. The
    default λ is 1. If λ is 0 for all tokens of a batch, or 1 for all, only one of the two models
    runs. A pair with a shared base runs its module twice, with its adapter off and on.

    Attributes:
        pair: The two models.
        reference: The transformers module of the reference.
        aligned: The transformers module of the aligned model.
        tokenizer: The pair's tokenizer.
    """

    config_class = TwoModelConfig

    def __init__(self, pair: ModelPair) -> None:
        """Decode with a pair. Its modules are not copied or changed."""
        super().__init__(TwoModelConfig(vocab_size=pair.vocab_size))
        self.pair = pair
        self.tokenizer = pair.tokenizer
        self.reference: Any = inner_model(pair.reference)
        self.aligned: Any = inner_model(pair.aligned)
        self._takes = {side: forward_inputs(getattr(self, side)) for side in SIDES}

        # The reference's settings, and the end tokens of both.
        settings: Any = copy.deepcopy(self.reference.generation_config)
        own = [getattr(self, side).generation_config.eos_token_id for side in SIDES]
        settings.eos_token_id = end_ids(pair.tokenizer, *own) or None
        if settings.pad_token_id is None:
            settings.pad_token_id = pair.tokenizer.pad_token_id
        self.generation_config = settings

    @property
    def device(self) -> torch.device:
        """Where the inputs go: the reference's device."""
        return cast("torch.device", self.reference.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PairCache | None = None,
        lam: Lambda = 1.0,
        gate: float | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        inputs: dict[Side, dict[str, Any]] | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        lam_checked: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run both models and fuse their logits.

        Args:
            input_ids: Shape ``(B, T)``.
            attention_mask: Shape ``(B, T)``, or ``(B, past + T)`` with a cache.
            position_ids: Shape ``(B, T)``.
            past_key_values: The two caches of an earlier call.
            lam: As in :func:`flexalign.fuse`: a number, ``(B,)`` or ``(B, T)``.
            gate: As in :func:`flexalign.fuse`.
            use_cache: Return the two caches.
            logits_to_keep: Number of last positions to return logits of; 0: all.
            inputs: Separate inputs for each model, instead of those above. A model without inputs
                does not run, and the logits are the other's.
            labels: Shape ``(B, T)``, −100 where nothing is counted, for the loss of the fused
                logits.
            return_dict: False for a tuple.
            lam_checked: λ has been checked already, as ``generate`` does before the first token.
            **kwargs: Other inputs of transformers' models, which are refused.

        Returns:
            Logits of shape ``(B, T, V)`` in float32, the caches, and the loss if there are labels.

        Raises:
            LambdaError: If λ is not finite or does not fit the batch.
            ConfigError: If the gate is outside [0, 1], or an input is not served.
        """
        refuse_inner_outputs(kwargs)
        for name, value in kwargs.items():
            if value is not None and value is not False:
                raise ConfigError(f"forward takes no {name}: it would have to fit both models.")
        if not lam_checked:
            lam = as_lambda(lam)
        if inputs is None:
            common = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                "use_cache": use_cache,
                "logits_to_keep": logits_to_keep,
            }
            inputs = {side: self._inputs(side, common, past_key_values) for side in SIDES}

        logits, cache = {}, PairCache()
        for side, given in inputs.items():
            with self.pair.running(side):
                outputs = getattr(self, side)(**given, return_dict=True)
            logits[side] = outputs.logits[..., : self.pair.vocab_size]
            setattr(cache, side, getattr(outputs, "past_key_values", None))

        if len(logits) == 2:
            aligned = logits["aligned"].to(logits["reference"].device)
            fused = fuse_logits(logits["reference"], aligned, lam, gate)
        else:
            (fused,) = logits.values()
        kept = cache if cache.caches() else None
        return self.fused_output(fused.float(), kept, labels, return_dict)

    def _inputs(
        self, side: Side, common: dict[str, Any], cache: PairCache | None
    ) -> dict[str, Any]:
        """Return the arguments of one model: the common ones that it takes, and its cache."""
        known = {name: value for name, value in common.items() if value is not None}
        given = taken_inputs(known, self._takes[side])
        if cache is not None:
            given["past_key_values"] = getattr(cache, side)
        return given

    def set_attn_implementation(self, attn_implementation: Any, **options: Any) -> None:
        """Set the attention of both models; arguments and errors are those of transformers."""
        for side in SIDES:
            getattr(self, side).set_attn_implementation(attn_implementation, **options)

    def set_checkpointing(self, method: str, *args: Any, **options: Any) -> None:
        """Switch activation checkpointing of both models."""
        for side in SIDES:
            getattr(getattr(self, side), method)(*args, **options)

    @property
    def loss_function(self) -> Any:
        """The reference's loss of logits and labels."""
        return self.reference.loss_function

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> NoReturn:
        """Not available: a pair is loaded by ``ModelPair.load``.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "TwoModelDecoder.from_pretrained is not available: two models have two folders; write "
            "TwoModelDecoder(ModelPair.load(reference, aligned))."
        )

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Not available: each model is saved by its own ``save_pretrained``.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "TwoModelDecoder.save_pretrained is not available: it holds two models; save each, or "
            "make one of both with flexalign realign or interpolate."
        )

    # Methods that `generate` calls while it decodes.

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *,
        dials: RowDials,
        dial_rows: Tensor,
        prompt_tokens: int,
        tags: TagTokens | None = None,
        gate: float | None = None,
        sides: tuple[Side, ...] = SIDES,
        past_key_values: PairCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs that each model prepares, and each row's λ for the next token."""
        inputs = {}
        for side in sides:
            given = taken_inputs(kwargs, self._takes[side])
            if past_key_values is not None:
                given["past_key_values"] = getattr(past_key_values, side)
            inputs[side] = getattr(self, side).prepare_inputs_for_generation(input_ids, **given)

        index = max(0, input_ids.shape[1] - prompt_tokens)
        lam = dials.at(dial_rows, index, input_ids, tags)
        return {"inputs": inputs, "lam": lam, "lam_checked": True, "gate": gate}

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Create one cache for each model that runs, of the model's own kind."""
        if model_kwargs.get("past_key_values") is not None or not generation_config.use_cache:
            return

        cache = PairCache()
        for side in model_kwargs["sides"]:
            own: dict[str, Any] = {}
            model = getattr(self, side)
            model._prepare_cache_for_generation(
                generation_config, own, generation_mode, batch_size, max_cache_length
            )
            if "past_key_values" not in own:
                raise UnsupportedModelError(
                    f"the {side} model (family {model.config.model_type}) keeps its state in "
                    "another way than by position, which two-model decoding does not serve; "
                    "generate with use_cache=False."
                )
            setattr(cache, side, own["past_key_values"])
        model_kwargs["past_key_values"] = cache

    # Methods that `FusedDecoding` requires of its subclasses.

    @property
    def _leader(self) -> PreTrainedModel:
        return cast("PreTrainedModel", self.reference)

    def _default_dial(self) -> float:
        return 1.0

    def _decoding_inputs(self, dials: RowDials, options: dict[str, Any]) -> dict[str, Any]:
        """Return which models run; both if their caches are returned to the caller."""
        needed = _sides(dials)
        cache = options.get("past_key_values")
        if cache is None:
            is_kept = self.generation_option("return_dict_in_generate", options)
            return {"sides": SIDES if is_kept else needed}

        held = tuple(side for side in SIDES if getattr(cache, side, None) is not None)
        if not isinstance(cache, PairCache) or not set(needed) <= set(held):
            raise ConfigError(
                "past_key_values must be the PairCache that an earlier generation with "
                "return_dict_in_generate=True returned."
            )
        repeats = self._repeats(options)
        if repeats > 1:
            for one in cache.caches():
                one.batch_repeat_interleave(repeats)
        return {"sides": held}

    @torch.no_grad()
    def prefill_phases(
        self, input_ids: Tensor, attention_mask: Tensor, phases: Sequence[Phase], **_: Tensor
    ) -> PairCache:
        """Run prompts, ``(B, T)``, once, in each model that any of the phases needs."""
        common = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": positions_of(attention_mask),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        needed = {side for _, dials in phases for side in _sides(dials)}
        inputs = {side: self._inputs(side, common, None) for side in sorted(needed)}
        outputs = self(inputs=inputs, lam_checked=True)  # only the caches are used, not the logits
        return cast("PairCache", outputs.past_key_values)

    def fork_cache(self, cache: PairCache, rows: Tensor, dials: RowDials) -> PairCache:
        """Return copies of some rows of the caches of the models that their dials need."""
        forked = PairCache()
        for side in _sides(dials):
            own = copy.deepcopy(getattr(cache, side))
            own.batch_select_indices(rows.to(self.device))
            setattr(forked, side, own)
        return forked


def _sides(dials: RowDials) -> tuple[Side, ...]:
    """Return the models that run: only one if every λ is always 0, or always 1."""
    if all(end == 0 for end in dials.ends):
        return ("reference",)
    if all(end == 1 for end in dials.ends):
        return ("aligned",)
    return SIDES
