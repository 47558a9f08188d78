"""What a model with a dial is not served with: each refused, in one sentence, while it loads."""

from typing import Any

from flexalign.errors import UnsupportedModelError

__all__ = ["refuse_unsupported"]

_SPECULATION = ("ngram",)


def refuse_unsupported(vllm_config: Any) -> None:
    """Refuse a configuration of vLLM with which answers could be wrong.

    Raises:
        UnsupportedModelError: Names the setting and what to do.
    """
    for refused, what, instead in _refusals(vllm_config):
        if refused:
            raise UnsupportedModelError(
                f"a model with a dial is not served with {what}; {instead}."
            )


def _refusals(config: Any) -> list[tuple[bool, str, str]]:
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    speculation = config.speculative_config
    exact_caches = ("auto", str(model.dtype).removeprefix("torch."))
    hf_config = model.hf_config
    return [
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism, as both streams meet before the head",
            "use --tensor-parallel-size",
        ),
        (
            parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1,
            "context parallelism, where a process does not see all tokens of the batch",
            "use --tensor-parallel-size",
        ),
        (
            parallel.use_ubatching,
            "batches that are run in two halves (--enable-dbo)",
            "leave that out",
        ),
        (
            config.lora_config is not None,
            "LoRA, whose table of tokens knows one stream alone",
            "leave out --enable-lora; merge the LoRA into the base before its adapter is trained",
        ),
        (
            model.quantization is not None,
            f"quantised weights ({model.quantization})",
            "leave out --quantization",
        ),
        (
            cache.cache_dtype not in exact_caches,
            f"a quantised KV cache ({cache.cache_dtype}), whose scales are one stream's",
            "leave out --kv-cache-dtype",
        ),
        (
            speculation is not None and speculation.method not in _SPECULATION,
            f"speculation by {getattr(speculation, 'method', None)}, which would draft from one λ's "
            "hidden states or was not tried",
            "use the method ngram",
        ),
        (
            model.enable_prompt_embeds,
            "embeddings as prompts (--enable-prompt-embeds)",
            "leave that out",
        ),
        (
            model.runner_type != "generate",
            f"the runner {model.runner_type}, as a dial chooses tokens",
            "use --runner generate",
        ),
        (
            getattr(hf_config, "dual_chunk_attention_config", None) is not None,
            "dual chunk attention",
            "take dual_chunk_attention_config out of the base's config.json",
        ),
        (
            not getattr(hf_config, "is_causal", True),
            "attention that is not causal",
            "give a causal language model",
        ),
    ]
