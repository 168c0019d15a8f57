"""The demo for hours at 80 % of its knee, looked at from outside: what grows?

    SOAK_SECONDS  how long (7,200)          SOAK_RATE  events/s instead of 80 % of a knee that is looked for
    SOAK_OUT      folder of samples.csv, soak.json and soak.svg (.headrace/soak)

The knee is the largest rate that the demo keeps up with in runs of KNEE_S seconds: rates are doubled until it does not,
then halved between. It keeps up if nearly nobody goes away without an answer, as much as asked for is sent, and probes
come back soon (KEEPS_UP).

Every SAMPLE_S seconds: resident memory, open files, threads and processor time of every process of the demo (Kafka and
the twin among them); disk by part; the workers' lag and the freshness of the probes meanwhile, from their /metrics.
The first SETTLE_S seconds (a quarter of a shorter run) do not count. Of the rest the Theil-Sen slope, the median of
the slopes between all pairs of samples, times the span is what a figure has grown; or the median of the last quarter
less that of the first, if it is more, as half of the pairs see nothing of a single step. It is flat where that is less
than 5 % of its median, or less than what the allocator, a compaction or a busy machine shift about (ALLOWED). What is
seen in fewer than half of the samples is not judged; of the JUDGED it fails.

What grows for a reason is not judged by that but bounded, or left out by the settings (SETTINGS):

- Kafka's log grows with what is sent, for the whole run: said, not judged. Its segments are files that are open.
- What the joiner keeps of open impressions, event ids and purchase windows is full after the longest of its windows,
  which are as long as the settling here.
- Snapshots and checkpoints are kept in number: there are as many as ever will be when the settling is over.
- Processor time is said: by it a machine that got slower is told from a system that did.
- Every new item brings rows to trainer and replica: hardly any comes (`item_life_s`). `rows` says how many there were.
- The demo keeps four bytes of each probe, and the page's samples of half an hour.
- RocksDB keeps blocks that it has read until its cache is full, which takes hours: `store_mb` is what it says of its
  memory, held to its limit (STORE_MB), and `rss_mb` of join and train is without it.
- The JVM takes heap up to -Xmx, when it likes: its memory is held to that and KAFKA_BESIDE_MB.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from deploy.bench.plots import curves_svg
from deploy.broker import MAX_HEAP_MB
from deploy.demo.run import EVENTS_PER_REQUEST
from deploy.freshness_metrics import SERVABLE
from deploy.prometheus import histogram, quantile
from tests.end_to_end.demos import Demo, demo
from tests.figures.common import Bench, FigureError, Row, at_least, at_most, equal, say

SECONDS, SAMPLE_S, SETTLE_S = 7_200.0, 10.0, 900.0
SHARE = 0.8  # of the knee
KNEE_S, FIRST_RATE, MOST_RATE, HALVINGS = 40, 500, 64_000, 2
KEEPS_UP = {"sent": 0.9, "unanswered": 0.01, "p95_ms": 2_000.0}
GROWTH = 0.05  # of the median, over the span
ALLOWED = {"rss_mb": 10.0, "files": 4.0, "threads": 2.0, "disk_mb": 32.0, "lag_s": 1.0, "fresh_ms": 50.0}
ALLOWED["store_mb"] = ALLOWED["rss_mb"]
ALLOWED["files kafka"] = 40.0  # three segments more or less of each partition
ALLOWED["lag train"] = 100.0  # blocks, not events: a second or two of them
JUDGED = ("rss_mb join", "rss_mb train", "rss_mb serve", "rss_mb demo", "rss_mb kafka", "lag join", "lag train",
          "fresh_ms p50", "fresh_ms p99")  # fmt: skip
KAFKA_BESIDE_MB = 400.0  # of a JVM, beside its heap
STORE_MB = {"join": 4 * 2**26 / 1e6, "train": 6 * 2**26 / 1e6}  # a partition; blocks, and tables that are written much
GRACE_S = 600.0  # to drain, to recount, and for the twin, which leaves the others the processor, to catch up

SETTINGS = """
[simulator]
item_life_s = 864000.0
[join]
open_ms = {window_ms}
click_window_ms = {window_ms}
purchase_window_ms = {window_ms}
snapshot_interval_s = {keep_s}
[train]
snapshot_interval_s = {copy_s}
checkpoint_interval_s = {copy_s}
"""


@dataclass
class Samples:
    """Rows of figures, one each SAMPLE_S; a name's first part is its kind, as in "rss_mb train"."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def series(self, name: str, from_s: float) -> tuple[np.ndarray, np.ndarray]:
        """(seconds, values) from then on."""
        known = [(row["seconds"], row[name]) for row in self.rows if row["seconds"] >= from_s and name in row]
        at, values = np.array(known, float).reshape(-1, 2).T
        return at, values

    @property
    def names(self) -> list[str]:
        """All but the time, in the order in which they came."""
        return [name for name in dict.fromkeys(name for row in self.rows for name in row) if name != "seconds"]


