"""From a request to the engine and back: prompts encoded, jobs submitted, answers put together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from starlette.concurrency import run_in_threadpool

from flexalign.data.rendering import render_chat
from flexalign.data.thinking import ThinkingTags
from flexalign.data.traces import derive_seed
from flexalign.decoding.text import ResponseText
from flexalign.errors import ConfigError, DataError
from flexalign.serving.answers import (
    AnswerForm,
    ChatForm,
    CompletionForm,
    Draft,
    count_usage,
    event,
)
from flexalign.serving.dial import Choice
from flexalign.serving.engine import Engine, Generation, Job, Piece
from flexalign.serving.errors import ApiError, as_sent
from flexalign.serving.metrics import Metrics
from flexalign.serving.protocol import ChatRequest, CompletionRequest, Sampling

__all__ = ["ServedModel", "Service", "Underway"]


@dataclass(frozen=True)
class ServedModel:
    """What is served.

    Attributes:
        name: What requests call it.
        tokenizer: Its tokenizer.
        tags: The tags around its thinking.
        context: Tokens that a prompt and its answer may have together.
        vocabulary: Token ids are below this.
    """

    name: str
    tokenizer: Any
    tags: ThinkingTags
    context: int
    vocabulary: int


@dataclass
class Underway:
    """A request that the engine works on.

    Attributes:
        form: How its answer is told.
        sampling: What it asked for.
        choice: Its dial; the way that was taken is told there.
        drafts: Its choices.
        generations: The engine's side of each.
        since: When it arrived, by the monotonic clock.
    """

    form: AnswerForm
    sampling: Sampling
    choice: Choice
    drafts: list[Draft]
    generations: list[Generation]
    since: float

    def cancel(self) -> None:
        """Let go of it."""
        for generation in self.generations:
            generation.cancel()


class Service:
    """Answers requests with an engine."""

    def __init__(self, model: ServedModel, engine: Engine, queue: int) -> None:
        """Serve a model.

        Args:
            model: What is served.
            engine: What runs it, started.
            queue: Answers that the engine ever lets wait.
        """
        self.model = model
        self.engine = engine
        self.metrics = Metrics(engine)
        self._queue = queue
        self._reader = ResponseText(model.tokenizer, model.tags)

    async def begin(self, request: ChatRequest | CompletionRequest, choice: Choice) -> Underway:
        """Check a request against the model and hand it to the engine.

        Raises:
            ApiError: If the model is another one, the engine does not serve the dial, a prompt is
                too long, or the queue full.
        """
        since = monotonic()
        name = self.model.name
        if request.model not in (None, name):
            raise ApiError(
                404,
                f"there is no model {request.model!r:.200} here; this server has {name!r}.",
                param="model",
                code="model_not_found",
            )
        try:
            self.engine.check(choice.dial)
        except ConfigError as error:
            raise ApiError(400, f"lambda: {error}", param="lambda", code="invalid_dial") from error
        form: AnswerForm
        if isinstance(request, ChatRequest):
            form = ChatForm(name, self.model.tokenizer, self.model.tags)
            prompts = [await run_in_threadpool(self._encode_chat, request)]
        else:
            form = CompletionForm(name, self.model.tokenizer, self.model.tags)
            prompts = [await run_in_threadpool(self._encode, prompt) for prompt in request.prompts]
        sampling = request.sampling
        jobs = [job for ids in prompts for job in self._jobs(ids, sampling, choice)]
        self._require_room(len(jobs))
        drafts = []
        for place, job in enumerate(jobs):
            counted = 0 if place % sampling.n else len(job.prompt)
            drafts.append(Draft(place, counted, self._reader.is_opened_by(job.prompt)))
        generations = self.engine.submit(jobs, asyncio.get_running_loop())
        self.metrics.began(choice.dial, sum(map(len, prompts)))
        return Underway(form, sampling, choice, drafts, generations, since)

    async def answer(self, underway: Underway) -> dict[str, Any]:
        """Wait for a whole answer."""
        async for _ in self._pieces(underway):
            pass
        return underway.form.answer(underway.drafts, underway.sampling.logprobs)

    async def stream(self, underway: Underway) -> AsyncIterator[bytes]:
        """Yield an answer's events as it is written."""
        form, sampling = underway.form, underway.sampling
        nothing = {"usage": None} if sampling.include_usage else {}
        for draft in underway.drafts:
            for told in form.begin(draft):
                yield event(form.chunk([told], **nothing))
        async for draft, piece in self._pieces(underway):
            for told in form.tell_piece(draft, piece, sampling.logprobs):
                yield event(form.chunk([told], **nothing))
        if sampling.include_usage:
            usage = count_usage(underway.drafts, self.model.tokenizer, self.model.tags)
            yield event(form.chunk([], usage=usage))
        yield b"data: [DONE]\n\n"

    async def _pieces(self, underway: Underway) -> AsyncIterator[tuple[Draft, Piece]]:
        """Yield every choice's pieces, as they come, each taken in and counted."""
        is_first = True
        async for place, piece in _merged(underway.generations):
            draft = underway.drafts[place]
            draft.take(piece)
            if is_first and piece.text:
                is_first = False
                self.metrics.first_text(underway.since)
            if piece.ended is not None:
                policy = underway.choice.report.get("policy")
                self.metrics.ended(piece.ended, policy)
                _report_way(underway)
            yield draft, piece

    def _encode_chat(self, request: ChatRequest) -> tuple[int, ...]:
        tokenizer = self.model.tokenizer
        if not tokenizer.chat_template:
            raise ApiError(
                400,
                "messages: this model has no chat template; send a prompt to /v1/completions.",
                param="messages",
            )
        try:
            messages = [dict(message) for message in request.messages]
            text = render_chat(tokenizer, messages, add_generation_prompt=True)
        except DataError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error
        except Exception as error:  # a template is a program, and these are its arguments
            raise ApiError(
                400,
                f"messages: the chat template fails on them ({error!r:.200}); send others.",
                param="messages",
            ) from error
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.model.tokenizer(prompt)["input_ids"])
        outside = [token for token in prompt if not 0 <= token < self.model.vocabulary]
        if outside:
            raise ApiError(
                400,
                f"prompt has the token id {as_sent(outside[0])}; this model's are 0 to "
                f"{self.model.vocabulary - 1}.",
                param="prompt",
            )
        return prompt

    def _jobs(self, ids: tuple[int, ...], sampling: Sampling, choice: Choice) -> Iterator[Job]:
        """Yield a prompt's choices; the first has the request's own seed."""
        if not ids:
            raise ApiError(400, "prompt is empty: there is no token to go on from.", param="prompt")
        room = self.model.context - len(ids)
        limit = sampling.max_tokens if sampling.max_tokens is not None else max(room, 1)
        if limit > room:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens and may get {limit} more; this server's context "
                f"is {self.model.context}. Shorten the prompt, or ask for fewer max_tokens.",
                code="context_length_exceeded",
            )
        for number in range(sampling.n):
            seed = sampling.seed if number == 0 else derive_seed(sampling.seed, number)
            yield Job(
                ids,
                choice.dial,
                limit,
                sampling.temperature,
                sampling.top_p,
                seed,
                sampling.stop,
                sampling.logprobs,
            )

    def _require_room(self, jobs: int) -> None:
        if jobs > self._queue:
            raise ApiError(
                400,
                f"n: the request asks for {jobs} answers, n to each prompt, and this server takes "
                f"{self._queue} at most; ask for fewer.",
                param="n",
            )
        if not self.engine.has_room(jobs):
            raise ApiError(
                429,
                "too many requests wait already; ask again later.",
                code="queue_full",
                headers={"retry-after": "1"},
            )


async def _merged(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Piece]]:
    """Yield (index, piece) of several generations, as they come."""
    if len(generations) == 1:
        async for piece in generations[0].pieces():
            yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def pump(place: int, generation: Generation) -> None:
        try:
            async for one in generation.pieces():
                queue.put_nowait((place, one))
        except Exception as error:
            queue.put_nowait((place, error))

    tasks = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(generations)]
    left = len(tasks)
    try:
        while left:
            place, given = await queue.get()
            if isinstance(given, Exception):
                raise given
            left -= given.ended is not None
            yield place, given
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _report_way(underway: Underway) -> None:
    """Write the ways that policies took into what the answer says of its dial."""
    ended = [draft.ended for draft in underway.drafts]
    if not any(one and one.route for one in ended):
        return
    told: dict[str, list[Any]] = {
        "route": [one and one.route for one in ended],
        "lambda": [one and one.lam for one in ended],
        "rejected_tokens": [one.rejected_tokens if one else 0 for one in ended],
    }
    if any(one and one.confidence is not None for one in ended):
        told["confidence"] = [one and one.confidence for one in ended]
    for key, values in told.items():
        underway.choice.report[key] = values[0] if len(values) == 1 else values
