"""A conversation with a model on this machine; its dial can be changed between answers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from flexalign.data.traces import derive_seed
from flexalign.generation.responses import generate_responses
from flexalign.generation.text import Piece, StreamedResponse
from flexalign.lambdas import Setting
from flexalign.systems.open import Answer, SystemOptions

if TYPE_CHECKING:
    from flexalign.systems.local import LocalBackend


class Reply(NamedTuple):
    """The result of a question.

    Attributes:
        answer: The answer; None if it was interrupted.
        seconds: The time it took.
        is_kept: Whether question and answer were added to the conversation.
    """

    answer: Answer | None
    seconds: float
    is_kept: bool


@dataclass
class Conversation:
    """A conversation.

    Attributes:
        backend: The model.
        options: How it is sampled.
        setting: The setting of the dial for the next answers.
        seed: Seeds all sampling.
        system: The system prompt; empty for none.
        turns: The messages so far, without thinking: a model does not get the thinking of its
            earlier answers.
    """

    backend: "LocalBackend"
    options: SystemOptions
    setting: Setting
    seed: int = 0
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    _asked: int = 0

    def turn_to(self, setting: Setting) -> None:
        """Set the dial for the next answers.

        Raises:
            ConfigError: If the model has no dial.
            LambdaError: If a λ is outside the range that is permitted.
        """
        self.backend.require_dial([setting])
        self.backend.require_range([setting], permit=_START_AGAIN)
        self.setting = setting

    def ask(self, text: str, show: Callable[[Sequence[Piece]], None]) -> Reply:
        """Answer a question, show the answer while it is written, and keep both.

        If Ctrl-C interrupts the answer, the text after the thinking is kept; if there is none,
        neither question nor answer is kept.

        Args:
            text: The question.
            show: Called with the new pieces of the answer.

        Raises:
            DataError: If the chat template refuses the conversation; the question is not kept.
        """
        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages: list[dict[str, Any]] = [*system, *self.turns, question]
        self._asked += 1

        reader = self.backend.text
        streamer = _Streamer(
            StreamedResponse(
                reader.tokenizer, reader.tags, opened=reader.opens(messages, self.setting)
            ),
            show,
        )
        started = time.perf_counter()
        answer: Answer | None = None
        try:
            answer = self._generate(messages, streamer)
        except KeyboardInterrupt:
            streamer.end()

        seconds = time.perf_counter() - started
        written = streamer.answer.strip()
        if written:
            self.turns += [question, {"role": "assistant", "content": written}]
        return Reply(answer, seconds, bool(written))

    def _generate(self, messages: list[dict[str, Any]], streamer: "_Streamer") -> Answer:
        options = self.options
        dial: dict[str, Any] = {}
        if self.setting.dial is not None:
            dial = {"lam": self.setting.dial, "gate": options.gate}

        (response,) = generate_responses(
            self.backend.model,
            self.backend.text.tokenizer,
            [self.backend.text.prompt(messages)],
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            logits=options.logits,
            seed=derive_seed(self.seed, self._asked),
            streamer=streamer,
            **dial,
        )
        return self.backend.text.read(messages, response)


_START_AGAIN = (
    "leave with /quit and start again with --lambda-range LEAST,LARGEST; else give a λ inside it"
)
"""How a running conversation permits a λ outside its range, for messages."""


class _Streamer:
    """A streamer for transformers' ``generate``, which passes it the prompt and then the tokens.

    Attributes:
        answer: The text after the thinking, so far.
    """

    def __init__(self, stream: StreamedResponse, show: Callable[[Sequence[Piece]], None]) -> None:
        self.answer = ""
        self._stream, self._show = stream, show
        self._has_prompt = self._has_ended = False

    def put(self, tokens: Any) -> None:
        """Skip the prompt, then take one token at a time."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        for token in tokens.flatten().tolist():
            self._write(self._stream.put(token))

    def end(self) -> None:
        """Show the text that was held back; a second call does nothing."""
        if not self._has_ended:
            self._has_ended = True
            self._write(self._stream.end())

    def _write(self, pieces: Sequence[Piece]) -> None:
        self.answer += "".join(piece.text for piece in pieces if not piece.is_thinking)
        self._show(pieces)
