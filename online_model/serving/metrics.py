"""Prometheus metrics of a serving replica, in a registry of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from online_model.serving.problems import KINDS

SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
CANDIDATES = (1, 10, 50, 100, 200, 250, 300, 400, 600, 1000)


class Measured(Protocol):
    """What the metrics ask of a replica."""

    epoch: int
    sequence: int  # -1: no version yet
    created_ms: int

    def rows(self) -> dict[str, int]: ...
    def nbytes(self) -> dict[str, int]: ...
    def recall(self) -> float | None: ...


class Metrics:
    """What a replica counts. The counters outlive a swap of replicas; the gauges are read from the one that serves."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "headrace_serve_requests", "HTTP requests answered", ["route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "headrace_serve_request_seconds", "From the request's head to the end of its answer (long polls wait)",
            ["route"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._candidates = Histogram(
            "headrace_serve_candidates", "Items scored per request", ["route"], buckets=CANDIDATES,
            registry=self.registry,
        )  # fmt: skip
        self._refused = Counter(
            "headrace_serve_refused", "Requests refused, by the problem said", ["reason"], registry=self.registry
        )
        for kind in KINDS:
            self._refused.labels(kind.slug)  # 0 is told too
        self._waiting = Gauge("headrace_serve_waiting", "Requests that wait for their turn", registry=self.registry)
        self._degraded = Counter(
            "headrace_serve_degraded", "Answers cut short by the deadline", ["route"], registry=self.registry
        )
        self._applied = Counter("headrace_replica_versions_applied", "Versions applied", registry=self.registry)
        self._swaps = Counter("headrace_replica_swaps", "Snapshots put in place", registry=self.registry)
        self._apply_seconds = Histogram(
            "headrace_replica_apply_seconds", "Time to apply a version; requests wait meanwhile", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def watch(self, replica: Callable[[], Measured]) -> None:
        """Read the gauges from the replica that this returns."""
        self.registry.register(_Gauges(replica))

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def candidates(self, route: str, n: int) -> None:
        self._candidates.labels(route).observe(n)

    def watch_waiting(self, waiting: Callable[[], int]) -> None:
        """Read from this how many requests wait for their turn."""
        self._waiting.set_function(waiting)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def answered(self, route: str, degraded: bool) -> None:
        self._degraded.labels(route).inc(degraded)

    def applied(self, seconds: float) -> None:
        self._applied.inc()
        self._apply_seconds.observe(seconds)

    def swapped(self) -> None:
        self._swaps.inc()

    def text(self) -> bytes:
        """The exposition for Prometheus."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, replica: Callable[[], Measured]) -> None:
        self._replica = replica

    def collect(self) -> Iterable[Metric]:
        replica = self._replica()
        rows = GaugeMetricFamily("headrace_replica_rows", "Rows held", labels=["table"])
        for table, n in replica.rows().items():
            rows.add_metric([table], n)
        yield rows
        reserved = GaugeMetricFamily("headrace_replica_bytes", "Reserved for rows", labels=["table"])
        for table, n in replica.nbytes().items():
            reserved.add_metric([table], n)
        yield reserved
        yield GaugeMetricFamily("headrace_replica_epoch", "Epoch served", replica.epoch)
        yield GaugeMetricFamily("headrace_replica_sequence", "Version served; -1: none", replica.sequence)
        if replica.sequence >= 0:
            age = max(0.0, time.time() - replica.created_ms / 1000)
            yield GaugeMetricFamily("headrace_replica_age_seconds", "Since the version served was made", age)
        recall = replica.recall()
        if recall is not None:
            what = "Share of the best items that the approximate index found, over its last probes"
            yield GaugeMetricFamily("headrace_serve_index_recall", what, recall)

    def describe(self) -> Iterable[Metric]:
        return ()
