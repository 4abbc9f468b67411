"""Counters for Prometheus and one log line per request; neither ever contains a token, a text or a key."""

from __future__ import annotations

import json
import logging
from typing import Any, final

from ...errors import require_extra
from ..durability.answers import Answer, Failure

__all__ = ["Telemetry"]

_logger = logging.getLogger("pullback.service")


@final
class Telemetry:
    """What a service counts; each has a registry of its own."""

    def __init__(self) -> None:
        prometheus = require_extra("prometheus_client", "serve", "the service")
        self._prometheus, self.registry = prometheus, prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "pullback_requests", "HTTP requests", ["route", "status"], registry=self.registry
        )
        self._operations = prometheus.Counter(
            "pullback_operations", "operations that have ended", ["kind", "outcome"], registry=self.registry
        )
        self._seconds = prometheus.Counter(
            "pullback_operation_seconds", "time in operations", ["kind"], registry=self.registry
        )
        self._amounts = prometheus.Counter(
            "pullback_amount", "tokens, by what they were", ["what"], registry=self.registry
        )

    def gauge(self, name: str, description: str, read: Any) -> None:
        """Show a number that is read when it is asked for."""
        self._prometheus.Gauge(f"pullback_{name}", description, registry=self.registry).set_function(read)

    def count(self, what: str, amount: float) -> None:
        """Add to an amount."""
        self._amounts.labels(what).inc(amount)

    def operation(self, kind: str, answer: Answer, seconds: float) -> None:
        """Note an operation that has ended."""
        outcome = answer.category if isinstance(answer, Failure) else "done"
        self._operations.labels(kind, outcome).inc()
        self._seconds.labels(kind).inc(seconds)
        _logger.info(json.dumps({"operation": kind, "outcome": outcome, "seconds": round(seconds, 4)}))

    def request(self, route: str, status: int, seconds: float, body: int) -> None:
        """Note an HTTP request."""
        self._requests.labels(route, str(status)).inc()
        _logger.info(json.dumps({"route": route, "status": status, "seconds": round(seconds, 4), "bytes": body}))

    def exposition(self) -> bytes:
        """Everything in Prometheus' text form."""
        return bytes(self._prometheus.generate_latest(self.registry))
