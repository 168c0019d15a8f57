"""How fast a log goes through Kafka at `--max-speed`, beside joiner and bare step alone on the same cores.

Through Kafka: an embedded broker, one join and one train worker, `headrace replay --max-speed`. The rate is events over
the time from the first one sent to the version that has learned all of them, an impression of k items as k. The workers
have learned WARM_UP events of the log before, a day earlier: what is loaded and compiled once is not in it.

The reference, in the same run, each part alone in a process of its own on one core:

- t_join:  processor seconds an event of `Joiner.process`, raw records in memory, slices of 2,000 records of a partition
  as the worker's; no store, no blocks encoded;
- t_train: processor seconds an event of `Trainer.step` on these very rows, as many a step as the worker takes at most
  where it has fallen behind (LARGEST_BATCHES · batch_size); rows in memory, no store, no commits.

Each can use one core only. On CORES of them both together reach

    reference = min(CORES / (t_join + t_train), 1 / t_join, 1 / t_train)    events/s.

Beside it, what the machine lets happen: the processor time of each process, over the same events.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import psutil

from tests.figures.common import Bench, FigureError, Row, at_least, headrace, program, public, say, started

CORES = 2
RUNS = 3
WARM_UP = 5_000  # events of the log
WANTED = 0.4  # of the reference
EVENTS = 300_000  # of the simulated log
KUAIRAND = "kuairand/kuairand27k_explicit_feedback_kcore15.tsv.gz"

_WARM = """
import itertools, json, sys
from msgspec.structs import replace
from replay.readers import open_log
from streams.events import Item, encode
name, path, out, events = *sys.argv[1:4], int(sys.argv[4])
DAY_MS = 86_400_000
with open(out, "wb") as file:
    for record in itertools.islice(open_log(name, path), events):
        if not isinstance(record, Item):
            record = replace(record, ts=record.ts - DAY_MS, event_id=f"warm {record.event_id}")
            if getattr(record, "request_id", None) is not None:
                record = replace(record, request_id=f"warm {record.request_id}")
        file.write(encode(record) + b"\\n")
print(json.dumps({}))
"""

_PARTS = """
import itertools, json, os, sys, time
from pathlib import Path
from deploy.settings import load
from online_model.trainer import open_trainer
from replay.joining import partition_of
from replay.readers import in_time_order, open_log
from streams.app import settle
from streams.catalogue import catalogue_item
from streams.events import Item, Tick, encode, units
from streams.join_worker import MAX_SLICE
from streams.joiner import Joiner, Record
from streams.train_worker import LARGEST_BATCHES
import torch

name, path, config = sys.argv[1:4]
settings = load(Path(config))
join, model, partitions = settings.join.join, settings.model, settings.topics.partitions
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
settle()
joiners, blocks, took = [Joiner(join, p) for p in range(partitions)], [], 0.0
for start in range(0, max(map(len, lanes)), MAX_SLICE):
    for partition, lane in enumerate(lanes):
        if values := lane[start : start + MAX_SLICE]:
            records = [Record(start + n, None, value) for n, value in enumerate(values)]
            began = time.process_time()
            blocks.append(joiners[partition].process(records).block)
            took += time.process_time() - began
joined, rows = took, sum(len(block.examples) for block in blocks)
trainer = open_trainer(model, None, lambda: 0)
trainer.catalogue(items)
most, learned, counted, took = LARGEST_BATCHES * model.batch_size, 0, 0, 0.0
for number, block in enumerate(blocks):
    trainer.offer(block, number)
    while trainer.pending >= most or (number + 1 == len(blocks) and trainer.pending):
        began = time.process_time()
        done = trainer.step(rows=most)
        if learned > 20 * most:  # what is compiled and laid out at first is over
            took += time.process_time() - began
            counted += done
        learned += done
        if not done:
            break
print(json.dumps({"events": events, "rows": rows, "learned": learned, "counted": counted, "join_s": joined,
                  "train_s": took * rows / max(1, counted)}))
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
            runs.append(_run(bench, name, path))
        rows += _rows(what, runs)
    return rows


def _rows(what: str, runs: list[dict[str, Any]]) -> list[Row]:
    runs = sorted(runs, key=lambda run: run["per_s"] / run["reference"])
    middle = runs[len(runs) // 2]
    ratios = [run["per_s"] / run["reference"] for run in runs]
    each = ", ".join(f"{name} {micros:.0f}" for name, micros in middle["micros"].items())
    packed = statistics.median(run["packed"] / run["reference"] for run in runs)
    return [
        Row(f"{what}: joiner alone, bare step alone, µs an event", f"{middle['join']:.1f}, {middle['train']:.1f}",
            "for the ratio", True),
        Row(f"{what}: both on {CORES} cores, events/s", f"{middle['reference']:,.0f}", "for the ratio", True),
        Row(f"{what}: through Kafka, events/s", f"{middle['per_s']:,.0f}", "for the ratio", True),
        at_least(f"{what}: to both on the same cores, median of {len(runs)} ({min(ratios):.2f} to {max(ratios):.2f})",
                 statistics.median(ratios), WANTED, " ×"),
        Row(f"{what}: processor time through Kafka, µs an event", each, "where it goes", True),
        Row(f"{what}: the same ratio, had nothing else used the cores", f"{packed:.2f}", f"{WANTED} or more", True),
    ]  # fmt: skip


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
            headrace(folder, "replay", "events", folder / "warm.jsonl", "--max-speed")
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
    if parts["learned"] != parts["rows"]:
        raise FigureError(f"the bare step learned {parts['learned']:,} of {parts['rows']:,} rows")
    events = parts["events"]
    t_join, t_train = parts["join_s"] / events, parts["train_s"] / events
    return {
        "per_s": found["learned_per_s"], "packed": events / (sum(used.values()) / CORES),
        "reference": min(CORES / (t_join + t_train), 1 / t_join, 1 / t_train),
        "join": 1e6 * t_join, "train": 1e6 * t_train,
        "micros": {what: 1e6 * seconds / events for what, seconds in used.items()},
    }  # fmt: skip


def _cpu_s(pid: int) -> float:
    """Processor seconds of a process so far, all threads."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system
