"""A user's prompts, from text or a file, answered at several settings of one local system."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flexalign.data.formats import load_prompts
from flexalign.data.traces import derive_seed
from flexalign.errors import DataError
from flexalign.lambdas import Setting
from flexalign.systems.local import LocalBackend
from flexalign.systems.open import Answer, Messages, PromptRequest


class UserPrompt(NamedTuple):
    """A prompt as results show it (``given``), and as the model gets it (``messages``)."""

    given: Messages
    messages: Messages

    @classmethod
    def of_text(cls, text: str) -> "UserPrompt":
        """Return the prompt whose one message of the user is a text.

        Raises:
            DataError: If the text is empty.
        """
        text = text.strip()
        if not text:
            raise DataError("the prompt is empty.")
        return cls(text, [{"role": "user", "content": text}])

    @property
    def text(self) -> str:
        """The prompt as text, without roles."""
        if isinstance(self.given, str):
            return self.given
        return "\n".join(message["content"] for message in self.given)


def read_prompts(file: Path) -> list[UserPrompt]:
    """Read a file of prompts: ``.txt`` with one a line, or a table as of :func:`load_prompts`.

    Raises:
        DataError: If the file cannot be read, or holds no prompt.
    """
    if file.suffix.lower() != ".txt":
        return [UserPrompt(one, one) for one in load_prompts(file)["prompt"]]

    if not file.is_file():
        raise DataError(f"{file}: no such file.")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 ({error.reason}); save it as UTF-8.") from error
    prompts = [UserPrompt.of_text(line) for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{file} holds no prompt; write one a line.")
    return prompts


def prompt_requests(
    prompts: Sequence[UserPrompt], settings: Sequence[Setting], *, samples: int = 1, seed: int = 0
) -> list[PromptRequest]:
    """Return a request for each prompt, setting and sample.

    All settings of a sample have the same seed.
    """
    return [
        # The empty string replaces the task of a sweep; without it, every seed would change.
        PromptRequest(index, one.messages, setting, sample, derive_seed(seed, "", index, sample))
        for index, one in enumerate(prompts)
        for setting in settings
        for sample in range(samples)
    ]


class TimedAnswer(NamedTuple):
    """An answer to one request.

    Attributes:
        place: The place of the request among all.
        request: The request.
        answer: The answer.
        tokens_per_second: Of the whole batch in which it was made.
    """

    place: int
    request: PromptRequest
    answer: Answer
    tokens_per_second: float

    def to_json(self, prompt: UserPrompt) -> dict[str, Any]:
        """Return the JSON form, with the prompt as it was given."""
        setting, answer = self.request.setting, self.answer
        return {
            "prompt": prompt.given,
            "setting": setting.id,
            "lambda": setting.lam,
            "policy": setting.policy,
            "sample": self.request.sample,
            "response": answer.text,
            "tokens": answer.tokens,
            "thinking_tokens": answer.thinking_tokens,
            "rejected_tokens": answer.rejected_tokens,
            "truncated": answer.truncated,
            "route": answer.route,
            "confidence": answer.confidence,
            "tokens_per_second": round(self.tokens_per_second, 1),
        }


def timed_answers(
    backend: LocalBackend, requests: Sequence[PromptRequest]
) -> Iterator[list[TimedAnswer]]:
    """Answer requests batch by batch, and measure the speed of each batch.

    Args:
        backend: The system; its weights are loaded at the first batch.
        requests: The requests, each with another key.

    Yields:
        The answers of a batch, in the order of their requests.
    """
    places = {request.key: place for place, request in enumerate(requests)}
    started = time.perf_counter()
    for batch in backend.run(requests):
        made = [(asked, answer) for asked, answer in batch if isinstance(answer, Answer)]
        speed = sum(answer.tokens for _, answer in made) / (time.perf_counter() - started)
        yield sorted(
            (TimedAnswer(places[asked.key], asked, answer, speed) for asked, answer in made),
            key=lambda one: one.place,
        )
        started = time.perf_counter()
