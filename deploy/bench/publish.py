"""`headrace bench publish`: versions on their way to a replica, beside safetensors alone, on one core.

Rows of one table, an id and `dim` weights each, in versions of VERSION rows. A part is a process of its own:

- versions: `encode`, and `Assembler.add` until the version is there again, its weights in float32, in each encoding;
- bare:     `safetensors.numpy.save` and `load` of the same ids and weights, in pieces of as many bytes: no checks, no
  numbers of versions, nothing that is cut.

`bytes_per_row` is of all that is sent, heads of parts among it. Each figure is the median of ROUNDS times through all
versions. Where others use the machine too the clock says little: figures with `cpu` in their names count processor
time.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from deploy.bench.common import BenchError, finish, median, run_part

VERSION, ROUNDS = 20_000, 5


def bench_publish(rows: int, dim: int, runs: int, step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The figures of the command, medians of `runs`. `step` is called after each of the 2 * runs parts."""
    found: dict[str, list[dict[str, Any]]] = {"versions": [], "bare": []}
    for _ in range(runs):
        for name, measured in found.items():
            measured.append(run_part(__name__, name, rows=rows, dim=dim))
            step()
    ours, bare = found["versions"], found["bare"]
    size = ours[0]["bytes_per_row"]
    speed = {name: statistics.median(run["per_s"][name] for run in ours) for name in size}
    cpu = statistics.median(run["per_cpu_s"]["fp32"] for run in ours)
    return {
        "rows_per_s": speed["fp32"],
        "bare_rows_per_s": median(bare, "per_s"),
        "ratio": speed["fp32"] / median(bare, "per_s"),
        "rows_per_cpu_s": cpu,
        "bare_rows_per_cpu_s": median(bare, "per_cpu_s"),
        "ratio_cpu": cpu / median(bare, "per_cpu_s"),
        "rows_per_s_by_encoding": speed,
        "bytes_per_row": size,
        "bare_bytes_per_row": bare[0]["bytes_per_row"],
        "ratio_to_fp32": {name: size[name] / size["fp32"] for name in size if name != "fp32"},
        "dim": dim,
    }


def _tables(rows: int, dim: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int64 [n], weights float32 [n, dim]) of each version."""
    rng = np.random.default_rng(1)
    ids = rng.integers(-(1 << 63), (1 << 63) - 1, rows)
    weights = rng.normal(0, 0.1, (rows, dim)).astype(np.float32)
    return [(ids[at : at + VERSION], weights[at : at + VERSION]) for at in range(0, rows, VERSION)]


def _rounds(rows: int, once: Callable[[], int]) -> dict[str, Any]:
    """Rows a second of `once`, which gives the bytes it has sent; the first time, which is not counted, warms up."""
    once()
    clocks, cpus, sent = [], [], 0
    for _ in range(ROUNDS):
        began, began_cpu = time.perf_counter(), time.process_time()
        sent = once()
        clocks.append(time.perf_counter() - began)
        cpus.append(time.process_time() - began_cpu)
    return {
        "per_s": rows / statistics.median(clocks),
        "per_cpu_s": rows / statistics.median(cpus),
        "bytes_per_row": sent / rows,
    }


def _versions(rows: int, dim: int) -> dict[str, Any]:
    from embedding_store.columns import WEIGHTS, TableRows
    from embedding_store.delta import Assembler, Version, encode
    from embedding_store.encoding import ENCODINGS, Encoding

    tables = _tables(rows, dim)

    def once(encoding: Encoding) -> int:
        sent, assembler = 0, Assembler()
        for number, (ids, weights) in enumerate(tables, 1):
            there = None
            for part in encode(Version(1, number, tables={"item": TableRows(ids, {WEIGHTS: weights})}), rows=encoding):
                sent += len(part)
                there = assembler.add(part)
            if there is None or not np.array_equal(there.tables["item"].ids, ids):
                raise BenchError("a version did not come back with its rows: report it")
        return sent

    found = {encoding: _rounds(rows, partial(once, encoding)) for encoding in ENCODINGS}
    return {key: {name: seen[key] for name, seen in found.items()} for key in ("per_s", "per_cpu_s", "bytes_per_row")}


def _bare(rows: int, dim: int) -> dict[str, Any]:
    from safetensors.numpy import load, save

    from embedding_store.delta import MAX_PART_BYTES

    piece = MAX_PART_BYTES // (8 + 4 * dim)  # rows
    tables = _tables(rows, dim)

    def once() -> int:
        sent = 0
        for ids, weights in tables:
            for at in range(0, len(ids), piece):
                part = save({"ids": ids[at : at + piece], "weights": weights[at : at + piece]})
                sent += len(part)
                load(part)
        return sent

    return _rounds(rows, once)


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, Any]]] = {"versions": _versions, "bare": _bare}
    finish(parts[sys.argv[1]](**json.loads(sys.argv[2])))
