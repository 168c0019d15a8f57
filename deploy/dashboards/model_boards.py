"""What the dashboards Model quality, Embedding store and Serving show."""

from __future__ import annotations

from deploy.dashboards import objectives as good
from deploy.dashboards.panels import ANSWERS, Board, Panel, Query, quantiles

TASK = "{{task}} {{scenario}}"

MODEL_QUALITY = Board(
    "headrace-model",
    "Headrace / Model quality",
    "Is the model still good? Each example was scored before it was learned; figures are of a sliding window of"
    " examples.",
    {
        "Test-then-train": [
            Panel(
                "AUC", "none",
                "By task and scenario. A fall after a change of the sources: their features. A slow fall: compare"
                " with a kept checkpoint (`headrace checkpoint list`).",
                [Query("headrace_train_auc{}", TASK)],
            ),
            Panel(
                "Normalised entropy", "none",
                "Log loss over that of always saying the mean. 1 and more: the model knows nothing beyond the mean.",
                [Query("headrace_train_entropy{}", TASK)],
            ),
            Panel(
                "Calibration", "none",
                "Predicted over actual. Outside the lines scores are wrong as probabilities: look for a change of"
                " labels (late purchases, a lost source of clicks) before anything else.",
                [Query("headrace_train_calibration{}", TASK)], good.CALIBRATION,
            ),
            Panel("Loss", "none", "Log loss by task; what the guard and the drift detector look at.",
                  [Query("headrace_train_loss{}", "{{task}}")]),
        ],
        "Guard": [
            Panel(
                "Held back by the guard", "none",
                "1: versions are not published, replicas serve the last good one; the trainer's log says why."
                " Rollbacks in a row beside it. `headrace checkpoint rollback` if it does not mend itself.",
                [Query("headrace_train_guard_held{}", "held"), Query("headrace_train_guard_rollbacks{}", "rollbacks")],
                good.GUARD,
            ),
            Panel("Drift of the loss", "none",
                  "Changes that were found, by task, per hour. Each is a reason to look at AUC.",
                  [Query("sum by (task) (increase(headrace_train_drifts_total{}[1h]))", "{{task}}")]),
        ],
        "Training": [
            Panel("Examples learned", "short", "Per second. Below what is joined: blocks wait, see Kafka.",
                  [Query("rate(headrace_train_rows_total{}[$__rate_interval])")]),
            Panel("Not learned", "short",
                  "Per second. Rows of batches whose loss exploded: the trainer's log has their places. Ids of a table"
                  " that got no row: make it larger.",
                  [Query("rate(headrace_train_left_out_rows_total{}[$__rate_interval])", "left out"),
                   Query("sum by (table) (rate(headrace_train_no_room_total{}[$__rate_interval]))",
                         "no room: {{table}}")]),
            Panel("Examples in a batch", "short", "Full batches ([model] batch_size) mean catching up.",
                  quantiles("headrace_train_batch_rows_bucket{}")),
            Panel("Step", "s", "One test-then-train step. Grows with batch, tables that are read from disk, other"
                               " processes.",
                  quantiles("headrace_train_step_seconds_bucket{}"), log=True),
            Panel("Where a step's time goes", "percentunit", "Seconds per second, by stage.",
                  [Query("sum by (stage) (rate(headrace_train_stage_seconds_total{}[$__rate_interval]))",
                         "{{stage}}")]),
        ],
    },
)  # fmt: skip

STORE = Board(
    "headrace-store",
    "Headrace / Embedding store",
    "Rows, commits, and the versions that go out.",
    {
        "Rows": [
            Panel("Rows", "short", "Held by the trainer, by table. At the table's limit eviction begins.",
                  [Query("headrace_train_table_rows{}", "{{table}}")], log=True),
            Panel("Admitted and evicted", "short",
                  "Rows per second. Evicted as fast as admitted: the table is too small, or admission too easy.",
                  [Query("sum by (table) (rate(headrace_train_admissions_total{}[$__rate_interval]))",
                         "{{table}} in"),
                   Query("sum by (table) (rate(headrace_train_evictions_total{}[$__rate_interval]))",
                         "{{table}} out")]),
            Panel("Reads of the tier on disk", "short",
                  "Ids that were not in memory, per second: `hit`, it was on disk; `miss`, nowhere, so new. Many"
                  " hits: more rows in memory pay.",
                  [Query("sum by (table, outcome) (rate(headrace_train_tier_reads_total{}[$__rate_interval]))",
                         "{{table}} {{outcome}}")]),
            Panel("Rows that wait for their turn", "short",
                  "Examples offered and not learned; rows owed to replicas by the budget of bytes.",
                  [Query("headrace_train_pending_rows{}", "offered"), Query("headrace_train_owed_rows{}", "owed")]),
        ],
        "Checkpoints": [
            Panel("Time since the last commit", "s",
                  "Commits come several times a second while there is anything to learn. Above the line while"
                  " examples wait: the trainer is stuck; what it learned since would be learned again.",
                  [Query("headrace_train_checkpoint_age_seconds{}")], good.CHECKPOINT_AGE),
            Panel("Commit", "s", "One atomic write of a version. Grows with rows touched, and with a slow disk.",
                  quantiles("headrace_train_commit_seconds_bucket{}"), log=True),
            Panel("Store on disk", "bytes", "The trainer's store; beside it stand snapshots and kept checkpoints.",
                  [Query("headrace_train_checkpoint_bytes{}")]),
            Panel("Age of the newest snapshot", "s",
                  "New replicas start from it. Above the line: is the snapshots' place full or away? See the"
                  " trainer's log.",
                  [Query("headrace_train_snapshot_age_seconds{}")], good.SNAPSHOT_AGE),
        ],
        "Versions": [
            Panel("Versions published", "short", "Per second; none while examples come: see the guard.",
                  [Query("rate(headrace_train_versions_published_total{}[$__rate_interval])")]),
            Panel("Rows in versions", "short",
                  "Per second; what replicas take over. None while versions go out: only dense weights move.",
                  [Query("rate(headrace_train_delta_rows_total{}[$__rate_interval])")]),
            Panel("Bytes a row", "bytes", "Of a version. fp32, fp16 and int8 differ: [model] encoding.",
                  [Query("rate(headrace_train_delta_bytes_total{}[$__rate_interval])"
                         " / rate(headrace_train_delta_rows_total{}[$__rate_interval])")]),
            Panel("Oldest row owed", "s",
                  "Held back by [model] row_bytes_per_s. Grows without end: the budget is too small.",
                  [Query("headrace_train_owed_oldest_seconds{}")]),
        ],
    },
)  # fmt: skip

