"""The dial in front of vLLM's own OpenAI server: what its ``--middleware`` takes.

``flexalign serve --engine vllm`` starts vLLM with it, and so may anybody::

    vllm serve FOLDER --generation-config vllm --middleware flexalign.serving.vllm.middleware.Front

FOLDER is of :func:`flexalign.serving.vllm.folder.prepare_folder`; its rules are the adapter's. What an
operator decides beside them stands in the environment variable :data:`VARIABLE`.

A request passes, from the outside in: the playground and the gates, :class:`ErrorRewriting`,
:class:`RoutesWithoutDial`, :class:`VllmDialMiddleware`, and then vLLM. What is done here and not by
vLLM's own plugins, and why, is in ``docs/decisions.md``.
"""

import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_type_hints

import torch
from pydantic import BaseModel

from flexalign.data.template_arguments import require_read
from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, FlexAlignError
from flexalign.generation.dial_config import DialConfig
from flexalign.lambdas import Adaptive, Dial, Exit, Fixed, Route, Schedule, way_dial
from flexalign.models.loading import load_tokenizer
from flexalign.serving.dial import DIAL_KEYS, DialChoice, DialRules, adapter_rules, refuse_misspelt
from flexalign.serving.errors import ApiError, Scope, send_error
from flexalign.serving.facades import with_facades
from flexalign.serving.keys import BodyKeys
from flexalign.serving.middleware import (
    PATHS,
    DialMiddleware,
    DialWriter,
    KeyGate,
    LoopbackGate,
    RequestIds,
    path_of,
    with_body,
    with_length,
)
from flexalign.serving.playground import Playground
from flexalign.serving.protocol import BODY_LIMIT, WITHOUT_EFFECT, parse_body, read_body
from flexalign.serving.vllm.adaptive import StreamedFastAnswer, fast_body, join_chunks
from flexalign.serving.vllm.folder import prepared_dial
from flexalign.serving.vllm.lambdas import LAMBDA_KEY
from flexalign.serving.vllm.responses import ResponseRewriter, ThinkingReader, are_ids
from flexalign.serving.vllm.stops import STOPS_KEY, are_stops_installed, with_stops

if TYPE_CHECKING:
    from flexalign.serving.metrics import DialMetrics

MIDDLEWARE = f"{__name__}.Front"
"""What vLLM's ``--middleware`` is told."""

VARIABLE = "FLEXALIGN_FRONT"
"""The environment variable with :class:`FrontOptions` as JSON."""

KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable that vLLM too reads its key from."""

_EXTRAS = "vllm_xargs"
"""The key of a body whose values vLLM hands to the engine as ``SamplingParams.extra_args``."""

_log = logging.getLogger("flexalign.serving")

_QUEUE_IS_FULL = ("cannot accept new requests", "backlog limit")
"""What vLLM 0.32 says, with a 503, when ``--max-num-queued-reqs`` or ``-tokens`` is reached."""


@dataclass(frozen=True)
class FrontOptions:
    """What an operator decides.

    Attributes:
        lambda_range: λ to permit; the adapter's own range if not given.
        body_limit: The longest body in bytes.
        playground: Whether there is a page to try the dial from.
        is_local: Whether this machine's programs and pages alone are served, if there is no key.
        warns_unknown: Whether unknown keys of a body are named in a header, instead of an error.
    """

    lambda_range: tuple[float, float] | None = None
    body_limit: int = BODY_LIMIT
    playground: bool = False
    is_local: bool = False
    warns_unknown: bool = False

    def to_text(self) -> str:
        """Return what stands in the environment variable."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str | None) -> "FrontOptions":
        """Read the environment variable.

        Raises:
            ConfigError: If it is malformed.
        """
        try:
            options = cls(**json.loads(text or "{}"))
            limits = options.lambda_range
            return cls(
                (float(limits[0]), float(limits[1])) if limits else None,
                int(options.body_limit),
                bool(options.playground),
                bool(options.is_local),
                bool(options.warns_unknown),
            )
        except (ValueError, TypeError, IndexError) as error:
            raise ConfigError(f"{VARIABLE} cannot be read ({error}); unset it.") from error


