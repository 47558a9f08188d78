"""Responses from a server that speaks OpenAI's protocol, several requests at a time."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, ServingError

__all__ = ["Endpoint", "EndpointResponse"]

_RETRIED_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
_LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class EndpointResponse:
    """One response of a server.

    Attributes:
        text: Thinking, if the server returns it apart, between think tags, then the answer.
        tokens: The server's own count; None if it gives none.
        truncated: Whether the server says that the limit on tokens cut it off.
        thinking_tokens: The server's own count of thinking tokens; None if it gives none.
        dial: What a flexalign server says of the request's dial; empty from any other.
    """

    text: str
    tokens: int | None
    truncated: bool
    thinking_tokens: int | None = None
    dial: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoint:
    """A server, and how to ask it.

    Attributes:
        url: Its base, such as ``http://localhost:8000/v1`` (``/v1`` may be left away).
        model: The model's name there.
        max_new_tokens: Tokens after which a response is cut off.
        temperature: 0 is greedy.
        top_p: Probability mass sampled from.
        concurrency: Requests under way at one time.
        attempts: Tries per request: an unreachable or overloaded server is asked again after 1,
            2, 4, … times `pause_seconds`, or when its Retry-After says (a minute at most).
        pause_seconds: The first pause between tries.
        timeout_seconds: Longest wait for one response.
        api_key: Sent as a bearer token; nothing is sent if it is not given.
    """

    url: str
    model: str
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    concurrency: int = 8
    attempts: int = 5
    pause_seconds: float = 1.0
    timeout_seconds: float = 600.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the address."""
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"endpoint {self.url!r} is not an address; write one such as "
                "http://localhost:8000/v1."
            )

    def generate(
        self, prompts: Sequence[str | list[dict[str, Any]]], seeds: Sequence[int]
    ) -> list[EndpointResponse]:
        """Answer each prompt with its own seed; messages as a chat, text as a completion.

        Raises:
            ServingError: If the server cannot be reached, refuses a request, or answers with
                something else than a response.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self.ask, prompts, seeds))

    def models(self) -> list[str]:
        """List the models that the server has.

        Raises:
            ServingError: If it cannot be reached, or does not say.
        """
        answer = self._send("models", None)
        try:
            return [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError) as error:
            raise ServingError(
                f"{self.url} does not say which models it has; name one with --model-name."
            ) from error

    def ask(self, prompt: str | list[dict[str, Any]], seed: int, **extra: Any) -> EndpointResponse:
        """Answer one prompt.

        Args:
            prompt: Messages, as a chat, or text, as a completion.
            seed: Of the sampling.
            **extra: More for the request's body, such as ``**{"lambda": 0.5}``.

        Raises:
            ServingError: As in :meth:`generate`.
        """
        body: dict[str, Any] = extra | {
            "model": self.model,
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": seed,
        }
        if isinstance(prompt, str):
            return self._read(self._send("completions", body | {"prompt": prompt}))
        messages = [
            {key: value for key, value in message.items() if value is not None}
            for message in prompt
        ]
        return self._read(self._send("chat/completions", body | {"messages": messages}))

    def _read(self, answer: Any) -> EndpointResponse:
        try:
            choice = answer["choices"][0]
            message = choice.get("message") or {"content": choice["text"]}
            content = message.get("content") or ""
            usage = answer.get("usage") or {}
            details = usage.get("completion_tokens_details") or {}
            dial = answer.get("dial") or {}
            truncated = choice.get("finish_reason") == "length"
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ServingError(
                f"{self.url} answered with something else than a response: {str(answer)[:200]}"
            ) from error
        thinking = message.get("reasoning_content") or message.get("reasoning")
        if thinking:
            tags = ThinkingTags()
            closing = tags.close if content or not truncated else ""
            content = f"{tags.open}{thinking}{closing}{content}"
        return EndpointResponse(
            content,
            usage.get("completion_tokens"),
            truncated,
            details.get("reasoning_tokens"),
            dial if isinstance(dial, dict) else {},
        )

    def _send(self, path: str, body: dict[str, Any] | None) -> Any:
        """Post a body, or get a path, and read the JSON that comes back."""
        base = self.url.rstrip("/").removesuffix("/v1")
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{base}/v1/{path}", content, headers)
        for attempt in range(1, self.attempts + 1):
            pause = self.pause_seconds * 2 ** (attempt - 1)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"{error.code} {error.read(300).decode(errors='replace')}".strip()
                if error.code not in _RETRIED_STATUSES:
                    raise ServingError(f"{self.url} refused a request: {reason}") from error
                pause = max(pause, _retry_after(error.headers))
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.attempts:
                time.sleep(pause)
        raise ServingError(
            f"{self.url} gave no response in {self.attempts} attempts ({reason}); "
            "check that the server runs, then run the same command to go on."
        )


def _retry_after(headers: Message) -> float:
    """Return the seconds that a server asks to be left alone, a minute at most; dates count 0."""
    try:
        return min(max(float(headers.get("Retry-After", 0)), 0.0), _LONGEST_PAUSE_SECONDS)
    except ValueError:
        return 0.0