SCORING = 'route=~"/v1/(rank|recommend)",instance=~"$instance"'
SERVING = Board(
    "headrace-serving",
    "Headrace / Serving",
    "Replicas: requests, latency, overload, and which version they serve.",
    {
        "Requests": [
            Panel("Requests", "reqps", "Answered per second, by route and status.",
                  [Query("sum by (route, status) (rate(headrace_serve_requests_total{}[$__rate_interval]))",
                         "{{route}} {{status}}")]),
            Panel("Latency", "s",
                  "Of rank and recommend, from a request's head to the end of its answer. Above the line: fewer"
                  " candidates, more replicas, or a version that is slow to apply.",
                  [Query(f"histogram_quantile({q}, sum by (le, route)"
                         f" (rate(headrace_serve_request_seconds_bucket{{{SCORING}}}[$__rate_interval])))",
                         f"p{100 * q:.0f} {{{{route}}}}") for q in (0.5, 0.99)], good.SERVE_SECONDS, log=True),
            Panel("Share of requests that failed", "percentunit",
                  "Of rank, recommend and similar: answered with 500 or more, or turned away (429). 429 and 503 are"
                  " overload.",
                  [Query(f'(sum(rate(headrace_serve_requests_total{{{ANSWERS},status=~"5..|429",'
                         'instance=~"$instance"}[$__rate_interval])) or vector(0))'
                         f' / sum(rate(headrace_serve_requests_total{{{ANSWERS},instance=~"$instance"}}'
                         "[$__rate_interval]))", "failed")],
                  good.SERVE_ERRORS),
            Panel("Requests refused", "reqps",
                  "By the problem that was said, per second. too-many-waiting, waited-too-long: overload; add"
                  " replicas.",
                  [Query("sum by (reason) (rate(headrace_serve_refused_total{}[$__rate_interval]))", "{{reason}}")]),
            Panel("Waiting, degraded", "short",
                  "Requests that wait for their turn; answers cut short by the deadline, per second. Both are"
                  " overload.",
                  [Query("headrace_serve_waiting{}", "waiting {{instance}}"),
                   Query("sum by (route) (rate(headrace_serve_degraded_total{}[$__rate_interval]))",
                         "degraded {{route}}")]),
            Panel("Candidates per request", "short", "Items scored; latency goes with them.",
                  quantiles("headrace_serve_candidates_bucket{}")),
        ],
        "Versions": [
            Panel("Version served", "none",
                  "Sequence of the version; replicas lie on one line, close below the trainer.",
                  [Query("headrace_replica_sequence{}"),
                   Query("headrace_train_published_sequence", "published by the trainer")]),
            Panel("Age of the version served", "s",
                  "Above the line while the trainer has a newer one: the replica does not follow; restart it.",
                  [Query("headrace_replica_age_seconds{}")], good.REPLICA_AGE),
            Panel("Versions applied", "ops", "Per second; as many as are published.",
                  [Query("rate(headrace_replica_versions_applied_total{}[$__rate_interval])")]),
            Panel("Applying a version", "s", "Requests wait meanwhile.",
                  quantiles("headrace_replica_apply_seconds_bucket{}"), log=True),
            Panel("Rows held", "short", "By table and replica; all replicas hold the same.",
                  [Query("headrace_replica_rows{}", "{{instance}} {{table}}")], log=True),
            Panel("Memory of rows", "bytes", "Reserved by tables; twice that while a snapshot is loaded.",
                  [Query("headrace_replica_bytes{}", "{{instance}} {{table}}")]),
        ],
    },
)  # fmt: skip
