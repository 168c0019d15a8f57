"""The embedding tables: feature ids to rows, the rows in memory, and a tier on disk for those that do not fit.

The default row 0, which unknown ids read, is zero and stays so: reads need not write. A new row starts from what the
table's `initialiser` makes of its id; where that is zero, an unknown id and a new row are the same to a forward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch

from embedding_store.admission import Admission
from embedding_store.checkpoint import OWN, CheckpointStore, Notes, all_notes
from embedding_store.columns import MOMENTUM, TOUCHED, WEIGHTS, TableRows, concat
from embedding_store.errors import StoreError, UsageError
from embedding_store.eviction import lowest, policy
from embedding_store.expiry import Calendar, grain
from embedding_store.initial import first_weights
from embedding_store.ranks import Ranks, SharedStore
from embedding_store.rows import RowMap
from embedding_store.sharded import ShardedTables, TableConfig
from embedding_store.specs import TableSpec

Rows: TypeAlias = np.ndarray  # int64 row numbers, 0 the default row
Feature: TypeAlias = tuple[np.ndarray, np.ndarray | None]  # rows int64 [m]; lengths int32 [B], None: one row each

_CHUNK = 100_000  # rows at a time where all of a table goes by
_EVICT_SHARE = 16  # an eviction frees at least capacity / 16 rows, so that it is seldom


class EmbeddingTables:
    """Tables by name. Not thread-safe: the trainer owns them.

    Deterministic for a number of ranks and a pinned number of threads (`torch.set_num_threads`), whatever the capacity
    and whenever rows were evicted, as long as `room` suffices.

    A row number is good until the next `begin_step` or `clear_touched`: until then its row is not evicted.

    With several ranks every method but `size`, `column`, `read_rows` and `write_rows` is called by all of them alike,
    and row numbers and answers are the same on all. A row lies on one rank.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        device: str = "cpu",
        store: CheckpointStore | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`store`: where rows that are not in memory are read from; the owner commits to it what `touched`, `gone`,
        `notes` and `sketches` say, all at once. Of several ranks the first one has it.

        Without a store nothing is evicted. The tables start empty; `restore` brings rows in at once, else each
        comes when it is asked for.
        """
        self.specs = {spec.name: spec for spec in specs}
        self.ranks = ranks or Ranks(device=device)
        self._device = torch.device(device)
        features = _feature_names(specs)
        configs = [_config(spec, features[spec.name], self.ranks.size) for spec in specs]
        self._sharded = ShardedTables(configs, self._device, self.ranks)
        self._table_of = {feature: table for table, own in features.items() for feature in own}
        there = self.ranks.from_first(lambda: store is not None)
        shared = SharedStore(store, self.ranks) if there else None
        self._tables = {spec.name: self._table(spec, shared) for spec in specs}

    def rows(
        self, table: str, ids: np.ndarray, admit: bool, examples: np.ndarray | None = None, at_once: bool = False
    ) -> Rows:
        """ids int64 [n] (0: none; may repeat) → rows int64 [n], 0 for an id that has none.

        With `admit` ids that have no row get one if the table's rules say so (see `Admission.admitted`; `examples`
        int64 [n]) or `at_once`, and all that have one are touched. Without, nothing changes that counts: an unknown
        id gets row 0, one that is only in the store is read back. Where the table is full clean rows make room, in
        the order of `rules.evict`; where there is none an id gets row 0 and is counted in `dropped`.
        """
        return self._tables[table].rows(ids, admit, examples, at_once)

    def begin_step(self, now_ms: int = 0) -> None:
        """Row numbers handed out before are no longer used: their rows may be evicted if they are clean.

        Event time is `now_ms`, if it was not later before: rows that were not learned for too long are forgotten,
        counts of sightings decay.
        """
        for table in self._tables.values():
            table.begin_step(now_ms)

    def room(self, table: str) -> int:
        """How many ids that are not in memory may come before one is dropped. Too few for a step: commit first.

        With several ranks: even if all of them belong to one.
        """
        return self.ranks.least(self._tables[table].room())

    def dropped(self, table: str) -> int:
        """How often an id got no row because all of the table was dirty or in use."""
        return self._tables[table].dropped

    def size(self, table: str) -> int:
        """How many rows are in this rank's memory."""
        return len(self._tables[table].map)

    def embed(self, features: Mapping[str, Feature]) -> dict[str, torch.Tensor]:
        """feature → (rows int64 [m], lengths) → embeddings float32 [m, dim] on the device.

        A feature whose name several tables have is called "table.feature".
        `backward` through them updates weights and momentum at once, and where gradients are on the rows are touched
        here; row 0 stays zero. `lengths` is for the caller's own pooling, and only its sum is looked at.
        With several ranks each gives the rows of its part of the batch, and touches all of them itself.
        Raises ValueError on a feature that is not known or a row outside of its table.
        """
        for feature, (rows, lengths) in features.items():
            self._check(feature, rows, lengths)
        rows_of = {f: torch.from_numpy(np.require(rows, np.int64, ["C", "W"])) for f, (rows, _) in features.items()}
        out = self._sharded(rows_of)
        for feature, embeddings in out.items():
            if embeddings.requires_grad:
                self.touch(self._table_of[feature], features[feature][0])
                default = (rows_of[feature] == 0).nonzero().squeeze(1).to(self._device)
                embeddings.register_hook(_without(default))
        return out

    def column(self, table: str, name: str) -> np.ndarray:
        """All of this rank's rows of a column, [capacity + 1, …], live: write to it, then `touch` (which zeroes row 0
        of extras).

        Weights and momentum on a CUDA device come as a copy.
        """
        return self._tables[table].column(name)

    def values(self, table: str, name: str, rows: Rows) -> np.ndarray:
        """A column of numbers at `rows` int64 [n], wherever they lie: [n, …], a copy."""
        return self._tables[table].values(name, rows)

    def set(self, table: str, name: str, rows: Rows, values: np.ndarray) -> None:
        """Sets an extra column at `rows` int64 [n], none of them 0, to `values` [n, …]. Does not touch them."""
        owner = self._tables[table]
        there, local = owner.located(rows)
        owner.column(name)[local] = values[there]

    def add(self, table: str, name: str, rows: Rows, numbers: np.ndarray) -> None:
        """Adds `numbers` [n] to an extra column at `rows` int64 [n], none of them 0, which may repeat. No touch."""
        owner = self._tables[table]
        there, local = owner.located(rows)
        np.add.at(owner.column(name), local, numbers[there])

    def read_rows(self, table: str, rows: Rows) -> dict[str, np.ndarray]:
        """Copies of all columns at `rows` int64 [n], which lie on this rank: name → [n, …]."""
        return self._tables[table].read(rows)

    def write_rows(self, table: str, rows: Rows, columns: Mapping[str, np.ndarray]) -> None:
        """Sets columns [n, …] at `rows` int64 [n] (distinct, of this rank, none of them 0). Does not touch them."""
        self._tables[table].write(rows, columns)

    def forget(self, table: str, ids: np.ndarray) -> None:
        """Takes away all that is known of `ids` int64 [n], in memory and, with the next commit, in the store.

        An id that comes again afterwards starts anew. Row numbers of these ids are no longer good.
        """
        self._tables[table].forget(np.unique(ids[ids != 0]))

    def gone(self) -> dict[str, np.ndarray]:
        """Ids int64 [n] forgotten since `clear_touched`, ascending; only tables that have any. Some may be back."""
        return {name: table.gone for name, table in self._tables.items() if len(table.gone)}

    def touch(self, table: str, rows: Rows) -> None:
        """Marks rows as changed since the last commit; row 0 is left out."""
        self._tables[table].touch(rows)

    def touched(self) -> dict[str, TableRows]:
        """All columns of the rows touched since `clear_touched`, sorted by id, as copies; only tables that have any.

        Of several ranks the first one is given those of all, the others nothing.
        """
        found = {name: self.ranks.at_first(table.touched_rows()) for name, table in self._tables.items()}
        return {name: concat(parts).sorted() for name, parts in found.items() if sum(map(len, parts))}

    def notes(self) -> dict[str, Notes]:
        """What the commit of `touched()` and `gone()` changes in the store's notes; only tables whose rows expire.

        Given to the first rank, like `touched`.
        """
        found = {name: self.ranks.at_first(table.notes()) for name, table in self._tables.items()}
        told = {name: [part for part in parts if part is not None] for name, parts in found.items()}
        return {name: all_notes(parts) for name, parts in told.items() if parts}

    def sketches(self) -> dict[str, dict[int, bytes]]:
        """Blobs that changed since `clear_touched`, of tables that count sightings."""
        sketches = {table.sketch_name: table.admission.sketch for table in self._tables.values()}
        found = {name: sketch.changed() for name, sketch in sketches.items() if sketch is not None}
        return {name: blobs for name, blobs in found.items() if blobs}

    def clear_touched(self) -> None:
        """After the commit of all that changed has succeeded, and only then, with no step in between: all is clean."""
        for table in self._tables.values():
            table.clear_touched()
        self.begin_step()

    def load(self, table: str, rows: TableRows) -> None:
        """Rows as they are in the store (all columns, ids that are not in memory); they are clean.

        What goes beyond the table's capacity is left in the store; raises StoreError where there is no store.
        """
        self._tables[table].load(rows)

    def restore(self) -> None:
        """Loads all that the store has, and fits, into tables that are empty."""
        for table in self._tables.values():
            table.restore()

    def digest_rows(self) -> Iterator[tuple[str, TableRows]]:
        """(table, rows) in chunks, sorted by table and id: all rows, in memory or only in the store (see `Digest`).

        For one rank: several have all of it in the store, once it is committed.
        """
        for name in sorted(self._tables):
            for rows in self._tables[name].logical_rows():
                yield name, rows

    def _table(self, spec: TableSpec, store: SharedStore | None) -> _Table:
        momentum = self._sharded.momentum.get(spec.name)
        return _Table(spec, store, self.ranks, self._sharded.weights[spec.name], momentum)

    def _check(self, feature: str, rows: np.ndarray, lengths: np.ndarray | None) -> None:
        if feature not in self._table_of:
            raise ValueError(f"no table has the feature {feature!r}")
        last = self._tables[self._table_of[feature]].last
        if len(rows) and not (rows.min() >= 0 and rows.max() <= last):  # fbgemm would take row 0 without a word
            raise ValueError(f"rows of {feature!r} outside of 0 … {last}")
        if lengths is not None and lengths.sum() != len(rows):
            raise ValueError(f"{len(rows)} rows of {feature!r}, but lengths for {lengths.sum()}")


