"""How fast a log goes through Kafka at `--max-speed`, beside joiner and bare step alone on the same cores.

Through Kafka: an embedded broker, one join and one train worker, `headrace replay --max-speed`. The rate is events over
the time from the first one sent to the version that has learned all of them, an impression of k items as k. Before, the
workers have learned the first WARM_UP records of the log, as of a day earlier: what is loaded and compiled once is not
in it; nor is the reading of the log, which is put in order before the first event goes out.

The reference, in the same run, each part alone in a process of its own on one core, on the same records:

- t_join:  seconds an event of `Joiner.process`, raw records in memory, slices of 2,000 records of a partition as the
  worker's; no store, no blocks encoded;
- t_train: seconds an event of `Trainer.step` on these very rows, as many a step as the worker takes at most where it
  has fallen behind (LARGEST_BATCHES · batch_size); rows in memory, no store, no commits.

Each can use one core only. On CORES of them both together reach

    reference = min(CORES / (t_join + t_train), 1 / t_join, 1 / t_train)    events/s.

By the clock is what is promised. Where others use the machine too the clock says little; so the same from processor
time: of joiner and bare step as above, of the real thing min(CORES / sum, 1 / most) of its processes' seconds an event.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import psutil

from deploy.bench.alone import together
from tests.figures.common import Bench, FigureError, Row, at_least, headrace, program, public, say, started

CORES = 2
RUNS = 3
WARM_UP = 5_000  # records
WANTED = 0.4  # of the reference
EVENTS = 300_000  # of the simulated log
KUAIRAND = "kuairand/kuairand27k_explicit_feedback_kcore15.tsv.gz"

_WARM = """
import itertools, json, sys
from msgspec.structs import replace
from replay.readers import in_time_order, open_log
from streams.events import Item, encode
name, path, out, events = *sys.argv[1:4], int(sys.argv[4])
DAY_MS = 86_400_000
records = list(itertools.islice(in_time_order(open_log(name, path)), events))
times = [record.ts for record in records if not isinstance(record, Item)]
earlier = times[-1] - times[0] + DAY_MS
with open(out, "wb") as file:
    for record in records:
        if not isinstance(record, Item):
            record = replace(record, ts=record.ts - earlier, event_id=f"warm {record.event_id}")
            if getattr(record, "request_id", None) is not None:
                record = replace(record, request_id=f"warm {record.request_id}")
        file.write(encode(record) + b"\\n")
print(json.dumps({}))
"""

_PARTS = """
import json, os, sys
from pathlib import Path
import torch
from deploy.bench.alone import join_alone, train_alone
from deploy.settings import load
from replay.joining import partition_of
from replay.readers import in_time_order, open_log
from streams.catalogue import catalogue_item
from streams.events import Item, Tick, encode, units

name, path, config = sys.argv[1:4]
settings = load(Path(config))
join, partitions = settings.join.join, settings.topics.partitions
torch.set_num_threads(settings.train.threads)
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
lanes, items, events, last = [[] for _ in range(partitions)], [], 0, 0
for record in in_time_order(open_log(name, path)):
    if isinstance(record, Item):
        items.append(catalogue_item(record, encode(record)))
    else:
        lanes[partition_of(record.user, partitions)].append(encode(record))
        events, last = events + units(record), max(last, record.ts)
for lane in lanes:
    lane.append(encode(Tick(event_id="last", ts=last + join.closing_ms)))
blocks, join_s = join_alone(join, lanes)
learned, train_s = train_alone(settings.model, blocks, items)
print(json.dumps({"events": events, "rows": sum(len(block.examples) for block in blocks), "learned": learned,
                  "join_s": join_s, "train_s": train_s}))
