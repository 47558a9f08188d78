"""A plain model that vLLM runs, if vLLM is installed."""

from collections.abc import Collection, Hashable, Iterator, Sequence
from functools import cached_property
from typing import Any

from flexalign._packages import require_packages
from flexalign.errors import ConfigError
from flexalign.generation.thinking_limits import ClosingTokens
from flexalign.models.hub import note_weights
from flexalign.models.loading import fingerprint, load_tokenizer
from flexalign.models.sources import resolve
from flexalign.systems.local import ModelText
from flexalign.systems.open import Answer, Asked, Failure, Messages, Request, SystemOptions


class VllmBackend:
    """A model without a dial; vLLM forms the batches."""

    def __init__(self, path: str, options: SystemOptions) -> None:
        """Find the model; the engine starts with the first sample.

        Raises:
            ConfigError: If vLLM is not installed, the model is a GGUF file or a PEFT adapter, the end of
                the thinking is biased, or the thinking has a budget and no tags.
        """
        options.logits.refuse_thinking_limits("--engine vllm", ("end_of_thinking_bias",))
        require_packages(
            "--engine vllm",
            "vllm",
            install="'flexalign[vllm]', or leave --engine out, or serve the model elsewhere and "
            "give url:http://….",
        )
        self._source = resolve(path)
        if self._source.gguf_file is not None or self._source.is_adapter:
            raise ConfigError(
                f"{path} is no whole model in safetensors, which --engine vllm needs; merge the "
                "adapter or save the model first."
            )
        note_weights(self._source.path)
        self._options = options
        tokenizer = load_tokenizer(self._source)
        if options.logits.limits_thinking:
            ClosingTokens.of(tokenizer)  # raises if the thinking has no end to be found
        self._text = ModelText(tokenizer)

    def describe(self) -> dict[str, Any]:
        """Return name, fingerprint, data type and thinking tags."""
        tags = self._text.tags
        return {
            "kind": "model",
            "engine": "vllm",
            "parts": [{"name": str(self._source), "fingerprint": fingerprint(self._source)}],
            "dtype": self._options.dtype,
            "thinking_tags": [tags.open, tags.close],
        }

    def render(self, messages: Messages) -> str:
        """Return the prompt as text, as the model gets it."""
        return self._text.render(messages)

    def run(
        self, requests: Sequence[Asked], done: Collection[Hashable]
    ) -> Iterator[list[tuple[Asked, Answer | Failure]]]:
        """Answer the requests that are not done, `batch_size` at a time, so that each is saved early."""
        missing = [request for request in requests if request.key not in done]
        size = max(1, self._options.batch_size)
        for start in range(0, len(missing), size):
            block = missing[start : start + size]
            yield list(zip(block, self._answer(block), strict=True))

    def release(self) -> None:
        """Free the weights."""
        self.__dict__.pop("_engine", None)

    def _answer(self, block: Sequence[Request]) -> list[Answer]:
        from vllm import SamplingParams

        options = self._options
        tokenizer = self._text.tokenizer
        has_template = bool(tokenizer.chat_template)
        limits = options.logits.to_json()  # by the names that vLLM has too
        limits |= {"logit_bias": dict(options.logits.logit_bias)} if "logit_bias" in limits else {}
        if "thinking_budget" in limits:
            limits["thinking_token_budget"] = limits.pop("thinking_budget")
        prompts, sampling = [], []
        for request in block:
            ids = tokenizer(self.render(request.messages), add_special_tokens=not has_template)[
                "input_ids"
            ]
            prompts.append({"prompt_token_ids": list(ids)})
            sampling.append(
                SamplingParams(
                    temperature=options.temperature,
                    top_p=options.top_p,
                    max_tokens=options.max_new_tokens,
                    seed=request.seed,
                    skip_special_tokens=False,  # thinking tags may be special
                    **limits,
                )
            )

        outputs = self._engine.generate(prompts, sampling, use_tqdm=False)
        return [
            self._read(request, output.outputs[0])
            for request, output in zip(block, outputs, strict=True)
        ]

    def _read(self, request: Request, output: Any) -> Answer:
        text = self._text.whole(request.messages, output.text)
        truncated = output.finish_reason == "length"
        written = len(output.token_ids) - (not truncated)  # the end token does not count
        return Answer(text, written, self._text.thinking_tokens(text), truncated=truncated)

    @cached_property
    def _engine(self) -> Any:
        from vllm import LLM

        tags, more = self._text.tags, {}
        if self._options.logits.thinking_budget is not None:
            # vLLM forces this text, and takes no shorter one for the thinking's own end. Therefore it
            # is the tag alone, without what the chat template writes after it.
            more["reasoning_config"] = {
                "reasoning_start_str": tags.open,
                "reasoning_end_str": tags.close,
            }
        return LLM(
            model=str(self._source.path),
            dtype=self._options.dtype,
            generation_config="vllm",
            **more,
        )
