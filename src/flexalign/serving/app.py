"""The application: OpenAI's routes over the service, their access checks, the schema at ``/docs``.

A route reads the body once, reads the dial by the operator's rules, and passes a typed request to the
service. No layer between a route and its client parses bodies or answers; an answer is serialised
once, in the form of the protocol that was asked (:mod:`flexalign.serving.facades`). The byte-level
:class:`~flexalign.serving.middleware.DialMiddleware` is for vLLM only.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from flexalign.errors import FlexAlignError
from flexalign.serving.dial import DialChoice, DialRules
from flexalign.serving.errors import ApiError, Scope
from flexalign.serving.facades import TRANSLATION, Translation, with_facades
from flexalign.serving.keys import IGNORED, ignored_value
from flexalign.serving.middleware import KeyGate, LoopbackGate, RequestIds
from flexalign.serving.protocol import (
    BODY_LIMIT,
    AnswerEncoder,
    AnswerFormat,
    ChatBody,
    ChatFormat,
    CompletionBody,
    CompletionFormat,
    as_json,
    body_keys,
    body_schema,
    read_chat,
    read_completion,
    read_json,
)
from flexalign.serving.requests import ChatRequest, CompletionRequest, RunningRequest
from flexalign.serving.service import Service
from flexalign.serving.tools import UNPARSED

_log = logging.getLogger("flexalign.serving")

AnyRequest: TypeAlias = ChatRequest | CompletionRequest


def create_app(
    service: Service,
    rules: DialRules,
    *,
    key: str | None = None,
    is_local: bool = False,
    body_limit: int = BODY_LIMIT,
    warns_unknown: bool = False,
) -> Any:
    """Return the ASGI application of a server.

    Args:
        service: Answers the requests.
        rules: The dials that are permitted.
        key: The API key that requests under ``/v1`` must have; None for no key.
        is_local: Without a key, serve only programs and pages of this machine.
        body_limit: The longest body in bytes.
        warns_unknown: Whether unknown keys of a body are named in a header, instead of an error.
    """
    app = FastAPI(title="flexalign", docs_url="/docs", redoc_url=None)
    routes = _Routes(service, rules, body_limit, refuses_unknown=not warns_unknown)
    routes.add_to(app)
    for kind in (ApiError, FlexAlignError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)

    stack: Any = with_facades(app, routes.keys[_CHAT], body_limit=body_limit, takes_objects=True)
    if key is not None:
        stack = KeyGate(stack, key)
    elif is_local:
        stack = LoopbackGate(stack)
    return RequestIds(service.metrics.watched(stack))


@dataclass(frozen=True)
class _RouteFormat:
    """How one route reads its bodies and writes its answers.

    Attributes:
        form: The form of its bodies, for the schema.
        read: Makes a request of a body without its dial, and the dial.
        answers: Writes the answers.
    """

    form: type[BaseModel]
    read: Callable[[Mapping[str, Any], DialChoice], AnyRequest]
    answers: type[AnswerFormat]

    def schema(self) -> dict[str, Any]:
        """Return the part of the OpenAPI schema that describes the route's bodies."""
        content = {"application/json": {"schema": body_schema(self.form)}}
        return {"requestBody": {"required": True, "content": content}}


_CHAT = _RouteFormat(ChatBody, read_chat, ChatFormat)
_COMPLETION = _RouteFormat(CompletionBody, read_completion, CompletionFormat)


