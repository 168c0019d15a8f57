"""Which rows replicas wait for, where versions have a budget of bytes per second.

The rows of a version may take rate · (its time − that of the version before it) bytes: their ids and columns, as they
are encoded. What must always go comes on top: dense weights, ids that are gone, blobs, headers. Rows are of two kinds:

1. Those in which a column named in `first` has changed (a user's history, what an item is): the longest waiting first.
2. The others, by how far they have moved since they were sent, as the sum over commits of the L2 norm of the change:
   of the weights, and of log(1 + count) of every other column but those that count nothing (`unmeasured`: ids,
   moments). A path's length: never less than the distance.

The first kind goes first, but while others wait it has half of the bytes (and a row at least): histories are large, and
many change, so that weights would wait for the refresh otherwise. What one kind leaves the other takes.

What does not fit is owed: it goes with a later version, in its value of then. Once a row has waited for `refresh_ms`
everything owed goes with the next version, whatever the budget says. So statistics wait no longer than that.

Which rows are owed is part of the owner's commit (`Commit.records`), never of the digest. A row that was carried over
was not touched since the last commit, so the store has its value: it does not matter whether it is still in memory.
Time and memory grow with the rows that are owed (25 bytes each); one write a row that is touched and stays owed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from embedding_store.checkpoint import CheckpointStore
from embedding_store.columns import MOMENTUM, TOUCHED, WEIGHTS, TableRows, concat
from embedding_store.delta import row_bytes
from embedding_store.encoding import Encoding

_RECORD = np.dtype([("since", "<i8"), ("moved", "<f4"), ("first", "?")])
_ID_BYTES = 8


@dataclass
class Plan:
    """What a version holds, and what is owed once it is committed."""

    tables: dict[str, TableRows]  # rows to send, without momentum
    records: dict[bytes, bytes] = field(default_factory=dict)  # for the commit
    waiting: dict[str, TableRows] = field(default_factory=dict)  # not for others to read

    def info(self, now_ms: int) -> dict[str, int]:
        """JSON-ready, for the version's info: how many rows are owed, and for how long the oldest has been (ms)."""
        return _info(self.waiting, now_ms)


