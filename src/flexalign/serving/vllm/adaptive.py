"""The fast answer of an adaptive policy, which vLLM writes and nobody sees until it is judged."""

import asyncio
import json
from typing import Any

import torch

from flexalign.generation.confidence import ConfidenceTracker
from flexalign.lambdas import Adaptive
from flexalign.serving.errors import ApiError, Scope
from flexalign.serving.middleware import with_body


class StreamedFastAnswer:
    """A fast answer as vLLM streams it: what vLLM is given as ``send`` and as ``receive``.

    Its confidence is measured token by token, by
    :class:`~flexalign.generation.confidence.ConfidenceTracker`, and it is cut off as soon as it cannot be
    accepted any more.

    Attributes:
        messages: What vLLM sent, to be sent on if the answer is accepted.
        chunks: The chunks of its stream.
        is_failed: Whether it is no answer but an error, to be sent on as it is.
    """

    def __init__(self, policy: Adaptive, threshold: float, is_chat: bool) -> None:
        """Get ready to judge.

        Args:
            policy: Whose fast answer it is.
            threshold: The least confidence that is accepted.
            is_chat: Whether the answer is a chat's.
        """
        self.messages: list[Scope] = []
        self.chunks: list[dict[str, Any]] = []
        self.is_failed = False
        self._threshold = threshold
        self._is_chat = is_chat
        self._tracker = ConfidenceTracker([policy], [threshold], torch.device("cpu"))
        self._buffer = b""
        self._stops = asyncio.Event()
        self._error: dict[str, Any] | None = None

    @property
    def confidence(self) -> float:
        """How sure the answer is; where it was cut off, up to there."""
        return float(self._tracker.confidence[0])

    @property
    def is_accepted(self) -> bool:
        """Whether it has come to its end by itself and is sure enough."""
        return bool(self._tracker.ended[0]) and self.confidence >= self._threshold

    @property
    def tokens(self) -> int:
        """Tokens that were written, without the one that ends it."""
        return int(self._tracker.counted[0])

    async def run(self, app: Any, body: dict[str, Any], scope: Scope, receive: Any) -> bool:
        """Let vLLM write it.

        Args:
            app: vLLM's application.
            body: Of :func:`fast_body`.
            scope: The request's.
            receive: The client's, whose body has been read.

        Returns:
            Whether the client is still there.

        Raises:
            ApiError: If vLLM fails in the middle.
        """
        scope, heard = with_body(scope, body, self._until_stopped)
        writing = asyncio.create_task(app(scope, heard, self))
        leaving = asyncio.create_task(self._stop_when_gone(receive))
        stopping = asyncio.create_task(self._stops.wait())
        tasks = (writing, leaving, stopping)

        try:
            await asyncio.wait((writing, stopping), return_when=asyncio.FIRST_COMPLETED)
            is_there = not leaving.done()
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)

        # An exception after the stop is vLLM's way to end where its client is gone.
        if isinstance(ended[0], Exception) and not self._stops.is_set():
            raise ended[0]
        if self._error is not None:
            status = self._error.get("code")
            status = status if isinstance(status, int) else 500
            raise ApiError(status, str(self._error.get("message")))
        return is_there

    async def __call__(self, message: Scope) -> None:
        """Take in what vLLM sends."""
        if self._stops.is_set():
            return
        self.messages.append(message)
        if message["type"] == "http.response.start":
            self.is_failed = message["status"] != 200
        elif not self.is_failed:
            *events, self._buffer = (self._buffer + message.get("body", b"")).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    self._take(json.loads(event.removeprefix(b"data: ")))

    def _take(self, chunk: dict[str, Any]) -> None:
        """Take in a chunk: an error, or tokens with their log-probabilities."""
        if "error" in chunk:
            self._error = chunk["error"]
            self._stops.set()
            return

        self.chunks.append(chunk)
        for choice in chunk["choices"]:
            told = choice.get("logprobs") or {}
            found = told.get("token_logprobs") or []
            if self._is_chat:
                found = [token["logprob"] for token in told.get("content") or ()]
            for place, log_prob in enumerate(found):
                self._take_token(log_prob, choice if place == len(found) - 1 else {})

    def _take_token(self, log_prob: float, ends: dict[str, Any]) -> None:
        """Measure a token; ``ends`` is the choice that it is the last token of, if it is one."""
        has_end = ends.get("finish_reason") == "stop"
        is_token = has_end and not isinstance(ends.get("stop_reason"), str)
        dropped = self._tracker.take(
            torch.tensor([log_prob]), torch.tensor([has_end]), torch.tensor([is_token])
        )
        if bool(dropped[0]):
            self._stops.set()

    async def _until_stopped(self) -> Scope:
        """Be vLLM's client: it leaves when the answer is cut off."""
        await self._stops.wait()
        return {"type": "http.disconnect"}

    async def _stop_when_gone(self, receive: Any) -> None:
        """Cut the answer off when the client leaves."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._stops.set()


def fast_body(body: dict[str, Any], is_chat: bool) -> dict[str, Any]:
    """Return what vLLM is asked for a fast answer: greedy, streamed, with log-probabilities.

    They are those that vLLM tells by default: the model's own, at temperature 1.
    """
    fast = {key: value for key, value in body.items() if key not in ("seed", "stream_options")}
    fast |= {"stream": True, "temperature": 0}

    if is_chat:
        fast |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0}
    elif body.get("logprobs") is None:
        fast["logprobs"] = 0

    # A client that wants a stream gets the chunks as they are, one that wants the whole needs usage.
    if not body.get("stream"):
        fast["stream_options"] = {"include_usage": True}
    elif body.get("stream_options") is not None:
        fast["stream_options"] = body["stream_options"]
    return fast


def join_chunks(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole answer that a stream of one choice is.

    Args:
        chunks: Its chunks; one of them has the ``usage``.
    """
    answer: dict[str, Any] = {}
    choice: dict[str, Any] = {"index": 0, "logprobs": None}
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    text, logprobs = "", dict[str, list[Any]]()

    for chunk in chunks:
        answer |= {key: value for key, value in chunk.items() if key not in ("choices", "object")}
        for part in chunk["choices"]:
            text += part.get("text") or ""
            for key in ("content", "reasoning"):
                more = part.get("delta", {}).get(key)
                if more is not None:
                    message[key] = (message.get(key) or "") + more
            for key, values in (part.get("logprobs") or {}).items():
                if isinstance(values, list):
                    logprobs.setdefault(key, []).extend(values)
            choice |= {key: part[key] for key in ("finish_reason", "stop_reason") if key in part}

    if logprobs:
        choice["logprobs"] = logprobs
    is_chat = chunks[0]["object"] == "chat.completion.chunk"
    choice |= {"message": message} if is_chat else {"text": text}
    kind = "chat.completion" if is_chat else "text_completion"
    return {**answer, "object": kind, "choices": [choice]}