"""


def max_speed(bench: Bench) -> list[Row]:
    """A log at --max-speed through Kafka, to what joiner and bare step reach on the same two cores"""
    made = bench.empty("pace") / "log.jsonl.gz"
    headrace(made.parent, "simulate", "--events", EVENTS, "--out", made)
    rows = []
    for what, name, path in (("simulated", "events", made), ("kuairand", "kuairand", public(KUAIRAND))):
        runs = []
        for number in range(RUNS):
            say(f"{what}: run {number + 1} of {RUNS}")
            runs.append(run := _run(bench, name, path))
            say(f"{what}: " + ", ".join(f"{key} {_ratio(run[key]):.2f}" for key in ("clock", "cpu")))
        rows += _rows(what, runs)
    return rows


def _rows(what: str, runs: list[dict[str, Any]]) -> list[Row]:
    by_clock, by_cpu = ([_ratio(run[key]) for run in runs] for key in ("clock", "cpu"))
    middle = sorted(runs, key=lambda run: _ratio(run["clock"]))[len(runs) // 2]
    rows = []
    for key, said in (("clock", "by the clock"), ("cpu", "by processor time")):
        one = middle[key]
        rows.append(Row(f"{what}: joiner alone, bare step alone, both on {CORES} cores; through Kafka, {said}",
                        f"{one['join']:.1f}, {one['train']:.1f} µs an event, {one['reference']:,.0f} events/s;"
                        f" {one['through']:,.0f} events/s", "for the ratio", True))  # fmt: skip
    each = ", ".join(f"{name} {micros:.0f}" for name, micros in middle["micros"].items())
    return [
        *rows,
        Row(f"{what}: processor time through Kafka, µs an event", each, "where it goes", True),
        at_least(f"{what}: ratio by the clock, median of {len(runs)} ({min(by_clock):.2f} to {max(by_clock):.2f})",
                 statistics.median(by_clock), WANTED, " ×"),
        at_least(f"{what}: ratio by processor time ({min(by_cpu):.2f} to {max(by_cpu):.2f})",
                 statistics.median(by_cpu), WANTED, " ×"),
    ]  # fmt: skip


def _ratio(found: dict[str, float]) -> float:
    return found["through"] / found["reference"]


def _run(bench: Bench, name: str, path: Path) -> dict[str, Any]:
    """per_s through Kafka, the reference beside it, and processor time by process, µs an event."""
    folder = bench.empty("pace")
    headrace(folder, "init", path)
    program(_WARM, name, path, folder / "warm.jsonl", WARM_UP)
    try:
        broker = headrace(folder, "broker", "start")["pid"]
        headrace(folder, "topics", "create")
        with (
            started(folder, "join", says="joining partitions") as join,
            started(folder, "train", says="training on partitions") as train,
        ):
            warm = headrace(folder, "replay", "events", folder / "warm.jsonl", "--max-speed")
            pids = {"broker": broker, "join": join.pid, "train": train.pid}
            before = {what: _cpu_s(pid) for what, pid in pids.items()}
            found = headrace(folder, "replay", name, path, "--max-speed")
            used = {what: _cpu_s(pid) - before[what] for what, pid in pids.items()}
    finally:
        headrace(folder, "broker", "stop")
    if found["lost"] or found["duplicated"]:
        raise FigureError(f"{found['lost']} lost, {found['duplicated']} duplicated: the rate is worth nothing")
    used["player"] = found["play_cpu_s"]
    parts = program(_PARTS, name, path, folder / "headrace.toml")
    rows = found["trained_examples"] - warm["trained_examples"]
    if not parts["learned"] == parts["rows"] == rows:
        raise FigureError(f"of {parts['rows']:,} rows the bare step learned {parts['learned']:,}, the worker {rows:,}")
    events = parts["events"]
    each = {what: seconds / events for what, seconds in used.items()}
    clock, cpu = (_reference(parts["join_s"][at] / events, parts["train_s"][at] / events) for at in (0, 1))
    clock["through"] = found["learned_per_s"]
    cpu["through"] = min(CORES / sum(each.values()), 1 / max(each.values()))
    return {"clock": clock, "cpu": cpu, "micros": {what: 1e6 * seconds for what, seconds in each.items()}}


def _reference(t_join: float, t_train: float) -> dict[str, float]:
    """Events/s of both on CORES; t_join, t_train: seconds an event, here in µs."""
    return {"reference": together(CORES, t_join, t_train), "join": 1e6 * t_join, "train": 1e6 * t_train}


def _cpu_s(pid: int) -> float:
    """Processor seconds of a process so far, all threads."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system