@dataclass
class Trend:
    """How a figure went."""

    name: str
    median: float
    growth: float  # over the span
    allowed: float

    @property
    def flat(self) -> bool:
        return self.growth <= max(self.allowed, GROWTH * self.median)


def soak(bench: Bench) -> list[Row]:
    """Hours of the demo at 80 % of its knee: memory, disk, open files, lag and freshness are flat"""
    seconds = float(os.environ.get("SOAK_SECONDS", SECONDS))
    out = Path(os.environ.get("SOAK_OUT", ".headrace/soak"))
    asked = float(os.environ.get("SOAK_RATE", 0))
    knee = None if asked else find_knee(bench)
    rate = asked if knee is None else SHARE * knee
    out.mkdir(parents=True, exist_ok=True)
    for old in ("samples.csv", "soak.json", "soak.svg"):  # else those of another run would pass for this one's
        (out / old).unlink(missing_ok=True)
    result, samples = run(bench, seconds, rate, out)
    settled = min(SETTLE_S, seconds / 4)
    found = trends(samples, settled, rate)
    keep(out, found, result, knee)
    return rows_of(found, samples, result, knee, seconds)


def find_knee(bench: Bench) -> float:
    """Events/s. Raises FigureError where the demo does not keep up with the first rate."""
    rate, good, bad = FIRST_RATE, 0.0, 0.0
    while not bad and rate <= MOST_RATE:
        good, bad, rate = (rate, 0.0, 2 * rate) if _keeps_up(bench, rate) else (good, rate, rate)
    if not good:
        raise FigureError(f"the demo does not keep up with {FIRST_RATE} events/s here")
    for _ in range(HALVINGS if bad else 0):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if _keeps_up(bench, middle) else (good, middle)
    return good


def _keeps_up(bench: Bench, rate: float) -> bool:
    with demo(bench.empty("knee"), "--no-page", "--seconds", KNEE_S, "--rate", rate) as running:
        try:
            found = running.result(KNEE_S + GRACE_S)
        except (subprocess.TimeoutExpired, AssertionError) as error:
            say(f"knee: {rate:,.0f} events/s: the demo came to no good end: {error}")
            return False
    pages = rate / EVENTS_PER_REQUEST * KNEE_S
    away, p95 = sum(found["unanswered"].values()) / pages, found["freshness_ms"]["p95"] or float("inf")
    sent = found["events_per_s"] / rate
    holds = sent >= KEEPS_UP["sent"] and away <= KEEPS_UP["unanswered"] and p95 <= KEEPS_UP["p95_ms"]
    say(f"knee: {rate:,.0f} events/s: {sent:.0%} sent, {away:.1%} unanswered, p95 {p95:,.0f} ms: {holds}")
    return holds


def run(bench: Bench, seconds: float, rate: float, out: Path) -> tuple[dict[str, Any], Samples]:
    """(figures of the demo, what was seen meanwhile). Raises FigureError; the samples are in `out` all the same."""
    home = bench.empty("soak")
    settled = min(SETTLE_S, seconds / 4)
    config = home / "soak.toml"
    keep_s = 2 * seconds + GRACE_S  # Kafka keeps `events` for that and the window, and the recount needs them all
    settings = SETTINGS.format(window_ms=round(0.8 * settled * 1000), copy_s=settled / 4, keep_s=keep_s)
    config.write_text(settings, "utf-8")
    say(f"soak: {seconds:,.0f} s at {rate:,.0f} events/s")
    with demo(home / "data", "--config", config, "--seconds", seconds, "--rate", rate) as running:
        samples = Samples()
        try:
            for row in _sampled(running, seconds):
                samples.rows.append(row)
                _write(out, samples)
            say("soak: the end of it: what was sent is learned, the twin catches up, the log is recounted")
            return running.result(GRACE_S + seconds), samples
        except (subprocess.TimeoutExpired, AssertionError) as error:
            raise FigureError(f"the demo came to no good end: {error}") from None
        finally:
            _draw(out, samples)  # now and not before: it takes a second, of which the demo would have had a part