class Front:
    """The middleware that vLLM makes, from its application alone; it reads its rules at the start.

    Its name stands in command lines.
    """

    def __init__(self, app: Any) -> None:
        """Stand before vLLM's application."""
        self._app = app
        self._stack: Any = None

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request; the first of all is the start of the server itself."""
        if self._stack is None:
            try:
                folder = Path(scope["app"].state.args.model)
                options = FrontOptions.read(os.environ.get(VARIABLE))
                key = os.environ.get(KEY_VARIABLE)
                routes = getattr(scope["app"], "routes", ())
                keys = engine_keys(routes, refuses=not options.warns_unknown)
                self._stack = build_front(self._app, folder, options, key, keys)
            except FlexAlignError as error:
                if scope["type"] != "lifespan":
                    raise
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
        await self._stack(scope, receive, send)


def engine_keys(routes: Iterable[Any], *, refuses: bool) -> dict[str, BodyKeys]:
    """Return the keys that vLLM's bodies may have, by path, as its routes declare them.

    vLLM takes any key and passes over those that it does not know.

    Args:
        routes: Those of its application.
        refuses: Whether an unknown key is an error.
    """
    found: dict[str, BodyKeys] = {}
    for route in _flat(routes):
        if getattr(route, "path", None) in PATHS:
            hints = get_type_hints(route.endpoint)
            forms = [one for name, one in hints.items() if name != "return" and _is_form(one)]
            if forms:
                found[route.path] = BodyKeys.of(forms[0], WITHOUT_EFFECT, refuses=refuses)
    for path in PATHS:
        if path not in found:
            _log.warning("the keys of %s are not known: unknown ones are not refused.", path)
    return found


def _flat(routes: Iterable[Any]) -> Iterator[Any]:
    """Yield routes, and those of included routers, which newer versions of FastAPI keep apart."""
    for route in routes:
        included = getattr(route, "original_router", None)
        yield from [route] if included is None else _flat(included.routes)


def _is_form(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


def build_front(
    app: Any,
    folder: Path,
    options: FrontOptions,
    key: str | None,
    keys: Mapping[str, BodyKeys] | None = None,
) -> Any:
    """Return the application with everything that stands before it.

    Args:
        app: vLLM's.
        folder: What it serves.
        options: What the operator decided.
        key: What requests must carry, if anything.
        keys: The keys that bodies may have, by path; others are not judged.

    Raises:
        CheckpointError: If the folder holds no adapter.
        ConfigError: If the options do not fit it.
    """
    settings = prepared_dial(folder)
    rules = adapter_rules(settings, options.lambda_range)
    tokenizer = load_tokenizer(folder)
    reader = ThinkingReader(tokenizer, settings.tags or ThinkingTags.of(tokenizer))
    dial_metrics()  # told as 0 before the first request

    keys, limit = keys or {}, options.body_limit
    stack: Any = VllmDialMiddleware(app, rules, settings, reader, keys, body_limit=limit)
    stack = ErrorRewriting(RoutesWithoutDial(stack, rules, limit))
    stack = with_facades(stack, keys.get(PATHS[0]), body_limit=limit)
    if key:
        stack = KeyGate(stack, key)
    elif options.is_local:
        stack = LoopbackGate(stack)
    return RequestIds(Playground(stack) if options.playground else stack)


class VllmDialMiddleware(DialMiddleware):
    """The dial in front of vLLM, which takes a λ or a schedule, and knows no policy.

    A policy that chooses a way is followed here. Under the adaptive one vLLM first writes the fast
    answer; if that is not sure enough, the slow one is asked for, whose prompt vLLM has cached.
    """

    def __init__(
        self,
        app: Any,
        rules: DialRules,
        settings: DialConfig,
        reader: ThinkingReader,
        keys: Mapping[str, BodyKeys] | None = None,
        *,
        body_limit: int = BODY_LIMIT,
    ) -> None:
        """Stand before vLLM's application.

        Args:
            app: vLLM's.
            rules: What is permitted.
            settings: The adapter's.
            reader: Of its model's thinking.
            keys: The keys that bodies may have, by path; others are not judged.
            body_limit: The longest body in bytes.
        """
        super().__init__(app, rules, keys, body_limit=body_limit)
        self._settings = settings
        self._reader = reader

    async def pass_on(
        self, body: dict[str, Any], choice: DialChoice, scope: Scope, receive: Any, send: Any
    ) -> None:
        """Let vLLM answer.

        Raises:
            ApiError: If λ would not arrive, or vLLM does not serve what is asked under the policy.
        """
        refuse_engine_lambda(body)
        _refuse_unserved(body, choice.dial)
        is_chat = path_of(scope) == PATHS[0]
        if is_chat:
            _require_template_read(self._reader.tokenizer, body)
        rewriter = ResponseRewriter(self._reader, body, is_chat, choice, _counted(choice, send))

        # What the rewriter needs to see: the chat's prompt, and tags that vLLM would hide.
        if is_chat:
            body = body | {"return_prompt_text": True}
        if self._reader.has_special_tags:
            body = {"skip_special_tokens": False} | body

        # A client that hides the tags leaves the stop texts to vLLM, which then sees one text.
        hides_tags = self._reader.has_special_tags and bool(body.get("skip_special_tokens"))
        if is_chat and not hides_tags and are_stops_installed():
            body = with_stops(body, _EXTRAS, self._reader.tags)

        dial = choice.dial
        if isinstance(dial, Route):
            dial = _drawn(dial, body.get("seed"), choice)
        elif isinstance(dial, Adaptive):
            slow = await self._answer_fast(dial, body, choice, scope, receive, rewriter)
            if slow is None:
                return
            dial = slow

        lam = cast("Fixed | Schedule", dial)  # all that is left: a model with a dial has a default
        scope, receive = with_body(scope, _with_lambda(body, lam), receive)
        await self.app(scope, receive, rewriter)

    async def _answer_fast(
        self,
        policy: Adaptive,
        body: dict[str, Any],
        choice: DialChoice,
        scope: Scope,
        receive: Any,
        rewriter: ResponseRewriter,
    ) -> Fixed | None:
        """Answer the fast way; return the slow one's dial if that is not sure enough."""
        is_chat = path_of(scope) == PATHS[0]
        answer = StreamedFastAnswer(policy, self._settings.threshold(policy), is_chat)
        asked = _with_lambda(fast_body(body, is_chat), way_dial(policy, "fast"))
        if not await answer.run(self.app, asked, scope, receive):
            return None  # the client has gone

        is_accepted = answer.is_accepted
        dial = way_dial(policy, "fast" if is_accepted else "slow")
        if not answer.is_failed:
            choice.report |= {
                "route": "fast" if is_accepted else "slow",
                "lambda": dial.lam,
                "rejected_tokens": 0 if is_accepted else answer.tokens,
                "confidence": answer.confidence,
            }
            if not is_accepted:
                return dial

        # An accepted answer, or vLLM's error. vLLM streamed it, whatever the client asked for.
        messages = answer.messages
        if is_accepted and not body.get("stream"):
            messages = _whole(join_chunks(answer.chunks))
        for message in messages:
            await rewriter(message)
        return None


