"""What the dashboards Freshness, Streams and Kafka show, and the list of all dashboards."""

from __future__ import annotations

from deploy.dashboards import objectives as good
from deploy.dashboards.model_boards import MODEL_QUALITY, SERVING, STORE
from deploy.dashboards.panels import JOBS, Board, Panel, Query, past_objective, quantiles

FRESHNESS = Board(
    "headrace-freshness",
    "Headrace / Freshness",
    "How long it takes until an event has its effect on what users are shown, and which stage is late.",
    {
        "From outside: probes": [
            Panel(
                "Freshness", "s",
                "From an event being produced to a replica that answers with its effect, by probes. Above the line:"
                " look at the stages beside it for the one that grew.",
                quantiles('headrace_freshness_seconds_bucket{stage="servable"}', of=(0.5, 0.95, 0.99)),
                good.FRESHNESS, log=True,
            ),
            Panel(
                "Freshness by stage, p99", "s",
                "From produced until joined, trained, committed, servable; each includes those before. The first line"
                " that rises is the stage that is late: see Streams, Embedding store or Serving.",
                quantiles('headrace_freshness_seconds_bucket', "stage", (0.99,), "{{stage}}"), log=True,
            ),
            Panel(
                "Probes past the objective", "percentunit",
                f"Share of probes that took longer than {good.FRESHNESS_S:g} s. Above the line the error budget is"
                " spent faster than it comes in.",
                [Query(past_objective("$__rate_interval"), "past")],
                good.PAST_FRESHNESS,
            ),
            Panel(
                "Burn rate of the error budget", "none",
                "1: the budget of 30 days lasts 30 days. At the line it lasts two days, and somebody is woken.",
                [Query(f"{past_objective(window)} / {good.ERROR_BUDGET}", window) for window in ("5m", "1h", "6h")],
                good.BURN_FAST,
            ),
            Panel(
                "Oldest probe in flight", "s",
                "Grows when a stage stands still: then there are no new probes in the plots above. Look for the worker"
                " that is down or stuck.",
                [Query("headrace_freshness_oldest_seconds")], good.STALL,
            ),
            Panel(
                "Probes", "short",
                "Sent per second, and in flight. None sent: `headrace monitor` does not run, and nobody measures"
                " freshness.",
                [Query("rate(headrace_freshness_probes_total[$__rate_interval])", "sent per second"),
                 Query("headrace_freshness_waiting", "in flight")], good.PROBES,
            ),
        ],
        "From inside": [
            Panel(
                "Age of an event when its block is in Kafka", "s",
                "The join worker's part, with what it waits for disorder ([join] disorder_ms).",
                quantiles("headrace_join_age_seconds_bucket{}", of=(0.5, 0.99)), log=True,
            ),
            Panel(
                "Age of the version served", "s",
                "Since the version was made that a replica serves. It also grows when nothing happens that could be"
                " learned.",
                [Query("headrace_replica_age_seconds{}")], good.REPLICA_AGE,
            ),
        ],
    },
)  # fmt: skip

