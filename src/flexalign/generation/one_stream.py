"""A plain model for policies that need no dial: λ is taken and has no effect."""

from typing import Any

from torch import Tensor

from flexalign.errors import ConfigError
from flexalign.generation.adapted import BasedModel
from flexalign.generation.fused import forward_inputs, taken_inputs
from flexalign.generation.inherited import refuse_inner_outputs
from flexalign.generation.row_lambdas import RowDials
from flexalign.models.adapters import inner_model


class OneStreamModel(BasedModel):
    """A model of transformers that generates under exit policies.

    Every λ is answered by the model as it is. Its caches are those that its own ``generate`` makes.

    Attributes:
        base: The model, also of a PEFT wrapper. It is not copied or changed.
    """

    def __init__(self, base: Any, tokenizer: Any = None) -> None:
        """Wrap a model."""
        super().__init__(inner_model(base), tokenizer)
        self._takes = forward_inputs(self.base)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        lam: Any = None,
        gate: float | None = None,
        lam_checked: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the model's own output; λ has no effect.

        Args:
            input_ids: Shape ``(B, T)``.
            attention_mask: Shape ``(B, T)``, or ``(B, T_cached + T)`` with a cache.
            position_ids: As the model takes them, if it does.
            past_key_values: The cache of an earlier call.
            inputs_embeds: Embeddings instead of ``input_ids``, shape ``(B, T, H)``.
            use_cache: Keep keys and values.
            logits_to_keep: As in transformers, if the model takes it.
            lam: Ignored.
            gate: Must be None.
            lam_checked: Ignored.
            **kwargs: Other arguments of the model.

        Raises:
            ConfigError: If a gate is given, or hidden states or attentions are asked for.
        """
        if gate is not None:
            raise ConfigError("a gate needs a dial, and a plain model has none; leave it out.")
        refuse_inner_outputs(kwargs, self.base.config)
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        kwargs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        kwargs |= {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        kwargs |= {"use_cache": use_cache}
        given = {name: value for name, value in kwargs.items() if value is not None}
        return self.base(**taken_inputs(given, self._takes))

    def prefill_phases(
        self, input_ids: Tensor, attention_mask: Tensor, phases: Any, **inputs: Tensor
    ) -> None:
        """Return None: each generation runs its own prompts, so that every family's cache is right."""

    def fork_cache(self, cache: Any, rows: Tensor, dials: RowDials) -> Any:
        """Not available, as there is no prefilled cache.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("a plain model has no prefilled cache; generate runs the prompts.")

    def _default_dial(self) -> float:
        return 0.0

    def _decoding_inputs(self, dials: RowDials, options: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Create the cache that the model's own ``generate`` would: its family decides."""
        return self.base._prepare_cache_for_generation(*args, **kwargs)
