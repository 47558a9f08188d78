"""The dials that were served, counted beside what vLLM's ``/metrics`` tells."""

from typing import Any

from flexalign.serving.bodies import with_length
from flexalign.serving.dial import Choice
from flexalign.serving.errors import Scope
from flexalign.serving.middleware import path_of

__all__ = ["DialCount"]

_BARGAINING = (b"accept", b"accept-encoding")
"""Headers by which a client gets another form than Prometheus' text, or a compressed one."""


class DialCount:
    """Counts the dials of answers, and tells them at ``/metrics`` after what vLLM tells.

    It needs ``prometheus_client``, which vLLM brings.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry

        from flexalign.serving.metrics import DialMetrics

        self._registry = CollectorRegistry()
        self._dials = DialMetrics(self._registry)

    def counted(self, choice: Choice, send: Any) -> Any:
        """Return a client's ``send`` that counts the dial of an answer as it begins."""

        async def counting(message: Scope) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                self._dials.began(choice.dial)
                self._dials.went(choice.report.get("policy"), choice.report.get("route"))
            await send(message)

        return counting

    def told(self, app: Any) -> Any:
        """Return the application with the count in what it answers at ``/metrics``."""
        from prometheus_client import generate_latest

        async def telling(scope: Scope, receive: Any, send: Any) -> None:
            if scope["type"] != "http" or path_of(scope) != "/metrics":
                await app(scope, receive, send)
                return
            headers = [one for one in scope["headers"] if one[0] not in _BARGAINING]
            answer: list[Scope] = []

            async def keep(message: Scope) -> None:
                answer.append(message)

            await app({**scope, "headers": headers}, receive, keep)
            start, *parts = answer
            body = b"".join(part.get("body", b"") for part in parts)
            if start["status"] == 200:
                body += generate_latest(self._registry)
            await send({**start, "headers": with_length(start["headers"], len(body))})
            await send({"type": "http.response.body", "body": body})

        return telling
