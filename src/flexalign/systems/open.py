"""Systems as users name them, and how they are opened.

A :class:`System` names a model, a dial, a scaled LoRA, a pair, one model under two prompts, weights
between two models, or a server.
:func:`open_backend` finds and checks its parts and returns the backend that answers for it; weights
are loaded at the first answer.
"""

import re
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from flexalign._spelling import nearest
from flexalign.data.logits import LogitsSettings
from flexalign.data.prompting import PromptSettings, parse_prompt
from flexalign.errors import ConfigError
from flexalign.lambdas import Exit, Ladder, Setting, ladder_refused
from flexalign.models.names import known_name

if TYPE_CHECKING:
    from flexalign.models.prompted import PromptPair

Messages: TypeAlias = list[dict[str, Any]] | str
"""A prompt: a conversation, or text that the model continues without a chat template."""

_FORM = re.compile(
    r"(?:(?P<name>[^:,]+)=)?(?P<kind>model|dial|lora|pair|prompts|interpolate|url):(?P<rest>.+)"
)
_PARTS = {
    "model": 1,
    "dial": 2,
    "lora": 2,
    "pair": 2,
    "prompts": 1,
    "interpolate": 2,
    "url": 1,
}


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        name: Its name in results.
        kind: ``model``, ``dial``, ``lora``, ``pair``, ``prompts``, ``interpolate`` or ``url``.
        parts: Its models, or its address.
        prompt: Its own system message, which a sweep puts into the questions, and its own arguments
            of the chat template.
        limits: Its own limits on the thinking, by the names of
            :class:`~flexalign.data.LogitsSettings`.
    """

    name: str
    kind: str
    parts: tuple[str, ...]
    prompt: PromptSettings = field(default_factory=PromptSettings, repr=False, hash=False)
    limits: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)

    @property
    def own(self) -> dict[str, Any]:
        """What it has of its own, as JSON: ``system``, ``template`` and the limits that are set."""
        told: dict[str, Any] = {}
        if self.prompt.system is not None:
            told["system"] = self.prompt.system
        if self.prompt.template:
            told["template"] = dict(self.prompt.template)
        return told | dict(self.limits)

    def options(self, shared: "SystemOptions") -> "SystemOptions":
        """Return the options of all systems with those of this one in their place.

        Raises:
            ConfigError: If a limit is out of its range, or there is a system message for two prompts.
        """
        if self.prompt.system is not None and self.kind == "prompts":
            raise ConfigError(
                f"{self.name}: a system message of its own would stand in both prompts; give it by "
                "--reference-prompt and --aligned-prompt."
            )
        template = {**(shared.template or {}), **self.prompt.template}
        logits = replace(shared.logits, **self.limits)
        return replace(shared, template=template or None, logits=logits)

    @property
    def has_two_models(self) -> bool:
        """Whether it is made of two whole models: a pair, or weights between them."""
        return self.kind in ("pair", "interpolate")

    @classmethod
    def of(
        cls,
        model: str,
        adapter: str | None = None,
        aligned: str | None = None,
        prompts: "PromptPair | None" = None,
    ) -> "System":
        """Make a system of a model and what its options give it: an adapter, an aligned model, prompts.

        Raises:
            ConfigError: If more than one of them is given.
        """
        if prompts is not None:
            if adapter is not None or aligned is not None:
                raise ConfigError(
                    "--reference-prompt and --aligned-prompt are a dial of one model; leave them "
                    f"out, or --{'adapter' if adapter is not None else 'aligned'}."
                )
            return cls("prompts", "prompts", (model,))
        if adapter is not None and aligned is not None:
            raise ConfigError("give --adapter or --aligned, not both: each is a dial of its own.")
        if adapter is not None:
            return cls("dial", "dial", (model, adapter))
        if aligned is not None:
            return cls("pair", "pair", (model, aligned))
        return cls("model", "model", (model,))


def parse_system(text: str) -> System:
    """Parse a system, as the command line takes it.

    Example:
        >>> parse_system("mine=dial:models/base,out/fast")
        System(name='mine', kind='dial', parts=('models/base', 'out/fast'))

    Raises:
        ConfigError: If the text does not name a system.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{text!r} is no system; write model:PATH, dial:BASE,ADAPTER, lora:BASE,ADAPTER, "
            "pair:REF,ALIGNED, prompts:MODEL, interpolate:REF,ALIGNED or url:http://…, with name= in "
            "front if you like" + (f" (such as model:{text})." if ":" not in text else ".")
        )
    kind, rest = match["kind"], match["rest"]

    # One known name can mean both parts, as in pair:miniature.
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


