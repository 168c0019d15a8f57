"""Prometheus metrics of the join and train workers, on the loopback, where a port is set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from embedding_store.errors import UsageError
from online_model.examples import Counts
from streams.events import REASONS

if TYPE_CHECKING:  # the join worker does without torch
    from online_model.trainer import Trainer

HOST = "127.0.0.1"
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)


def serve_metrics(registry: CollectorRegistry, port: int) -> Callable[[], None]:
    """Answer /metrics on 127.0.0.1:`port` from a thread of its own; port 0: not at all. Returns what ends it.

    Raises UsageError.
    """
    if not port:
        return lambda: None
    try:
        server, _ = start_http_server(port, addr=HOST, registry=registry)
    except OSError as error:
        raise UsageError(f"cannot listen on {HOST}:{port} for metrics: choose another metrics_port") from error

    def end() -> None:
        server.shutdown()
        server.server_close()

    return end


class JoinMetrics:
    """`counts`: partition → (the joiner's balance, next offset), as it is now."""

    def __init__(self, counts: Callable[[], dict[int, tuple[Counts, int]]]) -> None:
        self.registry = CollectorRegistry()
        self.commit = _histogram(self.registry, "headrace_join_commit_seconds", "Store write of one block")
        self.publish = _histogram(self.registry, "headrace_join_publish_seconds", "Kafka transaction of one block")
        self.age = _histogram(
            self.registry, "headrace_join_age_seconds", "From an event's time in Kafka to its block in Kafka"
        )
        self.rejected = Counter(
            "headrace_join_rejected", "Records refused since the start, by reason", ["reason"], registry=self.registry
        )
        for reason in REASONS:
            self.rejected.labels(reason)  # 0 is told too
        self.registry.register(_Balance(counts))


class _Balance(Collector):
    def __init__(self, counts: Callable[[], dict[int, tuple[Counts, int]]]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        labels = ["partition", "outcome"]
        balance = GaugeMetricFamily("headrace_join_events", "The balance of the partitions, in events", labels=labels)
        offset = GaugeMetricFamily("headrace_join_offset", "All events below it have their block", labels=["partition"])
        for partition, (counts, next_offset) in self._counts().items():
            offset.add_metric([str(partition)], next_offset)
            for field in fields(counts):
                balance.add_metric([str(partition), field.name], getattr(counts, field.name))
        return [balance, offset]

    def describe(self) -> Iterable[Metric]:
        return []


class TrainMetrics:
    """`values`: name → value of the gauges, as they are now; those that end in `_total` are counters."""

    def __init__(self, values: Callable[[], dict[str, float]]) -> None:
        self.registry = CollectorRegistry()
        self.step = _histogram(self.registry, "headrace_train_step_seconds", "One test-then-train step")
        self.commit = _histogram(self.registry, "headrace_train_commit_seconds", "One commit to the store")
        self.publish = _histogram(self.registry, "headrace_train_publish_seconds", "Kafka transaction of one version")
        self.registry.register(_Values(values))


def train_values(trainer: Trainer, waiting_bytes: int, published: int) -> dict[str, float]:
    """For `TrainMetrics`. waiting_bytes: of blocks that are not offered yet; published: the last sequence in Kafka."""
    owed = trainer.owed
    return {
        "rows_total": sum(position.rows for position in list(trainer.positions.values())),
        "pending_rows": trainer.pending,
        "waiting_bytes": waiting_bytes,
        "sequence": trainer.sequence,
        "published_sequence": published,
        "owed_rows": owed["rows"],
        "owed_oldest_seconds": owed["oldest_ms"] / 1000,
        "guard_held": trainer.guard.held,
        "guard_rollbacks": trainer.guard.rollbacks,
        **{f"drifts_{task}_total": found for task, found in trainer.drifts.items()},
    }


class _Values(Collector):
    def __init__(self, values: Callable[[], dict[str, float]]) -> None:
        self._values = values

    def collect(self) -> Iterable[Metric]:
        for name, value in self._values().items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(f"headrace_train_{name}", name.replace("_", " "))
            metric.add_metric([], value)
            yield metric

    def describe(self) -> Iterable[Metric]:
        return []


def _histogram(registry: CollectorRegistry, name: str, about: str) -> Histogram:
    return Histogram(name, about, buckets=SECONDS, registry=registry)
