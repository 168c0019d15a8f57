"""The alerts, each said once: as rules for Prometheus (YAML) and as Grafana's own alert rules.

Every window and duration of a rule can be scaled (`scale=1/60`: an hour becomes a minute), so that a test sees in
seconds what takes hours in operation. Bounds are never scaled: they are those of `objectives`, as on the panels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.dashboards import objectives as good
from deploy.dashboards.boards import BOARDS
from deploy.dashboards.objectives import Objective
from deploy.dashboards.panels import ANSWERS, JOBS, SOURCE_UID, past_objective, to_json

FOLDER_UID = GROUP = "headrace"
EVERY_S = 30  # between two evaluations
RUNBOOKS = "docs/operations.md"
_RANGE = re.compile(r"(?<=[\[:])(\d+)([smhd])(?=[\]:])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


@dataclass(frozen=True)
class Alert:
    """One alert. `name` is its anchor in the runbook; `wait`: how long `expr` must give something before it fires.

    `severity`: page (wakes somebody) or ticket (in working hours). `expr` gives a series for each thing that is wrong.
    """

    name: str
    severity: str
    wait: str
    expr: str
    summary: str
    todo: str
    objective: Objective

    @property
    def title(self) -> str:
        """As Prometheus names it: HeadraceReplicaStale."""
        return "Headrace" + "".join(word.capitalize() for word in self.name.split("-"))

    @property
    def uid(self) -> str:
        return f"headrace-{self.name}"


def _burns(factor: float, long: str, short: str) -> str:
    """Both windows burn the budget `factor` times too fast: the long one says that it matters, the short one that it
    still does (Google SRE workbook, chapter 5, multiwindow, multi-burn-rate alerts)."""
    bound = f"{factor:g} * {good.ERROR_BUDGET:g}"
    return f"({past_objective(long)} > {bound} and {past_objective(short)} > {bound})"


_WAITS = "(headrace_train_pending_rows > 0 or on (instance) sum by (instance) (headrace_train_lag_records) > 0)"
# Of what sources send: ticks, and with them probes, would thin it out where little happens.
_REFUSED = (
    "sum(rate(headrace_join_rejected_total[10m])) / (sum(rate(headrace_join_rejected_total[10m]))"
    ' + sum(rate(headrace_join_kinds_total{kind!="tick"}[10m])))'
)
_ABSENT = " or ".join(f'absent(up{{job="{job}"}})' for job in ("join", "train", "serve"))
# 429 is the replica's own answer to overload: whoever gets it has nothing to show.
_FAILED = (
    f'sum(rate(headrace_serve_requests_total{{{ANSWERS},status=~"5..|429"}}[5m]))'
    f" / sum(rate(headrace_serve_requests_total{{{ANSWERS}}}[5m]))"
)
# One that has no version yet has no age either.
_STALE = (
    f"(headrace_replica_age_seconds > {good.REPLICA_AGE.high:g}"
    " or time() - process_start_time_seconds > 60 and on (instance) headrace_replica_sequence < 0)"
    " and on (instance) (headrace_replica_sequence < scalar(max(headrace_train_published_sequence)))"
)
_SCORED = (
    "histogram_quantile(0.99, sum by (le, instance)"
    ' (rate(headrace_serve_request_seconds_bucket{route=~"/v1/(rank|recommend)"}[5m])))'
)

ALERTS: tuple[Alert, ...] = (
    Alert(
        "freshness-burn-fast", "page", "0s",
        f"{_burns(good.FAST_BURN, '1h', '5m')} or {_burns(6, '6h', '30m')}",
        "{{ $value | humanizePercentage }} of events take longer than a second to reach users: the error budget of a"
        " month is gone within days",
        "Open Freshness: the first stage that rose is the one that is late. Then the runbook.", good.FRESHNESS,
    ),
    Alert(
        "freshness-burn-slow", "ticket", "0s", f"{_burns(3, '1d', '2h')} or {_burns(1, '3d', '6h')}",
        "{{ $value | humanizePercentage }} of events take longer than a second to reach users: the error budget will"
        " not last",
        "Open Freshness over three days: since when, which stage, how much load. Usually it is the processor that is"
        " short.",
        good.PAST_FRESHNESS,
    ),
    Alert(
        "freshness-stalled", "page", "1m", f"headrace_freshness_oldest_seconds > {good.STALL.high:g}",
        "A probe has been on its way for {{ $value | humanizeDuration }}: a stage stands still",
        "See which worker is down or stuck (Streams, Processes; `/health` of each) and start it again: it goes on where"
        " it was.", good.STALL,
    ),
    Alert(
        "probes-missing", "ticket", "5m",
        "absent(headrace_freshness_probes_total) or sum(rate(headrace_freshness_probes_total[5m])) == 0",
        "Nobody measures freshness",
        "Start `headrace monitor` with --metrics-port, and have Prometheus scrape it.", good.PROBES,
    ),
    Alert(
        "watermark-stalled", "page", "1m",
        "delta(headrace_join_watermark_seconds[2m]) <= 0"
        " and (headrace_join_lag_records > 0 or delta(headrace_join_offset[2m]) > 0)",
        "Event time stands still in partition {{ $labels.partition }} while records wait",
        "The join worker at {{ $labels.instance }} is stuck on that partition: its log says on what. Restart it; the"
        " partition moves to another worker meanwhile.", good.EVENT_TIME,
    ),
    Alert(
        "join-lag-growing", "ticket", "5m",
        f"headrace_join_lag_records > {good.JOIN_LAG.high:g} and deriv(headrace_join_lag_records[10m]) > 0",
        "{{ $value | humanize }} records of events wait in partition {{ $labels.partition }}, and they become more",
        "More join workers, up to one a partition. After an outage [join] backlog = \"newest\" takes the newest first.",
        good.JOIN_LAG,
    ),
    Alert(
        "train-lag-growing", "ticket", "5m",
        f"headrace_train_lag_records > {good.TRAIN_LAG.high:g} and deriv(headrace_train_lag_records[10m]) > 0",
        "{{ $value | humanize }} blocks of examples wait for the trainer in partition {{ $labels.partition }}, and they"
        " become more",
        "Open Model quality, Training: where does a step's time go? A smaller ranker, fewer negatives, larger batches,"
        " or a GPU.",
        good.TRAIN_LAG,
    ),
    Alert(
        "checkpoint-old", "page", "1m",
        f"headrace_train_checkpoint_age_seconds > {good.CHECKPOINT_AGE.high:g} and on (instance) {_WAITS}",
        "The trainer has not committed for {{ $value | humanizeDuration }} while examples wait",
        "Is a rank stopped, is its disk very slow, does Kafka take versions? Its log says so. Restarted it goes on from"
        " the last commit.",
        good.CHECKPOINT_AGE,
    ),
    Alert(
        "snapshot-old", "ticket", "5m",
        f"headrace_train_snapshot_age_seconds > {good.SNAPSHOT_AGE.high:g}"
        " and on (instance) increase(headrace_train_versions_published_total[30m]) > 0",
        "The newest snapshot is {{ $value | humanizeDuration }} old: soon a new replica cannot start",
        "See the trainer's log: the place of snapshots is full, slow or away.", good.SNAPSHOT_AGE,
    ),
    Alert(
        "calibration-off", "ticket", "10m",
        f'headrace_train_calibration{{scenario="all"}} > {good.CALIBRATION.high:g}'
        f' or headrace_train_calibration{{scenario="all"}} < {good.CALIBRATION.low:g}',
        "The model predicts {{ $value | humanize }} times what happens ({{ $labels.task }})",
        "Have labels changed: late purchases, a source of clicks that is lost, bots? Compare with a kept checkpoint.",
        good.CALIBRATION,
    ),
    Alert(
        "guard-tripped", "page", "0s",
        f"headrace_train_guard_held > {good.GUARD.high:g} or headrace_train_guard_rollbacks > {good.GUARD.high:g}",
        "The guard holds versions back: what the trainer learned is bad, replicas serve the last good version",
        "The trainer's log says which task, and since when. Stop the source of the bad events; if the guard does not"
        " let go, `headrace checkpoint rollback`.", good.GUARD,
    ),
    Alert(
        "replica-stale", "page", "1m", _STALE,
        "The replica at {{ $labels.instance }} has taken no version for {{ $value | humanizeDuration }}, and there is a"
        " newer one",
        "Can it reach Kafka? Its log says so. Restarted it loads the newest snapshot and catches up.", good.REPLICA_AGE,
    ),
    Alert(
        "dead-letters", "ticket", "5m", f"{_REFUSED} > {good.DEAD_LETTERS.high:g}",
        "{{ $value | humanizePercentage }} of what comes in is refused",
        "Streams says for which reason; the records are in `events.dead`, whole, with their place. Mend the source,"
        " then `headrace replay dead`.", good.DEAD_LETTERS,
    ),
    Alert(
        "disk-low", "page", "1m", f"headrace_disk_free_bytes < {good.DISK_FREE.low:.0f}",
        "{{ $value | humanize1024 }}B are free on the disk of {{ $labels.job }} at {{ $labels.instance }}",
        "Make room: kept checkpoints and snapshots that nobody needs, Kafka's retention. Stores stop at a full disk"
        " and go on when there is room.", good.DISK_FREE,
    ),
    Alert(
        "disk-filling", "ticket", "1h",
        f"predict_linear(headrace_disk_free_bytes[6h], 86400) < 0 and headrace_disk_free_bytes < {20 * 2**30}",
        "At the pace of the last six hours the disk of {{ $labels.job }} at {{ $labels.instance }} is full within a"
        " day",
        "What grows: Kafka's topics, snapshots, kept checkpoints, the store itself? Bound it, or make the disk larger.",
        good.DISK_FILLING,
    ),
    Alert(
        "target-down", "page", "1m", f'up{{job=~"{JOBS}"}} == 0 or {_ABSENT}',
        "{{ $labels.job }} {{ $labels.instance }} does not answer",
        "The process is down or stuck, or Prometheus does not know of it. Start it: workers go on where they were.",
        good.UP,
    ),
    Alert(
        "serve-errors", "page", "2m", f"{_FAILED} > {good.SERVE_ERRORS.high:g}",
        "{{ $value | humanizePercentage }} of requests fail",
        "429, 503: overload, add replicas. 500: the replica's log has the request. Not ready: it has no version yet.",
        good.SERVE_ERRORS,
    ),
    Alert(
        "serve-slow", "ticket", "10m", f"{_SCORED} > {good.SERVE_SECONDS.high:g}",
        "One in a hundred requests to {{ $labels.instance }} takes longer than {{ $value | humanizeDuration }}",
        "Fewer candidates, more replicas, or a lower [serve.limits] deadline_ms.", good.SERVE_SECONDS,
    ),
)  # fmt: skip


def scaled(text: str, scale: float) -> str:
    """PromQL, or a duration, with each window times `scale`; none becomes shorter than a second.

    >>> scaled("rate(x[5m]) and y[1h:1m]", 1 / 60)
    'rate(x[5s]) and y[60s:1s]'
    """
    if scale == 1:
        return text

    def shorter(found: re.Match[str]) -> str:
        return f"{max(1, round(int(found[1]) * _SECONDS[found[2]] * scale))}s"

    return _RANGE.sub(shorter, text)


def waits(alert: Alert, scale: float = 1) -> str:
    """How long its expression must hold, as a duration."""
    return "0s" if alert.wait == "0s" else scaled(f"[{alert.wait}]", scale)[1:-1]


def rule_file(alerts: Sequence[Alert] = ALERTS, scale: float = 1, runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The rules as Prometheus reads them, to be written as YAML. `runbooks`: where the runbook is kept."""
    rules = [
        {
            "alert": alert.title,
            "expr": scaled(alert.expr, scale),
            "for": waits(alert, scale),
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "description": alert.todo,
                "runbook_url": f"{runbooks}#{alert.name}",
            },
        }
        for alert in alerts
    ]
    every = f"{max(1, round(EVERY_S * scale))}s"
    return {"groups": [{"name": GROUP, "interval": every, "rules": rules}]}