def parse_systems(texts: Sequence[str], own: Sequence[str] = ()) -> list[System]:
    """Parse several systems, which must have different names, and what single ones have of their own.

    Example:
        >>> plain, brief = parse_systems(
        ...     ["plain=model:m", "brief=model:m"], ["brief:system=Be brief."]
        ... )
        >>> brief.own
        {'system': 'Be brief.'}

    Args:
        texts: The systems, as :func:`parse_system` takes them.
        own: ``NAME:KEY=VALUE`` for the system of that name. The key is ``system``,
            ``thinking_budget``, ``end_of_thinking_bias``, or an argument of the chat template.

    Raises:
        ConfigError: If a text does not name a system, two have the same name, or an option of one
            is malformed or for none of them.
    """
    systems = [parse_system(text) for text in texts]
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two systems are called {name!r}; put a name in front, such as first={texts[0]}."
            )

    given: dict[str, list[str]] = {name: [] for name in names}
    for text in own:
        # A name may have colons and be the beginning of another one.
        owners = [name for name in names if text.startswith(f"{name}:")]
        if not owners and text not in names:
            owner, colon, _ = text.partition("=")[0].rpartition(":")
            hint = nearest(owner if colon else text, names)
            raise ConfigError(f"--for {text!r}: write NAME:KEY=VALUE, with a system's name{hint}")
        if not owners or "=" not in text:
            raise ConfigError(
                f"--for {text!r}: KEY=VALUE is missing; write NAME:KEY=VALUE, such as "
                f"{max(owners, key=len) if owners else text}:thinking_budget=2000."
            )
        name = max(owners, key=len)
        given[name].append(text.removeprefix(f"{name}:"))
    return [_with_own(system, given[system.name]) for system in systems]


_LIMITS = ("thinking_budget", "end_of_thinking_bias")
"""The keys of a system's own options that are no part of its prompt."""


def _with_own(system: System, texts: Sequence[str]) -> System:
    option = f"--for {system.name}:"
    read = parse_prompt(texts, option)
    limits = {name: read.template[name] for name in _LIMITS if name in read.template}
    template = {name: value for name, value in read.template.items() if name not in limits}
    try:
        LogitsSettings(**limits)
    except ConfigError as error:
        raise ConfigError(f"{option} {error}") from error
    return replace(system, prompt=PromptSettings(template, read.system), limits=limits)