class Owed:
    """The rows owed to replicas. Plan a version, commit it with the plan's records, then `accept` the plan."""

    def __init__(
        self,
        store: CheckpointStore,
        bytes_per_s: int,
        refresh_ms: int,
        first: Mapping[str, tuple[str, ...]],
        encoding: Encoding = "fp32",
        unmeasured: Collection[str] = (),
    ) -> None:
        """`bytes_per_s` 0: no budget. `first`: table → columns that must not wait for others to move."""
        self._store, self._rate, self._refresh_ms, self._first = store, bytes_per_s, refresh_ms, first
        self._encoding, self._skipped = encoding, {MOMENTUM, TOUCHED, *unmeasured}
        self._waiting: dict[str, TableRows] = {}  # sorted by id; columns: those of _RECORD
        self._last_ms = 0  # the time of the last version

    @property
    def rows(self) -> int:
        """How many are owed."""
        return sum(map(len, self._waiting.values()))

    def info(self, now_ms: int) -> dict[str, int]:
        """As `Plan.info`, of the last commit."""
        return _info(self._waiting, now_ms)

    def restore(self) -> None:
        """What was owed as of the store's last commit."""
        head = self._store.head()
        self._last_ms = head.created_ms if head else 0
        self._waiting = _read(self._store.records())

    def plan(
        self,
        touched: Mapping[str, TableRows],
        gone: Mapping[str, np.ndarray],
        now_ms: int,
        everything: bool = False,
    ) -> Plan:
        """What goes with a version at `now_ms`. What is owed changes with `accept` only.

        touched, gone: of the commit to come, which the store does not have yet. everything: whatever the budget says.
        """
        if not self._rate and not self._waiting:
            return Plan({table: rows.without(MOMENTUM, TOUCHED) for table, rows in touched.items()})
        for rows in self._waiting.values():
            np.minimum(rows.columns["since"], now_ms, out=rows.columns["since"])  # the clock was set back
        carried = {table: _less(rows, gone.get(table)) for table, rows in self._waiting.items()}
        left: dict[str, TableRows] = {}
        if self._rate and not everything and not self._refresh_due(carried, now_ms):
            left = self._left(carried, touched, gone, now_ms)
        tables = {}
        for table in sorted(carried.keys() | touched.keys()):
            rows = self._values(table, carried.get(table), touched.get(table), left.get(table))
            if len(rows):
                tables[table] = rows.without(MOMENTUM, TOUCHED)
        return Plan(tables, _notes(self._waiting, left, touched), {t: rows for t, rows in left.items() if len(rows)})

    def accept(self, plan: Plan, now_ms: int) -> None:
        """The plan's version is committed, at `now_ms`."""
        self._waiting, self._last_ms = plan.waiting, now_ms

    def _refresh_due(self, carried: Mapping[str, TableRows], now_ms: int) -> bool:
        return any((rows.columns["since"] <= now_ms - self._refresh_ms).any() for rows in carried.values())

    def _left(
        self,
        carried: Mapping[str, TableRows],
        touched: Mapping[str, TableRows],
        gone: Mapping[str, np.ndarray],
        now_ms: int,
    ) -> dict[str, TableRows]:
        """table → the records of the rows that the budget holds back."""
        names = sorted(carried.keys() | touched.keys())
        if not names:
            return {}
        room = self._rate * max(0, now_ms - self._last_ms) // 1000
        sizes = {table: row_bytes(self._store.layouts[table], self._encoding) for table in names}
        rows_of = {table: _ids_of(carried.get(table), touched.get(table)) for table in names}
        if sum(sizes[table] * len(ids) for table, ids in rows_of.items()) <= room:
            return {}
        records = {
            table: self._records(table, carried.get(table), touched.get(table), gone.get(table), now_ms)
            for table in names
        }
        every = concat([records[table] for table in names])
        size = np.repeat([sizes[table] for table in names], [len(records[table]) for table in names])
        order = _order(every, size, room)
        held_back = np.ones(len(every), bool)
        held_back[order] = np.cumsum(size[order]) > room
        ends = np.cumsum([len(records[table]) for table in names])
        parts = np.split(held_back, ends[:-1])
        return {table: records[table].take(part) for table, part in zip(names, parts, strict=True)}

    def _records(
        self, table: str, carried: TableRows | None, touched: TableRows | None, gone: np.ndarray | None, now_ms: int
    ) -> TableRows:
        """The records of all rows that wait, with what the touched ones have moved now; sorted by id."""
        if touched is None or not len(touched):
            return carried if carried is not None else _none()
        moved, first = self._moved(table, touched, gone)
        own = TableRows(touched.ids, {"since": np.full(len(touched), now_ms, np.int64), "moved": moved, "first": first})
        if carried is None or not len(carried):
            return own
        _, old, new = np.intersect1d(carried.ids, own.ids, assume_unique=True, return_indices=True)
        own.columns["since"][new] = carried.columns["since"][old]
        own.columns["moved"][new] += carried.columns["moved"][old]
        own.columns["first"][new] |= carried.columns["first"][old]
        return concat([_less(carried, own.ids), own]).sorted()

    def _moved(self, table: str, rows: TableRows, gone: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(how far float32 [n], whether a column of `first` has changed bool [n]) since the last commit."""
        found, stored = self._store.read_rows(table, rows.ids)
        known = found if gone is None else found & ~np.isin(rows.ids, gone)
        square, first = np.zeros(len(rows)), np.zeros(len(rows), bool)
        for name, column in rows.columns.items():
            if name in self._skipped:
                continue
            before = np.zeros_like(column)  # what an unknown id reads as
            before[known] = stored.columns[name][known[found]]
            if name in self._first.get(table, ()):
                first |= (column != before).reshape(len(rows), -1).any(1)
                continue
            with np.errstate(all="ignore"):
                change = column - before if name == WEIGHTS else np.log1p(column) - np.log1p(before)
                square += np.square(change.astype(np.float64)).reshape(len(rows), -1).sum(1)
        return np.nan_to_num(np.sqrt(square), nan=np.inf).astype(np.float32), first

    def _values(
        self, table: str, carried: TableRows | None, touched: TableRows | None, left: TableRows | None
    ) -> TableRows:
        """All columns of the rows that go now, sorted by id: as they were touched, or as the store has them."""
        ids = _ids_of(carried, touched)
        if left is not None:
            ids = np.setdiff1d(ids, left.ids, assume_unique=True)
        if touched is not None:
            fresh = touched.take(np.isin(touched.ids, ids))
            if len(fresh) == len(ids):
                return fresh
            _, old = self._store.read_rows(table, np.setdiff1d(ids, fresh.ids, assume_unique=True))
            return concat([fresh, old]).sorted()
        return self._store.read_rows(table, ids)[1]  # one that is gone by a rollback is not found, and owed no more


def _order(records: TableRows, size: np.ndarray, room: int) -> np.ndarray:
    """The places of the records in the order in which the rows go. size: bytes int64 [n]; room: bytes there are."""
    first, since, moved = (records.columns[name] for name in ("first", "since", "moved"))
    changed, others = np.flatnonzero(first), np.flatnonzero(~first)
    changed = changed[np.argsort(since[changed], kind="stable")]
    others = others[np.argsort(-moved[others], kind="stable")]
    before_it = np.cumsum(size[changed]) - size[changed]
    half = int(np.searchsorted(before_it, room / 2))
    return np.concatenate((changed[:half], others, changed[half:]))


def _info(waiting: Mapping[str, TableRows], now_ms: int) -> dict[str, int]:
    oldest = min((int(rows.columns["since"].min()) for rows in waiting.values() if len(rows)), default=now_ms)
    return {"rows": sum(map(len, waiting.values())), "oldest_ms": max(0, now_ms - oldest)}


def _notes(
    before: Mapping[str, TableRows], after: Mapping[str, TableRows], touched: Mapping[str, TableRows]
) -> dict[bytes, bytes]:
    """What the store must change: the records of touched rows that wait, and those that wait no more."""
    notes: dict[bytes, bytes] = {}
    for table, rows in before.items():
        paid = np.setdiff1d(rows.ids, after[table].ids) if table in after else rows.ids
        notes |= dict.fromkeys(_keys(table, paid), b"")
    for table, rows in after.items():
        if table in touched:
            new = rows.take(np.isin(rows.ids, touched[table].ids))
            packed = np.empty(len(new), _RECORD)
            for name in _RECORD.names or ():
                packed[name] = new.columns[name]
            notes |= zip(_keys(table, new.ids), packed.view(f"V{_RECORD.itemsize}").tolist(), strict=True)
    return notes


def _read(notes: Iterable[tuple[bytes, bytes]]) -> dict[str, TableRows]:
    """The inverse of `_notes`: table → records sorted by id."""
    found: dict[str, tuple[list[bytes], list[bytes]]] = {}
    for key, value in notes:
        keys, values = found.setdefault(key[: -_ID_BYTES].decode(), ([], []))
        keys.append(key[-_ID_BYTES:])
        values.append(value)
    out = {}
    for table, (keys, values) in found.items():
        packed = np.frombuffer(b"".join(values), _RECORD)
        ids = np.frombuffer(b"".join(keys), "<i8").astype(np.int64)
        out[table] = TableRows(ids, {name: packed[name].copy() for name in _RECORD.names or ()}).sorted()
    return out


def _keys(table: str, ids: np.ndarray) -> list[bytes]:
    name = table.encode()
    return [name + key for key in ids.astype("<i8").view(f"V{_ID_BYTES}").tolist()]


def _none() -> TableRows:
    return TableRows(np.empty(0, np.int64), {name: np.empty(0, _RECORD[name]) for name in _RECORD.names or ()})


def _less(rows: TableRows, ids: np.ndarray | None) -> TableRows:
    """Rows other than those of `ids`."""
    return rows if ids is None or not len(ids) else rows.take(~np.isin(rows.ids, ids))


def _ids_of(carried: TableRows | None, touched: TableRows | None) -> np.ndarray:
    """Ids int64 [n] of both, each once, ascending."""
    parts = [rows.ids for rows in (carried, touched) if rows is not None]
    return parts[0] if len(parts) == 1 else np.union1d(*parts)
