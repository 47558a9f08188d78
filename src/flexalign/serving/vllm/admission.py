"""A malformed λ is refused when its request comes in: an error for that request alone.

vLLM 0.32's official place, ``LogitsProcessor.validate_params``, does not serve: passed by option,
a custom processor excludes speculation; found by entry point, it would check everybody's models,
and each model runner refuses the other one's class. This relies on ``SamplingParams.verify``
being called for every request, in the process that takes it, with the model's configuration.
"""

from functools import wraps
from typing import Any

from flexalign.errors import FlexAlignError
from flexalign.serving.vllm.settings import CONFIG_KEY, DialSettings

__all__ = ["install"]


def install() -> None:
    """Let vLLM check the λ of requests to a model with a dial. Twice is once."""
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

    from flexalign.serving.vllm.lambdas import LAMBDA_KEY, read_lambda

    try:
        read_lambda(extra_args, settings)
    except FlexAlignError as error:
        value = (extra_args or {}).get(LAMBDA_KEY)
        raise VLLMValidationError(str(error), parameter=LAMBDA_KEY, value=value) from error