def _sampled(running: Demo, seconds: float) -> Iterator[dict[str, float]]:
    """Rows, from when events flow until they end."""
    targets = running.data_dir / "targets.json"
    running.until(targets.exists, 300)
    ports = {one["labels"]["job"]: one["targets"][0] for one in json.loads(targets.read_text("utf-8"))}
    with httpx.Client(timeout=30) as client:
        running.until(lambda: _fresh(client, ports)[0] > 0, 300)
        began, due, before = time.monotonic(), time.monotonic(), {}
        while (now := time.monotonic() - began) < seconds - SAMPLE_S:
            if running.process.poll() is not None:
                raise FigureError(f"the demo ended after {now:.0f} s: {running.stderr()[-500:]}")
            _, buckets = _fresh(client, ports)
            meanwhile = {bound: count - before.get(bound, 0.0) for bound, count in buckets.items()}
            row = {"seconds": round(now, 1)} | _processes(running) | _disk(running.data_dir / "demo")
            row |= _told(client, ports)
            for name in STORE_MB:
                if {f"rss_mb {name}", f"store_mb {name}"} <= row.keys():  # else it was just too late with its answer
                    row[f"rss_mb {name}"] -= row[f"store_mb {name}"]
                else:
                    row.pop(f"rss_mb {name}", None)
            if before and meanwhile.get(float("inf"), 0.0) > 0:
                row |= {f"fresh_ms p{100 * q:g}": 1e3 * quantile(q, meanwhile) for q in (0.5, 0.99)}
            before = buckets or before  # it did not answer in time: the next answer has both
            yield row
            ended = time.monotonic()
            due = max(due + SAMPLE_S, ended)
            time.sleep(due - ended)  # the pace of the samples


def _fresh(client: httpx.Client, ports: dict[str, str]) -> tuple[float, dict[float, float]]:
    return histogram(_metrics(client, ports["demo"]), "headrace_freshness_seconds", stage=SERVABLE)


def _metrics(client: httpx.Client, address: str) -> str:
    try:
        return client.get(f"http://{address}/metrics").text
    except httpx.TransportError:  # it is starting
        return ""


def _processes(running: Demo) -> dict[str, float]:
    """Of all processes of a name together."""
    row: dict[str, float] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(running.process.pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error), process.oneshot():  # it may have ended meanwhile
                name = _name(process.cmdline())
                used = process.cpu_times()
                seen = {
                    "rss_mb": process.memory_info().rss / 1e6, "files": float(process.num_fds()),
                    "threads": float(process.num_threads()), "cpu_s": used.user + used.system,
                }  # fmt: skip
                row |= {f"{kind} {name}": value + row.get(f"{kind} {name}", 0.0) for kind, value in seen.items()}
    return row


def _name(words: list[str]) -> str:
    if "kafka.Kafka" in words:
        return "kafka"
    if "deploy.demo.frozen" in words:
        return "twin"
    return words[3] if words[1:3] == ["-m", "deploy.cli"] else Path(words[0]).name


def _disk(home: Path) -> dict[str, float]:
    """MB in use by the first folder (a new index of Kafka's is 10 MB long and empty); files that vanish meanwhile count
    nothing."""
    row: dict[str, float] = {}
    for folder, _, files in os.walk(home):
        part = (Path(folder).relative_to(home).parts or ("files",))[0]
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                used = (Path(folder) / file).lstat().st_blocks * 512 / 1e6
                row[f"disk_mb {part}"] = row.get(f"disk_mb {part}", 0.0) + used
    return row


def _told(client: httpx.Client, ports: dict[str, str]) -> dict[str, float]:
    """Lag, rows, open impressions and RocksDB's memory, as the workers say them."""
    wanted = {
        "headrace_join_lag_records": "lag join", "headrace_train_lag_records": "lag train",
        "headrace_train_table_rows": "rows train", "headrace_join_open_impressions": "open join",
        "headrace_join_store_memory_bytes": "store_mb join", "headrace_train_store_memory_bytes": "store_mb train",
    }  # fmt: skip
    row: dict[str, float] = {}
    for job in ("join", "train"):
        for family in text_string_to_metric_families(_metrics(client, ports[job])):
            for sample in family.samples:
                if (name := wanted.get(sample.name)) is not None:
                    value = sample.value / 1e6 if name.startswith("store_mb") else sample.value
                    row[name] = row.get(name, 0.0) + value
    return row


