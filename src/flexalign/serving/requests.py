"""A request of the service and its answers, independent of the protocol.

A route reads a body into a :class:`ChatRequest` or a :class:`CompletionRequest`: every value is typed
and checked, and the dial is chosen. The service and the engine do not parse it again. Another protocol
needs a reader of its bodies into these classes and a writer of its answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from flexalign.data.logits import LogitsSettings
from flexalign.serving.dial import DialChoice
from flexalign.serving.engine import AnswerPiece, Ended, Generation, WrittenToken

if TYPE_CHECKING:
    from flexalign.serving.tools import ToolAnswers

TokenIds: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class SamplingOptions:
    """How answers are sampled, cut off and sent.

    Attributes:
        max_tokens: Tokens at which an answer is cut off; None for the rest of the context.
        temperature: 0 is greedy.
        top_p: Probability mass sampled from.
        seed: Of the first answer; drawn where the request gives none.
        stop: Texts that end an answer and are not in it.
        n: Answers per prompt.
        logprobs: Number of likeliest tokens to report at each token; None for no log-probabilities.
        stream: Whether the answer is sent as it is written.
        include_usage: Whether a stream ends with its token counts.
        logits: Limits on tokens, penalties and biases.
    """

    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    n: int
    logprobs: int | None
    stream: bool
    include_usage: bool
    logits: LogitsSettings


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to be continued.

    Attributes:
        model: The model that is asked for; None for the served one.
        messages: Objects with a ``role`` and a ``content`` that is text, as the template takes them.
        sampling: How answers are sampled.
        choice: Its dial.
        template: Arguments of the chat template; they override the operator's.
        tools: The tools that an answer may call, as the chat template takes them.
        schema: The JSON schema that the answer after the thinking follows; None for any text.
    """

    model: str | None
    messages: tuple[dict[str, Any], ...]
    sampling: SamplingOptions
    choice: DialChoice
    template: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()
    schema: Mapping[str, Any] | bool | None = None


@dataclass(frozen=True)
class CompletionRequest:
    """Prompts to be continued, without a chat template.

    Attributes:
        model: The model that is asked for; None for the served one.
        prompts: Texts or token ids.
        sampling: How answers are sampled.
        choice: Its dial.
    """

    model: str | None
    prompts: tuple[str | TokenIds, ...]
    sampling: SamplingOptions
    choice: DialChoice


@dataclass
class AnswerDraft:
    """One of a request's answers, while it is written.

    Attributes:
        index: Its number in the request, from 0.
        prompt_tokens: Tokens of its prompt; 0 if an earlier answer counts the same prompt.
        opened: Whether its prompt leaves the thinking open.
        text: Its text so far.
        tokens: Its tokens so far.
        ended: How it ended; None while it is written.
    """

    index: int
    prompt_tokens: int
    opened: bool = False
    text: str = ""
    tokens: list[WrittenToken] = field(default_factory=list)
    ended: Ended | None = None

    @property
    def finish(self) -> str | None:
        """Why it ended; None while it is written."""
        return self.ended.finish if self.ended else None

    def take(self, piece: AnswerPiece) -> None:
        """Add a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.ended = piece.ended


@dataclass
class RunningRequest:
    """A request that the engine works on.

    Attributes:
        sampling: How its answers are sampled.
        choice: Its dial; the routes that a policy takes are added to its report.
        drafts: Its answers.
        generations: The engine's generation of each answer.
        since: When it arrived, in seconds of the monotonic clock.
        tools: Reads the calls of tools in its answers; None if the request has no tools.
    """

    sampling: SamplingOptions
    choice: DialChoice
    drafts: Sequence[AnswerDraft]
    generations: Sequence[Generation]
    since: float
    tools: "ToolAnswers | None" = None

    def cancel(self) -> None:
        """Make the engine drop it before its next step; no effect if it has ended."""
        for generation in self.generations:
            generation.cancel()

    def report_routes(self) -> None:
        """Add the routes that the policy took to the dial's report; a list if there are several."""
        ended = [draft.ended for draft in self.drafts]
        if not any(one and one.route for one in ended):
            return

        reported: dict[str, list[Any]] = {
            "route": [one and one.route for one in ended],
            "lambda": [one and one.lam for one in ended],
            "rejected_tokens": [one.rejected_tokens if one else 0 for one in ended],
        }
        if any(one and one.confidence is not None for one in ended):
            reported["confidence"] = [one and one.confidence for one in ended]
        if "lambda" not in self.choice.report:  # a model without a dial, under an exit policy
            del reported["lambda"]
        for key, values in reported.items():
            self.choice.report[key] = values[0] if len(values) == 1 else values


@dataclass(frozen=True)
class Usage:
    """Token counts of a request, counted as in the rest of the library.

    Attributes:
        prompt_tokens: Tokens of its prompts, each prompt counted once.
        completion_tokens: Tokens written, with rejected ones, without the tokens that end answers.
        reasoning_tokens: Of the completion tokens, those inside the thinking.
        rejected_tokens: Of the completion tokens, those in fast answers that were rejected.
    """

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    rejected_tokens: int
