"""The metrics of ``/metrics``, in Prometheus' format.

:class:`Metrics` are those of the local server. :class:`DialMetrics`, its part about dials, is also
served beside vLLM's own metrics.
"""

from collections.abc import Iterable, Iterator
from time import monotonic
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flexalign.lambdas import Dial, Fixed
from flexalign.serving.engine import Ended, Engine
from flexalign.serving.errors import Scope
from flexalign.serving.middleware import PATHS, path_of

# Upper ends of the histograms' buckets.
_LAMBDAS = (-2, -1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5)
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PATHS = (*PATHS, "/v1/models", "/health", "/metrics")


class Metrics:
    """Counts what the local server does.

    Attributes:
        registry: The registry of all metrics; each server has its own.
    """

    def __init__(self, engine: Engine) -> None:
        """Start all counts at 0; the engine's own numbers are read at each request of metrics."""
        self.registry = CollectorRegistry()
        self.registry.register(_EngineState(engine))
        self._requests = self._counter("requests", "Requests answered.", ("path", "status"))
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._dials = DialMetrics(self.registry)
        self._cancelled = self._counter("cancelled", "Answers whose client left.")
        self._first = Histogram(
            "flexalign_first_text_seconds",
            "From a request's arrival to its first text.",
            registry=self.registry,
            buckets=_SECONDS,
        )

    def watched(self, app: Any) -> Any:
        """Return an ASGI application that calls another one and counts its answers."""

        async def counting(scope: Scope, receive: Any, send: Any) -> None:
            async def counted(message: Scope) -> None:
                if message["type"] == "http.response.start":
                    path = path_of(scope)
                    path = path if path in _PATHS else "other"
                    self._requests.labels(path, str(message["status"])).inc()
                await send(message)

            await app(scope, receive, counted if scope["type"] == "http" else send)

        return counting

    def began(self, dial: Dial | None, prompt_tokens: int) -> None:
        """Count a request that was accepted."""
        self._prompt_tokens.inc(prompt_tokens)
        self._dials.began(dial)

    def first_text(self, since: float) -> None:
        """Record the first text of a request that arrived at this time of the monotonic clock."""
        self._first.observe(monotonic() - since)

    def ended(self, ended: Ended, policy: str | None) -> None:
        """Count an answer that has ended."""
        if ended.finish == "cancelled":
            self._cancelled.inc()
        self._dials.went(policy, ended.route)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help_text: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(f"flexalign_{name}", help_text, tuple(labels), registry=self.registry)


class DialMetrics:
    """Counts the dials that were served; it does not depend on the engine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Add the metrics to a registry."""
        self._lambda = Histogram(
            "flexalign_lambda",
            "λ of requests with one λ throughout.",
            registry=registry,
            buckets=_LAMBDAS,
        )
        self._routes = Counter(
            "flexalign_routes",
            "Ways taken under adaptive, exit and route policies.",
            ("policy", "route"),
            registry=registry,
        )

    def began(self, dial: Dial | None) -> None:
        """Count a request that was accepted."""
        if isinstance(dial, Fixed):
            self._lambda.observe(dial.lam)

    def went(self, policy: str | None, route: str | None) -> None:
        """Count the route of an answer, if a policy chose it."""
        if route is not None:
            self._routes.labels(policy, route).inc()


class _EngineState(Collector):
    """The engine's own numbers, read each time the metrics are requested."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        yield CounterMetricFamily(
            "flexalign_generated_tokens",
            "Tokens written, rejected ones and ends included.",
            value=engine.tokens_written,
        )
        for name, help_text, value in (
            ("running", "Answers being written.", engine.running),
            ("waiting", "Answers waiting for a place.", engine.waiting),
            ("tokens_per_second", "Tokens per second, last 10 s.", engine.tokens_per_second),
        ):
            yield GaugeMetricFamily(f"flexalign_{name}", help_text, value=value)
