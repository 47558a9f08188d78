"""What `flexalign sample` asks for responses: a model on this machine, or a server."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flexalign.data.client import Endpoint, EndpointResponse
from flexalign.data.prompting import PromptSettings
from flexalign.data.rendering import Prompt, plain_prompt
from flexalign.data.traces import SamplingSettings, sampling_record
from flexalign.errors import ConfigError

if TYPE_CHECKING:
    from flexalign.generation.responses import Response


class LocalModel:
    """A model on this machine. Its weights are loaded when the first response is asked for."""

    def __init__(
        self, name: str | None, dtype: str, settings: SamplingSettings, prompting: PromptSettings
    ) -> None:
        if name is None:
            raise ConfigError("name a MODEL, or a server with --endpoint and --model-name.")
        from flexalign.models.loading import fingerprint, load_tokenizer
        from flexalign.models.sources import resolve

        self._source = resolve(name)
        self._dtype = dtype
        self._settings = settings
        self._tokenizer = load_tokenizer(self._source)
        self.source = {"model": name, "fingerprint": fingerprint(self._source), "dtype": dtype}
        prompting.bind(self._tokenizer)
        self.rendering: dict[str, Any] | None = sampling_record(self._tokenizer)

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> "list[Response]":
        """Answer a batch; its first seed seeds it."""
        from flexalign.generation.responses import generate_responses

        settings = self._settings
        return generate_responses(
            self._model,
            self._tokenizer,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            batch_size=settings.batch_size,
            seed=seeds[0],
        )

    def render(self, prompt: Prompt) -> str:
        """The text that the model is given."""
        return prompt if isinstance(prompt, str) else plain_prompt(self._tokenizer, prompt)

    @cached_property
    def _model(self) -> Any:
        from flexalign.models.loading import load_model

        return load_model(self._source, dtype=self._dtype)


class Server:
    """A model behind a server; the server has the chat template."""

    def __init__(
        self,
        url: str,
        model: str | None,
        api_key: str | None,
        concurrency: int,
        settings: SamplingSettings,
    ) -> None:
        if model is None:
            raise ConfigError("--endpoint needs --model-name, the model's name on that server.")
        self._endpoint = Endpoint(
            url,
            model,
            settings.max_new_tokens,
            settings.temperature,
            settings.top_p,
            concurrency=concurrency,
            api_key=api_key,
        )
        self.source = {"endpoint": url, "model": model}
        self.rendering: dict[str, Any] | None = None

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[EndpointResponse]:
        """Answer a batch, each prompt with its own seed."""
        return self._endpoint.generate(prompts, seeds)

    def render(self, prompt: Prompt) -> str:
        """The prompt as it is sent."""
        return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
