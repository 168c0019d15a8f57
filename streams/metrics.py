"""Prometheus metrics of the join and train workers, and what every process says of itself.

Nothing here is computed where events are handled: values are read when they are scraped, in another thread, from what
a worker knows anyway. docs/metrics.md lists them all.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from online_model.examples import Counts
from streams.events import KINDS, REASONS

if TYPE_CHECKING:  # the join worker does without torch
    from online_model.trainer import Trainer

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 60.0)
ROWS = (1, 10, 50, 100, 200, 500, 1_000, 2_000, 5_000)
ALL = "all"  # scenarios together

# A number, or several by the values of the metric's labels; a metric without any now is left out.
Value: TypeAlias = float | Mapping[tuple[str, ...], float]
# name → (what it is, labels); names that end in `_total` are counters, the others gauges.
About: TypeAlias = Mapping[str, tuple[str, tuple[str, ...]]]

JOIN: About = {
    "events": ("The balance of the partitions, in events", ("partition", "outcome")),
    "offset": ("All events below it have their block", ("partition",)),
    "lag_records": ("Records of `events` that have no block yet", ("partition",)),
    "watermark_seconds": ("Event time that the partition has come to, since 1970", ("partition",)),
    "watermark_lag_seconds": ("How far that is behind the clock", ("partition",)),
    "open_impressions": ("Impressions that can still be acted on", ("partition",)),
    "store_memory_bytes": ("What RocksDB has in memory", ("partition",)),
}
TRAIN: About = {
    "rows_total": ("Rows of examples learned", ()),
    "left_out_rows_total": ("Rows of batches from which nothing was learned", ()),
    "no_room_total": ("Ids that got no row, as all rows of the table waited for a commit", ("table",)),
    "stage_seconds_total": ("Time of the steps, by stage", ("stage",)),
    "lag_records": ("Blocks of `examples` that are not learned yet", ("partition",)),
    "loss": ("Mean log loss of the last scores, made before they were learned", ("task",)),
    "auc": ("AUC of the last scores", ("task", "scenario")),
    "entropy": ("Normalised entropy of the last scores: log loss over that of the base rate", ("task", "scenario")),
    "calibration": ("Positives predicted over positives that came, of the last scores", ("task", "scenario")),
    "drifts_total": ("Changes of the loss that were found", ("task",)),
    "table_rows": ("Rows in memory", ("table",)),
    "admissions_total": ("Ids that got their first row", ("table",)),
    "evictions_total": ("Rows that left the memory for the store", ("table",)),
    "tier_reads_total": ("Ids that were not in memory and were looked for in the store", ("table", "outcome")),
    "checkpoint_age_seconds": ("Since the last commit", ()),
    "checkpoint_bytes": ("The store on disk", ()),
    "store_memory_bytes": ("What RocksDB has in memory", ()),
    "snapshot_age_seconds": ("Since the newest snapshot was made", ()),
    "delta_rows_total": ("Rows in the versions to publish", ()),
    "pending_rows": ("Rows that were taken and are not learned yet", ()),
    "waiting_bytes": ("Blocks that were read and not taken yet", ()),
    "sequence": ("The last version committed", ()),
    "published_sequence": ("The last version in Kafka", ()),
    "owed_rows": ("Rows that replicas wait for", ()),
    "owed_oldest_seconds": ("For how long the first of them has waited", ()),
    "guard_held": ("1: versions are committed and not published", ()),
    "guard_rollbacks": ("Rollbacks of the guard in a row", ()),
}


@dataclass
class LaneFigures:
    """What is said of a partition that is joined."""

    counts: Counts
    offset: int  # all below has its block
    lag_records: int
    watermark_ms: int | None  # event time; None: none yet
    open_impressions: int
    store_memory_bytes: int


class JoinMetrics:
    """`lanes`: the partitions that are joined here, as they are now."""

    def __init__(self, lanes: Callable[[], Mapping[int, LaneFigures]]) -> None:
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
        kinds = Counter(
            "headrace_join_kinds", "Records that have their block, without those refused", ["kind"],
            registry=self.registry,
        )  # fmt: skip
        self._kinds = {kind: kinds.labels(name) for kind, name in KINDS.items()}
        self.registry.register(Values("headrace_join_", JOIN, lambda: join_values(lanes())))

    def joined(self, kinds: Mapping[type, int]) -> None:
        """So many records of these kinds have their block; those that were refused are not in it."""
        for kind, n in kinds.items():
            if kind in self._kinds:
                self._kinds[kind].inc(n)


def join_values(lanes: Mapping[int, LaneFigures]) -> dict[str, Value]:
    """For `Values`."""
    named: dict[tuple[str, ...], LaneFigures] = {(str(partition),): lane for partition, lane in lanes.items()}
    marks = {p: lane.watermark_ms / 1000 for p, lane in named.items() if lane.watermark_ms is not None}
    now = time.time()
    return {
        "events": {
            (*p, field.name): getattr(lane.counts, field.name)
            for p, lane in named.items()
            for field in fields(lane.counts)
        },
        "offset": {p: lane.offset for p, lane in named.items()},
        "lag_records": {p: lane.lag_records for p, lane in named.items()},
        "watermark_seconds": marks,
        "watermark_lag_seconds": {p: now - mark for p, mark in marks.items()},
        "open_impressions": {p: lane.open_impressions for p, lane in named.items()},
        "store_memory_bytes": {p: lane.store_memory_bytes for p, lane in named.items()},
    }


class TrainMetrics:
    """`values`: of TRAIN, as they are now."""

    def __init__(self, values: Callable[[], Mapping[str, Value]]) -> None:
        self.registry = CollectorRegistry()
        self.step = _histogram(self.registry, "headrace_train_step_seconds", "One test-then-train step")
        self.commit = _histogram(self.registry, "headrace_train_commit_seconds", "One commit to the store")
        self.publish = _histogram(self.registry, "headrace_train_publish_seconds", "Kafka transaction of one version")
        self.batch = Histogram(
            "headrace_train_batch_rows", "Rows that one step learned", buckets=ROWS, registry=self.registry
        )
        self._versions = Counter("headrace_train_versions_published", "Versions in Kafka", registry=self.registry)
        self._bytes = Counter("headrace_train_delta_bytes", "Bytes of these versions", registry=self.registry)
        self.registry.register(Values("headrace_train_", TRAIN, values))

    def published(self, parts: Iterable[bytes]) -> None:
        """A version, in its parts, is in Kafka."""
        self._versions.inc()
        self._bytes.inc(sum(map(len, parts)))


def train_values(trainer: Trainer, waiting_bytes: int, published: int) -> dict[str, Value]:
    """Of TRAIN what the trainer knows. waiting_bytes: of blocks that are not offered yet; published: the last sequence
    in Kafka. May be called from any thread."""
    owed, tables = trainer.owed, trainer.tables
    turnover = {table: tables.turnover(table) for table in tables.specs}
    return {
        "rows_total": sum(position.rows for position in list(trainer.positions.values())),
        "left_out_rows_total": trainer.left_out,
        "no_room_total": {(table,): tables.dropped(table) for table in tables.specs},
        "stage_seconds_total": {(stage,): seconds for stage, seconds in trainer.stage_seconds.items()},
        **_quality(trainer.figures),
        "drifts_total": {(task,): found for task, found in trainer.drifts.items()},
        "table_rows": {(table,): tables.size(table) for table in tables.specs},
        "admissions_total": {(table,): count.admitted for table, count in turnover.items()},
        "evictions_total": {(table,): count.evicted for table, count in turnover.items()},
        "tier_reads_total": {
            **{(table, "hit"): count.tier_hits for table, count in turnover.items()},
            **{(table, "miss"): count.tier_misses for table, count in turnover.items()},
        },
        "store_memory_bytes": trainer.store.memory_bytes,
        "delta_rows_total": trainer.delta_rows,
        "pending_rows": trainer.pending,
        "waiting_bytes": waiting_bytes,
        "sequence": trainer.sequence,
        "published_sequence": published,
        "owed_rows": owed["rows"],
        "owed_oldest_seconds": owed["oldest_ms"] / 1000,
        "guard_held": trainer.guard.held,
        "guard_rollbacks": trainer.guard.rollbacks,
    }


def _quality(figures: Mapping[str, Mapping]) -> dict[str, Value]:
    """Of the last scores of each task (`Evaluation.metrics`), those that are defined."""
    found = {
        (task, scenario): some["recent"]
        for task, all_of_it in figures.items()
        for scenario, some in {ALL: all_of_it, **all_of_it["scenarios"]}.items()
    }
    names = {"auc": "auc", "entropy": "ne", "calibration": "calibration"}
    values: dict[str, Value] = {
        name: {where: some[key] for where, some in found.items() if some[key] is not None}
        for name, key in names.items()
    }
    losses = {(task,): some["loss"] for (task, scenario), some in found.items() if scenario == ALL}
    return {**values, "loss": {task: loss for task, loss in losses.items() if loss is not None}}


def tell_process(registry: CollectorRegistry, data_dir: Path) -> None:
    """What every process says of itself: its version, memory and processor time, and the room on its disk."""
    ProcessCollector(registry=registry)
    Gauge("headrace_info", "1", ["version"], registry=registry).labels(_own_version()).set(1)
    about = {"disk_free_bytes": ("Room on the disk of the data directory", ())}
    registry.register(Values("headrace_", about, lambda: _disk(data_dir)))


def _own_version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that was not installed


def _disk(data_dir: Path) -> dict[str, Value]:
    try:
        return {"disk_free_bytes": shutil.disk_usage(data_dir).free}
    except OSError:
        return {}  # it is not there yet


class Values(Collector):
    """Metrics whose values are read when they are scraped. `about` has all names that `values` may give."""

    def __init__(self, prefix: str, about: About, values: Callable[[], Mapping[str, Value]]) -> None:
        self._prefix, self._about, self._values = prefix, about, values

    def collect(self) -> Iterable[Metric]:
        for name, value in self._values().items():
            help_, labels = self._about[name]
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(f"{self._prefix}{name}", help_, labels=labels)
            for where, number in (value if isinstance(value, Mapping) else {(): value}).items():
                metric.add_metric(where, number)
            yield metric

    def describe(self) -> Iterable[Metric]:
        return []


def _histogram(registry: CollectorRegistry, name: str, about: str) -> Histogram:
    return Histogram(name, about, buckets=SECONDS, registry=registry)
