"""What the service counts, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from detgpt.results import Detections

CLIENT_GONE = 499  # nginx's status of a client who hung up before the answer


class Metrics:
    """The counters of one service. `queue_depth` and `in_flight` are asked whenever the metrics are read."""

    def __init__(self, queue_depth: Callable[[], int], in_flight: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "detgpt_requests",
            "Requests by outcome: 200 answered, 422 bad input, 429 queue full, 499 client gone, 504 timed out.",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "detgpt_request_seconds",
            "Time from a request's first byte to the end of its answer, of answered requests.",
            ["endpoint"],
            buckets=(0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100),
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "detgpt_batch_size",
            "Requests that went through the models together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.held_back = Counter(
            "detgpt_held_back",
            "Answers that the guard refused or rewrote, by where the harm was: in the instruction, picture or answer.",
            ["where", "action"],
            registry=self.registry,
        )
        gauges = {
            "detgpt_queue_depth": ("Requests that wait for the models.", queue_depth),
            "detgpt_in_flight": (
                "Requests that hold a place: being read, waiting, at work or being answered.",
                in_flight,
            ),
        }
        for name, (meaning, count) in gauges.items():
            Gauge(name, meaning, registry=self.registry).set_function(count)

    def answered(self, result: Detections) -> None:
        """Count what the guard did to an answer, if anything."""
        if result.guard is not None and result.guard.harmful:
            self.held_back.labels(result.guard.where, result.guard.action).inc()


class Counted:
    """ASGI middleware that counts the requests to `endpoints` and times their answers.

    An answer that fails after its first byte, as a stream may, says so in `request.state.outcome`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: Collection[str]) -> None:
        self.app, self.metrics, self.endpoints = app, metrics, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self.endpoints:
            await self.app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:  # counted, whatever it is and whatever went out before it, and raised on
            status = 500
            raise
        finally:
            status = scope.get("state", {}).get("outcome", status)
            self.metrics.requests.labels(scope["path"], status).inc()
            if status == 200:
                self.metrics.seconds.labels(scope["path"]).observe(time.perf_counter() - started)
