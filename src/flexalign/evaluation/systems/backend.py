"""What a sweep asks of a system, and what it gets back."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from flexalign.evaluation.systems.settings import Setting

Messages = list[dict[str, str]] | str
"""A question as a conversation, or as text that the model goes on from as it is."""


class Key(NamedTuple):
    """What tells a system's samples apart."""

    setting: str
    task: str
    question: str
    sample: int


@dataclass(frozen=True)
class Cell:
    """One sample that is to be made.

    Attributes:
        setting: The dial.
        task: The task's name.
        question: The question's id in its task.
        sample: Which of the question's samples, from 0.
        seed: Of its sampling; the same at every setting.
        messages: The question as it is put.
    """

    setting: Setting
    task: str
    question: str
    sample: int
    seed: int
    messages: Messages

    @property
    def key(self) -> Key:
        """What tells it from the system's other samples."""
        return Key(self.setting.id, self.task, self.question, self.sample)


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


Outcome = tuple[Cell, Answer | Failure]
"""A sample that was asked for, with what came of it."""


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


class Backend(Protocol):
    """A system, ready to be asked. Weights are loaded when the first sample is made."""

    def describe(self) -> dict[str, Any]:
        """What identifies it in results: names, fingerprints, thinking tags."""

    def render(self, messages: Messages) -> str:
        """The prompt as it is sent."""

    def run(self, cells: Sequence[Cell], done: Collection[Key]) -> Iterator[list[Outcome]]:
        """Make what is missing of `cells`, and hand it out as it is made.

        Args:
            cells: All samples of the sweep; how they are batched follows from them alone.
            done: Those that are there already.

        Raises:
            ServingError: If a server cannot be used at all.
        """

    def release(self) -> None:
        """Let go of what it has loaded, for the next system."""
