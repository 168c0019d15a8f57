"""A joiner's state over RocksDB: in memory what was used last or is due next, the rest on disk.

Each piece takes part in a commit in the same way: `write` puts what changed since the last `saved` into a batch, and
`saved` says that the batch is in the database.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Generic, TypeVar

import msgspec
import xxhash

from embedding_store.rocks import FIRST, Batch, Cursor, Db, keys_of
from streams.join_state import FOREVER, NEVER, Due, MemorySeen, MemoryTimers, Pair, Shown, Window

LOOK_AHEAD_MS = 5_000  # of event time: timers due so soon are in memory
REQUEST_BYTES = 16  # of the keys of open impressions: user and request
ENDED_A_COMMIT = 5_000  # purchase windows that a commit deletes; one adds fewer

V = TypeVar("V")
_UNREAD: Any = object()
_BIAS = 1 << 63  # of signed keys, so that they sort as the numbers do
_ONE, _TWO = struct.Struct(">Q").pack, struct.Struct(">QQ").pack
_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode


def key_of(number: int, *more: int) -> bytes:
    """One of `keys_of`, where there is no other to make along with it."""
    if not more:
        return _ONE(number + _BIAS)
    if len(more) == 1:
        return _TWO(number + _BIAS, more[0] + _BIAS)
    return struct.pack(f">{1 + len(more)}Q", number + _BIAS, *[n + _BIAS for n in more])


def numbers_of(key: bytes) -> tuple[int, ...]:
    """What `key_of` was given."""
    return tuple([number - _BIAS for number in struct.unpack(f">{len(key) // 8}Q", key)])


class Cache(Generic[V]):
    """A family as a map of integers, or pairs of them, to objects. What was put stays in memory until `saved`.

    Of what is in memory the older half goes when `size` is reached: what was not asked for since the younger began.
    """

    def __init__(
        self, db: Db, family: str, pack: Callable[[V], bytes], unpack: Callable[[bytes], V], size: int
    ) -> None:
        self._db, self._family, self._pack, self._unpack, self._size = db, family, pack, unpack, size
        self._young: dict[Any, V | None] = {}  # None: not there either
        self._old: dict[Any, V | None] = {}  # some of them are in `_young` too, which counts
        self._dirty: dict[Any, V] = {}
        self._removed: set[Any] = set()

    def get(self, key: int | Pair, /) -> V | None:
        value = self._young.get(key, _UNREAD)
        if value is _UNREAD:
            value = self._old.get(key, _UNREAD)
            if value is _UNREAD:
                raw = self._db.get(self._family, key_of(*key) if isinstance(key, tuple) else key_of(key))
                value = None if raw is None else self._unpack(raw)
            self._young[key] = value
        return value

    def put(self, key: int | Pair, value: V, /) -> None:
        if self._removed:
            self._removed.discard(key)
        self._young[key] = self._dirty[key] = value

    def remove(self, key: int | Pair, /) -> None:
        self._young[key] = None
        self._dirty.pop(key, None)
        self._removed.add(key)

    def fetch(self, keys: Iterable[int | Pair], /) -> None:
        young, old = self._young, self._old
        missing: list[Any] = []
        for key in keys:
            if key not in young:
                if key in old:
                    young[key] = old[key]
                else:
                    missing.append(key)
        missing.sort()
        for key, raw in zip(missing, self._db.get_many(self._family, keys_of(missing)), strict=True):
            young[key] = None if raw is None else self._unpack(raw)

    def write(self, batch: Batch) -> None:
        order = sorted(self._dirty)
        batch.put_all(self._family, keys_of(order), [self._pack(self._dirty[key]) for key in order])
        delete = batch.into(self._family)
        for key in keys_of(sorted(self._removed)):
            del delete[key]

    def saved(self) -> None:
        for key in self._removed:  # that they are gone the disk says: nobody is to keep a note of all that ever were
            self._young.pop(key, None)
            self._old.pop(key, None)
        self._dirty.clear()
        self._removed.clear()
        if len(self._young) > self._size // 2:
            self._old, self._young = self._young, {}


class WindowCache(Cache[Window]):
    """The purchase windows. Each is noted under the time of its last click, so that ended ones are found in order."""

    before = NEVER  # ms; older clicks may go

    def __init__(self, db: Db, family: str, notes: str, size: int) -> None:
        super().__init__(db, family, _encode, msgspec.msgpack.Decoder(Window).decode, size)
        self._notes = notes
        self._noted: dict[Any, int] = {}  # of what is dirty: as it is noted on disk
        self._obsolete: list[bytes] = []  # notes of windows that were removed
        self._begin = self._next_begin = key_of(NEVER)  # no note stands before it

    def put(self, key: Any, value: Window, /) -> None:
        before = self._young.get(key) or self._old.get(key)
        if before is not None:
            value.noted = before.noted
        super().put(key, value)

    def remove(self, key: Any, /) -> None:
        window = self.get(key)
        if window is not None and window.noted >= 0:
            self._obsolete.append(key_of(window.noted, *key))
        super().remove(key)

    def forget(self, before: int) -> None:
        self.before = max(self.before, before)

    def of_user(self, user: int) -> list[tuple[Pair, Window]]:
        stored = self._db.cursor(self._family).beginning_with(key_of(user))
        found: dict[Any, Window] = {numbers_of(key): self._unpack(raw) for key, raw in stored}
        for kept in (self._old, self._young):
            found |= {pair: window for pair, window in kept.items() if window is not None and pair[0] == user}
        return [(pair, window) for pair, window in found.items() if pair not in self._removed]

    def write(self, batch: Batch) -> None:
        notes = batch.into(self._notes)
        for key in self._obsolete:
            del notes[key]
        for pair, key in self._ended():
            del notes[key]
            if pair is not None:
                Cache.remove(self, pair)
        gone, new = [], []
        for pair, window in self._dirty.items():
            noted = self._noted.setdefault(pair, window.noted)
            window.noted = window.clicked
            if noted != window.clicked:
                if noted >= 0:
                    gone.append((noted, *pair))
                new.append((window.clicked, *pair))
        for key in keys_of(gone):
            del notes[key]
        keys = keys_of(sorted(new))
        batch.put_all(self._notes, keys, [b""] * len(keys))
        if keys:
            self._next_begin = min(self._next_begin, keys[0])  # of a late click
        super().write(batch)

    def saved(self) -> None:
        super().saved()
        self._noted.clear()
        self._obsolete.clear()
        self._begin = self._next_begin

    def _ended(self) -> list[tuple[Pair | None, bytes]]:
        """The notes of some windows that have ended, each with the pair, None where the window has another note."""
        notes = []
        self._next_begin = self._begin
        for key, _ in islice(self._db.items(self._notes, self._begin), ENDED_A_COMMIT):
            clicked, user, item = numbers_of(key)
            if clicked >= self.before:
                break
            notes.append((clicked, (user, item), key))
            self._next_begin = key
        self.fetch(pair for _, pair, _ in notes)
        ended: list[tuple[Pair | None, bytes]] = []
        for clicked, pair, key in notes:
            window = self._young[pair]
            own = window is not None and window.clicked == clicked
            ended.append((pair if own else None, key))
        return ended


class SeenCache(MemorySeen):
    """The event ids: the newest chunks in memory (and on disk as they are), of older ones only the keys on disk.

    On disk an id is 16 bytes of its hash (two ids meet with a chance of 1e-26 for a trillion pairs), in generations of
    `open_ms` by its ts, which are dropped whole.
    """

    def __init__(self, db: Db, chunks: str, keys: str, open_ms: int, size: int) -> None:
        super().__init__()
        self._db, self._chunk_family, self._key_family, self._size = db, chunks, keys, size
        self._length = max(1, open_ms)
        self._new: list[dict[str, int]] = []  # chunks since `saved`
        self._dropped: list[dict[str, int]] = []  # those that left memory since then, for the disk
        self._gone = 0  # chunks that left memory since then
        self._before = NEVER
        self.chunk_numbers = (0, 0)  # [first, next) of the chunks on disk
        self.generations: list[int] = []  # that have keys on disk

    def restore(self, chunks: tuple[int, int], generations: list[int]) -> None:
        """Goes on from what is on disk."""
        unpack = msgspec.msgpack.Decoder(dict[str, int]).decode
        for _, raw in self._db.items(self._chunk_family, FIRST):
            super().add(unpack(raw))
        self.chunk_numbers, self.generations = chunks, list(generations)

    def find(self, ids: list[str], now: int) -> dict[str, int]:
        found = super().find(ids, now)
        if self.generations and len(found) < len(ids):
            names = {_hash(event_id): event_id for event_id in ids if event_id not in found}
            for generation in self.generations:
                keys = sorted(key_of(generation) + name for name in names)
                for key, raw in zip(keys, self._db.get_many(self._key_family, keys), strict=True):
                    if raw is not None:
                        event_id = names[key[8:]]
                        found[event_id] = max(numbers_of(raw)[0], found.get(event_id, NEVER))
        return found

    def add(self, chunk: dict[str, int]) -> None:
        super().add(chunk)
        if chunk:
            self._new.append(chunk)
        while len(self.first) > self._size and len(self.chunks) > 1:
            self._dropped.append(self._drop_oldest())

    def forget(self, before: int) -> None:
        self._before = before
        while self.chunks and self.chunks[0][0] < before:
            self._drop_oldest(before)

    def write(self, batch: Batch) -> None:
        first, end = self.chunk_numbers
        chunks = batch.into(self._chunk_family)
        for chunk in self._new:
            chunks[key_of(end)] = _encode(chunk)
            end += 1
        for number in range(first, first + self._gone):
            del chunks[key_of(number)]
        keys = {}
        for dropped in self._dropped:
            for event_id, ts in dropped.items():
                if ts >= self._before:
                    keys[key_of(ts // self._length) + _hash(event_id)] = key_of(ts)
        order = sorted(keys)
        batch.put_all(self._key_family, order, [keys[key] for key in order])
        generations = {*self.generations, *(numbers_of(key[:8])[0] for key in order)}
        for generation in [g for g in generations if (g + 1) * self._length <= self._before]:
            generations.remove(generation)
            batch.delete_range(self._key_family, key_of(generation), key_of(generation + 1))
        self._written = (first + self._gone, end), sorted(generations)

    def saved(self) -> None:
        self.chunk_numbers, self.generations = self._written
        self._new, self._dropped, self._gone = [], [], 0

    @property
    def written(self) -> tuple[tuple[int, int], list[int]]:
        """(chunk numbers, generations) as they are with the batch of the last `write`."""
        return self._written

    def _drop_oldest(self, before: int = FOREVER) -> dict[str, int]:
        self._gone += 1
        return self.drop(before)


class TimerCache(MemoryTimers):
    """Timers: in memory those that are due soon, all on disk."""

    def __init__(self, db: Db, family: str) -> None:
        super().__init__()
        self._db, self._family = db, family
        self._near = NEVER  # all that is due before it is in memory
        self._new: dict[Due, bytes] = {}  # since `saved`
        self._old: set[Due] = set()  # out since then, and perhaps on disk

    def put(self, due: Due, value: bytes = b"") -> None:
        self._new[due] = value
        self._old.discard(due)
        if due[0] < self._near:
            super().put(due, value)

    def remove(self, due: Due) -> None:
        super().remove(due)
        self._new.pop(due, None)
        self._old.add(due)

    def peek(self, limit: int) -> int:
        if limit > self._near:
            self._load(limit + LOOK_AHEAD_MS)
        return super().peek(limit)

    def pop(self) -> tuple[Due, bytes]:
        due, value = super().pop()
        self._new.pop(due, None)
        self._old.add(due)
        return due, value

    def write(self, batch: Batch) -> None:
        order = sorted(self._new)
        batch.put_all(self._family, keys_of(order), [self._new[due] for due in order])
        delete = batch.into(self._family)
        for key in keys_of(sorted(self._old)):
            del delete[key]

    def saved(self) -> None:
        self._new.clear()
        self._old.clear()

    def _load(self, until: int) -> None:
        near, self._near = self._near, until
        for key, raw in self._db.items(self._family, key_of(near)):
            due: Due = numbers_of(key)  # type: ignore[assignment]
            if due[0] >= until:
                break
            if due not in self._old:
                super().put(due, raw)
        for due, value in self._new.items():
            if near <= due[0] < until:
                super().put(due, value)


class AsideStore:
    """The open impressions on disk, by user and request, and the order of all of them."""

    def __init__(self, db: Db, shown: str, order: str) -> None:
        self._db, self._shown, self._order = db, shown, order
        self._unpack = msgspec.msgpack.Decoder(Shown).decode
        # What is not in memory is as it was at the last commit: one for requests, one for users.
        self._cursors: tuple[Cursor, Cursor] | None = None

    def load(self, user: int, request: int | None) -> list[Shown]:
        if self._cursors is None:
            self._cursors = self._db.cursor(self._shown, REQUEST_BYTES), self._db.cursor(self._shown)
        if request is None:
            found = self._cursors[1].beginning_with(key_of(user))
        else:
            found = self._cursors[0].beginning_with(key_of(user, request))
        return [self._unpack(raw) for _, raw in found]

    def order(self, first: int, end: int) -> Iterable[tuple[int, int, int, int]]:
        for key, raw in self._db.items(self._order, key_of(first)):
            (number,) = numbers_of(key)
            if number >= end:
                break
            ts, user, request = numbers_of(raw)
            yield number, ts, user, request

    def let_go(self) -> None:
        """Of the store as it was at the last commit: RocksDB could not be closed, or opened anew, meanwhile."""
        self._cursors = None


def _hash(text: str) -> bytes:
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))