def refuse_engine_lambda(body: dict[str, Any]) -> None:
    """Refuse a body that gives the engine a λ past the operator's range.

    Raises:
        ApiError: If it does.
    """
    sampling = body.get("sampling_params")
    extra_args = sampling.get("extra_args") if isinstance(sampling, dict) else None
    for extras in (body.get(_EXTRAS), extra_args):
        if isinstance(extras, dict) and STOPS_KEY in extras:
            raise ApiError(
                400,
                f"{_EXTRAS} may not hold {STOPS_KEY!r}, which is the server's; say stop itself.",
                param=_EXTRAS,
                code="invalid_value",
            )
        if isinstance(extras, dict) and LAMBDA_KEY in extras:
            raise ApiError(
                400,
                f"{_EXTRAS} may not hold {LAMBDA_KEY!r}, which is the server's; say {LAMBDA_KEY} itself, "
                f"beside the messages or the prompt, at {' or '.join(PATHS)}.",
                param=_EXTRAS,
                code="invalid_dial",
            )


def _drawn(policy: Route, seed: object, choice: DialChoice) -> Fixed:
    """Draw the way of a request by its seed, as the local engine does; report it."""
    is_seed = isinstance(seed, int) and -(2**63) <= seed < 2**63
    generator = torch.Generator().manual_seed(seed if is_seed else secrets.randbits(62))  # type: ignore[arg-type]

    way = policy.draw(generator)
    dial = way_dial(policy, way)
    choice.report |= {"route": way, "lambda": dial.lam, "rejected_tokens": 0}
    return dial


