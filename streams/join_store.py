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

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from embedding_store.errors import PositionError, StoreError, UsageError
from embedding_store.ids import feature_id
from embedding_store.rocks import AT, FIRST, Batch, keys_of, open_db
from online_model.examples import Counts
from online_model.history import UserHistory
from streams.dead_letters import DeadLetter
from streams.events import Tick, decode
from streams.join_caches import (
    REQUEST_BYTES,
    AsideStore,
    Cache,
    SeenCache,
    TimerCache,
    WindowCache,
    key_of,
    numbers_of,
)
from streams.join_state import Held, JoinState, Numbers
from streams.joiner import Joined, JoinSettings

FORMAT = 6
CACHED = 50_000  # event ids, histories and purchase windows in memory: together about 60 MB
MEMORY_BYTES = 64 << 20  # of RocksDB

META, HELD, SHOWN, ORDER, SEEN, OLD_SEEN = "meta", "held", "shown", "order", "seen", "old_seen"
HISTORIES, WINDOWS, CLICKS, PLAYS, UNBOUGHT = "histories", "windows", "clicks", "plays", "unbought"
FAMILIES = [META, HELD, SHOWN, ORDER, SEEN, OLD_SEEN, HISTORIES, WINDOWS, CLICKS, PLAYS, UNBOUGHT]

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode


class _Made(Struct):
    """What the store was made with."""

    format: int
    settings: JoinSettings


class _Head(Struct):
    next_offset: int
    watermark: int
    numbers: Numbers
    counts: Counts
    forgotten: dict[int, int]
    erased: bool  # since the files were rewritten last
    chunks: tuple[int, int]  # [first, next) of the family "seen"
    generations: list[int]  # in the family "old_seen"


