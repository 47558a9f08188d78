"""A client of servers with OpenAI's HTTP interface, which sends several requests at a time."""

import copy
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flexalign.data.logits import LogitsSettings
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import (
    ConfigError,
    RequestRefusedError,
    ServerUnusableError,
    ServingError,
)

if TYPE_CHECKING:
    from openai import Omit, OpenAI


_RETRIED_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
_PERMANENT_STATUSES = {401, 402, 403, 404, 405}
"""Of the key, the address or the model, so that every other request would meet the same."""
_LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class EndpointResponse:
    """One response of a server.

    Attributes:
        text: The response. Thinking that the server returns in its own field is put before the
            answer, between think tags.
        tokens: The server's own count; None if it gives none.
        truncated: Whether the response was cut off by the limit on tokens.
        thinking_tokens: The server's own count of thinking tokens; None if it gives none.
        dial: The `dial` field of a flexalign server's answer; empty from any other server.
    """

    text: str
    tokens: int | None
    truncated: bool
    thinking_tokens: int | None = None
    dial: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Endpoint:
    """A server's address with the settings of requests to it.

    Attributes:
        url: The base address, such as ``http://localhost:8000/v1`` (``/v1`` is optional).
        model: The model's name on the server.
        max_new_tokens: Limit on the tokens of a response, which is cut off there.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Probability mass sampled from.
        logits: Limits on tokens, penalties and biases; those with an effect are sent.
        concurrency: Requests sent at the same time.
        attempts: Attempts per request. Between attempts at an unreachable or overloaded server
            the pause is 1, 2, 4, … times `pause_seconds`, or the server's Retry-After (a minute
            at most) if that is longer.
        pause_seconds: The first pause between attempts, in seconds.
        timeout_seconds: Longest wait for one response, in seconds.
        api_key: Sent as a bearer token; no key is sent if it is None.
        on_retry: Called once, with a sentence, before a request is repeated for the first time.

    Raises:
        ConfigError: If `url` is not an HTTP address.
    """

    url: str
    model: str
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    logits: LogitsSettings = field(default_factory=LogitsSettings)
    concurrency: int = 8
    attempts: int = 5
    pause_seconds: float = 1.0
    timeout_seconds: float = 600.0
    api_key: str | None = field(default=None, repr=False)
    on_retry: Callable[[str], None] | None = field(default=None, repr=False, compare=False)
    _first_retry: threading.Lock = field(
        default_factory=threading.Lock, init=False, repr=False, compare=False
    )
    """Taken by the first thread that repeats a request, and never released."""

    def __post_init__(self) -> None:
        """Check the address."""
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"endpoint {self.url!r} is not an address; write one such as "
                "http://localhost:8000/v1."
            )

    def for_model(self, name: str) -> "Endpoint":
        """Return this endpoint for another of its models; of both, the first retry alone is told."""
        other = copy.copy(self)  # with the same lock, where `replace` would make another
        object.__setattr__(other, "model", name)
        return other

    def generate(
        self, prompts: Sequence[str | list[dict[str, Any]]], seeds: Sequence[int]
    ) -> list[EndpointResponse]:
        """Answer each prompt with its own seed; messages as a chat, text as a completion.

        Returns:
            The responses, in the order of the prompts.

        Raises:
            ServerUnusableError: If the server refuses the key, the path or the model, or does not
                answer in JSON.
            RequestRefusedError: If the server refuses a request for another reason.
            ServingError: If the server cannot be reached, or its answer is not a response.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self.ask, prompts, seeds))

    def models(self) -> list[str]:
        """List the names of the models that the server has.

        Raises:
            ServerUnusableError: If it refuses the key or the path, or does not answer in JSON.
            ServingError: If the server cannot be reached, or its answer is not a list of models.
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
            seed: Seed of the sampling.
            **extra: Further fields of the request's body, such as ``**{"lambda": 0.5}``.

        Raises:
            ServingError: As in :meth:`generate`.
        """
        body: dict[str, Any] = {
            **extra,
            **self.logits.to_json(),
            "model": self.model,
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": seed,
        }
        if isinstance(prompt, str):
            return self._read(self._send("completions", body | {"prompt": prompt}))
        messages = [_message_sent(message) for message in prompt]
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
        """Post a body, or get a path if it is None, and return the JSON of the answer.

        Raises:
            ServerUnusableError: If the server refuses the key, the path or the model, or does not
                answer in JSON.
            RequestRefusedError: If the server refuses the request for another reason.
            ServingError: If all attempts fail.
        """
        from openai import APIConnectionError, APIStatusError

        client = self._client
        for attempt in range(1, self.attempts + 1):
            pause = self.pause_seconds * 2 ** (attempt - 1)

            try:
                return self._parse(self._exchange(client, path, body))
            except APIStatusError as error:
                said = error.response.content[:300].decode(errors="replace")
                reason = " ".join([str(error.status_code), *said.split()])
                if error.status_code not in _RETRIED_STATUSES:
                    raise self._refusal(error.status_code, reason) from error
                pause = max(pause, _retry_after(error.response.headers))
            except (APIConnectionError, ValueError) as error:
                cause = error.__cause__ or error  # the client says only "Connection error."
                reason = str(cause) or type(cause).__name__

            if attempt < self.attempts:
                self._tell_retry(reason)
                time.sleep(pause)

        raise ServingError(
            f"{self.url} gave no response in {self.attempts} attempts ({reason}); "
            "check that the server runs, then run the same command to go on."
        )

    def _tell_retry(self, reason: str) -> None:
        if self.on_retry is not None and self._first_retry.acquire(blocking=False):
            self.on_retry(
                f"{self.url} gave no response ({reason}); every request is tried up to "
                f"{self.attempts} times, after longer and longer pauses."
            )

    def _parse(self, content: bytes) -> Any:
        """Read an answer's JSON.

        Raises:
            ServerUnusableError: If it is no JSON, such as the page of another kind of server.
            ValueError: If it is JSON that was cut off on the way, or nothing.
        """
        try:
            return json.loads(content)
        except ValueError as error:
            beginning = " ".join(content[:300].decode(errors="replace").split())[:80]
            if not beginning or beginning.startswith(("{", "[")):
                raise ValueError(
                    f"its answer is not whole JSON: {beginning or 'it is empty'}"
                ) from None
            raise ServerUnusableError(
                f"{self.url} answered with something else than JSON ({beginning}); give the address "
                "of a server of OpenAI's protocol."
            ) from error

    def _refusal(self, status: int, reason: str) -> ServingError:
        """Return the error of a status that is not tried again, with what to do where it is known."""
        refused = f"{self.url} refused a request: {reason}"
        if status in (401, 403) and self.api_key is None:
            return ServerUnusableError(
                f"{refused}; give --api-key-env NAME, the environment variable that holds a key."
            )
        if status in (401, 403):
            return ServerUnusableError(f"{refused}; check the key that --api-key-env names.")
        if status == 404:
            return ServerUnusableError(f"{refused}; check the address and --model-name.")
        kind = ServerUnusableError if status in _PERMANENT_STATUSES else RequestRefusedError
        return kind(refused)

    @cached_property
    def _client(self) -> "OpenAI":
        """OpenAI's client without its own retries; it reuses connections between requests."""
        from openai import OpenAI

        base = self.url.rstrip("/").removesuffix("/v1")
        try:
            return OpenAI(
                base_url=f"{base}/v1",
                api_key=self.api_key or "unsent",  # without one it reads OPENAI_API_KEY
                timeout=self.timeout_seconds,
                max_retries=0,
            )
        except Exception as error:  # bad addresses and bad proxies share no class
            raise ConfigError(f"endpoint {self.url!r} cannot be asked: {error}") from error

    def _exchange(self, client: "OpenAI", path: str, body: dict[str, Any] | None) -> bytes:
        """Send one request, and return the body of the answer unparsed."""
        from openai import omit

        # The client would send the environment's settings for OpenAI, which must not reach others.
        headers: dict[str, str | Omit] = {
            "Authorization": f"Bearer {self.api_key}" if self.api_key else omit,
            "OpenAI-Organization": omit,
            "OpenAI-Project": omit,
        }
        if body is None:
            return client.get(f"/{path}", cast_to=bytes, options={"headers": headers})

        # The client's own JSON encoder fails on a lone surrogate.
        content = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
        return client.post(f"/{path}", cast_to=bytes, content=content, options={"headers": headers})


def _message_sent(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without empty fields, and with the role ``system`` for ``developer``.

    The server's chat template is not known, and many drop a ``developer`` message silently.
    """
    sent = {key: value for key, value in message.items() if value is not None}
    return sent | {"role": "system"} if sent.get("role") == "developer" else sent


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return a server's Retry-After in seconds, a minute at most; 0 for none and for a date."""
    try:
        return min(max(float(headers.get("Retry-After", 0)), 0.0), _LONGEST_PAUSE_SECONDS)
    except ValueError:
        return 0.0
