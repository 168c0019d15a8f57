"""The axis `ids` of `headrace bench growth`: a table whose memory stays while its ids grow. A process a point.

1. `x` rows are committed to a new store, COMMITTED at a time at most, under ids that are as spread as hashes are. Of
   the second half of them the processor time a row is taken, of all threads: so RocksDB's compaction at that size is in
   it (`commit_us_a_row`). Then it has time to come to rest.
2. The stream: steps of STEP events, one in NEW of them of an id that was never seen, the others of ids drawn from all
   `x` so that the n-th has a chance of 1/n. All are looked up, admitted where they are new, and changed; what is not in
   memory is read from the store, what was longest unused leaves memory. A commit every STEPS_A_COMMIT steps.

An event costs what its look-ups cost in 2 and, for each row that was committed there, what a row costs in 1: the stream
is too short for compaction to have its usual share in it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.bench.common import finish, rss_mb
from embedding_store.ids import GOLDEN

if TYPE_CHECKING:
    from embedding_store.checkpoint import CheckpointStore
    from embedding_store.rocks import Db

TABLE, COUNT = "item", "learned"
DIM = 16
MEMORY = 250_000  # rows of the table in memory, whatever is in the store
COMMITTED, STEP, STEPS_A_COMMIT, NEW = 200_000, 20_000, 5, 20
WARM_UP, STEPS = 40, 60
REST_S = 120.0  # at most, for compaction to end


def ids_point(folder: str, x: int, seconds: float = 0.0) -> dict[str, Any]:
    """µs an event with `x` ids. `seconds`: by so much more than usual it may take."""
    from embedding_store.checkpoint import CheckpointStore
    from embedding_store.specs import TableSettings, TableSpec
    from embedding_store.tables import EmbeddingTables

    spec = TableSpec(TABLE, (TABLE,), TableSettings(dim=DIM, capacity=MEMORY), {COUNT: ("<i8", ())})
    with CheckpointStore(Path(folder) / "store", {TABLE: spec.layout}) as store:
        row_us, row_clock_us = _filled(store, x)
        rest(store.db, f"rows.{TABLE}")
        tables = EmbeddingTables([spec], store=store)
        tables.restore()
        stream = _Stream(tables, store, x)
        for _ in range(WARM_UP):
            stream.step()
        measured = stream.measure()
        disk = sum(file.stat().st_size for file in (Path(folder) / "store").iterdir())
        files = len(list((Path(folder) / "store").glob("*.sst")))
    a_row = measured["rows_committed_an_event"]
    return {
        "cpu_us": measured["lookup_us"] + a_row * row_us,
        "clock_us": measured["lookup_clock_us"] + a_row * row_clock_us,
        "rss_mb": rss_mb(),
        "commit_us_a_row": row_us,
        "disk_mb": disk / 1e6,
        "files": files,
        **measured,
    }


def _filled(store: CheckpointStore, rows: int) -> tuple[float, float]:
    """Commits so many rows; µs a row of the second half: processor time, clock."""
    from embedding_store.checkpoint import Commit
    from embedding_store.columns import MOMENTUM, WEIGHTS, TableRows

    half = cpu = clock = 0.0
    size = min(COMMITTED, rows // 4)
    for number, start in enumerate(range(0, rows, size), 1):
        if not half and start >= rows // 2:
            half, cpu, clock = start, time.process_time(), time.perf_counter()
        ids = spread(np.arange(start, min(start + size, rows)))
        columns: dict[str, np.ndarray] = {
            WEIGHTS: np.repeat((ids % 1000 / 1000).astype(np.float32)[:, None], DIM, axis=1),
            MOMENTUM: np.ones(len(ids), np.float32),
            COUNT: np.ones(len(ids), np.int64),
        }
        store.commit(Commit(1, number, b"", rows={TABLE: TableRows(ids, columns)}))
    done = rows - half
    return (time.process_time() - cpu) / done * 1e6, (time.perf_counter() - clock) / done * 1e6


def rest(db: Db, name: str) -> None:
    """Until RocksDB has nothing to compact in a family, or for REST_S."""
    end = time.monotonic() + REST_S
    names = ("rocksdb.compaction-pending", "rocksdb.num-running-compactions", "rocksdb.num-running-flushes")
    db.flush()
    family = db.family(name)
    while any(family.property_int_value(name) for name in names) and time.monotonic() < end:
        time.sleep(0.2)  # RocksDB tells nobody when it is done


class _Stream:
    def __init__(self, tables: Any, store: CheckpointStore, ids: int) -> None:
        self._tables, self._store, self._ids, self._next = tables, store, ids, ids
        self._dice, self._steps = np.random.default_rng(1), 0
        self._sequence = store.head().sequence  # type: ignore[union-attr]
        self.lookup = self.lookup_clock = self.commit = 0.0
        self.committed = self.events = 0

    def step(self) -> None:
        new = np.arange(self._next, self._next + STEP // NEW)
        self._next += len(new)
        known = (self._ids ** self._dice.random(STEP - len(new))).astype(np.int64) - 1  # the n-th with 1/n
        numbers = np.concatenate((new, known))
        ids = spread(numbers)
        cpu, clock = time.process_time(), time.perf_counter()
        self._tables.begin_step()
        at = self._tables.rows(TABLE, ids, admit=True)
        self._tables.column(TABLE, "weights")[at] += 0.01
        self._tables.touch(TABLE, at)
        self.lookup += time.process_time() - cpu
        self.lookup_clock += time.perf_counter() - clock
        self.events += len(ids)
        self._steps += 1
        if self._steps % STEPS_A_COMMIT == 0:
            self._commit()

    def measure(self) -> dict[str, float]:
        """Of the next STEPS steps."""
        before = {**vars(self._tables.turnover(TABLE))}
        self.lookup = self.lookup_clock = self.commit = 0.0
        self.committed = self.events = 0
        for _ in range(STEPS):
            self.step()
        grown = {name: value - before[name] for name, value in vars(self._tables.turnover(TABLE)).items()}
        return {
            "lookup_us": self.lookup / self.events * 1e6,
            "lookup_clock_us": self.lookup_clock / self.events * 1e6,
            "commit_in_the_stream_us_a_row": self.commit / self.committed * 1e6,
            "rows_committed_an_event": self.committed / self.events,
            "cold_an_event": grown["tier_hits"] / self.events,
            "new_an_event": grown["tier_misses"] / self.events,
            "evicted_an_event": grown["evicted"] / self.events,
        }

    def _commit(self) -> None:
        from embedding_store.checkpoint import Commit

        cpu = time.process_time()
        rows = self._tables.touched()
        self._sequence += 1
        self._store.commit(Commit(1, self._sequence, b"", rows=rows))
        self._tables.clear_touched()
        self.commit += time.process_time() - cpu
        self.committed += sum(map(len, rows.values()))


def spread(numbers: np.ndarray) -> np.ndarray:
    """Distinct ids int64 [n], as spread as hashes are."""
    return ((numbers.astype(np.uint64) + np.uint64(1)) * GOLDEN).view(np.int64)


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, Any]]] = {"ids": ids_point}
    finish(parts[sys.argv[1]](**json.loads(sys.argv[2])))
