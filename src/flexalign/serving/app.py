"""The application: OpenAI's routes over a service, with the dial and the key before them."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from flexalign.errors import FlexAlignError
from flexalign.serving.answers import event
from flexalign.serving.bodies import BODY_LIMIT
from flexalign.serving.dial import DialRules
from flexalign.serving.errors import ApiError, Scope
from flexalign.serving.loopback import LoopbackGate
from flexalign.serving.middleware import CHOICE, DialMiddleware, KeyGate
from flexalign.serving.protocol import ChatRequest, CompletionRequest, read_chat, read_completion
from flexalign.serving.service import Service, Underway

__all__ = ["create_app"]

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
