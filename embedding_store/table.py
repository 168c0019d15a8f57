"""One rank's share of a table: which ids have a row there, its columns, what is dirty, and the way to disk and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from embedding_store.admission import Admission
from embedding_store.columns import MOMENTUM, TOUCHED, WEIGHTS, TableRows, concat
from embedding_store.errors import StoreError
from embedding_store.eviction import lowest, policy
from embedding_store.expiry import Calendar, Notes, grain
from embedding_store.families import OWN
from embedding_store.initial import first_weights
from embedding_store.ranks import Ranks, SharedStore
from embedding_store.rows import RowMap
from embedding_store.specs import TableSpec

Rows: TypeAlias = np.ndarray  # int64 row numbers, 0 the default row

_CHUNK = 100_000  # rows at a time where all of a table goes by
_EVICT_SHARE = 16  # an eviction frees at least capacity / 16 rows, so that it is seldom


@dataclass
class Turnover:
    """Ids and rows that came and went since the start, of this rank; may be read from any thread."""

    admitted: int = 0  # ids that got their first row
    evicted: int = 0  # rows that left the memory; the store has them
    tier_hits: int = 0  # ids that were not in memory, and were in the store
    tier_misses: int = 0  # ids that were asked for there in vain


class Table:
    """One table: its map, its columns, which rows are dirty, and when each was last used, of the ids of this rank.

    What it is given and gives are row numbers of all ranks; `local` ones are those in its own columns.

    A row in memory is dirty (touched) or clean; a clean one is in the store with the same value, so it can be dropped
    at any time. A free row is zero.
    """

    def __init__(
        self,
        spec: TableSpec,
        store: SharedStore | None,
        ranks: Ranks,
        weights: torch.Tensor,
        momentum: torch.Tensor | None,
    ) -> None:
        self.spec, self._ranks = spec, ranks
        self.capacity, rules = capacity_of(spec, ranks.size), spec.settings.rules
        capacity = self.capacity
        self._first = ranks.rank * (capacity + 1)  # the row number of its local row 0
        self.last = ranks.size * (capacity + 1) - 1  # of all ranks
        self.map = RowMap(capacity)
        self.touched = np.zeros(capacity + 1, bool)
        self._marked, self._used = 0, 0  # at least as many rows are touched, and in use at this tick
        self.tick, self.now_ms = 1, 0
        self.usage = policy(rules, capacity)
        self.dropped = self._lost = 0  # ids that got no row, of all ranks and of this one
        self.turnover = Turnover()
        self.gone = np.empty(0, np.int64)  # forgotten since the last commit: what the store has of them counts no more
        self._tensors = {WEIGHTS: weights} | ({} if momentum is None else {MOMENTUM: momentum})
        self._extras = {n: np.zeros((capacity + 1, *shape), dtype) for n, (dtype, shape) in spec.columns.items()}
        self._calendar = Calendar(rules.expire_after_ms, self._extras[TOUCHED]) if TOUCHED in self._extras else None
        self.admission = Admission(rules)
        self.sketch_name = f"{OWN}seen.{spec.name}.{rules.admit_cells}.{rules.admit_seed}"
        self._store = store
        self._tiered = store is not None and store.has_rows(spec.name)  # the store may have rows that memory has not
        if store is not None and self.admission.sketch is not None:
            self.admission.sketch.load(store.iter_blobs(self.sketch_name))

    def begin_step(self, now_ms: int) -> None:
        self.tick += 1
        self._used = 0
        if now_ms <= self.now_ms:
            return
        self.now_ms = now_ms
        if self.admission.sketch is not None:
            self.admission.sketch.advance(now_ms)
        cutoff = self._calendar.cutoff(now_ms) if self._calendar is not None else None
        if cutoff is not None:
            self._expire(cutoff)

    def rows(self, ids: np.ndarray, admit: bool, examples: np.ndarray | None, at_once: bool) -> Rows:
        rows = self._find(ids)
        self.usage.use(self.located(rows)[1], self.tick)  # before anything is evicted
        self._used += len(ids)  # those that are given rows below are among them
        absent = np.flatnonzero((rows == 0) & (ids != 0))
        if len(absent) and (admit or self._tiered):
            wanted = self._bring_back(ids[absent])
            if admit and not (at_once or self.admission.all):
                at = absent[np.isin(ids[absent], wanted)]
                wanted = self.admission.admitted(ids[at], None if examples is None else examples[at])
            if admit:
                given = self._give_rows(self._own(wanted))
                self.turnover.admitted += int(np.count_nonzero(given))
                self._begin(given)
            self._settle()
            rows[absent] = self._find(ids[absent])
        if admit:
            self.touch(rows)
        return rows

    def touch(self, rows: Rows) -> None:
        _, local = self.located(rows)
        self.touched[local] = True
        self._marked += len(local)
        self.touched[0] = False
        if self._calendar is not None:
            self._extras[TOUCHED][local] = self.now_ms
        for column in self._extras.values():
            column[0] = 0  # written along with the others, for an id that got no row

    def forget(self, ids: np.ndarray) -> None:
        if self._calendar is not None and self._tiered:
            assert self._store is not None
            only_there = ids[(self._find(ids) == 0) & ~np.isin(ids, self.gone)]
            stored = self._store.read_rows(self.spec.name, only_there)
            own = self._ranks.owns(stored.ids)
            self._calendar.void(stored.ids[own], grain(stored.columns[TOUCHED][own]))
        self._drop(ids)

    def notes(self) -> Notes | None:
        if self._calendar is None:
            return None
        rows = np.flatnonzero(self.touched)
        return self._calendar.notes(self.map.ids_of(rows), rows)

    def clear_touched(self) -> None:
        if self._calendar is not None:
            self._calendar.committed(np.flatnonzero(self.touched))
        if self.admission.sketch is not None:
            self.admission.sketch.clean()
        self.touched[:] = False
        self._marked = 0
        self.gone = self.gone[:0]

    def room(self) -> int:
        if self._store is None:
            return self.map.free
        self._used = int(np.count_nonzero(self.usage.last[1:] == self.tick))
        self._marked = int(np.count_nonzero(self.touched[1:]))
        kept = self.touched | (self.usage.last == self.tick)
        return self.capacity - int(np.count_nonzero(kept[1:]))

    def has_room(self, ids: int) -> bool:
        # Where many times as many rows are in memory as a step takes, it is not to look through them at every step:
        # rows that were marked more than once are counted so often, and only where that is too many are they counted.
        if self._store is not None and self.capacity - self._marked - self._used >= ids:
            return True
        return self.room() >= ids

    def column(self, name: str) -> np.ndarray:
        return self._extras[name] if name in self._extras else self._tensors[name].cpu().numpy()

    def values(self, name: str, rows: Rows) -> np.ndarray:
        if self._ranks.size == 1:
            return self.column(name)[rows]
        there, local = self.located(rows)
        column = self.column(name)
        values = np.zeros((len(rows), *column.shape[1:]), column.dtype)
        values[there] = column[local]
        return self._ranks.sum(values)

    def located(self, rows: Rows) -> tuple[np.ndarray | slice, Rows]:
        """(which of the rows int64 [n] lie on this rank, their local numbers int64 [k])."""
        if self._ranks.size == 1:
            return slice(None), rows
        here = rows // (self.capacity + 1) == self._ranks.rank
        return here, rows[here] - self._first

    def read(self, rows: Rows) -> dict[str, np.ndarray]:
        return self._read(rows - self._first)

    def write(self, rows: Rows, columns: Mapping[str, np.ndarray]) -> None:
        self._write(rows - self._first, columns)

    def _read(self, local: Rows) -> dict[str, np.ndarray]:
        index = torch.from_numpy(local)
        columns = {n: t.index_select(0, index.to(t.device)).cpu().numpy() for n, t in self._tensors.items()}
        return columns | {n: column[local] for n, column in self._extras.items()}

    def _write(self, local: Rows, columns: Mapping[str, np.ndarray]) -> None:
        if len(local) and not (local.min() > 0 and local.max() <= self.capacity):
            raise ValueError(f"only rows 1 … {self.capacity} of {self.spec.name!r} can be written")
        for name, values in columns.items():
            if name in self._extras:
                self._extras[name][local] = values
            else:
                tensor = self._tensors[name]
                there = torch.tensor(values, dtype=torch.float32, device=tensor.device)
                tensor.index_copy_(0, torch.from_numpy(local).to(tensor.device), there)

    def touched_rows(self) -> TableRows:
        return self._read_sorted(np.flatnonzero(self.touched))

    def load(self, rows: TableRows) -> None:
        rows = rows.take(self._ranks.owns(rows.ids))
        fitting = rows.take(slice(self.map.free))
        if len(fitting) < len(rows):
            if self._store is None:
                raise StoreError(
                    f"table {self.spec.name!r} has room for {self.capacity:,} rows, but more are to be "
                    "loaded: raise its capacity, or give it a store"
                )
            self._tiered = True
        numbers, _ = self.map.admit(fitting.ids)
        self._write(numbers, fitting.columns)
        if self._calendar is not None:
            self._calendar.loaded(numbers)

    def restore(self) -> None:
        if self._store is None:
            return
        self._tiered = False
        for rows in self._store.iter_rows(self.spec.name, _CHUNK):
            self.load(rows)
            self._settle()
            if self._tiered:
                return

    def logical_rows(self) -> Iterator[TableRows]:
        here = np.flatnonzero(self.map.ids_of(np.arange(self.capacity + 1)))
        here = here[np.argsort(self.map.ids_of(here))]
        ids, done = self.map.ids_of(here), 0
        if self._tiered:
            assert self._store is not None
            for stored in self._store.iter_rows(self.spec.name, _CHUNK):
                stop = int(np.searchsorted(ids, stored.ids[-1], side="right"))
                only_there = stored.take(~np.isin(stored.ids, np.concatenate((ids[done:stop], self.gone))))
                yield concat([self._read_sorted(here[done:stop]), only_there]).sorted()
                done = stop
        for start in range(done, len(here), _CHUNK):
            yield self._read_sorted(here[start : start + _CHUNK])

    def _read_sorted(self, rows: Rows) -> TableRows:
        ids = self.map.ids_of(rows)
        order = np.argsort(ids)
        return TableRows(ids[order], self._read(rows[order]))

    def _bring_back(self, ids: np.ndarray) -> np.ndarray:
        """Ids that are not in memory: gives rows to those that the store has, as it has them; the others, distinct."""
        ids = np.unique(ids)
        if not self._tiered:
            return ids
        assert self._store is not None
        asked = ids[~np.isin(ids, self.gone)]
        stored = self._store.read_rows(self.spec.name, asked)
        self.turnover.tier_hits += len(stored)
        self.turnover.tier_misses += len(asked) - len(stored)
        if not len(stored):
            return ids
        own = stored.take(self._ranks.owns(stored.ids))
        rows = self._give_rows(own.ids)
        self._write(rows[rows > 0], own.take(rows > 0).columns)
        if self._calendar is not None:
            self._calendar.loaded(rows[rows > 0])
        return ids[~np.isin(ids, stored.ids)]

    def _find(self, ids: np.ndarray) -> Rows:
        """The rows of `ids`, wherever they lie, 0 where there is none."""
        if self._ranks.size == 1:
            return self.map.find(ids)
        local = self.map.find(ids)
        return self._ranks.sum(np.where(local > 0, local + self._first, 0))

    def _own(self, ids: np.ndarray) -> np.ndarray:
        return ids[self._ranks.owns(ids)]

    def _settle(self) -> None:
        """What a rank has found out about its own rows is true for all of them."""
        if self._ranks.size > 1:
            tiered, self.dropped = self._ranks.sum(np.array([self._tiered, self._lost], np.int64)).tolist()
            self._tiered = tiered > 0
        else:
            self.dropped = self._lost

    def _give_rows(self, ids: np.ndarray) -> Rows:
        """Local rows for distinct ids of this rank that have none, ascending: the smallest where there is no room for
        all."""
        if len(ids) > self.map.free:
            self._evict(len(ids) - self.map.free)
        rows, _ = self.map.admit(ids)
        self.usage.enter(rows, self.tick)
        self._lost += int(np.count_nonzero(rows == 0))
        return rows

    def _begin(self, local: Rows) -> None:
        """Gives rows that were just admitted (0: not) their first weights; free rows are zero."""
        if self.spec.settings.initialiser != "zero":
            local = local[local > 0]
            self._write(local, {WEIGHTS: first_weights(self.spec.settings, self.map.ids_of(local))})

    def _expire(self, before_ms: int) -> None:
        """Forgets all that was last learned before then, in memory or only in the store."""
        assert self._calendar is not None
        rows = np.flatnonzero(self._extras[TOUCHED] < before_ms)
        ids = self.map.ids_of(rows)
        ids = ids[ids != 0]
        if self._tiered:
            assert self._store is not None
            noted, grains = self._store.noted_before(self.spec.name, before_ms)
            only_there = (self._find(noted) == 0) & ~np.isin(noted, self.gone)
            own = only_there & self._ranks.owns(noted)
            self._calendar.void(noted[own], grains[own])
            ids = np.concatenate((ids, noted[own]))
        ids = np.concatenate(self._ranks.every(ids))
        if len(ids):
            self._drop(np.unique(ids))

    def _drop(self, ids: np.ndarray) -> None:
        """Distinct ids are no more, wherever they are."""
        if self._calendar is not None:
            rows = self.map.find(ids)
            self._calendar.void_rows(ids[rows > 0], rows[rows > 0])
        rows = self.map.remove(ids)
        self._clear(rows)
        self.touched[rows] = False
        self.gone = np.union1d(self.gone, ids)

    def _evict(self, needed: int) -> None:
        """Drops at least `needed` rows from memory, if so many may go: clean, not in use, by the table's policy."""
        if self._store is None:
            return
        may_go = ~self.touched & (self.usage.last < self.tick)
        rows = np.flatnonzero(may_go)
        rows = rows[self.map.ids_of(rows) != 0]
        count = min(len(rows), max(needed, self.capacity // _EVICT_SHARE))
        if count == 0:
            return
        rows = rows[lowest(self.usage.rank(rows, self.tick), count)]
        self.map.remove(self.map.ids_of(rows))
        self.turnover.evicted += count
        self._tiered = True
        self._clear(rows)

    def _clear(self, rows: Rows) -> None:
        """Zeroes rows: they are free."""
        self._write(rows, {n: np.zeros((len(rows), *t.shape[1:]), np.float32) for n, t in self._tensors.items()})
        for column in self._extras.values():
            column[rows] = 0
        if self._calendar is not None:
            self._calendar.freed(rows)


def capacity_of(spec: TableSpec, ranks: int) -> int:
    """How many of a table's rows are in the memory of each of so many ranks."""
    return -(-spec.settings.capacity // ranks)