def _with_lambda(body: dict[str, Any], dial: Fixed | Schedule) -> dict[str, Any]:
    """Return a body that asks vLLM for this λ, beside what else it tells the engine."""
    extras = body.get(_EXTRAS)
    if extras is not None and not isinstance(extras, dict):
        return body  # vLLM refuses it, with the reason

    value: object = dial.lam if isinstance(dial, Fixed) else dial.to_json()
    if isinstance(value, dict):
        value = json.dumps(value)  # vLLM takes texts and numbers there
    return body | {_EXTRAS: {**(extras or {}), LAMBDA_KEY: value}}


def _count_prompts(body: dict[str, Any]) -> int:
    """Count the prompts of a completion."""
    given = body.get("prompt")
    return len(given) if isinstance(given, list) and not are_ids(given) else 1


def _whole(answer: dict[str, Any]) -> list[Scope]:
    """Return the messages by which an application sends a whole answer."""
    content = json.dumps(answer, ensure_ascii=False).encode()
    kind = (b"content-type", b"application/json")
    start = {"type": "http.response.start", "status": 200, "headers": [kind]}
    return [start, {"type": "http.response.body", "body": content}]


def _refuse_unserved(body: dict[str, Any], dial: Dial | None) -> None:
    """Refuse what vLLM does not serve: with λ at all, or under a policy that chooses a way."""
    if body.get("use_beam_search"):
        raise _refused("use_beam_search", "vLLM's beam search takes no λ; leave it out.")
    if isinstance(dial, Exit):
        raise _refused(
            "lambda",
            "the exit policy is not served on vLLM, which cannot close a thinking on trial; start "
            "the server with --engine local, or take an adaptive policy.",
        )
    if not isinstance(dial, Adaptive | Route):
        return

    if body.get("n") not in (None, 1) or _count_prompts(body) > 1:
        raise _refused(
            "n",
            "n must be 1, and the prompt one, under the adaptive and the route policy on vLLM; ask "
            "once for each answer.",
        )
    for key in ("tools", "echo") if isinstance(dial, Adaptive) else ():
        if body.get(key):
            raise _refused(key, f"{key} is not served under the adaptive policy on vLLM.")


def _require_template_read(tokenizer: Any, body: Mapping[str, Any]) -> None:
    """Refuse arguments that the model's chat template does not read: vLLM drops them in silence."""
    given = body.get("chat_template_kwargs")
    if not isinstance(given, dict) or body.get("chat_template") is not None:
        return  # vLLM refuses it, or judges the template that the request brings
    try:
        require_read(tokenizer, given, "chat_template_kwargs")
    except ConfigError as error:
        raise _refused("chat_template_kwargs", str(error)) from error


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def _counted(choice: DialChoice, send: Any) -> Any:
    """Return a client's ``send`` that counts the dial of an answer as it begins."""

    async def counting(message: Scope) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            metrics = dial_metrics()
            metrics.began(choice.dial)
            metrics.went(choice.report.get("policy"), choice.report.get("route"))
        await send(message)

    return counting


