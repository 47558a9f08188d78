"""A conversation with a model and its dial: what is said, and what the commands change."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexalign.cli._dial import (
    describe_choice,
    describe_setting,
    describe_tokens,
    read_efforts,
    read_setting,
    require_dial,
)
from flexalign.cli.console import ResponsePrinter, console
from flexalign.data.traces import derive_seed
from flexalign.errors import ConfigError
from flexalign.evaluation.systems import Answer, Setting
from flexalign.generation.responses import Response, generate_responses
from flexalign.generation.text import StreamedResponse

if TYPE_CHECKING:
    from flexalign.evaluation.systems import SystemOptions
    from flexalign.evaluation.systems.local import LocalBackend


_HELP = """\
/lambda 0.3          λ from the next answer on, or a schedule's JSON; 0 is the reference, 1 the
                     aligned model or the adapter's
/policy adaptive 0.5 think only where the fast answer is unsure; or route 0.3, auto, JSON
/effort 50           0 is fastest, 100 the reference's tokens; the adapter must be calibrated
/system TEXT         what the model is told beforehand; alone: nothing
/reset               forget the conversation
/quit                leave, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass
class Chat:
    """A conversation.

    Attributes:
        backend: The model, with its weights loaded.
        options: How it is sampled.
        setting: Of the dial.
        seed: Of all sampling.
        system: What the model is told beforehand.
        adapter: The adapter that is its dial, if one is.
        turns: What has been said, without thinking: thinking is not the conversation.
    """

    backend: "LocalBackend"
    options: "SystemOptions"
    setting: Setting
    seed: int = 0
    system: str = ""
    adapter: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    _asked: int = 0

    def say(self, text: str) -> None:
        """Ask, print the answer as it is written, and keep both.

        If the answer is broken off, what stands after the thinking is kept; if nothing does, the
        question is withdrawn.

        Raises:
            DataError: If the chat template refuses the conversation; the question is withdrawn.
        """
        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.turns, question]
        self._asked += 1
        opened = self.backend.text.tags.opened_by(self.backend.render(messages))
        printer = _Streamer(self.backend, opened=opened)
        started = time.perf_counter()
        try:
            response = self._generate(messages, printer)
        except KeyboardInterrupt:
            printer.end()
            console.print("stopped", style="dim")
        else:
            seconds = time.perf_counter() - started
            self._tell(self.backend.text.whole(messages, response.text), response, seconds)
        answer = printer.answer.strip()
        if answer:
            self.turns += [question, {"role": "assistant", "content": answer}]
        else:
            console.print("no answer came after the thinking; the question is not kept.")

    def obey(self, line: str) -> bool:
        """Follow a command; return whether the conversation goes on.

        Raises:
            ConfigError: If there is no such command, or its value is malformed.
            LambdaError: If it is a λ that is not finite, or outside the range.
        """
        name, _, value = line[1:].partition(" ")
        value = value.strip()
        match name:
            case "quit":
                return False
            case "help":
                console.print(_HELP, markup=False)
            case "reset":
                self.turns.clear()
                console.print("The conversation is forgotten.")
            case "system":
                self.system = value
                console.print("The system prompt is set." if value else "No system prompt.")
            case "lambda" | "policy" | "effort":
                self._turn(name, value)
            case _:
                raise ConfigError(f"there is no command /{name}; /help lists them.")
        return True

    def _turn(self, name: str, value: str) -> None:
        if value:
            setting = self._read(name, value)
            if self.backend.kind == "model":
                require_dial([setting])
            self.backend.require_range([setting])
            self.setting = setting
        console.print(describe_setting(self.setting, self.backend.calibration), markup=False)

    def _read(self, name: str, value: str) -> Setting:
        if name != "effort":
            return read_setting(name, value)
        settings = read_efforts(value, self.adapter)
        if len(settings) != 1:
            raise ConfigError(f"a conversation has one effort at a time; got {value!r}.")
        return settings[0]

    def _generate(self, messages: list[dict[str, str]], printer: "_Streamer") -> Response:
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
            seed=derive_seed(self.seed, self._asked),
            streamer=printer,
            **dial,
        )
        return response

    def _tell(self, text: str, response: Response, seconds: float) -> None:
        answer = Answer(
            text,
            response.tokens,
            self.backend.text.thinking_tokens(text),
            response.rejected_tokens,
            response.truncated,
            response.route,
            response.confidence,
        )
        parts = [
            describe_setting(self.setting, self.backend.calibration),
            describe_choice(answer, self.setting, self.backend.model),
            describe_tokens(answer, response.tokens / seconds),
        ]
        line = " · ".join(part for part in parts if part)
        console.print(line, style="dim", markup=False, soft_wrap=True)


class _Streamer:
    """Prints the tokens of one response as ``generate`` hands them over; the first are the prompt.

    Attributes:
        answer: What has been written after the thinking.
    """

    def __init__(self, backend: "LocalBackend", *, opened: bool) -> None:
        tags = backend.text.tags
        self.answer = ""
        self._stream = StreamedResponse(backend.text.tokenizer, tags, opened=opened)
        self._printer = ResponsePrinter(tags)
        self._has_prompt = self._has_ended = False

    def put(self, tokens: Any) -> None:
        """Take the prompt, then one token at a time."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        for token in tokens.flatten().tolist():
            self._write(self._stream.put(token))

    def end(self) -> None:
        """Print what was held back; a second call does nothing."""
        if not self._has_ended:
            self._has_ended = True
            self._write(self._stream.end())
            self._printer.end()

    def _write(self, pieces: Any) -> None:
        self.answer += "".join(piece.text for piece in pieces if not piece.is_thinking)
        self._printer.write(pieces)