@dataclass(frozen=True)
class SystemOptions:
    """How systems are run.

    Attributes:
        temperature: 0 is greedy.
        top_p: Probability mass sampled from.
        max_new_tokens: Tokens at which a response is cut off.
        batch_size: Responses generated together on this machine.
        gate: As in :func:`flexalign.fusion.fuse`.
        dtype: Data type of weights on this machine.
        lambda_range: The least and the largest λ to permit; if not given, an adapter's own range,
            and λ ≥ 0 for a pair.
        any_base: Accept an adapter that was made for another base, if the shapes fit.
        model_name: The model's name at an endpoint; its only model if not given.
        tokenizer: The tokenizer of an endpoint's model, for counts that the server does not give.
        concurrency: The most requests at an endpoint at one time.
        timeout_seconds: Longest wait for one response of an endpoint.
        attempts: Tries per request.
        pause_seconds: The first pause between tries; it doubles after each.
        api_key: The API key of an endpoint.
        on_retry: Called once, with a sentence, before a request to an endpoint is repeated for the
            first time.
        engine: ``local`` or ``vllm``, for plain models.
        template: Arguments of the chat template, for what is on this machine.
        prompts: The two prompts of systems of the kind ``prompts``.
        calibration: The folder with the calibration of systems of the kind ``prompts``.
        by_id: Of two models, take each token id for one token of both where only the names of
            special tokens differ; see `flexalign.models.compatibility.renamed_tokens`.
        logits: Limits on tokens, penalties and biases, beside temperature and top_p.
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
    on_retry: Callable[[str], None] | None = field(default=None, repr=False, compare=False)
    engine: str = "local"
    template: Mapping[str, Any] | None = None
    prompts: "PromptPair | None" = None
    calibration: str | PurePath | None = None
    by_id: bool = False
    logits: LogitsSettings = field(default_factory=LogitsSettings)


def require_two_models(systems: Sequence[System]) -> None:
    """Refuse ``--by-id`` where no system has two models.

    Raises:
        ConfigError: If none is a pair, or weights between two models.
    """
    if not any(system.has_two_models for system in systems):
        raise ConfigError(
            "--by-id is about two models whose special tokens differ in name; name the --aligned "
            "model, pair:REF,ALIGNED or interpolate:REF,ALIGNED."
        )


def require_two_prompts(systems: Sequence[System]) -> None:
    """Refuse ``--calibration`` where no system has two prompts.

    Raises:
        ConfigError: If none has.
    """
    if all(system.kind != "prompts" for system in systems):
        raise ConfigError(
            "--calibration is that of one model under two prompts; name its --aligned-prompt (an "
            "adapter's calibration is in the adapter's own folder)."
        )


_HERE = ("model", "dial", "lora", "pair", "prompts", "interpolate")
_FUSED = ("dial", "lora", "pair", "prompts")
_SERVER = (("url",), "a server, url:http://…")

_READ_BY: dict[str, tuple[tuple[str, ...], str]] = {
    "gate": (_FUSED, "logits that are mixed: dial:, pair: or prompts:"),
    "lambda_range": (
        (*_FUSED, "interpolate"),
        "what has a range of λ: dial:, lora:, pair:, prompts: or interpolate:",
    ),
    "dtype": (_HERE, "weights on this machine"),
    "engine": (_HERE, "what runs on this machine"),
    "batch_size": (_HERE, "what runs on this machine (a server has --concurrency)"),
    **dict.fromkeys(("model_name", "tokenizer", "api_key"), _SERVER),
    **dict.fromkeys(("concurrency", "timeout_seconds", "attempts"), _SERVER),
}
"""Options that only some kinds of systems read: the kinds, and what they are, for a message."""

_SPELT = {"api_key": "--api-key-env", "timeout_seconds": "--timeout"}
"""Options of the command line that have another name than the field."""


def refuse_unread(systems: Sequence[System], options: SystemOptions) -> None:
    """Refuse options that none of the systems reads, if they differ from their defaults.

    Raises:
        ConfigError: If there is one.
    """
    kinds = {system.kind for system in systems}
    unchanged = SystemOptions()
    for name, (readers, what) in _READ_BY.items():
        is_given = getattr(options, name) != getattr(unchanged, name)
        if is_given and kinds.isdisjoint(readers):
            option = _SPELT.get(name, f"--{name.replace('_', '-')}")
            raise ConfigError(f"{option} is about {what}, and no system here is one; leave it out.")


def refuse_ladders(system: System, settings: Sequence[Setting]) -> None:
    """Refuse ladders for all systems but weights between two models.

    Raises:
        ConfigError: If one of the settings is a ladder.
    """
    for setting in settings:
        if isinstance(setting.dial, Ladder) and system.kind != "interpolate":
            raise ConfigError(f"{system.name}: {ladder_refused(setting.dial)}")


class Request(Protocol):
    """A request for one answer."""

    @property
    def key(self) -> Hashable:
        """Identifies it among all requests of a run."""

    @property
    def label(self) -> str:
        """Its name in messages."""

    @property
    def prompt(self) -> Hashable:
        """Identifies its prompt among those of the run."""

    @property
    def messages(self) -> Messages:
        """The prompt."""

    @property
    def setting(self) -> Setting:
        """The setting of the dial."""

    @property
    def sample(self) -> int:
        """Which of the prompt's samples, from 0."""

    @property
    def seed(self) -> int:
        """Seeds its sampling."""


