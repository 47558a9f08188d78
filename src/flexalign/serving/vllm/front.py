"""The dial in front of vLLM's own OpenAI server: what its ``--middleware`` takes.

``flexalign serve --engine vllm`` starts vLLM with it, and so may anybody::

    vllm serve FOLDER --generation-config vllm --middleware flexalign.serving.vllm.front.Front

FOLDER is of :func:`flexalign.serving.vllm.folder.prepare_folder`; its rules are the adapter's. What an
operator decides beside them stands in the environment variable :data:`VARIABLE`.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexalign.data.thinking import ThinkingTags
from flexalign.errors import ConfigError, FlexAlignError
from flexalign.inra.config import InRaConfig
from flexalign.loading import load_tokenizer
from flexalign.serving.bodies import BODY_LIMIT, parse_body, read_body, with_body
from flexalign.serving.dial import DIAL_KEYS, Choice, DialRules, refuse_misspelt
from flexalign.serving.echo import Echo
from flexalign.serving.errors import ApiError, Scope, send_error
from flexalign.serving.loopback import LoopbackGate
from flexalign.serving.middleware import PATHS, KeyGate, path_of
from flexalign.serving.playground import Playground
from flexalign.serving.rules import adapter_rules
from flexalign.serving.vllm.asking import EngineDial, refuse_engine_lambda
from flexalign.serving.vllm.counting import DialCount
from flexalign.serving.vllm.refusals import openai_errors
from flexalign.serving.vllm.retelling import Reading

__all__ = ["KEY_VARIABLE", "MIDDLEWARE", "VARIABLE", "Front", "FrontOptions", "build_front"]

MIDDLEWARE = f"{__name__}.Front"
"""What vLLM's ``--middleware`` is told."""

VARIABLE = "FLEXALIGN_FRONT"
"""The environment variable with :class:`FrontOptions` as JSON."""

KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable that vLLM too reads its key from."""


@dataclass(frozen=True)
class FrontOptions:
    """What an operator decides.

    Attributes:
        lambda_range: λ to permit; the adapter's own range if not given.
        body_limit: The longest body in bytes.
        playground: Whether there is a page to try the dial from.
        is_local: Whether this machine's programs and pages alone are served, if there is no key.
    """

    lambda_range: tuple[float, float] | None = None
    body_limit: int = BODY_LIMIT
    playground: bool = False
    is_local: bool = False

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
            )
        except (ValueError, TypeError, IndexError) as error:
            raise ConfigError(f"{VARIABLE} cannot be read ({error}); unset it.") from error


class Front:
    """ASGI middleware without arguments; it reads its rules when vLLM's server starts."""

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
                self._stack = build_front(self._app, folder, options, key)
            except FlexAlignError as error:
                if scope["type"] != "lifespan":
                    raise
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
        await self._stack(scope, receive, send)


def build_front(app: Any, folder: Path, options: FrontOptions, key: str | None) -> Any:
    """Return the application with everything that stands before it.

    Args:
        app: vLLM's.
        folder: What it serves.
        options: What the operator decided.
        key: What requests must carry, if anything.

    Raises:
        CheckpointError: If the folder holds no adapter.
        ConfigError: If the options do not fit it.
    """
    settings = InRaConfig.load(folder)
    rules = adapter_rules(settings, options.lambda_range)
    tokenizer = load_tokenizer(folder)
    reading = Reading(tokenizer, settings.tags or ThinkingTags.of(tokenizer))
    count = DialCount()
    stack: Any = EngineDial(app, rules, settings, reading, count, body_limit=options.body_limit)
    stack = openai_errors(count.told(_OtherRoutes(stack, rules, options.body_limit)))
    if key:
        stack = KeyGate(stack, key)
    elif options.is_local:
        stack = LoopbackGate(stack)
    return Playground(stack) if options.playground else stack


class _OtherRoutes:
    """vLLM's routes that have no dial: one that is turned there is refused, not passed over."""

    def __init__(self, app: Any, rules: DialRules, body_limit: int) -> None:
        self._app = app
        self._rules = rules
        self._limit = body_limit

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        path = path_of(scope) if scope["type"] == "http" else None
        if path is not None and scope["method"] == "POST" and path not in PATHS:
            try:
                content = await read_body(scope, receive, self._limit)
                if content is None:
                    return
                self._refuse_dial(content, path)
            except ApiError as error:
                await send_error(error, send)
                return
            scope, receive = with_body(scope, content, receive)
        elif path == "/v1/models":
            send = _Models(self._rules, send)
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


class _Models(Echo):
    """Writes the dial beside each model."""

    def __init__(self, rules: DialRules, send: Any) -> None:
        super().__init__(Choice(None), send)
        self._rules = rules

    def tell(self, answer: Any) -> Any:
        for model in answer["data"]:
            model["dial"] = self._rules.to_json()
        return answer
