"""The application: OpenAI's routes over a service, with the dial and the key before them."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from flexalign.data.rendering import Rendering
from flexalign.data.thinking import ThinkingTags
from flexalign.data.traces import derive_seed
from flexalign.errors import ConfigError, DataError, FlexAlignError
from flexalign.generation.text import ResponseText
from flexalign.serving.dial import Choice, DialRules
from flexalign.serving.engine import Engine, Generation, Job, Piece
from flexalign.serving.errors import ApiError, Scope, as_sent
from flexalign.serving.metrics import Metrics
from flexalign.serving.middleware import CHOICE, DialMiddleware, KeyGate, LoopbackGate
from flexalign.serving.protocol import (
    BODY_LIMIT,
    AnswerForm,
    ChatForm,
    ChatRequest,
    CompletionForm,
    CompletionRequest,
    Draft,
    Sampling,
    count_usage,
    event,
    read_chat,
    read_completion,
)

# From a request to the engine and back: prompts encoded, jobs submitted, answers put together.


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
            return tuple(Rendering(tokenizer).prompt(messages).ids)
        except DataError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error
        except Exception as error:  # a template is a program, and these are its arguments
            raise ApiError(
                400,
                f"messages: the chat template fails on them ({error!r:.200}); send others.",
                param="messages",
            ) from error

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


_log = logging.getLogger("flexalign.serving")


def create_app(
    service: Service,
    rules: DialRules,
    *,
    key: str | None = None,
    is_local: bool = False,
    body_limit: int = BODY_LIMIT,
) -> Any:
    """Return the ASGI application of a server.

    Args:
        service: What answers.
        rules: What dials are permitted.
        key: What requests under ``/v1`` must carry, if anything.
        is_local: Serve this machine's programs and pages alone, where there is no key.
        body_limit: The longest body in bytes.
    """
    app = FastAPI(title="flexalign", docs_url=None, redoc_url=None, openapi_url=None)
    routes = _Routes(service, rules)
    for method, path, endpoint in (
        ("POST", "/v1/chat/completions", routes.chat),
        ("POST", "/v1/completions", routes.complete),
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/models/{name:path}", routes.model),
        ("GET", "/health", routes.health),
        ("GET", "/metrics", routes.metrics),
    ):
        app.add_route(path, endpoint, methods=[method])
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(FlexAlignError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(Exception, _on_error)
    stack: Any = DialMiddleware(app, rules, body_limit=body_limit)
    if key is not None:
        stack = KeyGate(stack, key)
    elif is_local:
        stack = LoopbackGate(stack)
    return service.metrics.watched(stack)


class _Routes:
    """What each path does."""

    def __init__(self, service: Service, rules: DialRules) -> None:
        self._service = service
        self._rules = rules
        self._since = int(time.time())

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat(await request.json()))

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, read_completion(await request.json()))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._service.model.name:
            raise ApiError(404, f"there is no model {name!r:.200} here.", code="model_not_found")
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        is_well = self._service.engine.is_alive
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _answer(self, request: Request, asked: ChatRequest | CompletionRequest) -> Response:
        underway = await self._service.begin(asked, request.scope[CHOICE])
        if asked.sampling.stream:
            return _EventStream(self._service.stream(underway), underway)
        leaving = asyncio.create_task(_cancel_when_gone(request.receive, underway))
        try:
            return JSONResponse(await self._service.answer(underway))
        except asyncio.CancelledError as error:
            raise _as_api_error(error) from error
        finally:
            leaving.cancel()
            underway.cancel()

    def _model(self) -> dict[str, Any]:
        model = self._service.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._since,
            "owned_by": "flexalign",
            "max_model_len": model.context,
            "dial": self._rules.to_json(),
        }


class _EventStream(Response):
    """A stream of events that lets go of its request when the client leaves."""

    def __init__(self, events: AsyncIterator[bytes], underway: Underway) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._underway = underway

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:  # type: ignore[override]
        leaving = asyncio.create_task(_cancel_when_gone(receive, self._underway))
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async for content in self._guarded():
                await send({"type": "http.response.body", "body": content, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()
            self._underway.cancel()

    async def _guarded(self) -> AsyncIterator[bytes]:
        """Yield the events; the status is sent, so that a failure is one of them."""
        try:
            async for content in self._events:
                yield content
        except (Exception, asyncio.CancelledError) as error:
            yield event(_as_api_error(error).to_json())


async def _cancel_when_gone(receive: Any, underway: Underway) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    underway.cancel()


async def _on_error(request: Request, error: Exception) -> Response:
    told = _as_api_error(error)
    if isinstance(error, HTTPException):
        told.message = f"{request.method} {request.url.path:.200}: {told.message.lower()}."
    return JSONResponse(told.to_json(), told.status, headers=told.headers)


def _as_api_error(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, asyncio.CancelledError):  # by uvicorn, when the grace is over
        return ApiError(503, "the server is shutting down; ask again later.")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, FlexAlignError):
        return ApiError(400 if isinstance(error, ValueError) else 503, str(error))
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why.")