class _Routes:
    """The handlers of all paths.

    Attributes:
        keys: The keys that bodies may have, by the form of the route.
    """

    def __init__(
        self, service: Service, rules: DialRules, body_limit: int, *, refuses_unknown: bool
    ) -> None:
        self.keys = {
            form: body_keys(form.form, refuses=refuses_unknown) for form in (_CHAT, _COMPLETION)
        }
        self._service = service
        self._rules = rules
        self._body_limit = body_limit
        self._since = int(time.time())

    def add_to(self, app: FastAPI) -> None:
        """Add the routes; the schema contains those that write answers, with their bodies."""
        for path, route, form in (
            ("/v1/chat/completions", self.chat, _CHAT),
            ("/v1/completions", self.complete, _COMPLETION),
        ):
            app.add_api_route(
                path,
                route,
                methods=["POST"],
                response_model=None,
                openapi_extra=form.schema(),
            )
        # Probes ask by HEAD, which FastAPI's own routes do not answer; Starlette's do.
        for path, shown in (
            ("/v1/models", self.models),
            ("/v1/models/{name:path}", self.model),
            ("/health", self.health),
            ("/metrics", self.metrics),
        ):
            app.add_route(path, shown, methods=["GET"])

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        return await self._answer(request, _CHAT)

    async def complete(self, request: Request) -> Response:
        """Continue prompts, without a chat template."""
        return await self._answer(request, _COMPLETION)

    async def models(self, request: Request) -> Response:
        """List the served model and what its dial accepts."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Describe the model that the path names."""
        name = request.path_params["name"]
        if name != self._service.model.name:
            raise ApiError(404, f"there is no model {name!r:.200} here.", code="model_not_found")
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        """Return 200 if the engine runs, 503 if it does not."""
        is_well = self._service.engine.is_alive
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    async def metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _answer(self, request: Request, form: _RouteFormat) -> Response:
        translation = _translation(request)
        encoder = translation or AnswerEncoder()
        if translation is None:
            body = await read_json(request.scope, request.receive, self._body_limit)
        else:
            body = translation.body  # the facade has read it
        if body is None:
            return _NoResponse()

        # The headers are stored at the request, so that an error has them too.
        choice = self._rules.choose(body, is_chat=form is _CHAT)
        request.state.headers = _headers(choice)
        choice.ignored += self.keys[form].sort_out(body)
        request.state.headers = headers = _headers(choice)
        running = await self._service.begin(form.read(body, choice))
        model = self._service.model
        answers = form.answers(model.name, model.tokenizer, model.tags, choice)
        if running.tools is not None and isinstance(answers, ChatFormat):
            answers.read_calls(running.tools)
            if not running.tools.is_parsed:
                headers |= {UNPARSED: "text"}
        if running.sampling.stream:
            return _EventStream(self._chunks(running, answers), encoder, running, headers)

        # The engine drops the request if the client disconnects while it waits.
        leaving = asyncio.create_task(_cancel_when_gone(request.receive, running))
        try:
            await self._service.finish(running)
        except asyncio.CancelledError as error:
            raise _as_api_error(error) from error
        finally:
            leaving.cancel()
            running.cancel()

        usage = self._service.usage(running)
        answer = answers.answer(running.drafts, running.sampling.logprobs, usage)
        return _whole_response(encoder, encoder.whole(answer), 200, headers)

    async def _chunks(
        self, running: RunningRequest, answers: AnswerFormat
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of an answer as it is written."""
        sampling = running.sampling
        # With include_usage every chunk has the key, and only the last one has the counts.
        more = {"usage": None} if sampling.include_usage else {}
        for draft in running.drafts:
            for choice in answers.opening(draft):
                yield answers.chunk([choice], **more)

        async for draft, piece in self._service.pieces(running):
            for choice in answers.choices_of(draft, piece, sampling.logprobs):
                yield answers.chunk([choice], **more)

        if sampling.include_usage:
            usage = as_json(self._service.usage(running))
            yield answers.chunk([], usage=usage)

    def _model(self) -> dict[str, Any]:
        model = self._service.model
        prompts = None if model.rendering is None else model.rendering.prompts
        return {
            "id": model.name,
            "object": "model",
            "created": self._since,
            "owned_by": "flexalign",
            "max_model_len": model.context,
            "dial": self._rules.to_json(),
            **({} if prompts is None else {"prompts": prompts.to_json()}),
        }


def _headers(choice: DialChoice) -> dict[str, str]:
    """Return the headers that name the keys without effect; errors have them too."""
    return {IGNORED: ignored_value(choice.ignored)} if choice.ignored else {}


def _translation(request: Request) -> Translation | None:
    """Return the translation of a request of another protocol; None for OpenAI's own."""
    translation: Translation | None = request.scope.get(TRANSLATION)
    return translation


def _whole_response(
    encoder: AnswerEncoder, content: bytes, status: int, headers: Mapping[str, str]
) -> Response:
    response = Response(content, status, headers=headers, media_type="application/json")
    response.raw_headers = encoder.headers(response.raw_headers, len(content))
    return response


class _NoResponse(Response):
    """Sends nothing: the client has disconnected."""

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        return


class _EventStream(Response):
    """A stream of events. The engine drops its request when the client disconnects."""

    def __init__(
        self,
        chunks: AsyncIterator[dict[str, Any]],
        encoder: AnswerEncoder,
        running: RunningRequest,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", **headers}
        )
        del self.headers["content-length"]
        self.raw_headers = encoder.headers(self.raw_headers)
        self._chunks = chunks
        self._encoder = encoder
        self._running = running

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        leaving = asyncio.create_task(_cancel_when_gone(receive, self._running))
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async for content in self._events():
                if content:
                    await send({"type": "http.response.body", "body": content, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            leaving.cancel()
            self._running.cancel()

    async def _events(self) -> AsyncIterator[bytes]:
        """Yield the events. The status is sent before, so a failure becomes an event too."""
        try:
            yield self._encoder.begin()
            async for chunk in self._chunks:
                yield self._encoder.chunk(chunk)
            yield self._encoder.end()
        except (Exception, asyncio.CancelledError) as error:
            yield self._encoder.chunk(_as_api_error(error).to_json())


async def _cancel_when_gone(receive: Any, running: RunningRequest) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    running.cancel()


async def _on_error(request: Request, error: Exception) -> Response:
    told = _as_api_error(error)
    if isinstance(error, HTTPException):
        told.message = f"{request.method} {request.url.path:.200}: {told.message.lower()}."
    headers = told.headers | getattr(request.state, "headers", {})
    encoder = _translation(request) or AnswerEncoder()
    return _whole_response(encoder, encoder.error(told.to_json()), told.status, headers)


def _as_api_error(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, asyncio.CancelledError):  # by uvicorn, at the end of the grace period
        return ApiError(503, "the server is shutting down; ask again later.")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, FlexAlignError):
        return ApiError(400 if isinstance(error, ValueError) else 503, str(error))
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why.")
