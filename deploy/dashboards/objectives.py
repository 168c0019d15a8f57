"""What is promised of a running system: each bound once, for the threshold of a panel and for the alert beside it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """Good is above `low` and below `high`, in `unit` (Grafana's name of it); a bound that is None is none."""

    name: str
    unit: str
    low: float | None = None
    high: float | None = None
    words: str = ""

    @property
    def said(self) -> str:
        """The bounds as a reader of a table wants them."""
        if self.words:
            return self.words
        bounds = [f"above {self.low:g}"] if self.low is not None else []
        bounds += [f"below {self.high:g}"] if self.high is not None else []
        return f"{self.name} {' and '.join(bounds)}{_UNITS.get(self.unit, '')}"


_UNITS = {"s": " s", "bytes": " bytes"}

# 99 % of probes are in a replica's answers within a second, over 30 days: the other 1 % is the error budget.
FRESHNESS_S = 1.0  # also a bound of the buckets of headrace_freshness_seconds
FRESHNESS = Objective("freshness", "s", high=FRESHNESS_S)
ERROR_BUDGET = 0.01
PAST_FRESHNESS = Objective("share of probes past the objective", "percentunit", high=ERROR_BUDGET)
# Times the pace at which the budget would last for 30 days; as in the Google SRE workbook, chapter 5, table 5-8.
FAST_BURN = 14.4
BURN_FAST = Objective("burn rate", "none", high=FAST_BURN)
STALL = Objective("age of the oldest probe in flight", "s", high=15.0)  # a restarted train worker takes as long
PROBES = Objective("probes sent per second", "short", low=0.0)
EVENT_TIME = Objective("pace of event time", "none", low=0.0)
JOIN_LAG = Objective("records of `events` that wait", "short", high=10_000)
TRAIN_LAG = Objective("blocks of `examples` that wait", "short", high=500)
CHECKPOINT_AGE = Objective("time since the last commit", "s", high=60.0)
SNAPSHOT_AGE = Objective("age of the newest snapshot", "s", high=1_800.0)  # twice [train] snapshot_interval_s; at three
# times it `parameters` may have lost what a replica needs beside the snapshot
CALIBRATION = Objective("predicted over actual", "none", low=0.8, high=1.25)
GUARD = Objective("held back by the guard", "none", high=0.5, words="no version held back")  # 0 or 1
REPLICA_AGE = Objective("age of the version served", "s", high=30.0)
DEAD_LETTERS = Objective("share of events refused", "percentunit", high=0.01)
DISK_FREE = Objective("free space", "bytes", low=5 * 2**30, words="free space above 5 GiB")
DISK_FILLING = Objective("free space in a day", "bytes", low=0.0, words="not full within a day, or 20 GiB free")
UP = Objective("answers to Prometheus", "none", low=0.5, words="every process answers")  # 0 or 1
SERVE_ERRORS = Objective("share of requests that failed", "percentunit", high=0.01)
SERVE_SECONDS = Objective("p99 of rank and recommend", "s", high=0.05)
