"""Figures for Prometheus, in a registry of the server's own: two servers in one process do not mix."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_GAUGES = {
    "running": "Requests whose cache is held.",
    "waiting": "Requests that wait for room.",
    "blocks_used": "Blocks of the cache in use.",
    "blocks_free": "Blocks of the cache that are free.",
    "cache_bytes": "Bytes of the blocks in use.",
}
_COUNTERS = {
    "tokens_read": "Tokens read by forward passes.",
    "tokens_written": "Tokens produced.",
    "steps": "Rounds of the engine.",
    "preemptions": "Requests set back for want of room.",
}


class HasStatistics(Protocol):
    """An engine, as far as its figures go."""

    @property
    def held_bytes(self) -> int:
        """Bytes of the weights that it holds itself."""

    @property
    def statistics(self) -> Any:
        """Its counts at this moment."""


class Metrics:
    """What is counted by the server itself, and what its engines count."""

    def __init__(self, engines: Mapping[str, HasStatistics]) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("puna_requests", "Requests by path and status.", ["path", "status"], **named)
        self.refused = Counter(
            "puna_refused", "Requests refused for want of room, by which bound.", ["bound"], **named
        )
        self.left = Counter("puna_left", "Requests whose client left before the end.", **named)
        self.answers = Counter("puna_answers", "Answers by how they ended.", ["model", "ended"], **named)
        self.prompt_tokens = Counter("puna_prompt_tokens", "Tokens of prompts.", ["model"], **named)
        self.answer_tokens = Counter("puna_answer_tokens", "Tokens of answers.", ["model"], **named)
        seconds: dict[str, Any] = {"buckets": _SECONDS, **named}
        self.first_token = Histogram(
            "puna_first_token_seconds", "From the request to the first token.", ["model"], **seconds
        )
        self.whole = Histogram(
            "puna_answer_seconds", "From the request to the last token.", ["model"], **seconds
        )
        self.registry.register(_Engines(engines))

    def text(self) -> bytes:
        """Everything, in the text format that Prometheus reads."""
        return generate_latest(self.registry)


class _Engines(Collector):
    """Reads the engines' own counts when it is asked."""

    def __init__(self, engines: Mapping[str, HasStatistics]) -> None:
        self._engines = engines

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """One family for each figure, labelled by model."""
        held = GaugeMetricFamily(
            "puna_engine_held_bytes", "Bytes of weights held, without shared ones.", labels=["model"]
        )
        for name, engine in self._engines.items():
            held.add_metric([name], engine.held_bytes)
        yield held
        found = {name: engine.statistics for name, engine in self._engines.items()}
        for field, says in _GAUGES.items():
            gauge = GaugeMetricFamily(f"puna_engine_{field}", says, labels=["model"])
            for name, statistics in found.items():
                gauge.add_metric([name], getattr(statistics, field))
            yield gauge
        for field, says in _COUNTERS.items():
            counter = CounterMetricFamily(f"puna_engine_{field}", says, labels=["model"])
            for name, statistics in found.items():
                counter.add_metric([name], getattr(statistics, field))
            yield counter


class CountRequests:
    """ASGI middleware: counts requests by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note the status it got."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                # Paths that nobody serves are one label: a scanner must not fill the memory.
                path = getattr(route, "path", "other")
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, noting)


class Clock:
    """Seconds since a request came."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._start
