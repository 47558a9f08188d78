"""Transformers' ``generate`` for models whose forward returns fused logits.

Two models, and one model with an adapter stream, are decoded by the same loop: that of
transformers, with its sampling options, beams, stop strings and streamers. This module adds λ. It
is parsed and checked once, stored per prompt before ``generate`` repeats rows, and passed to
``forward`` at every step. Policies that choose a stream for a whole response are handled by
:mod:`flexalign.generation.policies`, which calls the same ``generate`` for each phase.
"""

import copy
import inspect
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedTokenizerBase

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError
from flexalign.fusion import as_gate
from flexalign.generation.confidence import LogProbRecorder, RowTracker
from flexalign.generation.inherited import InheritedMethods, refuse_inner_outputs
from flexalign.generation.interface import DialModel
from flexalign.generation.policies import chooses_stream, generate_with_policies
from flexalign.generation.row_lambdas import RowDials, TagTokens, read_dials
from flexalign.lambdas import Adaptive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
_REPEATING = ("num_beams", "num_return_sequences")
_OPTIONAL = ("position_ids", "logits_to_keep")
"""Inputs that the forward of some families does not take."""


class FusedDecoding(InheritedMethods, GenerationMixin, DialModel):  # type: ignore[misc]
    """`generate` with a λ, for a module whose ``forward`` returns fused logits.

    ``forward`` must take ``lam``, ``gate`` and ``lam_checked`` (λ has been checked already). A
    subclass defines which transformers model leads (its configuration, and how it prepares inputs),
    the default λ, the other inputs of its forward, and the methods for caches of
    :class:`~flexalign.generation.interface.DialModel`.

    Attributes:
        tokenizer: The models' tokenizer; None if it is not known.
    """

    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    @abstractmethod
    def _leader(self) -> "PreTrainedModel":
        """The model whose configuration is used, and which prepares the inputs."""

    @abstractmethod
    def _default_dial(self) -> Any:
        """Return the λ for calls that give none."""

    @abstractmethod
    def _decoding_inputs(self, dials: RowDials, options: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of ``forward`` besides λ, such as a cache, for these prompts."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        lam: Any = None,
        policy: Any = None,
        gate: float | None = None,
        **options: Any,
    ) -> Any:
        """Generate as transformers does, each prompt with its own λ.

        Args:
            inputs: Prompts, shape ``(B, T)``, left padded; or ``input_ids`` among the options.
            lam: A number, a schedule over the generated token's index (from 0), a policy, a list
                with one of these for each prompt, or a tensor ``(B,)``, or ``(B, K)`` with λ by
                generated token. By default the model's default λ. Also the
                :class:`~flexalign.generation.row_lambdas.RowDials` of the prompts, which are not
                checked again.
            policy: Another name of ``lam``, for policies. For ``Adaptive``, ``Exit`` and ``Route``, a stream
                is chosen for each row (see :class:`flexalign.generation.policies.RoutedOutput`).
            gate: As in :func:`flexalign.fusion.fuse`.
            **options: The options of transformers' ``generate``, except assisted decoding and
                caches other than the dynamic one.

        Returns:
            As transformers' ``generate``; with a policy and ``return_dict_in_generate``, a
            ``RoutedOutput``.

        Raises:
            LambdaError: If a λ is not finite, or their number is not that of the prompts.
            ConfigError: If an option is not available here, or the gate is outside [0, 1].
        """
        if lam is not None and policy is not None:
            raise ConfigError("give lam or policy, not both: they are two names of one dial.")
        if inputs is not None:
            options["input_ids"] = inputs
        ids = options.get("input_ids")
        prompts = ids if ids is not None else options.get("inputs_embeds")
        if prompts is None:
            raise ConfigError("generate needs input_ids: the prompts, shape (B, T).")
        if gate is not None:
            as_gate(gate)

        # λ is parsed and checked only here.
        given = policy if lam is None else lam
        given = self._default_dial() if given is None else given
        if isinstance(given, RowDials):
            dials = given
        elif isinstance(given, Tensor):
            dials = RowDials.of(given, len(prompts))
        else:
            per_prompt = read_dials(given, len(prompts))
            if chooses_stream(per_prompt):
                return generate_with_policies(self, per_prompt, gate, options)
            dials = RowDials.following(per_prompt)

        self.check_options(options)
        _leave_cache_unnamed(options)
        options |= self._decoding_inputs(dials, options)
        return GenerationMixin.generate(
            self,
            dials=dials,
            dial_rows=torch.arange(len(prompts)),  # generate repeats these as it repeats rows
            prompt_tokens=0 if ids is None else ids.shape[1],
            tags=self.tag_tokens(options) if dials.follow_thinking else None,
            gate=gate,
            **options,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *,
        dials: RowDials,
        dial_rows: Tensor,
        prompt_tokens: int,
        tags: TagTokens | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs that the leading model prepares, and each row's λ for the next token."""
        index = max(0, input_ids.shape[1] - prompt_tokens)
        lam = dials.at(dial_rows, index, input_ids, tags)
        prepared: dict[str, Any] = self._leader.prepare_inputs_for_generation(
            input_ids, lam=lam, lam_checked=True, inputs_embeds=inputs_embeds, **kwargs
        )
        return prepared

    @property
    def thinking_tags(self) -> ThinkingTags | None:
        """The model's thinking tags; None if its tokenizer's are used."""
        return None

    def threshold(self, policy: Adaptive) -> float:
        """Return the smallest confidence that an adaptive policy accepts."""
        return policy.resolved_threshold()

    def generation_option(self, name: str, options: dict[str, Any]) -> Any:
        """Return an option of ``generate``, given directly or in a generation config."""
        configs = (options.get("generation_config"), self.generation_config)
        given = [options.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in given if value is not None), None)

    def check_options(self, options: dict[str, Any]) -> None:
        """Refuse options of ``generate`` that fused models cannot serve.

        Raises:
            ConfigError: If there is one.
        """
        for name in _ASSISTED:
            if self.generation_option(name, options):
                raise ConfigError(
                    f"assisted decoding ({name}) is not available for fused models: the drafts "
                    "would have to be verified in both; leave it out."
                )

        cache = self.generation_option("cache_implementation", options)
        if cache not in (None, "hybrid", "dynamic"):
            raise ConfigError(
                f"cache_implementation={cache!r} is not available for fused models, which build "
                "their own dynamic cache; leave it out."
            )

        if self.generation_option("guidance_scale", options) not in (None, 1.0):
            raise ConfigError(
                "guidance_scale is not available for fused models: its pass without the prompt "
                "would run at the default λ; leave it out."
            )

        inner = ("output_hidden_states", "output_attentions")
        refuse_inner_outputs({name: self.generation_option(name, options) for name in inner})

    def pad_token(self, options: dict[str, Any]) -> int:
        """Return the token that responses are padded with, as transformers chooses it."""
        for name in ("pad_token_id", "eos_token_id"):
            token = self.generation_option(name, options)
            if token is not None:
                return int(torch.as_tensor(token).flatten()[0])
        return 0

    def require_tokenizer(self, purpose: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the options, or else the model's.

        Args:
            purpose: What needs the tokenizer, for the message.
            options: The options of ``generate``.

        Raises:
            ConfigError: If there is none.
        """
        tokenizer = options.get("tokenizer") or self.tokenizer
        if tokenizer is None:
            raise ConfigError(f"{purpose} needs the tokenizer: pass tokenizer=….")
        return tokenizer

    def tag_tokens(self, options: dict[str, Any]) -> TagTokens:
        """Return the tokens of the thinking tags, which some schedules follow.

        Args:
            options: The options of ``generate``.

        Raises:
            ConfigError: If the tokenizer is not known, the prompt comes in parts, or a tag cannot
                be found in token ids.
        """
        tokenizer = self.require_tokenizer("a thinking schedule", options)
        if self.generation_option("prefill_chunk_size", options):
            raise ConfigError("a thinking schedule needs the prompt whole; no prefill_chunk_size.")
        return TagTokens(tokenizer, self.thinking_tags or ThinkingTags.of(tokenizer))

    def _repeats(self, options: dict[str, Any]) -> int:
        """Return how many rows ``generate`` makes of each prompt."""
        return max(self.generation_option(name, options) or 1 for name in _REPEATING)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Put a recorder before all other processors, so that it gets the model's distribution."""
        processors = super()._get_logits_processor(*args, **kwargs)
        processors.sort(key=lambda processor: not isinstance(processor, LogProbRecorder))
        return processors

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        """Give each tracker the stopping criteria, of which it uses those that end a response."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for tracker in criteria:
            if isinstance(tracker, RowTracker):
                tracker.use_ends(criteria)
        return criteria


def _leave_cache_unnamed(options: dict[str, Any]) -> None:
    """Remove the name of the dynamic cache, in place: transformers takes no cache beside a name."""
    options.pop("cache_implementation", None)
    config = options.get("generation_config")
    if config is not None and config.cache_implementation is not None:
        options["generation_config"] = config = copy.copy(config)
        config.cache_implementation = None


def forward_inputs(model: Any) -> frozenset[str]:
    """Return the names of the inputs that a model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def taken_inputs(given: Mapping[str, Any], takes: Collection[str]) -> dict[str, Any]:
    """Return inputs without the positions and the ``logits_to_keep`` that a forward does not take.

    Args:
        given: The inputs by name.
        takes: What :func:`forward_inputs` returns for the model.
    """
    return {name: value for name, value in given.items() if name not in _OPTIONAL or name in takes}


def positions_of(attention_mask: Tensor) -> Tensor:
    """Return position ids (B, T), counted from each row's first unmasked token as in ``generate``."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
