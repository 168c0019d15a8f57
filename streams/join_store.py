"""A joiner's store: one RocksDB per partition, written once a batch, all or nothing.

    store = JoinStore(path, settings)
    joiner = Joiner(settings, partition, store.next_offset, store.state())
    joined = joiner.process(records)
    outbox = [encode_block(joined.block), *joined.dead]
    store.commit(joined, outbox)       # then send the outbox; only then join the next batch

After a crash the joiner goes on exactly where the last commit was, and `outbox()` has what that commit wanted sent:
send it again where it is not known to have arrived. Only what a batch changed is written. Histories and purchase
windows are read one by one through bounded caches, the rest is read when the store is opened.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from embedding_store.errors import PositionError, StoreError, UsageError
from embedding_store.rocks import Batch, Db, open_db
from online_model.examples import Counts
from online_model.history import UserHistory
from streams.events import decode
from streams.join_state import NEVER, Changes, Held, JoinState, Pair, Seen, Shown, Window
from streams.joiner import Joined, JoinSettings

FORMAT = 1
CACHED = 50_000  # histories, and purchase windows, in memory: about 30 MB each
CHUNKS_A_COMMIT = 4  # of ended purchase windows that a commit deletes; one commit adds at most one

META, HELD, SHOWN, SEEN, HISTORIES, WINDOWS, CLICKS = "meta", "held", "shown", "seen", "histories", "windows", "clicks"

V = TypeVar("V")
_UNREAD: Any = object()
_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode


def _key(number: int) -> bytes:
    """Sorts as the number does."""
    return number.to_bytes(8, "big")


class _Made(Struct):
    """What the store was made with."""

    format: int
    settings: JoinSettings


class _Head(Struct):
    next_offset: int
    watermark: int
    number: int
    counts: Counts
    chunks: tuple[int, int]  # [first, next) of the family "seen"
    clicks: tuple[int, int]  # the same of "clicks"


class _Cache(Generic[V]):
    """A family as a map of integers, or pairs of them, to objects. What was put stays in memory until `saved`."""

    def __init__(
        self, db: Db, family: str, pack: Callable[[V], bytes], unpack: Callable[[bytes], V], size: int
    ) -> None:
        self._db, self._family, self._pack, self._unpack, self._size = db, family, pack, unpack, size
        self._kept: dict[Any, V | None] = {}  # None: not there either. The last one used is at the end
        self._dirty: dict[Any, V] = {}

    def get(self, key: int | Pair, /) -> V | None:
        kept = self._kept
        value = kept.pop(key, _UNREAD)
        if value is _UNREAD:
            raw = self._db.get(self._family, _pack_key(key))
            value = None if raw is None else self._unpack(raw)
        kept[key] = value
        return value

    def put(self, key: int | Pair, value: V, /) -> None:
        self._kept.pop(key, None)
        self._kept[key] = self._dirty[key] = value

    def changed(self) -> list[int | Pair]:
        """The keys that are to be written."""
        return list(self._dirty)

    def write(self, batch: Batch) -> None:
        """All that was put since `saved` into the batch."""
        rows = sorted((_pack_key(key), self._pack(value)) for key, value in self._dirty.items())
        batch.put_all(self._family, [key for key, _ in rows], [value for _, value in rows])

    def saved(self) -> None:
        """What was put is in the database: it may leave the memory."""
        self._dirty.clear()
        if len(self._kept) > self._size:
            for key in list(islice(self._kept, len(self._kept) - self._size * 3 // 4)):
                del self._kept[key]


class _Windows(_Cache[Window]):
    """The purchase windows. Each commit notes the windows that it put in a chunk; ended ones go with their chunk."""

    before = 0  # ms; older clicks may go

    def forget(self, before: int) -> None:
        self.before = max(self.before, before)

    def latest_click(self) -> int:
        return max(window.clicked for window in self._dirty.values())

    def ended(self, keys: Iterable[Pair]) -> list[Pair]:
        """Those of `keys` whose windows have ended, out of memory."""
        ended = []
        for key in keys:
            window = self._dirty.get(key) or self.get(key)
            if window is not None and window.clicked < self.before:
                self._kept.pop(key, None)
                self._dirty.pop(key, None)
                ended.append(key)
        return ended


def _pack_key(key: int | Pair) -> bytes:
    return struct.pack(">q", key) if isinstance(key, int) else struct.pack(">qq", *key)


class JoinStore:
    """The store at `path`, made where it is missing. With `sync` a commit outlives a power cut, not only a kill -9.

    `next_offset`: of the last commit; None if there was none. Raises UsageError if it was made with other settings,
    StoreLocked if another worker has it, StoreError.
    """

    def __init__(self, path: Path | str, settings: JoinSettings, sync: bool = False) -> None:
        self.path, self._sync = Path(path), sync
        self._db = open_db(path, [META, HELD, SHOWN, SEEN, HISTORIES, WINDOWS, CLICKS])
        self._histories = _Cache(self._db, HISTORIES, UserHistory.to_bytes, UserHistory.from_bytes, CACHED)
        unpack_window = msgspec.msgpack.Decoder(Window).decode
        self._windows = _Windows(self._db, WINDOWS, _encode, unpack_window, CACHED)
        try:
            self._check(settings)
            raw = self._db.get(META, b"head")
            self._head = _decode(raw, type=_Head) if raw else None
        except (UsageError, StoreError):
            self._db.close()
            raise

    @property
    def next_offset(self) -> int | None:
        return self._head.next_offset if self._head else None

    def state(self) -> JoinState:
        """What a Joiner at `next_offset` goes on with. For one joiner: it shares the caches."""
        state = JoinState(histories=self._histories, windows=self._windows, seen=Seen())
        if self._head is None:
            return state
        state.watermark, state.number = self._head.watermark, self._head.number
        state.counts = replace(self._head.counts)
        unpack_chunk = msgspec.msgpack.Decoder(dict[str, int]).decode
        unpack_shown = msgspec.msgpack.Decoder(Shown).decode
        for _, raw in self._db.items(SEEN):
            state.seen.add(unpack_chunk(raw))
        state.shown = [unpack_shown(raw) for _, raw in self._db.items(SHOWN)]
        state.held = [_held(int.from_bytes(key, "big"), raw) for key, raw in self._db.items(HELD)]
        return state

    def outbox(self) -> list[bytes]:
        """What the last commit wanted sent, as it was given."""
        raw = self._db.get(META, b"outbox")
        return _decode(raw, type=list[bytes]) if raw else []

    def commit(self, joined: Joined, outbox: list[bytes]) -> None:
        """One atomic write of all that `joined` changed, the next offset and the outbox.

        Raises PositionError if `joined` does not follow the last commit. After DiskFull or StoreError nothing of it is
        in the store: commit the same again, or throw the joiner away.
        """
        head, block, changes = self._head, joined.block, joined.changes
        if head is not None and head.next_offset != block.from_offset:
            raise PositionError(
                f"the join store {self.path} is at offset {head.next_offset} where a batch from {block.from_offset} is "
                f"to be committed: open the store and the joiner anew"
            )
        chunks, clicks = (head.chunks, head.clicks) if head else ((0, 0), (0, 0))
        batch = self._db.batch()
        chunks = self._write_seen(batch, changes, chunks)
        clicks = self._write_windows(batch, clicks)
        self._histories.write(batch)
        _write(batch, HELD, {held[2]: held[4] for held in changes.held}, changes.released)
        _write(batch, SHOWN, {number: _encode(shown) for number, shown in changes.shown.items()}, changes.closed)
        head = _Head(block.to_offset, block.watermark, changes.next_number, block.counts, chunks, clicks)
        batch.put_all(META, [b"head", b"outbox"], [_encode(head), _encode(outbox)])
        self._db.write(batch, self._sync)
        self._head = head
        self._histories.saved()
        self._windows.saved()

    def checkpoint(self, path: Path) -> None:
        """A copy as of the last commit as the new directory `path` on the same file system: hard links."""
        self._db.checkpoint(path)

    def close(self) -> None:
        """Lets go of the store. Idempotent."""
        self._db.close()

    def __enter__(self) -> JoinStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check(self, settings: JoinSettings) -> None:
        made = _Made(FORMAT, settings)
        raw = self._db.get(META, b"made")
        if raw is None:
            batch = self._db.batch()
            batch.put_all(META, [b"made"], [_encode(made)])
            self._db.write(batch, sync=True)
            return
        found = _decode(raw)
        if found["format"] != FORMAT:
            raise UsageError(
                f"the join store {self.path} has format {found['format']}, this version reads {FORMAT}: run the "
                f"version that made it, or choose another data directory and join the log again"
            )
        wanted = msgspec.to_builtins(settings)
        differing = [f"{k} = {found['settings'].get(k)}" for k in wanted if found["settings"].get(k) != wanted[k]]
        if differing:
            raise UsageError(
                f"the join store {self.path} was made with [join] {', '.join(differing)}: set it so, or choose another "
                f"data directory and join the log again"
            )

    def _write_seen(self, batch: Batch, changes: Changes, chunks: tuple[int, int]) -> tuple[int, int]:
        first, end = chunks
        new = {}
        if changes.seen:
            new[end] = _encode(changes.seen)
            end += 1
        dropped = range(first, first + changes.chunks_dropped)
        old = [n for n in dropped if n not in new]
        _write(batch, SEEN, {n: raw for n, raw in new.items() if n not in dropped}, old)
        return first + changes.chunks_dropped, end

    def _write_windows(self, batch: Batch, clicks: tuple[int, int]) -> tuple[int, int]:
        """The windows that were put, and the end of the oldest ones."""
        first, end = clicks
        gone: list[int] = []
        ended: set[Pair] = set()
        while first + len(gone) < end and len(gone) < CHUNKS_A_COMMIT:
            raw = self._db.get(CLICKS, _key(first + len(gone)))
            latest, keys = _decode(raw, type=tuple[int, list[Pair]]) if raw else (NEVER, [])
            if latest >= self._windows.before:
                break
            ended.update(self._windows.ended(keys))
            gone.append(first + len(gone))
        delete = batch.into(WINDOWS)
        for pair in sorted(ended):
            del delete[_pack_key(pair)]
        new = {}
        if changed := self._windows.changed():
            new[end] = _encode((self._windows.latest_click(), changed))
            end += 1
        self._windows.write(batch)
        _write(batch, CLICKS, new, gone)
        return first + len(gone), end


def _write(batch: Batch, family: str, puts: dict[int, bytes], deletes: list[int]) -> None:
    batch.put_all(family, map(_key, sorted(puts)), [puts[number] for number in sorted(puts)])
    writer = batch.into(family)
    for number in sorted(deletes):
        del writer[_key(number)]


def _held(offset: int, raw: bytes) -> Held:
    event = decode(raw)
    return event.ts, str(event.event_id), offset, event, raw  # type: ignore[return-value]
