"""Counts requests and rows, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


class Metrics:
    """Counters of one server; any thread may count."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._about: dict[str, Any] = {"namespace": "modernbert_jax", "registry": self._registry}
        count = lambda name, about, *labels: Counter(name, about, labels, **self._about)  # noqa: E731
        self._requests = count("requests", "Answered requests.", "path", "status")
        self._seconds = Histogram(
            "request_seconds", "Seconds until the answer.", ["path"], buckets=BUCKETS, **self._about
        )
        self._rows = count("rows", "Computed rows.")
        self._texts = count("texts", "Texts in computed rows.")
        self._tokens = count("tokens", "Tokens in computed rows.")
        self._row_seconds = count("row_seconds", "Seconds spent on rows.")

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts an answered request; status 499: the client left before the answer."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def row(self, texts: int, tokens: int, seconds: float) -> None:
        """Counts a computed row."""
        self._rows.inc()
        self._texts.inc(texts)
        self._tokens.inc(tokens)
        self._row_seconds.inc(seconds)

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Adds a value that is read whenever the metrics are."""
        Gauge(name, about, **self._about).set_function(value)

    def text(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self._registry)
