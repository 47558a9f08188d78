"""Traces for training: responses to prompts, sampled from a model or a server, as JSON Lines.

::

    from flexalign.data import SamplingSettings
    from flexalign.systems import sample

    sample("models/base", "questions.jsonl", "traces.jsonl", SamplingSettings(samples=4))
    sample("url:http://localhost:8000/v1", "questions.jsonl", "traces.jsonl")

The same call continues a run that was interrupted. The manifest beside the file records what the run
consists of (`flexalign.data.traces`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexalign.data.formats import load_prompts
from flexalign.data.prompting import PromptSettings
from flexalign.data.rendering import Prompt, plain_prompt
from flexalign.data.traces import (
    Sampled,
    SamplingSettings,
    TraceSummary,
    make_traces,
    open_run,
    sampling_record,
)
from flexalign.errors import ConfigError
from flexalign.generation.responses import generate_responses
from flexalign.models.loading import fingerprint
from flexalign.models.sources import resolve
from flexalign.systems.endpoint import EndpointBackend
from flexalign.systems.local import LocalBackend
from flexalign.systems.open import System, SystemOptions, open_backend, parse_system

if TYPE_CHECKING:
    from datasets import Dataset

_KINDS = ("model", "url")


def sample(
    system: str | Path | System,
    prompts: str | Path,
    output: str | Path,
    settings: SamplingSettings | None = None,
    *,
    options: SystemOptions | None = None,
    prompting: PromptSettings | None = None,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    progress: Callable[[int], None] | None = None,
) -> TraceSummary:
    """Answer prompts and write the responses, in the form that `load_traces` reads.

    Args:
        system: A model's folder or known name, ``model:PATH``, or ``url:http://…``.
        prompts: A file or a saved data set, as `load_prompts` takes it.
        output: The JSONL file to write or to continue.
        settings: How responses are sampled; if not given, one for each prompt at temperature 1.
        options: How the system is run: ``dtype`` of a model on this machine; ``model_name``,
            ``api_key``, ``concurrency``, ``timeout_seconds`` and ``attempts`` of a server.
        prompting: A system message for prompts that have none, and, for a model on this machine,
            arguments of the chat template; the rows keep what they were sampled with.
        limit: Take only this many prompts, the first ones.
        skip_bad_rows: Leave out rows that cannot be used.
        progress: Called with the number of rows in the file after each batch.

    Returns:
        A summary of the finished file.

    Raises:
        ConfigError: If the system does not exist, or the file belongs to another run.
        DataError: If prompts cannot be read, or a row of the file is damaged.
        ServingError: If a server cannot be used.
    """
    run = SampleRun(
        system,
        prompts,
        output,
        settings,
        options=options,
        prompting=prompting,
        limit=limit,
        skip_bad_rows=skip_bad_rows,
    )
    return run.finish(progress)


class SampleRun:
    """A run of :func:`sample`, checked but not begun; the arguments are the same.

    Attributes:
        settings: How responses are sampled.
        prompts: The prompts.
        total: Rows of the finished file.
        done: Rows that the file has already; 0 before :meth:`begin`.
    """

    def __init__(
        self,
        system: str | Path | System,
        prompts: str | Path,
        output: str | Path,
        settings: SamplingSettings | None = None,
        *,
        options: SystemOptions | None = None,
        prompting: PromptSettings | None = None,
        limit: int | None = None,
        skip_bad_rows: bool = False,
    ) -> None:
        """Open the system and read the prompts. No weights are loaded and nothing is written."""
        self.settings = settings or SamplingSettings()
        self._output = Path(output)
        prompting = prompting or PromptSettings()
        self._generator = _open_generator(_system_of(system), self.settings, options, prompting)

        loaded = load_prompts(prompts, skip_bad_rows=skip_bad_rows)
        self.prompts: Dataset = prompting.apply(loaded)
        if limit is not None:
            self.prompts = self.prompts.select(range(min(limit, len(self.prompts))))
        self.total = len(self.prompts) * self.settings.samples
        self.done = 0

    def preview(self, count: int) -> list[str]:
        """Return the first prompts as they will be sent."""
        return [self._generator.render(prompt) for prompt in self.prompts[:count]["prompt"]]

    def begin(self) -> int:
        """Write the manifest, or compare it with an existing one; return the number of rows done.

        Raises:
            ConfigError: If the file belongs to another run.
            DataError: If a row of it is damaged.
        """
        self.done = open_run(
            self.prompts,
            self._output,
            self.settings,
            self._generator.source,
            self._generator.rendering,
        )
        return self.done

    def finish(self, progress: Callable[[int], None] | None = None) -> TraceSummary:
        """Sample the missing rows; arguments, result and errors are those of :func:`sample`."""
        return make_traces(
            self.prompts,
            self._output,
            self._generator.generate,
            self.settings,
            done=self.begin(),
            progress=progress,
            render=self._generator.render,
            rendering=self._generator.rendering,
        )


class _Generator(Protocol):
    """A model or a server that answers prompts.

    Attributes:
        source: Its identity in a manifest.
        rendering: How its prompts are rendered; None if a server does it.
    """

    source: dict[str, Any]
    rendering: dict[str, Any] | None

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Sequence[Sampled]:
        """Answer a batch of prompts; there is a seed for each prompt."""

    def render(self, prompt: Prompt) -> str:
        """Return the prompt as text, as it is sent."""


def _system_of(given: str | Path | System) -> System:
    if isinstance(given, System):
        return given
    if isinstance(given, str) and given.startswith(tuple(f"{kind}:" for kind in _KINDS)):
        return parse_system(given)
    return System.of(str(given))


def _open_generator(
    system: System,
    settings: SamplingSettings,
    options: SystemOptions | None,
    prompting: PromptSettings,
) -> _Generator:
    if system.kind not in _KINDS:
        raise ConfigError(
            f"{system.name}: traces are sampled from one model or from a server; give model:PATH "
            "or url:http://…."
        )

    options = replace(
        options or SystemOptions(),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        batch_size=settings.batch_size,
    )

    backend = open_backend(system, options=options)
    if isinstance(backend, EndpointBackend):
        if prompting.template:
            raise ConfigError(
                "--template has no meaning with --endpoint; leave one of the two out."
            )
        return _SampledServer(backend, system, options)
    if isinstance(backend, LocalBackend):
        return _SampledModel(backend, system, options, prompting)
    raise ConfigError("traces are sampled by the local engine, or from a server; leave engine out.")


class _SampledModel:
    """A model on this machine."""

    def __init__(
        self,
        backend: LocalBackend,
        system: System,
        options: SystemOptions,
        prompting: PromptSettings,
    ) -> None:
        (name,) = system.parts
        self._backend, self._options = backend, options
        self._tokenizer = backend.text.tokenizer
        self.source = {
            "model": name,
            "fingerprint": fingerprint(resolve(name)),
            "dtype": options.dtype,
        }
        prompting.bind(self._tokenizer)
        self.rendering: dict[str, Any] | None = sampling_record(self._tokenizer)

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Sequence[Sampled]:
        """Answer a batch of prompts; the first seed seeds the whole batch."""
        options = self._options
        return generate_responses(
            self._backend.model,
            self._tokenizer,
            prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            batch_size=options.batch_size,
            seed=seeds[0],
        )

    def render(self, prompt: Prompt) -> str:
        """Return the text that the model gets."""
        return prompt if isinstance(prompt, str) else plain_prompt(self._tokenizer, prompt)


class _SampledServer:
    """A server; it applies the chat template."""

    def __init__(self, backend: EndpointBackend, system: System, options: SystemOptions) -> None:
        self._backend = backend
        # If no name is given, the server is asked for it: the manifest must name the model.
        name = options.model_name or backend.endpoint.model
        self.source = {"endpoint": system.parts[0], "model": name}
        self.rendering: dict[str, Any] | None = None

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Sequence[Sampled]:
        """Answer a batch, each prompt with its own seed."""
        return self._backend.endpoint.generate(prompts, seeds)

    def render(self, prompt: Prompt) -> str:
        """Return the prompt as it is sent."""
        return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