STREAMS = Board(
    "headrace-streams",
    "Headrace / Streams",
    "The join worker: what comes in, what is made of it, what is refused, and whether event time moves.",
    {
        "Events": [
            Panel(
                "Events by outcome", "short",
                "Per second; they must balance: events_in is the sum of the others and of what became open, but for"
                " rows (what came of them) and skew_… (impressions whose features were checked). Many late: the"
                " disorder of the sources is larger than [join] disorder_ms.",
                [Query('sum by (outcome) (rate(headrace_join_events{outcome!="open",instance=~"$instance"}'
                       "[$__rate_interval]))", "{{outcome}}")],
            ),
            Panel(
                "Events by kind", "short", "Per second. A kind that is missing has lost its source.",
                [Query("sum by (kind) (rate(headrace_join_kinds_total{}[$__rate_interval]))", "{{kind}}")],
            ),
            Panel(
                "Refused, by reason", "short",
                "Records per second that are no events; they are in `events.dead`, whole. Mend the source, then"
                " `headrace replay dead`.",
                [Query("sum by (reason) (rate(headrace_join_rejected_total{}[$__rate_interval]))", "{{reason}}")],
            ),
            Panel(
                "Share refused", "percentunit",
                "Of what sources send, ticks left out. Above the line: a source sends what nobody can read.",
                [Query("sum(rate(headrace_join_rejected_total{}[$__rate_interval]))"
                       " / (sum(rate(headrace_join_rejected_total{}[$__rate_interval]))"
                       ' + sum(rate(headrace_join_kinds_total{kind!="tick",instance=~"$instance"}'
                       "[$__rate_interval])))", "refused")],
                good.DEAD_LETTERS,
            ),
        ],
        "Event time": [
            Panel(
                "Pace of event time", "none",
                "Seconds of event time per second: 1 is live, more is catching up or a replay. 0 while records wait: a"
                " partition is stuck, and so are its users.",
                [Query("deriv(headrace_join_watermark_seconds{}[$__rate_interval])", "partition {{partition}}")],
                good.EVENT_TIME,
            ),
            Panel(
                "Watermark behind the clock", "s",
                "Now less the event time up to which a partition is joined. Grows in one partition: its worker. In"
                " all: too little processor, or Kafka.",
                [Query("headrace_join_watermark_lag_seconds{}", "partition {{partition}}")], log=True,
            ),
            Panel(
                "Open impressions", "short",
                "Windows that still wait for actions. Bounded by [join]; on disk past in_memory.",
                [Query("headrace_join_open_impressions{}", "partition {{partition}}")],
            ),
            Panel(
                "Memory of the stores", "bytes",
                "What RocksDB has in memory: it rises for hours, to 64 MB a partition. The rest of a worker's memory"
                " does not.",
                [Query("headrace_join_store_memory_bytes{}", "partition {{partition}}"),
                 Query("headrace_train_store_memory_bytes{}", "trainer")],
            ),
            Panel(
                "Commit and publish", "s",
                "One block: the write to the store, the transaction in Kafka. Slow commits: the disk. Slow"
                " transactions: Kafka.",
                [*quantiles("headrace_join_commit_seconds_bucket{}", of=(0.99,), legend="commit"),
                 *quantiles("headrace_join_publish_seconds_bucket{}", of=(0.99,), legend="publish")], log=True,
            ),
        ],
        "Processes": [
            Panel(
                "Answers to Prometheus", "none", "1: yes. 0: the process is down, stuck, or its port is closed.",
                [Query(f'up{{job=~"{JOBS}"}}', "{{job}} {{instance}}")], good.UP,
            ),
            Panel(
                "Free space", "bytes",
                "Where [data_dir] lies, by process. Stores stop at a full disk and go on when there is room.",
                [Query("headrace_disk_free_bytes{}", "{{job}} {{instance}}")], good.DISK_FREE,
            ),
            Panel(
                "Free space in a day", "bytes",
                "At the pace of the last six hours. Below the line the disk is full by then: what grows? It wakes"
                " nobody while 20 GiB are free.",
                [Query("predict_linear(headrace_disk_free_bytes{}[6h], 86400)", "{{job}} {{instance}}")],
                good.DISK_FILLING,
            ),
            Panel(
                "Processor", "percentunit", "Seconds of processor per second; 100 % is one core.",
                [Query(f'rate(process_cpu_seconds_total{{job=~"{JOBS}",instance=~"$instance"}}[$__rate_interval])',
                       "{{job}} {{instance}}")],
            ),
            Panel(
                "Memory", "bytes", "Resident. Growth without an end is a fault: send a `headrace doctor --bundle`.",
                [Query(f'process_resident_memory_bytes{{job=~"{JOBS}",instance=~"$instance"}}',
                       "{{job}} {{instance}}")],
            ),
        ],
    },
)  # fmt: skip

KAFKA = Board(
    "headrace-kafka",
    "Headrace / Kafka",
    "The topics as our workers see them: the embedded Kafka has no exporter of its own.",
    {
        "events": [
            Panel(
                "Records that wait", "short",
                "Of `events`, by partition: its end less what the join worker has done. Growing: more join workers,"
                " or find out what slows this one.",
                [Query("headrace_join_lag_records{}", "partition {{partition}}")], good.JOIN_LAG,
            ),
            Panel(
                "Records in and done", "short", "Per second, all partitions. `in` above `done`: lag grows.",
                [Query("sum(rate(headrace_join_offset{}[$__rate_interval]))"
                       " + sum(deriv(headrace_join_lag_records{}[$__rate_interval]))", "in"),
                 Query("sum(rate(headrace_join_offset{}[$__rate_interval]))", "done")],
            ),
            Panel(
                "Time to catch up", "s", "What waits, at the pace of now. Infinite: nothing is done.",
                [Query("sum(headrace_join_lag_records{}) / sum(rate(headrace_join_offset{}[$__rate_interval]))",
                       "join")],
            ),
            Panel(
                "End of the topic", "short", "The next offset of each partition. One that lags: keys are skewed.",
                [Query("headrace_join_offset{} + headrace_join_lag_records{}", "partition {{partition}}")],
            ),
            Panel(
                "Partitions by worker", "short", "How many each join worker has. They move when one dies.",
                [Query("count by (instance) (headrace_join_offset{})")],
            ),
        ],
        "examples and parameters": [
            Panel(
                "Blocks that wait", "short",
                "Of `examples`, not learned yet, wherever they wait. Growing: the trainer is slower than the stream.",
                [Query("headrace_train_lag_records{}", "partition {{partition}}")], good.TRAIN_LAG,
            ),
            Panel(
                "Transactions", "s", "p99 of one transaction of join (a block) and train (a version). Slow: Kafka or"
                                     " its disk.",
                [*quantiles("headrace_join_publish_seconds_bucket{}", of=(0.99,), legend="join"),
                 *quantiles("headrace_train_publish_seconds_bucket{}", of=(0.99,), legend="train")], log=True,
            ),
            Panel(
                "Bytes of versions", "Bps", "Per second into `parameters`. [model] row_bytes_per_s bounds it.",
                [Query("rate(headrace_train_delta_bytes_total{}[$__rate_interval])")],
            ),
        ],
    },
)  # fmt: skip

BOARDS = (FRESHNESS, STREAMS, MODEL_QUALITY, STORE, SERVING, KAFKA)
