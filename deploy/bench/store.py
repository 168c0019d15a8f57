"""`headrace bench store`: the row map, commits and restores of large tables, more ids than memory holds; on one core.

Each part is a process of its own on one core, `dim` is 32, stores are not synced (as the trainer's by default):

- row map: `rows` random ids are admitted to an empty map in batches of 32,768, then 200 batches drawn from them are
  looked up. Beside it a plain dict, of the same ids in the same batches (a tenth of the look-ups), and a bare gather:
  numpy takes as many numbers from random places of an array as large as the map's. The gather waits for memory as the
  map does, so this ratio stays where others use the memory too; the one to the dict, which waits for the interpreter,
  does not. The best of five times: the machine has to find the memory first. Compiling is not timed.
- checkpoint: tables of `largest` / 100, / 10 and `largest` rows, whose store was written and compacted. Nine times
  `touched` rows drawn at random change and are committed. What is timed is all that the trainer does to its tables and
  store for a commit, but encoding the version. `checkpoint_flatness` is the largest of the medians over the smallest.
- restore: the store of `largest` / 10 rows is opened anew, and its rows loaded.
- tiers: `ids` ids through a table of `memory` rows, in steps of up to 20,000 events; every fifth event is of an id
  drawn from all that came before, every fifth step is committed. Each event adds one to a column of its row. The
  figures are microseconds an event, in the first and the last tenth of the steps after memory was full. At the end the
  oldest ids are read back (`tier_read_rows_per_s`), and the counts compared with those that are known (`tier_exact`).

Where others use the machine too the clock says little: figures with `cpu` in their names count processor time (of all
threads, RocksDB's too) instead.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.bench.common import BenchError, finish, median, rss_mb, run_part

if TYPE_CHECKING:
    from embedding_store.checkpoint import CheckpointStore
    from embedding_store.tables import EmbeddingTables

DIM, BATCH, STEP, COMMITS, STEPS_A_COMMIT = 32, 32_768, 20_000, 9, 5
TABLE, COUNT = "item", "learned"
LOOKUPS, TIMES = 200, 5  # batches of a row map; that all of it is done
Use = Callable[[np.ndarray], object]  # of a batch of ids
AGAIN = 5  # one in so many events is of an id that was there before


def bench_store(
    rows: int, largest: int, touched: int, ids: int, memory: int, runs: int, step: Callable[[], None] = lambda: None,
    map_only: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The figures of the command, medians of `runs`. `step` is called after each of the 7 * runs parts, or of the
    3 * runs of the row map and what is beside it, if those are all (`map_only`)."""
    sizes = [largest // 100, largest // 10, largest]
    measured: dict[str, list[dict[str, Any]]] = {}

    def part(key: str, name: str, **arguments: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
            measured.setdefault(key, []).append(run_part(__name__, name, folder=folder, **arguments))
        step()

    for _ in range(runs):
        part("map", "map", rows=rows)
        part("dict", "dict", rows=rows)
        part("gather", "gather", rows=rows)
        if map_only:
            continue
        for size in sizes:
            part(f"{size}", "checkpoint", rows=size, touched=touched)
        part("tiers", "tiers", ids=ids, memory=memory)
    if map_only:
        return _map_figures(measured, rows)
    checkpoint_ms = {f"{size}": median(measured[f"{size}"], "checkpoint_ms") for size in sizes}
    checkpoint_cpu = {f"{size}": median(measured[f"{size}"], "checkpoint_cpu_ms") for size in sizes}
    again, tiers = measured[f"{sizes[1]}"], measured["tiers"]
    return {
        **_map_figures(measured, rows),
        "checkpoint_ms": checkpoint_ms,
        "checkpoint_flatness": max(checkpoint_ms.values()) / min(checkpoint_ms.values()),
        "checkpoint_cpu_ms": checkpoint_cpu,
        "checkpoint_touched": min(touched, sizes[0]),
        **{name: median(again, name) for name in ("restore_rows_per_s", "restore_rows_per_cpu_s")},
        "rows_tiered": ids,
        "rows_in_memory": memory,
        **{f"tier_{name}": median(tiers, name) for name in tiers[0] if name != "exact"},
        "tier_exact": all(run["exact"] for run in tiers),
    }


def _map_figures(measured: dict[str, list[dict[str, Any]]], rows: int) -> dict[str, Any]:
    """Of the row map, and of the dict and the gather beside it."""
    names = [f"{done}_per_{unit}" for done in ("lookup", "admit") for unit in ("s", "cpu_s")]
    ours = {name: median(measured["map"], name) for name in names}
    gathered = {f"gather_{name}": median(measured["gather"], name) for name in names if name.startswith("lookup")}
    return ours | {f"dict_{name}": median(measured["dict"], name) for name in names} | gathered | {"map_rows": rows}


class _Watch:
    """What went by since it was made: seconds, and seconds of processor time of all threads."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def per_s(self, name: str, count: int) -> dict[str, float]:
        return {f"{name}_per_s": count / self.seconds, f"{name}_per_cpu_s": count / self.cpu}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def cpu(self) -> float:
        return time.process_time() - self._cpu


def _map(folder: str, rows: int) -> dict[str, Any]:
    from embedding_store.rows import RowMap

    def empty() -> tuple[Use, Use]:
        there = RowMap(rows)
        return there.admit, there.find

    return _best(rows, LOOKUPS, empty)


def _dict(folder: str, rows: int) -> dict[str, Any]:
    def empty() -> tuple[Use, Use]:
        there: dict[int, int] = {}

        def admit(batch: np.ndarray) -> None:
            for i in batch.tolist():
                there.setdefault(i, len(there) + 1)

        return admit, lambda batch: np.array([there.get(i, 0) for i in batch.tolist()], np.int64)

    return _best(rows, LOOKUPS // 10, empty)


def _gather(folder: str, rows: int) -> dict[str, float]:
    """The limit of look-ups: one number of 8 bytes from a random place for each, of two for each of the map's slots."""
    slots = 1 << (2 * rows - 1).bit_length()
    table, rng = np.arange(2 * slots), np.random.default_rng(1)
    wanted, taken = [2 * rng.integers(0, slots, BATCH) for _ in range(LOOKUPS)], np.empty(BATCH, np.int64)
    times = []
    for _ in range(TIMES):
        watch = _Watch()
        for batch in wanted:
            table.take(batch, out=taken, mode="clip")  # "raise" would copy
        times.append(watch.per_s("lookup", LOOKUPS * BATCH))
    return {name: max(one[name] for one in times) for name in times[0]}


def _best(rows: int, lookups: int, empty: Callable[[], tuple[Use, Use]]) -> dict[str, float]:
    """All ids admitted to what is `empty`, so many batches looked up in it, TIMES over: the best of each figure.
    empty: (admit, find) of a new one."""
    ids, wanted = _map_ids(rows)
    times = []
    for _ in range(TIMES):
        admit, find = empty()
        watch = _Watch()
        for batch in ids:
            admit(batch)
        admitted, watch = watch.per_s("admit", rows), _Watch()
        for batch in wanted[:lookups]:
            find(batch)
        times.append(admitted | watch.per_s("lookup", lookups * BATCH))
    return {name: max(one[name] for one in times) for name in times[0]}


def _map_ids(rows: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(the ids in batches, batches drawn from them)."""
    rng = np.random.default_rng(1)
    ids = rng.integers(-(1 << 63), (1 << 63) - 1, rows)
    return np.array_split(ids, -(-rows // BATCH)), [rng.choice(ids, BATCH) for _ in range(LOOKUPS)]


def _checkpoint(folder: str, rows: int, touched: int) -> dict[str, Any]:
    rng, seconds, cpu = np.random.default_rng(1), [], []
    with _open(folder, rows) as (store, tables):
        for start in range(0, rows, 100_000):
            _learn(tables, _ids(np.arange(start, min(start + 100_000, rows))))
            _commit(tables, store)
        store.purge()
        for _ in range(COMMITS):
            _learn(tables, _ids(rng.choice(rows, min(touched, rows), replace=False)))
            watch = _Watch()
            _commit(tables, store)
            seconds.append(watch.seconds)
            cpu.append(watch.cpu)
    with _open(folder, rows) as (store, tables):
        watch = _Watch()
        tables.restore()
        restored = watch.per_s("restore_rows", rows)
        assert tables.size(TABLE) == rows
    return {
        "checkpoint_ms": float(np.median(seconds)) * 1e3, "checkpoint_cpu_ms": float(np.median(cpu)) * 1e3, **restored
    }  # fmt: skip


def _tiers(folder: str, ids: int, memory: int) -> dict[str, Any]:
    step, full, costs, cpu = min(STEP, memory // 10), 0, [], []
    counts = np.zeros(ids, np.int64)
    with _open(folder, memory) as (store, tables):
        for number, events in enumerate(_events(ids, step)):
            np.add.at(counts, events, 1)
            named = _ids(events)
            watch = _Watch()
            _learn(tables, named)
            if number % STEPS_A_COMMIT == 0:
                _commit(tables, store)
            costs.append(watch.seconds / len(events))
            cpu.append(watch.cpu / len(events))
            full = full or number * (tables.size(TABLE) + step > memory)
        _commit(tables, store)
        oldest = np.array_split(np.arange(min(ids, memory) // 2), 10)  # nearly all of them left memory long ago
        watch = _Watch()
        learned = [_counted(tables, part) for part in oldest]
        read = watch.per_s("read_rows", memory // 2)
        sample = np.random.default_rng(2).integers(0, ids, step)
        exact = all(np.array_equal(n, counts[part]) for n, part in zip(learned, oldest, strict=True))
        exact = exact and np.array_equal(_counted(tables, sample), counts[sample])
    if not full:
        raise BenchError(f"{ids:,} ids fit into memory for {memory:,}: try more --ids")
    tenth = max(1, (len(costs) - full) // 10)
    return {
        "us_first_tenth": float(np.mean(costs[full : full + tenth])) * 1e6,
        "us_last_tenth": float(np.mean(costs[-tenth:])) * 1e6,
        "cpu_us_first_tenth": float(np.mean(cpu[full : full + tenth])) * 1e6,
        "cpu_us_last_tenth": float(np.mean(cpu[-tenth:])) * 1e6,
        **read,
        "rss_mb": rss_mb(),
        "exact": exact,
    }


def _events(ids: int, step: int) -> Iterator[np.ndarray]:
    """Numbers of ids int64 [≤ step]: 0 … ids − 1, each for the first time in this order, and between them old ones."""
    rng, new = np.random.default_rng(1), step - step // AGAIN
    for start in range(0, ids, new):
        first = np.arange(start, min(start + new, ids))
        again = rng.integers(0, start, step // AGAIN) if start else first[:0]
        yield np.concatenate((first, again))


def _ids(numbers: np.ndarray) -> np.ndarray:
    """Distinct ids int64 [n], as spread as hashes are."""
    return ((numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


@contextmanager
def _open(folder: str, capacity: int) -> Iterator[tuple[CheckpointStore, EmbeddingTables]]:
    from embedding_store.checkpoint import CheckpointStore
    from embedding_store.specs import TableSettings, TableSpec
    from embedding_store.tables import EmbeddingTables

    spec = TableSpec(TABLE, (TABLE,), TableSettings(dim=DIM, capacity=capacity), {COUNT: ("<i8", ())})
    with CheckpointStore(Path(folder) / "store", {TABLE: spec.layout}) as store:
        yield store, EmbeddingTables([spec], store=store)


def _learn(tables: EmbeddingTables, ids: np.ndarray) -> None:
    """One step: each id's row changes, weights and count."""
    tables.begin_step()
    at = tables.rows(TABLE, ids, admit=True)
    tables.column(TABLE, "weights")[at] += 0.01
    np.add.at(tables.column(TABLE, COUNT), at, 1)
    tables.touch(TABLE, at)


def _commit(tables: EmbeddingTables, store: CheckpointStore) -> None:
    from embedding_store.checkpoint import Commit

    head = store.head()
    sequence = head.sequence + 1 if head else 1
    store.commit(Commit(1, sequence, b"", rows=tables.touched(), gone=tables.gone(), notes=tables.notes()))
    tables.clear_touched()


def _counted(tables: EmbeddingTables, numbers: np.ndarray) -> np.ndarray:
    """How often ids were learned, int64 [n], from wherever their rows are."""
    tables.begin_step()
    return tables.read_rows(TABLE, tables.rows(TABLE, _ids(numbers), admit=False))[COUNT]


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "map": _map, "dict": _dict, "gather": _gather, "checkpoint": _checkpoint, "tiers": _tiers,
    }  # fmt: skip
    finish(parts[sys.argv[1]](**json.loads(sys.argv[2])))
