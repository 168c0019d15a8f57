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

from embedding_store.checkpoint import CheckpointStore
from embedding_store.columns import TableRows, concat
from embedding_store.errors import UsageError
from embedding_store.expiry import Notes, all_notes
from embedding_store.ranks import Ranks, SharedStore, exact
from embedding_store.sharded import ShardedTables, TableConfig
from embedding_store.specs import TableSpec
from embedding_store.table import Rows, Table, Turnover, capacity_of

Feature: TypeAlias = tuple[np.ndarray, np.ndarray | None]  # rows int64 [m]; lengths int32 [B], None: one row each


class EmbeddingTables:
    """Tables by name. Not thread-safe: the trainer owns them.

    Deterministic for a number of ranks and a pinned number of threads (`torch.set_num_threads`), whatever the capacity
    and whenever rows were evicted, as long as `room` suffices.

    A row number is good until the next `begin_step` or `clear_touched`: until then its row is not evicted.

    With several ranks every method but `size`, `turnover`, `column`, `read_rows` and `write_rows` is called by all of
    them alike, and row numbers and answers are the same on all. A row lies on one rank.
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
        self._device = exact(device)
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

    def has_room(self, table: str, ids: int) -> bool:
        """Whether `room` is at least so many, for nothing as long as far fewer rows were used since the last commit."""
        return bool(self.ranks.least(int(self._tables[table].has_room(ids))))

    def dropped(self, table: str) -> int:
        """How often an id got no row because all of the table was dirty or in use."""
        return self._tables[table].dropped

    def size(self, table: str) -> int:
        """How many rows are in this rank's memory."""
        return len(self._tables[table].map)

    def turnover(self, table: str) -> Turnover:
        """What came and went on this rank since the start; it goes on counting."""
        return self._tables[table].turnover

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
                default = (rows_of[feature] == 0).nonzero().squeeze(1)
                if len(default):
                    embeddings.register_hook(_without(default.to(self._device)))
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
        found = self.ranks.at_first({name: table.touched_rows() for name, table in self._tables.items()})
        parts = {name: [rows[name] for rows in found] for name in self._tables}
        return {name: concat(own).sorted() for name, own in parts.items() if sum(map(len, own))}

    def notes(self) -> dict[str, Notes]:
        """What the commit of `touched()` and `gone()` changes in the store's notes; only tables whose rows expire.

        Given to the first rank, like `touched`.
        """
        found = self.ranks.at_first({name: table.notes() for name, table in self._tables.items()})
        told = {name: [own for notes in found if (own := notes[name]) is not None] for name in self._tables}
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

    def _table(self, spec: TableSpec, store: SharedStore | None) -> Table:
        momentum = self._sharded.momentum.get(spec.name)
        return Table(spec, store, self.ranks, self._sharded.weights[spec.name], momentum)

    def _check(self, feature: str, rows: np.ndarray, lengths: np.ndarray | None) -> None:
        if feature not in self._table_of:
            raise ValueError(f"no table has the feature {feature!r}")
        last = self._tables[self._table_of[feature]].last
        if len(rows) and not (rows.min() >= 0 and rows.max() <= last):  # fbgemm would take row 0 without a word
            raise ValueError(f"rows of {feature!r} outside of 0 … {last}")
        if lengths is not None and lengths.sum() != len(rows):
            raise ValueError(f"{len(rows)} rows of {feature!r}, but lengths for {lengths.sum()}")


def _feature_names(specs: Sequence[TableSpec]) -> dict[str, tuple[str, ...]]:
    """table → what its features are called, each name once: TorchRec has one space of names for all tables."""
    count = Counter(feature for spec in specs for feature in spec.features)
    names = {spec.name: tuple(f if count[f] == 1 else f"{spec.name}.{f}" for f in spec.features) for spec in specs}
    if twice := [name for name, n in Counter(name for own in names.values() for name in own).items() if n > 1]:
        raise UsageError(f"the feature {twice[0]!r} is there twice: give it another name")
    return names


def _config(spec: TableSpec, features: tuple[str, ...], ranks: int) -> TableConfig:
    s = spec.settings
    rows = capacity_of(spec, ranks) + 1
    return TableConfig(spec.name, rows, s.dim, features, s.learning_rate, s.eps, s.optimizer)


def _without(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that takes the gradient of the default row away, also where it is not finite."""
    return lambda gradient: gradient.index_fill(0, rows, 0.0)
