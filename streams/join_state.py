"""What a joiner remembers, in pieces that a store can write one by one. No RocksDB in here.

What can grow with the traffic is seen through small interfaces: dictionaries where there is nothing to survive and
memory is no concern, caches over RocksDB in the worker (streams/join_caches.py). The open impressions are in
streams/open_impressions.py.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Protocol, TypeAlias, TypeVar

from msgspec import Struct

from online_model.examples import Counts
from online_model.history import UserHistory
from streams.events import Action, Forget, Impression

NEVER = -(1 << 63)  # the watermark before the first event
FOREVER = 1 << 62

K = TypeVar("K", contravariant=True)
V = TypeVar("V")
Pair = tuple[int, int]  # feature ids of (user, item)
Due = tuple[int, int, int, int]  # ms, user, and what: the order of timers


class Shown(Struct, array_like=True, gc=False):
    """An impression whose examples are open. Tuples (the garbage collector skips them) have an entry per example."""

    number: int  # counts the impressions of the partition: in order of (ts, event_id)
    user: int  # feature id
    request: int  # request_name
    ts: int  # ms
    scenario: int  # index in SCENARIOS
    history: bytes  # packed, as of ts
    items: tuple[str | int, ...]  # as they came
    ids: tuple[int, ...]  # their feature ids, each once
    positions: tuple[int, ...] | None
    propensities: tuple[float, ...] | None
    query: bytes  # what was searched for: the ids of its words, int64 [QUERY_WORDS]; empty: nothing
    clicked: tuple[int, ...] = ()  # which examples
    plays: dict[int, tuple[int, int, int]] | None = None  # example → longest play_ms, its duration_ms, when it is due


class Window(Struct, array_like=True, gc=False):
    """The last click of a user on an item, and what a purchase would make a row from. At most 512 bytes on disk."""

    clicked: int  # time of the last click on the example, ms
    first: int  # of the first one
    name: int  # of the example, beside its item
    source: int
    ts: int  # of the example, ms
    scenario: int
    position: int
    propensity: float | None
    history: bytes
    query: bytes  # as in Shown
    bought: bool = False
    due: int = 0  # ms: when it is NOT_BOUGHT; 0: it has been said whether it was bought
    noted: int = -1  # its store's


# An event held for disorder: ts, event_id as text, offset, the event, its record's value, feature id of its user.
Held: TypeAlias = tuple[int, str, int, Impression | Action | Forget, bytes, int]


class KeyedState(Protocol[K, V]):
    """A map that may be larger than memory. A value that was changed in place must be `put` again."""

    def get(self, key: K, /) -> V | None: ...

    def put(self, key: K, value: V, /) -> None: ...

    def remove(self, key: K, /) -> None:
        """Nothing of it may stay. It need not be there."""

    def fetch(self, keys: Iterable[K], /) -> None:
        """These will be asked for: all at once is cheaper."""


class Windows(KeyedState[Pair, Window], Protocol):
    """The purchase windows."""

    def forget(self, before: int) -> None:
        """No window whose click is older than `before` (ms) will be asked for again: they may go."""

    def of_user(self, user: int) -> list[tuple[Pair, Window]]:
        """All that a user has."""


class SeenIds(Protocol):
    """The event ids that would be duplicates, each with the ts of its first record."""

    def find(self, ids: list[str], now: int) -> dict[str, int]:
        """Those of `ids` that were added, with their ts (ms); none younger than what `forget(now)` keeps is missing."""

    def add(self, chunk: dict[str, int]) -> None:
        """Notes id → ts; an id that is there already had expired before it came again."""

    def forget(self, before: int) -> None:
        """Ids whose ts is older than `before` (ms) may go."""


class Timers(Protocol):
    """What is due when, in order of (ms, user, what); each carries a few bytes."""

    def put(self, due: Due, value: bytes = b"") -> None: ...

    def remove(self, due: Due) -> None:
        """It need not be there."""

    def peek(self, limit: int) -> int:
        """When the first that is due before `limit` is due; FOREVER if there is none."""

    def pop(self) -> tuple[Due, bytes]:
        """Takes out the one that `peek` saw."""


class MemoryHistories(dict[int, UserHistory]):
    """All users in a dictionary: for one process with nothing to survive."""

    put = dict.__setitem__

    def remove(self, key: int) -> None:
        self.pop(key, None)

    def fetch(self, keys: Iterable[int]) -> None:
        """All are here."""


class MemoryWindows(dict[Pair, Window]):
    """All purchase windows in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self._clicks: deque[tuple[int, Pair]] = deque()

    def put(self, key: Pair, value: Window) -> None:
        self._clicks.append((value.clicked, key))
        self[key] = value

    def remove(self, key: Pair) -> None:
        self.pop(key, None)

    def fetch(self, keys: Iterable[Pair]) -> None:
        """All are here."""

    def of_user(self, user: int) -> list[tuple[Pair, Window]]:
        return [(pair, window) for pair, window in self.items() if pair[0] == user]

    def forget(self, before: int) -> None:
        clicks = self._clicks
        while clicks and clicks[0][0] < before:
            key = clicks.popleft()[1]
            if key in self and self[key].clicked < before:
                del self[key]


