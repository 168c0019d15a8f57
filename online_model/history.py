"""What is known of a user as of any moment that a row may be made for: the last actions, and counts of them.

The state is HISTORY_BYTES opaque bytes (HISTORY_DTYPE) that all rows of an impression share. It travels in rows,
blocks, the user's row and versions: a replica scores with the joiner's own. docs/architecture.md, "The user's state".
"""

from __future__ import annotations

import struct
from enum import IntEnum
from functools import lru_cache

import numpy as np
import xxhash


class Kind(IntEnum):
    """What a user did with an item. 0: nothing."""

    CLICK = 1
    WATCH = 2
    CART = 3
    FAVOURITE = 4
    PURCHASE = 5


RECENT, INTENT = 14, 6  # entries of the two lists: clicks and watches; carts, favourites and purchases
HISTORY = RECENT + INTENT  # items that travel with a row
HORIZONS_S = (3_600, 86_400, 604_800)  # an hour, a day, a week …
PANES = 4  # … each in so many panes
COUNTED = ("click", "watch", "intent", "purchase")  # intent: cart and favourite
PANE_S = tuple(horizon // PANES for horizon in HORIZONS_S)
MAX_SECOND = (1 << 32) - 1  # in 2106: what comes later is as if it were then

ENTRY_DTYPE = np.dtype([("item", "<i8"), ("second", "<u4"), ("kind", "u1")])  # of seconds since 1970 UTC; item 0: none
HISTORY_DTYPE = np.dtype([
    ("recent", ENTRY_DTYPE, (RECENT,)),  # newest first
    ("intent", ENTRY_DTYPE, (INTENT,)),
    ("newest", "<u4"),  # the largest second: the newest pane of a horizon is newest // its PANE_S
    ("counts", "<u2", (len(HORIZONS_S), PANES, len(COUNTED))),  # pane p stands in slot p % PANES
])  # fmt: skip
HISTORY_BYTES = HISTORY_DTYPE.itemsize
EMPTY = bytes(HISTORY_BYTES)

_ENTRY, _SECOND = struct.Struct("<qIB"), struct.Struct("<I")
_KIND = 12  # where the kind stands in an entry
_NEWEST, _COUNTS = HISTORY_DTYPE.fields["newest"][1], HISTORY_DTYPE.fields["counts"][1]  # type: ignore[index]
_PANE = 2 * len(COUNTED)  # bytes
# Of a horizon: a pane's seconds, where its panes begin.
_PANES = tuple((width, _COUNTS + i * PANES * _PANE) for i, width in enumerate(PANE_S))
_RECENT_ENDS = RECENT * _ENTRY.size
# By kind: where its list begins and ends, its counter's place in a pane.
_PLACES = (
    (0, 0, 0), (0, _RECENT_ENDS, 0), (0, _RECENT_ENDS, 2),
    (_RECENT_ENDS, _NEWEST, 4), (_RECENT_ENDS, _NEWEST, 4), (_RECENT_ENDS, _NEWEST, 6),
)  # fmt: skip


def history_hash(state: bytes | np.ndarray) -> int:
    """Signed xxh3 64-bit hash of a state, bytes or uint8 [HISTORY_BYTES]: the `feature_hash` of an impression."""
    if isinstance(state, np.ndarray):
        state = state.tobytes()
    return (xxhash.xxh3_64_intdigest(state) + (1 << 63)) % (1 << 64) - (1 << 63)


def as_array(states: list[bytes]) -> np.ndarray:
    """uint8 [n, HISTORY_BYTES] of n states; read-only."""
    return np.frombuffer(b"".join(states), np.uint8).reshape(-1, HISTORY_BYTES)


def unpack(states: np.ndarray) -> np.ndarray:
    """uint8 [n, HISTORY_BYTES] → HISTORY_DTYPE [n], the same memory where it is contiguous."""
    return np.ascontiguousarray(states).view(HISTORY_DTYPE)[:, 0]


def entry_items(states: np.ndarray) -> np.ndarray:
    """Ids of the entries of states uint8 [n, HISTORY_BYTES]: int64 [n, HISTORY], the recent ones and then those of
    intent, newest first, 0 none."""
    state = unpack(states)
    return np.concatenate((state["recent"]["item"], state["intent"]["item"]), axis=1, dtype=np.int64)


class UserHistory:
    """The actions of one user in the order they came, late ones included.

    The state as of t is what the actions with ts < t make, in the order they came, and nothing else: no clock moves it.
    Two states are all it takes: actions come in the order of time and the late ones are older than any moment still to
    be asked for, so a moment is either after the newest `ts` or equal to it.
    """

    __slots__ = ("_before", "_latest", "_ts")

    def __init__(self, latest: bytes = EMPTY, before: bytes = EMPTY, ts: int = -1) -> None:
        self._latest = latest
        self._before = before  # only of actions with ts < _ts
        self._ts = ts  # the largest so far, ms

    def push(self, item: int, ts: int, kind: int) -> None:
        """Add what was done (Kind) with `item` (feature id) at `ts` (ms)."""
        second = min(ts // 1000, MAX_SECOND)
        latest = self._latest
        if ts > self._ts:
            self._ts, self._before = ts, latest
        elif ts < self._ts:
            self._before = _after(self._before, item, second, kind)
        self._latest = _after(latest, item, second, kind)

    def latest(self) -> bytes:
        """The state of all actions so far."""
        return self._latest

    def as_of(self, ts: int) -> bytes:
        """The state of the actions with strictly smaller ts. ValueError for a moment before the newest ts."""
        if ts > self._ts:
            return self._latest
        if ts == self._ts:
            return self._before
        raise ValueError(f"no history is kept as of {ts}: the user's newest event is at {self._ts}")

    def to_bytes(self) -> bytes:
        """2 · HISTORY_BYTES + 8 bytes for `from_bytes`."""
        return self._latest + self._before + self._ts.to_bytes(8, "little", signed=True)

    @staticmethod
    def from_bytes(raw: bytes) -> UserHistory:
        before, ts = HISTORY_BYTES, 2 * HISTORY_BYTES
        return UserHistory(raw[:before], raw[before:ts], int.from_bytes(raw[ts:], "little", signed=True))


def _after(state: bytes, item: int, second: int, kind: int) -> bytes:
    """The state after one action more. It runs for every action of the stream: about 1.5 µs."""
    start, end, counter = _PLACES[kind]
    new = bytearray(state)
    entry = _ENTRY.pack(item, second, kind)
    if state[start + _KIND] != kind or not state.startswith(entry[:8], start):
        new[start + _ENTRY.size : end] = state[start : end - _ENTRY.size]
        new[start : start + _ENTRY.size] = entry
    (newest,) = _SECOND.unpack_from(state, _NEWEST)
    if second > newest:
        _SECOND.pack_into(new, _NEWEST, second)
        if second // PANE_S[0] > newest // PANE_S[0]:  # else the wider panes are the same too
            _begin_panes(new, newest, second)
    if second >= newest:
        slots = _newest_slots(second // PANE_S[0])
    else:
        slots = [
            at + second // width % PANES * _PANE
            for width, at in _PANES
            if newest // width - second // width < PANES
        ]  # fmt: skip
    for at in slots:
        at += counter
        if new[at] < 255:
            new[at] += 1
        elif new[at + 1] < 255:  # uint16: a pane counts no further
            new[at], new[at + 1] = 0, new[at + 1] + 1
    return bytes(new)


@lru_cache(maxsize=64)
def _newest_slots(pane: int) -> list[int]:
    """Where the pane of each horizon stands while the narrowest is at `pane`: its width divides the others'."""
    return [at + pane * PANE_S[0] // width % PANES * _PANE for width, at in _PANES]


def _begin_panes(state: bytearray, newest: int, second: int) -> None:
    """Time goes on from `newest` to `second`: empties the panes that begin, in the slots of those that are over."""
    for width, at in _PANES:
        pane = second // width
        for begun in range(max(newest // width, pane - PANES) + 1, pane + 1):
            slot = at + begun % PANES * _PANE
            state[slot : slot + _PANE] = bytes(_PANE)
