"""What a joiner remembers, in pieces that a store can write one by one. No RocksDB in here.

Everything is bounded by `open_ms` and held in memory, but for two maps that outlive it: the users' histories and the
purchase windows. These the joiner sees through `KeyedState` only: dictionaries when there is nothing to survive,
caches over RocksDB in the worker (streams/join_store.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypeVar

from msgspec import Struct

from online_model.examples import Counts
from online_model.history import UserHistory
from streams.events import Action, Impression

NEVER = -(1 << 63)  # the watermark before the first event

K = TypeVar("K", contravariant=True)
V = TypeVar("V")
Pair = tuple[int, int]  # feature ids of (user, item)


class Shown(Struct, array_like=True, gc=False):
    """An impression whose examples are open. Tuples (the garbage collector skips them) have an entry per example."""

    number: int  # counts the impressions of the partition: in order of (ts, event_id)
    user: int  # feature id
    request: str
    ts: int  # ms
    scenario: int  # index in SCENARIOS
    history: bytes  # packed, as of ts
    items: tuple[str | int, ...]  # as they came
    ids: tuple[int, ...]  # their feature ids, each once
    positions: tuple[int, ...] | None
    propensities: tuple[float, ...] | None
    clicked: int = 0  # bit i: the example i
    plays: dict[int, tuple[int, int, int]] | None = None  # example → longest play_ms, its duration_ms, when it is due


class Window(Struct, array_like=True, gc=False):
    """The last click of a user on an item, and what a purchase would make a row from. At most 512 bytes packed."""

    clicked: int  # time of the click, ms
    row_id: int  # of the row PURCHASE
    example_id: int
    source: int
    ts: int  # of the example, ms
    scenario: int
    position: int
    propensity: float | None
    history: bytes
    bought: bool = False


# An event held for disorder: ts, event_id as text, offset, the event, its record's value.
Held: TypeAlias = tuple[int, str, int, Impression | Action, bytes]


class KeyedState(Protocol[K, V]):
    """A map that may be larger than memory. A value that was changed in place must be `put` again."""

    def get(self, key: K, /) -> V | None: ...

    def put(self, key: K, value: V, /) -> None: ...


class Windows(KeyedState[Pair, Window], Protocol):
    """The purchase windows."""

    def forget(self, before: int) -> None:
        """No window whose click is older than `before` (ms) will be asked for again: they may go."""


class MemoryHistories(dict[int, UserHistory]):
    """All users in a dictionary: for one process with nothing to survive."""

    put = dict.__setitem__


class MemoryWindows(dict[Pair, Window]):
    """All purchase windows in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self._clicks: deque[tuple[int, Pair]] = deque()

    def put(self, key: Pair, value: Window) -> None:
        self._clicks.append((value.clicked, key))
        self[key] = value

    def forget(self, before: int) -> None:
        clicks = self._clicks
        while clicks and clicks[0][0] < before:
            key = clicks.popleft()[1]
            if key in self and self[key].clicked < before:
                del self[key]


class Seen:
    """The event ids that would be duplicates, in chunks (one a call of `process`) that are forgotten whole."""

    def __init__(self) -> None:
        self.first: dict[str, int] = {}  # event id → ts of its first record
        self._chunks: deque[tuple[int, list[str]]] = deque()  # largest ts, ids

    def add(self, chunk: dict[str, int]) -> None:
        """Notes a chunk of id → ts; an id of an earlier chunk had expired before it came again."""
        self.first.update(chunk)
        if chunk:
            self._chunks.append((max(chunk.values()), list(chunk)))

    def forget(self, before: int) -> int:
        """Drops the oldest chunks while all of their ids are older than `before` (ms). Returns how many."""
        dropped, first = 0, self.first
        while self._chunks and self._chunks[0][0] < before:
            for event_id in self._chunks.popleft()[1]:
                if first.get(event_id, before) < before:
                    del first[event_id]
            dropped += 1
        return dropped


@dataclass
class JoinState:
    """All that a joiner knows beside its settings and its next offset."""

    histories: KeyedState[int, UserHistory] = field(default_factory=MemoryHistories)
    windows: Windows = field(default_factory=MemoryWindows)
    watermark: int = NEVER
    number: int = 0  # of the next impression
    counts: Counts = field(default_factory=Counts)
    held: list[Held] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    shown: list[Shown] = field(default_factory=list)  # by number


@dataclass
class Changes:
    """What one call of `process` changed beside histories and windows, and what was there before it."""

    from_offset: int  # held events below it were there before
    first_number: int  # impressions below it were there before
    next_number: int = 0  # of the next impression, after it
    seen: dict[str, int] = field(default_factory=dict)  # a new chunk
    chunks_dropped: int = 0  # of seen ids, the oldest
    held: list[Held] = field(default_factory=list)  # new and still held
    released: list[int] = field(default_factory=list)  # offsets that were there before
    shown: dict[int, Shown] = field(default_factory=dict)  # opened or changed, and still open, by number
    closed: list[int] = field(default_factory=list)  # numbers that were there before
