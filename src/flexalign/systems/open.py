"""What can be asked for answers, as users name it, and the one place where it is opened.

A :class:`System` is a name: of a model, a dial, a pair, weights between two models, or a server.
:func:`open_backend` finds all that belongs to it, checks it, and returns the backend that answers
for it; weights are loaded with its first answer.
"""

import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Protocol, TypeAlias, TypeVar

from flexalign.errors import ConfigError
from flexalign.lambdas import Setting
from flexalign.models.names import known_name

Messages: TypeAlias = list[dict[str, Any]] | str
"""A prompt: a conversation, or text that the model goes on from as it is."""

_FORM = re.compile(r"(?:(?P<name>[^:,]+)=)?(?P<kind>model|dial|pair|interpolate|url):(?P<rest>.+)")
_PARTS = {"model": 1, "dial": 2, "pair": 2, "interpolate": 2, "url": 1}


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        name: What results call it.
        kind: ``model``, ``dial``, ``pair``, ``interpolate`` or ``url``.
        parts: Its models, or its address.
    """

    name: str
    kind: str
    parts: tuple[str, ...]

    @classmethod
    def of(cls, model: str, adapter: str | None = None, aligned: str | None = None) -> "System":
        """Make one of a model, its adapter or its aligned model, as options name them.

        Raises:
            ConfigError: If there are an adapter and an aligned model.
        """
        if adapter is not None and aligned is not None:
            raise ConfigError("give --adapter or --aligned, not both: each is a dial of its own.")
        if adapter is not None:
            return cls("dial", "dial", (model, adapter))
        if aligned is not None:
            return cls("pair", "pair", (model, aligned))
        return cls("model", "model", (model,))


def parse_system(text: str) -> System:
    """Read a system as the command line takes it.

    Example:
        >>> parse_system("mine=dial:models/base,out/fast")
        System(name='mine', kind='dial', parts=('models/base', 'out/fast'))

    Raises:
        ConfigError: If it is none.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{text!r} is no system; write model:PATH, dial:BASE,ADAPTER, pair:REF,ALIGNED, "
            "interpolate:REF,ALIGNED or url:http://…, with name= in front if you like"
            + (f" (such as model:{text})." if ":" not in text else ".")
        )
    kind, rest = match["kind"], match["rest"]

    parts = (rest,) if _PARTS[kind] == 1 else tuple(part.strip() for part in rest.split(","))
    if len(parts) == 1:
        entry, part = known_name(parts[0]) or (None, "")
        if entry is not None and not part:
            parts = entry.parts_of(kind) or parts
    if len(parts) != _PARTS[kind] or not all(parts):
        raise ConfigError(
            f"{text!r}: {kind} takes {_PARTS[kind]} models with a comma between, got {len(parts)}."
        )

    short = ",".join(parts if kind == "url" else [PurePath(part).name or part for part in parts])
    return System(match["name"] or f"{kind}:{short}", kind, parts)


def parse_systems(texts: Sequence[str]) -> list[System]:
    """Read several systems, each of which needs a name of its own.

    Raises:
        ConfigError: If one is none, or two have one name.
    """
    systems = [parse_system(text) for text in texts]
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two systems are called {name!r}; put a name in front, such as first={texts[0]}."
            )
    return systems


@dataclass(frozen=True)
class SystemOptions:
    """How systems are run.

    Attributes:
        temperature: 0 is greedy.
        top_p: Probability mass sampled from.
        max_new_tokens: Tokens after which a response is cut off.
        batch_size: Responses made together on this machine.
        gate: As in :func:`flexalign.fusion.fuse`.
        dtype: Of weights on this machine.
        lambda_range: λ's to permit; an adapter's own range if not given, λ ≥ 0 for a pair.
        any_base: Take an adapter for another base than it was made for, if the shapes fit.
        model_name: The model's name at an endpoint; its only one if not given.
        tokenizer: Of an endpoint's model, to count tokens where the server does not.
        concurrency: Requests under way at an endpoint at one time.
        timeout_seconds: Longest wait for one response of an endpoint.
        attempts: Tries per request.
        pause_seconds: The first pause between tries; it doubles with each.
        api_key: Of an endpoint.
        engine: ``local`` or ``vllm``, for plain models.
        template: Arguments of the chat template, for what is on this machine.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 16_384
    batch_size: int = 32
    gate: float | None = None
    dtype: str = "auto"
    lambda_range: tuple[float, float] | None = None
    any_base: bool = False
    model_name: str | None = None
    tokenizer: str | None = None
    concurrency: int = 8
    timeout_seconds: float = 1800.0
    attempts: int = 5
    pause_seconds: float = 1.0
    api_key: str | None = None
    engine: str = "local"
    template: Mapping[str, Any] | None = None


class Request(Protocol):
    """One answer that is asked for."""

    @property
    def key(self) -> Hashable:
        """What tells it from all other requests of a run."""

    @property
    def label(self) -> str:
        """How messages call it."""

    @property
    def prompt(self) -> Hashable:
        """What tells its prompt from the others."""

    @property
    def messages(self) -> Messages:
        """The prompt as it is put."""

    @property
    def setting(self) -> Setting:
        """The dial."""

    @property
    def sample(self) -> int:
        """Which of the prompt's samples, from 0."""

    @property
    def seed(self) -> int:
        """Of its sampling."""


