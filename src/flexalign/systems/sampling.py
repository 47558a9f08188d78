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
from collections.abc import Callable, Mapping, Sequence
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
from flexalign.errors import ConfigError, DataError
from flexalign.generation.responses import generate_responses
from flexalign.lambdas import Policy, Setting
from flexalign.models.loading import known_fingerprint
from flexalign.models.prompted import TwoPrompts, prompted_messages, without_system
from flexalign.models.sources import resolve
from flexalign.systems.endpoint import EndpointBackend
from flexalign.systems.local import LocalBackend
from flexalign.systems.open import System, SystemOptions, open_backend, parse_system

if TYPE_CHECKING:
    from datasets import Dataset

_KINDS = ("model", "dial", "pair", "prompts", "url")

_INSTEAD = {
    **{
        name: f"settings.{name} says it"
        for name in ("max_new_tokens", "temperature", "top_p", "batch_size", "logits")
    },
    "template": "prompting.template says it",
    "gate": "they are sampled without a gate",
    "tokenizer": "their tokens are those that a server counts",
}
"""Options of systems that sampling does not read, each with the reason."""


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
    columns: Mapping[str, str] | None = None,
    lam: object = None,
    progress: Callable[[int], None] | None = None,
) -> TraceSummary:
    """Answer prompts and write the responses, in the form that `load_traces` reads.

    Args:
        system: A model's folder or known name, ``model:PATH``, ``dial:BASE,ADAPTER``,
            ``pair:REF,ALIGNED``, ``prompts:MODEL`` or ``url:http://…``.
        prompts: A file or a saved data set, as `load_prompts` takes it.
        output: The JSONL file to write or to continue.
        settings: How responses are sampled; if not given, one for each prompt at temperature 1.
        options: How the system is run: ``dtype`` of a model on this machine; ``model_name``,
            ``api_key``, ``concurrency``, ``timeout_seconds`` and ``attempts`` of a server;
            ``prompts`` of ``prompts:MODEL``. What `settings` and `prompting` say is refused here.
        prompting: A system message for prompts that have none, and, for a model on this machine,
            arguments of the chat template; the rows keep what they were sampled with.
        limit: Take only this many prompts, the first ones.
        skip_bad_rows: Leave out rows that cannot be used.
        columns: The file's own names for fields, such as ``{"problem": "query"}``.
        lam: λ of a dial, a pair or two prompts, a number or a schedule; the system's default if not
            given. Of two prompts, the rows keep the prompt without the two prompts' own system
            messages, and the reference's template arguments: what a student is asked.
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
        columns=columns,
        lam=lam,
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
        columns: Mapping[str, str] | None = None,
        lam: object = None,
    ) -> None:
        """Open the system and read the prompts. No weights are loaded and nothing is written."""
        self.settings = settings or SamplingSettings()
        self._output = Path(output)
        prompting = prompting or PromptSettings()
        self._generator = _open_generator(
            _system_of(system), self.settings, options, prompting, lam
        )

        loaded = load_prompts(prompts, skip_bad_rows=skip_bad_rows, columns=columns)
        self.prompts: Dataset = prompting.apply(loaded)
        if limit is not None:
            self.prompts = self.prompts.select(range(min(limit, len(self.prompts))))
        if isinstance(self._generator, _SampledModel):
            self.prompts = self._generator.asked(self.prompts)
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

    rendering: dict[str, Any] | None

    @property
    def source(self) -> dict[str, Any]: ...

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
    lam: object,
) -> _Generator:
    if system.kind not in _KINDS:
        raise ConfigError(
            f"{system.name}: traces are sampled from models or from a server; give model:PATH, "
            "dial:BASE,ADAPTER, pair:REF,ALIGNED, prompts:MODEL or url:http://…."
        )
    if lam is not None and system.kind in ("model", "url"):
        raise ConfigError(
            f"{system.name} is sampled as it is; λ is for an adapter, a pair or two prompts."
        )
    asked = [] if lam is None else [Setting.of(lam)]

    options = options or SystemOptions()
    _refuse_unread(system, options)
    options = replace(
        options,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        logits=settings.logits,
        batch_size=settings.batch_size,
    )

    if system.kind not in ("model", "url"):
        # Of two prompts the arguments are both prompts', and must be bound before those of each
        # side; a dial compares them with those of its training.
        options = replace(options, template=prompting.template or None)
    backend = open_backend(system, asked, options)
    if isinstance(backend, EndpointBackend):
        if prompting.template:
            raise ConfigError(
                "--template has no meaning with --endpoint; leave one of the two out."
            )
        return _SampledServer(backend, system, options)
    if isinstance(backend, LocalBackend):
        return _SampledModel(backend, system, options, prompting, asked, plain=settings.plain)
    raise ConfigError("traces are sampled by the local engine, or from a server; leave engine out.")


def _refuse_unread(system: System, options: SystemOptions) -> None:
    """Refuse options that have no effect on sampling, if they differ from their defaults.

    Raises:
        ConfigError: If there is one.
    """
    unchanged = SystemOptions()
    refused = dict(_INSTEAD)
    if system.kind == "url":
        refused |= dict.fromkeys(
            ("dtype", "any_base", "lambda_range", "engine"), "a server has its own"
        )
    else:
        refused |= dict.fromkeys(("model_name", "api_key"), f"{system.name} is no server")
    if system.kind == "model":
        refused["lambda_range"] = f"{system.name} has no dial"
    for name, reason in refused.items():
        if getattr(options, name) != getattr(unchanged, name):
            raise ConfigError(f"options.{name} has no effect on traces: {reason}; leave it out.")


class _SampledModel:
    """A model on this machine."""

    def __init__(
        self,
        backend: LocalBackend,
        system: System,
        options: SystemOptions,
        prompting: PromptSettings,
        asked: Sequence[Setting],
        *,
        plain: bool,
    ) -> None:
        name = system.parts[0]
        self._backend, self._options = backend, options
        self._tokenizer = backend.text.tokenizer
        self.source: dict[str, Any] = {
            "model": name,
            "fingerprint": known_fingerprint(resolve(name)),
            "dtype": options.dtype,
        }

        # A plain model has no dial; of anything else the manifest says what it is and at which λ.
        self._dial: dict[str, Any] = {}
        if system.kind == "model":
            prompting.bind(self._tokenizer)
        else:
            if plain and options.prompts is not None:
                raise ConfigError(
                    "--plain has no meaning with two prompts: the text of a row would be one of "
                    "the two; leave it out."
                )

            (setting,) = asked or [backend.default]
            dial = setting.dial
            if dial is None or isinstance(dial, Policy):
                raise ConfigError(f"traces are sampled at one λ or a schedule, not {setting.id}.")
            self._dial = {"lam": dial}
            if options.prompts is not None:
                self.source["prompts"] = options.prompts.to_json()
            else:
                described = backend.describe()
                self.source["beside"] = described["parts"][1]
                if "renamed" in described:
                    self.source["renamed"] = described["renamed"]
            self.source["lambda"] = dial.to_json()

        self.rendering: dict[str, Any] | None = sampling_record(self._tokenizer)

    def asked(self, prompts: "Dataset") -> "Dataset":
        """Return the prompts as a student is asked: of two prompts, under the reference's.

        Raises:
            DataError: If a prompt cannot be rendered under both prompts, or is longer than the
                model's context.
        """
        if self._options.prompts is None:
            return prompts
        rows = prompts.to_list()
        for number, row in enumerate(rows, start=1):
            try:
                self._both(row["prompt"])
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error
            row["prompt"] = prompted_messages(self._options.prompts.reference, row["prompt"])
        return type(prompts).from_list(rows)

    def _both(self, prompt: Prompt) -> Prompt | TwoPrompts:
        """Render a conversation, with the reference's system message or without, for both sides."""
        return self._backend.text.prompt(self._bare(prompt))

    def _bare(self, prompt: Prompt) -> Prompt:
        if self._options.prompts is None or isinstance(prompt, str):
            return prompt
        return without_system(self._options.prompts.reference, prompt)

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Sequence[Sampled]:
        """Answer a batch of prompts; the first seed seeds the whole batch."""
        options = self._options
        return generate_responses(
            self._backend.model,
            self._tokenizer,
            [self._both(prompt) for prompt in prompts] if self._dial else prompts,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            logits=options.logits,
            batch_size=options.batch_size,
            seed=seeds[0],
            **self._dial,
        )

    def render(self, prompt: Prompt) -> str:
        """Return the text that the model gets; of two prompts, both."""
        if self._dial:
            return self._backend.render(self._bare(prompt))
        return prompt if isinstance(prompt, str) else plain_prompt(self._tokenizer, prompt)


class _SampledServer:
    """A server; it applies the chat template."""

    def __init__(self, backend: EndpointBackend, system: System, options: SystemOptions) -> None:
        self._backend, self._address, self._name = backend, system.parts[0], options.model_name
        self.rendering: dict[str, Any] | None = None

    @property
    def source(self) -> dict[str, Any]:
        """Its address and the model's name, for which the server is asked if none is given.

        Raises:
            ConfigError: If the server has not exactly one model.
            ServingError: If it cannot be asked.
        """
        # Not asked earlier: a dry run calls no server.
        name = self._name or self._backend.endpoint.model
        return {"endpoint": self._address, "model": name}

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Sequence[Sampled]:
        """Answer a batch, each prompt with its own seed."""
        return self._backend.endpoint.generate(prompts, seeds)

    def render(self, prompt: Prompt) -> str:
        """Return the prompt as it is sent."""
        return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