Asked = TypeVar("Asked", bound=Request)


@dataclass(frozen=True)
class PromptRequest:
    """A :class:`Request` of one of several prompts, by its place among them.

    Attributes:
        prompt: The prompt's place, from 0.
        messages: The prompt.
        setting: The setting of the dial.
        sample: Which of the prompt's samples, from 0.
        seed: Seeds its sampling.
    """

    prompt: int
    messages: Messages
    setting: Setting
    sample: int
    seed: int

    @property
    def key(self) -> tuple[int, str, int]:
        """Identifies it: prompt, setting and sample."""
        return self.prompt, self.setting.id, self.sample

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"prompt {self.prompt + 1}"


@dataclass(frozen=True)
class Answer:
    """One response.

    Attributes:
        text: The response, with the opening thinking tag even if the prompt contains it.
        tokens: Tokens written, rejected ones included, without the one that ends it.
        thinking_tokens: Tokens between the thinking tags; None if not known.
        rejected_tokens: Tokens of fast or trial answers that the policy rejected.
        truncated: Whether the limit on tokens cut it off.
        route: ``fast`` or ``slow``, under a policy that chooses; with exits, ``fast`` after one; with
            a ladder, ``fast`` for a first answer that is kept.
        confidence: Confidence of the fast or first answer, or of the last trial answer.
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
    """Why there is no response.

    Attributes:
        reason: A sentence.
        is_final: Whether the same request would fail again.
    """

    reason: str
    is_final: bool = False


class Backend(Protocol):
    """A system that is ready to answer. Weights are loaded at the first answer."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies it in results: names, fingerprints, thinking tags."""

    def render(self, messages: Messages) -> str:
        """Return the prompt as text, as it is sent to the model."""

    def run(
        self, requests: Sequence[Asked], done: Collection[Hashable]
    ) -> Iterator[list[tuple[Asked, Answer | Failure]]]:
        """Answer the requests that are not done, and yield answers as they are made.

        Args:
            requests: All requests of the run; only they decide how they are batched.
            done: Keys of the requests that are answered already.

        Raises:
            ServingError: If a server cannot be used at all.
        """

    def release(self) -> None:
        """Free what it has loaded, for the next system."""


def open_backend(
    system: System, settings: Sequence[Setting] = (), options: SystemOptions | None = None
) -> Backend:
    """Open a system: find and check its parts. Weights are loaded at the first answer.

    Args:
        system: The system.
        settings: The settings that it will be used at, checked against the permitted range.
        options: How it is run.

    Raises:
        ConfigError: If a part does not exist, or the system or the engine does not serve a setting or
            an option.
        CheckpointError: If a part is damaged.
        LambdaError: If a λ is outside the permitted range.
    """
    options = system.options(options or SystemOptions())
    if options.by_id:
        require_two_models([system])
    refuse_ladders(system, settings)
    if options.template and (system.kind == "url" or options.engine == "vllm"):
        raise ConfigError(
            f"{system.name}: --template, or an argument of the chat template by --for, is for what "
            "the local engine renders; give the server its "
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
        exits = [setting.id for setting in settings if isinstance(setting.dial, Exit)]
        if exits:
            raise ConfigError(
                f"{exits[0]}: --engine vllm cannot close a thinking on trial; leave --engine out."
            )
        from flexalign.systems.vllm import VllmBackend

        return VllmBackend(system.parts[0], options)

    from flexalign.systems.local import LocalBackend

    return LocalBackend(system, settings, options)
