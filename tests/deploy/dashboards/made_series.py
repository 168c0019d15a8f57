"""For each alert a made-up past in which it has a cause that goes away again, as `promtool test rules` takes it.

A case is series, each a list of (minutes, step) or (minutes, value), and three moments: before, while, and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def rising(*spans: tuple[int, float]) -> list[float]:
    """A counter that rises by `step` at each point, over so many points, span after span."""
    values = [0.0]
    for points, step in spans:
        for _ in range(points):
            values.append(values[-1] + step)
    return values


def level(*spans: tuple[int, float]) -> list[float]:
    """A gauge that has a value for so many points, span after span."""
    return [value for points, value in spans for _ in range(points)]


@dataclass(frozen=True)
class Case:
    """`fires`: at which points it does, and at which it does not (all within the series)."""

    alert: str
    series: dict[str, Sequence[float]]
    quiet: Sequence[int] = ()
    fires: Sequence[int] = ()
    point: str = "1m"  # the time between two points
    name: str = ""


WORKERS = ("join", "train", "serve")
UP = {f'up{{job="{job}",instance="{job}:1"}}': level((40, 1)) for job in WORKERS}
OF = 'instance="j:1",job="join",partition="0"'
TRAINER = 'instance="t:1",job="train"'
CALIBRATION = f'headrace_train_calibration{{{TRAINER},task="click",scenario="all"}}'
SERVABLE = 'stage="servable",job="monitor"'
ROUTE, POLLED, PROBED = (
    f'route="{route}",instance="s:1",job="serve"' for route in ("/v1/rank", "/v1/model", "/readyz")
)


def probes(*spans: tuple[int, float, float]) -> dict[str, list[float]]:
    """Spans of (points, probes at each point, how many of them within the objective)."""
    return {
        f"headrace_freshness_seconds_count{{{SERVABLE}}}": rising(*((n, all_) for n, all_, _ in spans)),
        f'headrace_freshness_seconds_bucket{{{SERVABLE},le="1.0"}}': rising(*((n, good) for n, _, good in spans)),
    }


def lag(name: str, labels: str, step: float) -> dict[str, list[float]]:
    """Nothing waits, then more and more, then less and less."""
    up = [step * i for i in range(31)]
    return {f"{name}{{{labels}}}": [*level((10, 0)), *up, *reversed(up)]}


CASES = (
    Case("freshness-burn-fast", probes((120, 1200, 1200), (60, 1200, 600), (120, 1200, 1200)),
         quiet=(100, 125, 225, 290), fires=(145, 179), name="a great part"),
    Case("freshness-burn-fast", probes((360, 1200, 1200), (120, 1200, 1080), (120, 1200, 1200)),
         quiet=(350, 550), name="a tenth for two hours: not yet"),
    Case("freshness-burn-slow", probes((144, 12_000, 12_000), (72, 12_000, 10_800), (72, 12_000, 12_000)),
         quiet=(140, 270), fires=(190, 215), point="10m"),
    Case("freshness-stalled", {"headrace_freshness_oldest_seconds": level((5, 0.5), (5, 100), (5, 0.5))},
         quiet=(4, 11), fires=(7,)),
    Case("probes-missing", {"headrace_freshness_probes_total": rising((10, 1200), (15, 0), (15, 1200))},
         quiet=(9, 38), fires=(23,), name="none are sent"),
    Case("probes-missing", {"up": level((40, 1))}, fires=(10,), name="nobody is asked"),
    Case("watermark-stalled",
         {f"headrace_join_watermark_seconds{{{OF}}}": rising((10, 60), (8, 0), (10, 60)),
          f"headrace_join_offset{{{OF}}}": rising((10, 500), (8, 0), (10, 500)),
          f"headrace_join_lag_records{{{OF}}}": level((30, 7))},
         quiet=(9, 22), fires=(15, 18), name="records wait"),
    Case("watermark-stalled",
         {f"headrace_join_watermark_seconds{{{OF}}}": rising((10, 60), (8, 0)),
          f"headrace_join_offset{{{OF}}}": rising((18, 500)),
          f"headrace_join_lag_records{{{OF}}}": level((19, 0))},
         quiet=(9,), fires=(16,), name="records arrive"),
    Case("watermark-stalled",
         {f"headrace_join_watermark_seconds{{{OF}}}": level((30, 5)),
          f"headrace_join_offset{{{OF}}}": level((30, 5)),
          f"headrace_join_lag_records{{{OF}}}": level((30, 0))},
         quiet=(5, 29), name="nothing happens"),
    Case("join-lag-growing", lag("headrace_join_lag_records", OF, 2_000), quiet=(12, 60), fires=(30, 40)),
    Case("train-lag-growing", lag("headrace_train_lag_records", f'{TRAINER},partition="0"', 100),
         quiet=(12, 60), fires=(30, 40)),
    Case("checkpoint-old",
         {f"headrace_train_checkpoint_age_seconds{{{TRAINER}}}": level((5, 0.2), (5, 100), (5, 0.2)),
          f"headrace_train_pending_rows{{{TRAINER}}}": level((15, 0)),
          f'headrace_train_lag_records{{{TRAINER},partition="0"}}': level((15, 3))},
         quiet=(4, 11), fires=(7,), name="blocks wait"),
    Case("checkpoint-old",
         {f"headrace_train_checkpoint_age_seconds{{{TRAINER}}}": level((15, 1_000)),
          f"headrace_train_pending_rows{{{TRAINER}}}": level((15, 0)),
          f'headrace_train_lag_records{{{TRAINER},partition="0"}}': level((15, 0))},
         quiet=(4, 14), name="there is nothing to learn"),
    Case("snapshot-old",
         {f"headrace_train_snapshot_age_seconds{{{TRAINER}}}": level((5, 900), (15, 3_000), (5, 10)),
          f"headrace_train_versions_published_total{{{TRAINER}}}": rising((25, 300))},
         quiet=(4, 22), fires=(15,)),
    Case("calibration-off", {CALIBRATION: level((5, 1.0), (15, 1.6), (5, 1.1))}, quiet=(4, 22), fires=(17,),
         name="high"),
    Case("calibration-off", {CALIBRATION: level((5, 1.0), (15, 0.5), (5, 0.9))}, quiet=(4, 22), fires=(17,),
         name="low"),
    Case("guard-tripped",
         {f"headrace_train_guard_held{{{TRAINER}}}": level((5, 0), (5, 1), (5, 0)),
          f"headrace_train_guard_rollbacks{{{TRAINER}}}": level((15, 0))},
         quiet=(4, 11), fires=(6,)),
    Case("replica-stale",
         {'headrace_replica_age_seconds{instance="s:1",job="serve"}': level((5, 0.3), (5, 90), (5, 0.3)),
          'headrace_replica_sequence{instance="s:1",job="serve"}': level((10, 7), (5, 99)),
          f"headrace_train_published_sequence{{{TRAINER}}}": level((5, 7), (10, 99))},
         quiet=(4, 11), fires=(7,), name="it does not follow"),
    Case("replica-stale",
         {'headrace_replica_age_seconds{instance="s:1",job="serve"}': level((15, 9_000)),
          'headrace_replica_sequence{instance="s:1",job="serve"}': level((15, 7)),
          f"headrace_train_published_sequence{{{TRAINER}}}": level((15, 7))},
         quiet=(4, 14), name="there is nothing newer"),
    Case("replica-stale",
         {'process_start_time_seconds{instance="s:1",job="serve"}': level((20, 0)),
          'headrace_replica_sequence{instance="s:1",job="serve"}': level((10, -1), (10, 99)),
          f"headrace_train_published_sequence{{{TRAINER}}}": level((20, 99))},
         quiet=(1, 12), fires=(5, 9), name="it has none"),
    Case("dead-letters",
         {'headrace_join_rejected_total{instance="j:1",reason="not_json"}': rising((20, 0), (20, 50), (30, 0)),
          'headrace_join_kinds_total{instance="j:1",kind="click"}': rising((70, 1_000)),
          'headrace_join_kinds_total{instance="j:1",kind="tick"}': rising((70, 100_000))},
         quiet=(19, 60), fires=(30, 40)),
    Case("disk-low", {'headrace_disk_free_bytes{instance="t:1"}': level((5, 1e12), (5, 1e9), (5, 1e12))},
         quiet=(4, 11), fires=(7,)),
    Case("disk-filling",
         {'headrace_disk_free_bytes{instance="t:1"}': [*(19e9 - 3e7 * i for i in range(300)), *level((60, 1e12))]},
         quiet=(30, 320), fires=(120, 290)),
    Case("target-down", UP | {'up{job="train",instance="train:1"}': level((5, 1), (5, 0), (30, 1))},
         quiet=(4, 11), fires=(7,), name="it does not answer"),
    Case("target-down", {k: v for k, v in UP.items() if "train" not in k}, fires=(7,), name="nobody knows of it"),
    Case("serve-errors",
         {f'headrace_serve_requests_total{{{ROUTE},status="200"}}': rising((40, 1_000)),
          f'headrace_serve_requests_total{{{ROUTE},status="503"}}': rising((10, 0), (10, 100), (20, 0))},
         quiet=(9, 30), fires=(16, 20), name="waited in vain"),
    Case("serve-errors",
         {f'headrace_serve_requests_total{{{ROUTE},status="200"}}': rising((40, 1_000)),
          f'headrace_serve_requests_total{{{ROUTE},status="429"}}': rising((10, 0), (10, 100), (20, 0))},
         quiet=(9, 30), fires=(16, 20), name="turned away"),
    Case("serve-errors",
         {f'headrace_serve_requests_total{{{ROUTE},status="200"}}': rising((40, 1_000)),
          f'headrace_serve_requests_total{{{ROUTE},status="404"}}': rising((40, 1_000))},
         quiet=(9, 20, 30), name="asked wrongly"),
    Case("serve-errors",
         {f'headrace_serve_requests_total{{{ROUTE},status="200"}}': rising((40, 10)),
          f'headrace_serve_requests_total{{{ROUTE},status="503"}}': rising((10, 0), (10, 1), (20, 0)),
          f'headrace_serve_requests_total{{{POLLED},status="200"}}': rising((40, 10_000))},
         quiet=(9, 30), fires=(16, 20), name="beside polls that are answered"),
    Case("serve-errors",
         {f'headrace_serve_requests_total{{{ROUTE},status="200"}}': rising((40, 10)),
          f'headrace_serve_requests_total{{{PROBED},status="503"}}': rising((40, 100))},
         quiet=(9, 20, 30), name="probed while it is not ready"),
    Case("serve-slow",
         {f'headrace_serve_request_seconds_bucket{{{ROUTE},le="{le}"}}': rising((10, fast), (20, slow), (20, fast))
          for le, fast, slow in (("0.02", 1_000, 500), ("0.05", 1_000, 500), ("0.1", 1_000, 990),
                                ("+Inf", 1_000, 1_000))},
         quiet=(9, 40), fires=(28,)),
)  # fmt: skip