def grafana_rules(alerts: Sequence[Alert] = ALERTS, runbooks: str = RUNBOOKS) -> list[dict[str, Any]]:
    """The same as Grafana's alert rules, as its provisioning API takes them."""
    return [to_json(_grafana_rule(alert, runbooks).build()) for alert in alerts]


def _grafana_rule(alert: Alert, runbooks: str) -> Any:
    """A asks Prometheus, which gives what is wrong and nothing else; B holds for any number that comes."""
    from grafana_foundation_sdk.builders import alerting, expr, prometheus
    from grafana_foundation_sdk.models.alerting import RelativeTimeRange

    board, panel = next(
        (board, number) for board in BOARDS if (number := board.panel_id(alert.objective)) is not None
    )
    window = RelativeTimeRange(from_val=600, to=0)
    asked = prometheus.Dataquery().expr(alert.expr).instant().ref_id("A").interval_ms(1_000).max_data_points(43_200)
    holds = expr.TypeMath().expression("is_number($A) || is_inf($A)").ref_id("B")
    holds = holds.interval_ms(1_000).max_data_points(43_200)  # the server would fill these in, and plan see a change
    return (
        alerting.Rule(alert.title)
        .uid(alert.uid)
        .org_id(1)
        .folder_uid(FOLDER_UID)
        .rule_group(GROUP)
        .for_val(alert.wait)
        .condition("B")
        .no_data_state("OK")
        .exec_err_state("Error")
        .is_paused(False)
        .labels({"severity": alert.severity})
        .annotations({
            "summary": alert.summary.replace("$value", "$values.A.Value"),
            "description": alert.todo,
            "runbook_url": f"{runbooks}#{alert.name}",
            "__dashboardUid__": board.uid,
            "__panelId__": str(panel),
        })
        .with_query(alerting.Query("A").datasource_uid(SOURCE_UID).relative_time_range(window).model(asked))
        .with_query(alerting.Query("B").datasource_uid("__expr__").relative_time_range(window).model(holds))
    )