@cache
def dial_metrics() -> "DialMetrics":
    """Return the counts of dials, one for each process, in the registry that vLLM's ``/metrics`` reads.

    Where vLLM runs several API processes, prometheus_client adds up what they count.
    """
    from prometheus_client import REGISTRY

    from flexalign.serving.metrics import DialMetrics

    return DialMetrics(REGISTRY)


class RoutesWithoutDial:
    """vLLM's routes that have no dial: one that is turned there is refused, not passed over."""

    def __init__(self, app: Any, rules: DialRules, body_limit: int) -> None:
        """Stand before an application that serves the dial at :data:`PATHS`."""
        self._app = app
        self._rules = rules
        self._limit = body_limit

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request."""
        path = path_of(scope) if scope["type"] == "http" else None
        if path is not None and scope["method"] == "POST" and path not in PATHS:
            try:
                content = await read_body(scope, receive, self._limit)
                if content is None:  # the client has gone
                    return
                self._refuse_dial(content, path)
            except ApiError as error:
                await send_error(error, send)
                return
            scope, receive = with_body(scope, content, receive)
        elif path == "/v1/models":
            send = _ModelsRewriter(self._rules, send)
        await self._app(scope, receive, send)

    def _refuse_dial(self, content: bytes, path: str) -> None:
        try:
            body = parse_body(content)
        except ApiError:
            return  # a form, or nothing; vLLM knows

        refuse_engine_lambda(body)
        refuse_misspelt(body)
        found = [key for key in DIAL_KEYS if body.get(key) is not None]
        if found:
            raise ApiError(
                400,
                f"{path[:80]} has no dial; {found[0]} is served at {' and '.join(PATHS)}.",
                param=found[0],
                code="invalid_dial",
            )


class _ModelsRewriter(DialWriter):
    """Writes what the dial may be beside each model."""

    def __init__(self, rules: DialRules, send: Any) -> None:
        super().__init__(DialChoice(None), send)
        self._rules = rules

    def rewrite(self, answer: Any) -> Any:
        for model in answer["data"]:
            model["dial"] = self._rules.to_json()
        return answer


class ErrorRewriting:
    """Gives vLLM's errors the form that a client of OpenAI's expects.

    An unknown route's ``{"detail": …}`` becomes an ``error``; the type is a word of OpenAI's, and
    the code no number; a full queue is a 429 that says when to come back.
    """

    def __init__(self, app: Any) -> None:
        """Stand before an application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Serve a request."""
        await self._app(scope, receive, _ErrorRewriter(send) if scope["type"] == "http" else send)


class _ErrorRewriter:
    """A client's ``send``, which holds an error back until it is whole."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self._start: Scope | None = None
        self._body = b""

    async def __call__(self, message: Scope) -> None:
        if message["type"] == "http.response.start" and _is_error(message):
            self._start = message
        elif self._start is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._end(self._start)

    async def _end(self, start: Scope) -> None:
        error = _rewritten(start["status"], self._body)
        body, headers = self._body, list(start["headers"])
        if error is not None:
            body = json.dumps(error.to_json(), ensure_ascii=False).encode()
            headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
            start = {**start, "status": error.status}
        await self._send({**start, "headers": with_length(headers, len(body))})
        await self._send({"type": "http.response.body", "body": body})


def _is_error(message: Scope) -> bool:
    kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
    return message["status"] >= 400 and any(b"application/json" in kind for kind in kinds)


def _rewritten(status: int, body: bytes) -> ApiError | None:
    """Return an error of vLLM's as ours; None for one that is ours already, or that is unknown."""
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    if not isinstance(answer, dict):
        return None
    if isinstance(answer.get("detail"), str):
        return ApiError(status, answer["detail"])

    error = answer.get("error")
    if not isinstance(error, dict) or not isinstance(error.get("code"), int):
        return None

    message = str(error.get("message"))
    if status == 503 and any(words in message for words in _QUEUE_IS_FULL):
        return ApiError(429, message, code="queue_full", headers={"retry-after": "1"})
    param = error.get("param")
    return ApiError(status, message, param=param if isinstance(param, str) else None)