class JoinStore:
    """The store at `path`, made where it is missing. With `sync` a commit outlives a power cut, not only a kill -9.

    `cached`: how many event ids, histories and purchase windows each are kept in memory.
    `next_offset`: of the last commit; None if there was none. Raises UsageError if it was made with other settings,
    StoreLocked if another worker has it, StoreError (also where it is damaged).
    """

    def __init__(self, path: Path | str, settings: JoinSettings, sync: bool = False, cached: int = CACHED) -> None:
        self.path, self._sync = Path(path), sync
        self._db = db = open_db(path, FAMILIES, memory=MEMORY_BYTES, by_prefix={SHOWN: REQUEST_BYTES})
        self._histories = Cache(db, HISTORIES, UserHistory.to_bytes, UserHistory.from_bytes, cached)
        self._windows = WindowCache(db, WINDOWS, CLICKS, cached)
        self._seen = SeenCache(db, SEEN, OLD_SEEN, settings.open_ms, cached)
        self._plays, self._unbought = TimerCache(db, PLAYS), TimerCache(db, UNBOUGHT)
        self._aside = AsideStore(db, SHOWN, ORDER)
        self._erasures = self._purged = 0  # commits with users forgotten; those before which the files were rewritten
        try:
            self._check(settings)
            raw = self._db.get(META, b"head")
            self._head = _decode(raw, type=_Head) if raw else None
            self._check_commits()
            self._erasures = int(self._head is not None and self._head.erased)
        except (UsageError, StoreError):
            self._db.close()
            raise

    @property
    def next_offset(self) -> int | None:
        return self._head.next_offset if self._head else None

    @property
    def memory_bytes(self) -> int:
        """As of `Db`."""
        return self._db.memory_bytes

    def state(self) -> JoinState:
        """What a Joiner at `next_offset` goes on with. For one joiner: it shares the caches."""
        state = JoinState(
            self._histories, self._windows, self._seen, self._plays, self._unbought, self._aside,
        )  # fmt: skip
        head = self._head
        if head is None:
            return state
        self._seen.restore(head.chunks, head.generations)
        state.numbers, state.watermark = replace(head.numbers), head.watermark
        state.counts, state.forgotten = replace(head.counts), dict(head.forgotten)
        state.held = [_held(numbers_of(key)[0], raw) for key, raw in self._db.items(HELD, FIRST)]
        return state

    def outbox(self) -> list[bytes | DeadLetter]:
        """What the last commit wanted sent, as it was given."""
        raw = self._db.get(META, b"outbox")
        return _decode(raw, type=list[bytes | DeadLetter]) if raw else []

    def commit(self, joined: Joined, outbox: Sequence[bytes | DeadLetter]) -> None:
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
        before, numbers = changes.before, changes.numbers
        self._aside.let_go()
        batch = self._db.batch()
        self._seen.write(batch)
        for piece in (self._histories, self._windows, self._plays, self._unbought):
            piece.write(batch)
        held = sorted((held[2], held[4]) for held in changes.held)
        _write(batch, HELD, [offset for offset, _ in held], [raw for _, raw in held], changes.released)
        shown = sorted(changes.shown.values(), key=attrgetter("user", "request", "number"))
        places = [(s.user, s.request, s.number) for s in shown]
        _write(batch, SHOWN, places, [_encode(s) for s in shown], changes.closed)
        opened = keys_of([(ts, user, request) for _, ts, user, request in changes.opened])
        _write(batch, ORDER, [number for number, *_ in changes.opened], opened, [])
        if numbers.first > before.first:
            batch.delete_range(ORDER, key_of(before.first), key_of(numbers.first))
        erasures = self._erasures + changes.erased
        head = _Head(
            block.to_offset, block.watermark, replace(numbers), block.counts, dict(changes.forgotten),
            erasures > self._purged,
            *self._seen.written,
        )  # fmt: skip
        batch.put_all(META, [b"head", b"outbox"], [_encode(head), _encode(outbox)])
        for family in FAMILIES[1:]:
            batch.into(family)[AT] = key_of(block.to_offset)
        self._db.write(batch, self._sync)
        self._head = head
        self._erasures = erasures
        for part in (self._histories, self._windows, self._seen, self._plays, self._unbought):
            part.saved()

    def purge(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Rewrites the files, if users were forgotten: what was known of them leaves the disk too. False: none was,
        or `stop` said so before the end; it is then still to be done, also after a restart.

        Commits may go on meanwhile, in another thread.
        """
        erasures = self._erasures
        if erasures == self._purged:
            return False
        for family in FAMILIES:
            if stop():
                return False
            self._db.compact(family)
        self._purged = erasures
        return True

    def scan(self) -> None:
        """Reads all of it: `Db.scan`. Raises StoreError where it is damaged."""
        self._db.scan(FAMILIES)

    def checkpoint(self, path: Path) -> None:
        """A copy as of the last commit as the new directory `path` on the same file system: hard links."""
        self._db.checkpoint(path)

    def close(self) -> None:
        """Lets go of the store. Idempotent."""
        self._aside.let_go()
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
            raise _other_format(self.path, found["format"])
        wanted = msgspec.to_builtins(settings)
        differing = [f"{k} = {found['settings'].get(k)}" for k in wanted if found["settings"].get(k) != wanted[k]]
        if differing:
            raise UsageError(
                f"the join store {self.path} was made with [join] {', '.join(differing)}: set it so, or choose another "
                f"data directory and join the log again"
            )

    def _check_commits(self) -> None:
        """That all families are at one commit: of a list of files that ends too early RocksDB takes what it has."""
        for family in FAMILIES[1:]:
            raw = self._db.get(family, AT)
            at = numbers_of(raw)[0] if raw else None
            if at != self.next_offset:
                raise StoreError(
                    f"the join store {self.path} is damaged: {family!r} is at offset {at}, the rest at "
                    f"{self.next_offset}: go back to a copy of it, or delete it to go on from a snapshot"
                )


def head_of(path: Path) -> dict[str, Any]:
    """JSON-ready: where the store at `path` is, and its balance; no rows, no ids. Also beside a worker that has it.

    Raises StoreError where it cannot be read, UsageError where another version made it.
    """
    db = open_db(path, FAMILIES, read_only=True)
    try:
        made, raw = db.get(META, b"made"), db.get(META, b"head")
        found = _decode(made)["format"] if made else FORMAT
        if found != FORMAT:
            raise _other_format(path, found)
        if raw is None:
            return {"next_offset": None}
        head = _decode(raw, type=_Head)
        return {"next_offset": head.next_offset, "watermark_ms": head.watermark, "counts": asdict(head.counts)}
    finally:
        db.close()


def _other_format(path: Path, found: int) -> UsageError:
    return UsageError(
        f"the join store {path} has format {found}, this version reads {FORMAT}: run the version that made it, or "
        "choose another data directory and join the log again"
    )


def _write(batch: Batch, family: str, order: list, values: list[bytes], deletes: list) -> None:
    """Puts `values` under the keys of the numbers in `order`, ascending, and deletes those of `deletes`."""
    batch.put_all(family, keys_of(order), values)
    writer = batch.into(family)
    for key in keys_of(sorted(deletes)):
        del writer[key]


def _held(offset: int, raw: bytes) -> Held:
    event = decode(raw)
    assert not isinstance(event, Tick), "a tick is not held"
    return event.ts, str(event.event_id), offset, event, raw, feature_id("user", event.user)