class _Table:
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
        self.tick, self.now_ms = 1, 0
        self.usage = policy(rules, capacity)
        self.dropped = self._lost = 0  # ids that got no row, of all ranks and of this one
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
        absent = np.flatnonzero((rows == 0) & (ids != 0))
        if len(absent) and (admit or self._tiered):
            wanted = self._bring_back(ids[absent])
            if admit and not (at_once or self.admission.all):
                at = absent[np.isin(ids[absent], wanted)]
                wanted = self.admission.admitted(ids[at], None if examples is None else examples[at])
            if admit:
                self._begin(self._give_rows(self._own(wanted)))
            self._settle()
            rows[absent] = self._find(ids[absent])
        if admit:
            self.touch(rows)
        return rows

    def touch(self, rows: Rows) -> None:
        _, local = self.located(rows)
        self.touched[local] = True
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
        self.gone = self.gone[:0]

    def room(self) -> int:
        if self._store is None:
            return self.map.free
        kept = self.touched | (self.usage.last == self.tick)
        return self.capacity - int(np.count_nonzero(kept[1:]))

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
        self._tiered = True
        self._clear(rows)

    def _clear(self, rows: Rows) -> None:
        """Zeroes rows: they are free."""
        self._write(rows, {n: np.zeros((len(rows), *t.shape[1:]), np.float32) for n, t in self._tensors.items()})
        for column in self._extras.values():
            column[rows] = 0
        if self._calendar is not None:
            self._calendar.freed(rows)


def _feature_names(specs: Sequence[TableSpec]) -> dict[str, tuple[str, ...]]:
    """table → what its features are called, each name once: TorchRec has one space of names for all tables."""
    count = Counter(feature for spec in specs for feature in spec.features)
    names = {spec.name: tuple(f if count[f] == 1 else f"{spec.name}.{f}" for f in spec.features) for spec in specs}
    if twice := [name for name, n in Counter(name for own in names.values() for name in own).items() if n > 1]:
        raise UsageError(f"the feature {twice[0]!r} is there twice: give it another name")
    return names


def capacity_of(spec: TableSpec, ranks: int) -> int:
    """How many of a table's rows are in the memory of each of so many ranks."""
    return -(-spec.settings.capacity // ranks)


def _config(spec: TableSpec, features: tuple[str, ...], ranks: int) -> TableConfig:
    s = spec.settings
    rows = capacity_of(spec, ranks) + 1
    return TableConfig(spec.name, rows, s.dim, features, s.learning_rate, s.eps, s.optimizer)


def _without(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that takes the gradient of the default row away, also where it is not finite."""
    return lambda gradient: gradient.index_fill(0, rows, 0.0)
