"""What a fused model does with the methods of transformers' models.

A fused model has one forward over two streams or two models. Most methods of
``transformers.PreTrainedModel`` and ``GenerationMixin`` were written for one model. A method that
would act on a part of the whole, or ignore λ, is refused by name. The others act on the whole, or
return a fact about the leading model, which is the same for the whole.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from flexalign.errors import ConfigError

_BATCHING = "continuous batching has no λ; use generate, or flexalign serve for many requests"
_PEFT = "a PEFT adapter would change every stream; put it on the base, merge it, and load that"
_EMBEDDINGS = "an adapter and its base were made for each other; change the base before"
_GRADIENTS = "a fused model is trained by flexalign adapt and realign, which see to it"
_ENCODER = "the models are decoders"
_LOADING = "the parts are loaded one by one; this belongs to loading one model"
_SAVING = "the parts are saved one by one, by their own save_pretrained"
_REMOTE = "the class is part of this library and not of a checkpoint"
_COMPILING = "the streams have caches of their own, which are not compiled"

REFUSED: dict[str, str] = {
    "generate_batch": _BATCHING,
    "continuous_batching_context_manager": _BATCHING,
    "init_continuous_batching": _BATCHING,
    "load_custom_generate": "a custom generate would not know λ",
    "push_to_hub": "it would upload one part; save the adapter with save_pretrained and upload "
    "that folder, with `hf upload`",
    "add_adapter": _PEFT,
    "load_adapter": _PEFT,
    "set_adapter": _PEFT,
    "delete_adapter": _PEFT,
    "disable_adapters": _PEFT,
    "enable_adapters": _PEFT,
    "active_adapters": _PEFT,
    "get_adapter_state_dict": _PEFT,
    "enable_peft_hotswap": _PEFT,
    "resize_token_embeddings": _EMBEDDINGS,
    "resize_position_embeddings": _EMBEDDINGS,
    "set_input_embeddings": _EMBEDDINGS,
    "set_output_embeddings": _EMBEDDINGS,
    "set_decoder": _EMBEDDINGS,
    "get_encoder": _ENCODER,
    "set_encoder": _ENCODER,
    "enable_input_require_grads": _GRADIENTS,
    "disable_input_require_grads": _GRADIENTS,
    "dequantize": "load the model de-quantised",
    "get_compiled_call": _COMPILING,
    "set_use_kernels": "load the base with the kernels that it is to use",
    "set_experts_implementation": "load the base with the implementation that it is to use",
    "register_for_auto_class": _REMOTE,
    "add_model_tags": "the cards of adapters and students have their tags already",
    "post_init": _LOADING,
    "init_weights": _LOADING,
    "initialize_weights": _LOADING,
    "init_parallel_plans": _LOADING,
    "mark_tied_weights_as_initialized": _LOADING,
    "get_init_context": _LOADING,
    "maybe_distribute_model": _LOADING,
    "prepare_distribute_model": _LOADING,
    "retrieve_modules_from_names": _LOADING,
    "save_distributed_checkpoint": _SAVING,
    "gather_sharded_state_dict_for_save": _SAVING,
    "barrier_after_gathered_checkpoint_save": _SAVING,
    "should_save_on_this_rank": _SAVING,
}
"""The methods that are refused, and what to do instead."""


def _refusal(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(f"{type(self).__name__}.{name} is not available: {REFUSED[name]}.")

    refuse.__name__ = name
    refuse.__doc__ = f"Not available: {REFUSED[name]}."
    return refuse


class _RefusedMethods:
    """Every method of :data:`REFUSED`; each raises a ``ConfigError``."""


for _name in REFUSED:
    setattr(_RefusedMethods, _name, _refusal(_name))


class InheritedMethods(_RefusedMethods):
    """A mix-in for fused models: methods of transformers that act on the whole model."""

    num_parameters = PreTrainedModel.num_parameters
    get_memory_footprint = PreTrainedModel.get_memory_footprint
    get_parameter_or_buffer = PreTrainedModel.get_parameter_or_buffer
    named_non_persistent_buffers = PreTrainedModel.named_non_persistent_buffers

    loss_function: Any
    """The leading model's loss of logits and labels."""

    @abstractmethod
    def set_checkpointing(self, method: str, *args: Any, **options: Any) -> None:
        """Call a method that switches activation checkpointing on or off, on every part.

        Args:
            method: Its name in ``PreTrainedModel``.
            *args: Its arguments.
            **options: Its named arguments.
        """

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Recompute activations in the backward pass; arguments are those of transformers."""
        self.set_checkpointing("gradient_checkpointing_enable", *args, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.set_checkpointing("gradient_checkpointing_disable")

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Recompute activations in the backward pass; arguments are those of transformers."""
        self.set_checkpointing("activation_checkpointing_enable", *args, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self.set_checkpointing("activation_checkpointing_disable")

    def fused_output(
        self,
        logits: Tensor,
        cache: Any,
        labels: Tensor | None,
        return_dict: bool | None,
    ) -> Any:
        """Return the result of a forward in the form that the caller asks for.

        Args:
            logits: Fused logits, shape ``(B, T, V)``.
            cache: The cache, or None.
            labels: Shape ``(B, T)``, −100 where nothing is counted; None for no loss.
            return_dict: False for a tuple.

        Raises:
            ConfigError: If only some positions have logits, and labels are given.
        """
        loss = None
        if labels is not None:
            if logits.shape[:2] != labels.shape:
                raise ConfigError(
                    f"labels have shape {tuple(labels.shape)} and the logits "
                    f"{tuple(logits.shape[:2])}; leave out logits_to_keep, or labels."
                )
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])

        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output


def refuse_inner_outputs(options: dict[str, Any], config: Any = None) -> None:
    """Refuse hidden states and attentions, of which a fused model has two of each.

    Args:
        options: The arguments of a forward or of ``generate``.
        config: The leading model's configuration, which may ask for them too.

    Raises:
        ConfigError: If they are asked for.
    """
    for name in ("output_hidden_states", "output_attentions"):
        if options.get(name) or (name not in options and getattr(config, name, False)):
            raise ConfigError(
                f"{name} is not available for fused models, which have two of each; "
                "run the models one by one for them."
            )