class MemorySeen:
    """All ids in a dictionary, in chunks that are forgotten whole."""

    def __init__(self) -> None:
        self.first: dict[str, int] = {}  # event id → ts of its first record
        self.chunks: deque[tuple[int, list[str]]] = deque()  # largest ts, ids

    def find(self, ids: list[str], now: int) -> dict[str, int]:
        first = self.first
        return {i: first[i] for i in ids if i in first}

    def add(self, chunk: dict[str, int]) -> None:
        self.first.update(chunk)
        if chunk:
            self.chunks.append((max(chunk.values()), list(chunk)))

    def forget(self, before: int) -> None:
        while self.chunks and self.chunks[0][0] < before:
            self.drop(before)

    def drop(self, before: int = FOREVER) -> dict[str, int]:
        """Takes out the oldest chunk, but for those of its ids that came again since. Returns what went."""
        first, gone = self.first, {}
        for event_id in self.chunks.popleft()[1]:
            ts = first.get(event_id)
            if ts is not None and ts < before:
                gone[event_id] = first.pop(event_id)
        return gone


class MemoryTimers:
    """All timers in memory."""

    def __init__(self) -> None:
        self._heap: list[Due] = []
        self._values: dict[Due, bytes] = {}  # of those that were not removed

    def put(self, due: Due, value: bytes = b"") -> None:
        if due not in self._values:
            heappush(self._heap, due)
        self._values[due] = value

    def remove(self, due: Due) -> None:
        self._values.pop(due, None)

    def peek(self, limit: int) -> int:
        heap = self._heap
        while heap and heap[0][0] < limit:
            if heap[0] in self._values:
                return heap[0][0]
            heappop(heap)
        return FOREVER

    def pop(self) -> tuple[Due, bytes]:
        due = heappop(self._heap)
        return due, self._values.pop(due)


class Aside(Protocol):
    """Open impressions that are not in memory."""

    def load(self, user: int, request: int | None) -> list[Shown]:
        """All that a user has, or has of a request."""

    def order(self, first: int, end: int) -> Iterable[tuple[int, int, int, int]]:
        """(number, ts, user, request) of the impressions that are not closed, for numbers in [first, end)."""


class NothingAside:
    """Everything is in memory."""

    def load(self, user: int, request: int | None) -> list[Shown]:
        return []

    def order(self, first: int, end: int) -> Iterable[tuple[int, int, int, int]]:
        return itertools.repeat((0, 0, 0, 0), 0)


@dataclass
class Numbers:
    """The impressions of the partition are numbered; three numbers say how far they are. first ≤ waiting ≤ next."""

    first: int = 0  # all below are closed
    waiting: int = 0  # of all below the wait is over
    next: int = 0  # of the next impression


@dataclass
class JoinState:
    """All that a joiner knows beside its settings and its next offset."""

    histories: KeyedState[int, UserHistory] = field(default_factory=MemoryHistories)
    windows: Windows = field(default_factory=MemoryWindows)
    seen: SeenIds = field(default_factory=MemorySeen)
    plays: Timers = field(default_factory=MemoryTimers)  # (due, user, number, place) of watches, each with the request
    unbought: Timers = field(default_factory=MemoryTimers)  # (due, user, item, 0), each with the item as it came
    aside: Aside = field(default_factory=NothingAside)
    numbers: Numbers = field(default_factory=Numbers)
    watermark: int = NEVER
    counts: Counts = field(default_factory=Counts)
    held: list[Held] = field(default_factory=list)
    forgotten: dict[int, int] = field(default_factory=dict)  # user → ms: nothing from before is to be known


@dataclass
class Changes:
    """What one call of `process` changed, beside what the state's own maps and timers note, and what was there before
    it."""

    from_offset: int  # held events below it were there before
    before: Numbers
    numbers: Numbers  # after it
    forgotten: dict[int, int]  # as in JoinState, after it
    seen: dict[str, int] = field(default_factory=dict)  # new ids
    held: list[Held] = field(default_factory=list)  # new and still held
    released: list[int] = field(default_factory=list)  # offsets that were there before
    shown: dict[int, Shown] = field(default_factory=dict)  # opened or changed, and still open, by number
    opened: list[tuple[int, int, int, int]] = field(default_factory=list)  # (number, ts, user, request), closed or not
    closed: list[tuple[int, int, int]] = field(default_factory=list)  # (user, request, number), were there before
    erased: bool = False  # a user was forgotten: what is overwritten or deleted must leave the disk as well
