"""Counts requests and rows, and writes them in Prometheus' text format."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Sequence

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
PREFIX = "modernbert_jax_"


class Metrics:
    """Counters of one server; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._seconds: Counter[str] = Counter()
        self._rows = self._texts = self._tokens = 0
        self._row_seconds = 0.0

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts an answered request; status 499: the client left before the answer."""
        with self._lock:
            self._requests[path, status] += 1
            self._seconds[path] += seconds  # type: ignore[assignment]
            buckets = self._buckets.setdefault(path, [0] * (len(BUCKETS) + 1))
            buckets[bisect.bisect_left(BUCKETS, seconds)] += 1

    def row(self, texts: int, tokens: int, seconds: float) -> None:
        """Counts a computed row."""
        with self._lock:
            self._rows += 1
            self._texts += texts
            self._tokens += tokens
            self._row_seconds += seconds

    def text(self, gauges: dict[str, tuple[str, Callable[[], float]]]) -> str:
        """Returns everything in Prometheus' text format.

        gauges: further values, {name: (help, function)}.
        """
        lines: list[str] = []

        def metric(name: str, kind: str, about: str, samples: Sequence[tuple[str, float]]) -> None:
            lines.append(f"# HELP {PREFIX}{name} {about}")
            lines.append(f"# TYPE {PREFIX}{name} {kind}")
            lines.extend(f"{PREFIX}{sample} {value}" for sample, value in samples)

        with self._lock:
            requests = [
                (f'requests_total{{path="{path}",status="{status}"}}', count)
                for (path, status), count in sorted(self._requests.items())
            ]
            metric("requests_total", "counter", "Answered requests.", requests)
            samples = []
            for path, buckets in sorted(self._buckets.items()):
                total = 0
                for limit, count in zip((*BUCKETS, "+Inf"), buckets, strict=True):
                    total += count
                    samples.append((f'request_seconds_bucket{{path="{path}",le="{limit}"}}', total))
                samples.append((f'request_seconds_sum{{path="{path}"}}', self._seconds[path]))
                samples.append((f'request_seconds_count{{path="{path}"}}', total))
            metric("request_seconds", "histogram", "Seconds until the answer.", samples)
            for name, about, value in (
                ("rows_total", "Computed rows.", self._rows),
                ("texts_total", "Texts in computed rows.", self._texts),
                ("tokens_total", "Tokens in computed rows.", self._tokens),
                ("row_seconds_total", "Seconds spent on rows.", self._row_seconds),
            ):
                metric(name, "counter", about, [(name, value)])
        for name, (about, value) in gauges.items():
            metric(name, "gauge", about, [(name, value())])
        return "\n".join(lines) + "\n"