Asked = TypeVar("Asked", bound=Request)


@dataclass(frozen=True)
class PromptRequest:
    """A :class:`Request` of one of several prompts, by its place among them.

    Attributes:
        prompt: The prompt's place, from 0.
        messages: The prompt as it is put.
        setting: The dial.
        sample: Which of the prompt's samples, from 0.
        seed: Of its sampling.
    """

    prompt: int
    messages: Messages
    setting: Setting
    sample: int
    seed: int

    @property
    def key(self) -> tuple[int, str, int]:
        """What tells it from the others."""
        return self.prompt, self.setting.id, self.sample

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"prompt {self.prompt + 1}"


@dataclass(frozen=True)
class Answer:
    """One response.

    Attributes:
        text: The response; with the opening thinking tag, also where that stood in the prompt.
        tokens: Tokens written, rejected ones included, without the one that ends it.
        thinking_tokens: Those between the thinking tags; None where that is not known.
        rejected_tokens: Those of an answer that a policy did not accept.
        truncated: Whether the limit on tokens cut it off.
        route: Which way a policy took, ``fast`` or ``slow``.
        confidence: How sure a policy was of the fast answer.
    """

    text: str
    tokens: int
    thinking_tokens: int | None = None
    rejected_tokens: int = 0
    truncated: bool = False
    route: str | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class Failure:
    """Why there is no response."""

    reason: str


class Backend(Protocol):
    """A system, ready to be asked. Weights are loaded when the first answer is made."""

    def describe(self) -> dict[str, Any]:
        """What identifies it in results: names, fingerprints, thinking tags."""

    def render(self, messages: Messages) -> str:
        """The prompt as it is sent."""

    def run(
        self, requests: Sequence[Asked], done: Collection[Hashable]
    ) -> Iterator[list[tuple[Asked, Answer | Failure]]]:
        """Answer what is missing of the requests, and yield answers as they are made.

        Args:
            requests: All requests of the run; how they are batched follows from them alone.
            done: Keys of those that are answered already.

        Raises:
            ServingError: If a server cannot be used at all.
        """

    def release(self) -> None:
        """Let go of what it has loaded, for the next system."""


def open_backend(
    system: System, settings: Sequence[Setting] = (), options: SystemOptions | None = None
) -> Backend:
    """Find and check all that a system needs; weights are loaded with its first answer.

    Args:
        system: What is opened.
        settings: What it will be asked at, checked against the range that is permitted.
        options: How it is run.

    Raises:
        ConfigError: If a part is not there, or the engine does not serve its kind.
        CheckpointError: If a part is damaged.
        LambdaError: If a λ is outside the permitted range.
    """
    options = options or SystemOptions()
    if options.template and (system.kind == "url" or options.engine == "vllm"):
        raise ConfigError(
            f"{system.name}: --template is for what the local engine renders; give the server its "
            "own, such as vLLM's --default-chat-template-kwargs."
        )
    if system.kind == "url":
        from flexalign.systems.endpoint import EndpointBackend

        return EndpointBackend(system.parts[0], options)

    if options.engine == "vllm":
        if system.kind != "model":
            raise ConfigError(
                f"{system.name}: --engine vllm runs plain models (model:PATH) alone; leave it out, "
                "or serve the dial and give url:http://…."
            )
        from flexalign.systems.vllm import VllmBackend

        return VllmBackend(system.parts[0], options)

    from flexalign.systems.local import LocalBackend

    return LocalBackend(system, settings, options)