def trends(samples: Samples, from_s: float, rate: float) -> list[Trend]:
    """Of all figures that can be flat. The lag of the join worker may grow by what is sent in a second."""
    found = []
    wanted = max(3, sum(row["seconds"] >= from_s for row in samples.rows) / 2)
    for name in samples.names:
        kind = name.split()[0]
        if is_only_said(name):
            continue
        at, values = samples.series(name, from_s)
        if len(at) < wanted:
            continue  # a copy that is being made
        allowed = ALLOWED["lag_s"] * rate if name == "lag join" else ALLOWED.get(name) or ALLOWED[kind]
        growth = max(slope(at, values) * float(at[-1] - at[0]), step(values))
        limits = {"rss_mb kafka": MAX_HEAP_MB + KAFKA_BESIDE_MB} | {f"store_mb {of}": mb for of, mb in STORE_MB.items()}
        if name in limits:  # it may fill up, so what counts is where it ends
            allowed = max(allowed, limits[name] - (float(np.median(values)) - growth / 2))
        found.append(Trend(name, float(np.median(values)), growth, allowed))
    return found


def is_only_said(name: str) -> bool:
    """Whether it grows, or moves, for a reason that is said above."""
    return name.split()[0] in ("rows", "open", "cpu_s") or name == "disk_mb kafka"


def slope(at: np.ndarray, values: np.ndarray) -> float:
    """Theil-Sen: the median of the slopes between all pairs (Sen, JASA 1968).

    >>> slope(np.arange(5.0), np.array([0.0, 2.0, 100.0, 6.0, 8.0]))
    2.0
    """
    first, second = np.triu_indices(len(at), 1)
    return float(np.median((values[second] - values[first]) / (at[second] - at[first])))


def step(values: np.ndarray) -> float:
    """The median of the last quarter less that of the first.

    >>> step(np.repeat([1.0, 5.0], 8))
    4.0
    """
    quarter = -(-len(values) // 4)
    return float(np.median(values[-quarter:]) - np.median(values[:quarter]))


def keep(out: Path, found: list[Trend], result: dict[str, Any], knee: float | None) -> None:
    """soak.json, beside samples.csv and soak.svg."""
    told = {"knee": knee, "trends": [vars(trend) | {"flat": trend.flat} for trend in found], "demo": result}
    (out / "soak.json").write_text(json.dumps(told, indent=1), "utf-8")
    say(f"soak: samples, trends and a drawing are in {out}")


def _write(out: Path, samples: Samples) -> None:
    with (out / "samples.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["seconds", *samples.names])
        writer.writeheader()
        writer.writerows(samples.rows)


def _draw(out: Path, samples: Samples) -> None:
    curves = {name: samples.series(name, 0) for name in samples.names}
    (out / "soak.svg").write_text(curves_svg("What was seen of the soak", curves), "utf-8")


def rows_of(
    found: list[Trend], samples: Samples, result: dict[str, Any], knee: float | None, seconds: float
) -> list[Row]:
    """The line's rows."""
    events_in, *others = result["balance"].values()
    counted = result["oracle_balance"]
    judged = {trend.name for trend in found}
    away, requests = sum(result["unanswered"].values()), result["events_per_s"] / EVENTS_PER_REQUEST * seconds
    return [
        Row("the knee", f"{knee:,.0f} events/s" if knee else "not looked for: SOAK_RATE", "", True),
        Row("sent", f"{result['events_per_s']:,.0f} events/s for {result['seconds']:,.0f} s", "", True),
        at_least("seconds", result["seconds"], 0.95 * seconds, " s"),
        *(equal(name, result[name], 0) for name in ("lost", "duplicated", "left_out")),
        equal("the balance", events_in, sum(others)),
        equal("the oracle's balance", counted, {name: result["balance"][name] for name in counted}),
        at_most("users without an answer", away, 0.01 * requests),
        equal("workers that died", sum(result["restarts"].values()), 0),
        at_least("samples", len(samples.rows), 0.9 * seconds / SAMPLE_S),
        *(Row(name, "seen in too few samples", "in half of them", False) for name in JUDGED if name not in judged),
        *map(_trend, found),
        *(_said(name, samples) for name in samples.names if is_only_said(name)),
    ]


def _trend(trend: Trend) -> Row:
    allowed = max(trend.allowed, GROWTH * trend.median)
    return Row(trend.name, f"{trend.median:,.1f}, grown by {trend.growth:+,.2f}", f"at most {allowed:,.1f}", trend.flat)


def _said(name: str, samples: Samples) -> Row:
    _, values = samples.series(name, 0)
    return Row(f"{name}, first and last", f"{values[0]:,.0f}, {values[-1]:,.0f}", "", True)
