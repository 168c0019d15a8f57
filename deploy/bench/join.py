"""`headrace bench join`: the joiner with its real store on one core, beside a joiner of plain dictionaries.

The log is written to a file first; each part reads it in slices of 2,000 records, and reading is not timed: neither its
time nor its memory is in the figures. A part is a process of its own on one core:

- joiner:    decode, join, features, `encode_block` and `JoinStore.commit` (not synced), slice by slice;
- reference: `replay.oracle.PartitionOracle`, which has no store and no features.

Memory. The same log is joined twice. Its span of event time is S; impressions stay open S/2 in one run (ten times the
open windows), S/20 in the other. From the middle of the log on each holds as many as it ever will. A figure is the
median resident memory from there to the end, above that at the start (everything imported, the store open, no event).
Whatever else the joiner keeps is the same in both runs, so what differs is open windows (and the event ids that are
remembered as long, to know duplicates).

`digest_equal`: in both runs the number of rows and the sum of their ids mod 2^64 are those of the reference under the
same settings. `events_per_s` is of the run with the fewer open windows, `events_per_s_10x_open` of the other.
Where others use the machine too the clock says little: `…_per_cpu_s` count the seconds of processor time (of all
threads, RocksDB's too) instead.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from deploy.bench.common import finish, median, rss_mb, run_part
from deploy.bench.mix import SHARES, standard_mix

SLICE = 2_000  # records, as the worker joins them
EVENTS_PER_S = 1_000  # of event time


def bench_join(events: int, page: int, runs: int, step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The figures of the command, medians of `runs`. `step` is called after each of the 4 * runs parts."""
    span_ms = events * 1000 // EVENTS_PER_S
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in ("joiner", "joiner_10x", "reference", "ref_10x")}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        log = Path(folder) / "events.jsonl"
        with log.open("wb") as file:
            file.writelines(raw + b"\n" for raw in standard_mix(events, page, span_ms))
        for number in range(runs):
            for suffix, plain, open_ms in (("", "reference", span_ms // 20), ("_10x", "ref_10x", span_ms // 2)):
                store = Path(folder) / f"store-{number}{suffix}"
                measured[f"joiner{suffix}"].append(run_part(__name__, "joiner", log=log, store=store, open_ms=open_ms))
                step()
                measured[plain].append(run_part(__name__, "reference", log=log, open_ms=open_ms))
                step()
    few, many = measured["joiner"], measured["joiner_10x"]
    equal = all(a["digest"] == b["digest"] for a, b in zip(few + many, measured["reference"] + measured["ref_10x"],
                                                           strict=True))  # fmt: skip
    speed, reference = median(few, "events_per_s"), median(measured["reference"], "events_per_s")
    cpu, reference_cpu = median(few, "events_per_cpu_s"), median(measured["reference"], "events_per_cpu_s")
    return {
        "events_per_s": speed,
        "reference_per_s": reference,
        "ratio": speed / reference,
        "events_per_cpu_s": cpu,
        "reference_per_cpu_s": reference_cpu,
        "ratio_cpu": cpu / reference_cpu,
        "events_per_s_10x_open": median(many, "events_per_s"),
        "rss_growth_mb": median(few, "rss_growth_mb"),
        "rss_growth_mb_10x_open": median(many, "rss_growth_mb"),
        "open": int(SHARES["impression"] * events) // 20,  # items, from the middle of the log on
        "open_10x": int(SHARES["impression"] * events) // 2,
        "digest_equal": equal,
    }


def _slices(log: str) -> Iterator[list[bytes]]:
    with open(log, "rb") as file:
        while lines := list(islice(file, SLICE)):
            yield [line.rstrip(b"\n") for line in lines]


def _settings(open_ms: int) -> Any:
    from streams.joiner import JoinSettings

    return JoinSettings(open_ms=open_ms, wait_ms=min(5_000, open_ms))


def _joiner(log: str, store: str, open_ms: int) -> dict[str, Any]:
    from streams.app import settle
    from streams.blocks import encode_block
    from streams.join_store import JoinStore
    from streams.joiner import Joiner, Record
    from streams.settings import JoinWorkerSettings

    settle()  # as a worker does
    in_memory = JoinWorkerSettings(bootstrap="", data_dir=Path()).in_memory
    settings = _settings(open_ms)
    kept = JoinStore(store, settings, cached=in_memory)
    joiner = Joiner(settings, 0, 0, kept.state())
    start_mb, sizes, seconds, cpu, offset = rss_mb(), [], 0.0, 0.0, 0
    rows = total = 0
    for values in _slices(log):
        records = [Record(offset + i, None, value) for i, value in enumerate(values)]
        offset += len(values)
        began, began_cpu = time.perf_counter(), time.process_time()
        joined = joiner.process(records)
        kept.commit(joined, [encode_block(joined.block), *joined.dead])
        joiner.trim(in_memory)
        seconds += time.perf_counter() - began
        cpu += time.process_time() - began_cpu
        ids = joined.block.examples.row_id
        rows += len(ids)
        total = (total + int(ids.view("uint64").sum(dtype="uint64"))) % (1 << 64)
        sizes.append(rss_mb())
    kept.close()
    growth = statistics.median(sizes[len(sizes) // 2 :]) - start_mb
    return {
        "events_per_s": joiner.counts.events_in / seconds,
        "events_per_cpu_s": joiner.counts.events_in / cpu,
        "rss_growth_mb": growth,
        "digest": [rows, total],
    }


def _reference(log: str, open_ms: int) -> dict[str, Any]:
    from replay.oracle import PartitionOracle, Rules

    oracle = PartitionOracle(Rules.of(_settings(open_ms)))
    seconds = cpu = 0.0
    for values in _slices(log):
        began, began_cpu = time.perf_counter(), time.process_time()
        for value in values:
            oracle.feed(value, None)
        seconds += time.perf_counter() - began
        cpu += time.process_time() - began_cpu
    expected = oracle.expected
    done = expected.balance["events_in"]
    return {"events_per_s": done / seconds, "events_per_cpu_s": done / cpu, "digest": [expected.rows, expected.sum]}


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, Any]]] = {"joiner": _joiner, "reference": _reference}
    finish(parts[sys.argv[1]](**json.loads(sys.argv[2])))
