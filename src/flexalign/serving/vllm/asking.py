"""What vLLM is asked for each dial, and what is refused because λ would not arrive."""

import json
import secrets
from typing import Any, cast

import torch

from flexalign.inra.config import InRaConfig
from flexalign.policies import Adaptive, Dial, Fixed, Route
from flexalign.schedules import Schedule
from flexalign.serving.bodies import BODY_LIMIT, with_body
from flexalign.serving.dial import Choice, DialRules
from flexalign.serving.echo import Echo
from flexalign.serving.errors import ApiError, Scope
from flexalign.serving.middleware import PATHS, DialMiddleware, path_of
from flexalign.serving.vllm.attempt import Attempt, fast_body, fold
from flexalign.serving.vllm.counting import DialCount
from flexalign.serving.vllm.lambdas import LAMBDA_KEY
from flexalign.serving.vllm.retelling import Reading, Retold, are_ids

__all__ = ["EngineDial", "refuse_engine_lambda"]

_EXTRAS = "vllm_xargs"


class EngineDial(DialMiddleware):
    """The dial in front of vLLM, which takes a λ or a schedule, and knows no policy.

    A policy that chooses a way is followed here. Under the adaptive one vLLM first writes the fast
    answer; if that is not sure enough, the slow one is asked for, whose prompt vLLM has cached.
    """

    def __init__(
        self,
        app: Any,
        rules: DialRules,
        settings: InRaConfig,
        reading: Reading,
        count: DialCount,
        *,
        body_limit: int = BODY_LIMIT,
    ) -> None:
        """Stand before vLLM's application.

        Args:
            app: vLLM's.
            rules: What is permitted.
            settings: The adapter's.
            reading: Of its model.
            count: Of the dials that it serves.
            body_limit: The longest body in bytes.
        """
        super().__init__(app, rules, body_limit=body_limit)
        self._settings = settings
        self._reading = reading
        self._count = count

    async def pass_on(
        self, body: dict[str, Any], choice: Choice, scope: Scope, receive: Any, send: Any
    ) -> None:
        """Let vLLM answer."""
        refuse_engine_lambda(body)
        is_chat = path_of(scope) == PATHS[0]
        self._check(body, choice.dial)
        send = self._count.counted(choice, send)
        retold = Retold(self._reading, body, is_chat, choice, send)
        if is_chat:
            body = body | {"return_prompt_text": True}
        if self._reading.has_special_tags:
            body = {"skip_special_tokens": False} | body
        dial = choice.dial
        if isinstance(dial, Route):
            dial = _drawn(dial, body.get("seed"), choice)
        elif isinstance(dial, Adaptive):
            later = await self._go_fast(dial, body, choice, scope, receive, retold)
            if later is None:
                return
            dial = later
        lam = cast("Fixed | Schedule", dial)  # all that is left: a model with a dial has a default
        scope, receive = with_body(scope, _with_lambda(body, lam), receive)
        await self.app(scope, receive, retold)

    async def _go_fast(
        self,
        policy: Adaptive,
        body: dict[str, Any],
        choice: Choice,
        scope: Scope,
        receive: Any,
        answer: Echo,
    ) -> Fixed | None:
        """Answer the fast way; return the slow one's dial if that is not sure enough."""
        fast = Fixed(policy.fast_lambda)
        is_chat = path_of(scope) == PATHS[0]
        tried = Attempt(policy, self._settings.threshold(policy), is_chat)
        asked = _with_lambda(fast_body(body, is_chat), fast)
        if not await tried.run(self.app, asked, scope, receive):
            return None
        is_sure = tried.is_accepted
        lam = policy.fast_lambda if is_sure else policy.slow_lambda
        if not tried.is_failed:
            choice.report |= {
                "route": "fast" if is_sure else "slow",
                "lambda": lam,
                "rejected_tokens": 0 if is_sure else tried.tokens,
                "confidence": tried.confidence,
            }
            if not is_sure:
                return Fixed(lam)
        messages = tried.messages
        if is_sure and not body.get("stream"):
            messages = _whole(fold(tried.chunks))
        for message in messages:
            await answer(message)
        return None

    def _check(self, body: dict[str, Any], dial: Dial | None) -> None:
        if body.get("use_beam_search"):
            raise _refused("use_beam_search", "vLLM's beam search takes no λ; leave it out.")
        if not isinstance(dial, Adaptive | Route):
            return
        if body.get("n") not in (None, 1) or _prompts(body) > 1:
            raise _refused(
                "n",
                "n must be 1, and the prompt one, under the adaptive and the route policy on vLLM; ask "
                "once for each answer.",
            )
        for key in ("tools", "echo") if isinstance(dial, Adaptive) else ():
            if body.get(key):
                raise _refused(key, f"{key} is not served under the adaptive policy on vLLM.")


def refuse_engine_lambda(body: dict[str, Any]) -> None:
    """Refuse a body that gives the engine a λ past the operator's range.

    Raises:
        ApiError: If it does.
    """
    sampling = body.get("sampling_params")
    extra_args = sampling.get("extra_args") if isinstance(sampling, dict) else None
    for extras in (body.get(_EXTRAS), extra_args):
        if isinstance(extras, dict) and LAMBDA_KEY in extras:
            raise ApiError(
                400,
                f"{_EXTRAS} may not hold {LAMBDA_KEY!r}, which is the server's; say {LAMBDA_KEY} itself, "
                f"beside the messages or the prompt, at {' or '.join(PATHS)}.",
                param=_EXTRAS,
                code="invalid_dial",
            )


def _drawn(policy: Route, seed: object, choice: Choice) -> Fixed:
    """Draw the way of a request by its seed, as the local engine does."""
    is_seed = isinstance(seed, int) and -(2**63) <= seed < 2**63
    generator = torch.Generator().manual_seed(seed if is_seed else secrets.randbits(62))  # type: ignore[arg-type]
    way = policy.draw(generator)
    lam = policy.slow_lambda if way == "slow" else policy.fast_lambda
    choice.report |= {"route": way, "lambda": lam, "rejected_tokens": 0}
    return Fixed(lam)


def _with_lambda(body: dict[str, Any], dial: Fixed | Schedule) -> dict[str, Any]:
    value: object = dial.lam if isinstance(dial, Fixed) else dial.to_json()
    if isinstance(value, dict):
        value = json.dumps(value)  # vLLM takes texts and numbers there
    extras = body.get(_EXTRAS)
    if extras is not None and not isinstance(extras, dict):
        return body  # vLLM refuses it, with the reason
    return body | {_EXTRAS: {**(extras or {}), LAMBDA_KEY: value}}


def _prompts(body: dict[str, Any]) -> int:
    """Count the prompts of a completion."""
    given = body.get("prompt")
    return len(given) if isinstance(given, list) and not are_ids(given) else 1


def _whole(answer: dict[str, Any]) -> list[Scope]:
    content = json.dumps(answer, ensure_ascii=False).encode()
    kind = (b"content-type", b"application/json")
    start = {"type": "http.response.start", "status": 200, "headers": [kind]}
    return [start, {"type": "http.response.body", "body": content}]


def _refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
