"""A user's history: the last items acted on, as of any moment that a row may be made for.

HISTORY item ids, newest first, padded with 0, packed in 160 bytes that all rows of an impression share.
"""

from __future__ import annotations

import sys

import numpy as np
import xxhash

from online_model.examples import HISTORY

BYTES = HISTORY * 8  # a packed history: HISTORY little-endian int64
EMPTY = bytes(BYTES)
assert sys.byteorder == "little", "packed histories are read as native int64"


def history_hash(history: bytes | np.ndarray) -> int:
    """Signed xxh3 64-bit hash of a history [HISTORY] int64: what `feature_hash` of an impression carries."""
    if isinstance(history, np.ndarray):
        history = np.ascontiguousarray(history, np.int64).tobytes()
    return (xxhash.xxh3_64_intdigest(history) + (1 << 63)) % (1 << 64) - (1 << 63)


def as_array(packed: list[bytes]) -> np.ndarray:
    """int64 [n, HISTORY] of n packed histories; read-only."""
    return np.frombuffer(b"".join(packed), np.int64).reshape(-1, HISTORY)


class UserHistory:
    """The items of one user in the order they came, late ones included.

    Two packed histories are all it takes: events come in the order of time and the late ones are older than any
    moment still to be asked for, so a moment is either after the newest `ts` or equal to it.
    """

    __slots__ = ("_before", "_latest", "_ts")

    def __init__(self, latest: bytes = EMPTY, before: bytes = EMPTY, ts: int = -1) -> None:
        self._latest = latest
        self._before = before  # only of entries with ts < _ts
        self._ts = ts  # the largest so far, ms

    def push(self, item: int, ts: int) -> bool:
        """Add `item` (feature id) acted on at `ts` (ms). False, and no change, if it is the newest entry already."""
        packed = item.to_bytes(8, "little", signed=True)
        latest = self._latest
        if latest.startswith(packed):
            return False
        if ts > self._ts:
            self._ts, self._before = ts, latest
        elif ts < self._ts:
            self._before = packed + self._before[:-8]
        self._latest = packed + latest[:-8]
        return True

    def latest(self) -> bytes:
        """The newest HISTORY items, packed."""
        return self._latest

    def as_of(self, ts: int) -> bytes:
        """The newest HISTORY items with strictly smaller ts, packed. ValueError for a moment before the newest ts."""
        if ts > self._ts:
            return self._latest
        if ts == self._ts:
            return self._before
        raise ValueError(f"no history is kept as of {ts}: the user's newest event is at {self._ts}")

    def to_bytes(self) -> bytes:
        """328 bytes for `from_bytes`."""
        return self._latest + self._before + self._ts.to_bytes(8, "little", signed=True)

    @staticmethod
    def from_bytes(raw: bytes) -> UserHistory:
        return UserHistory(raw[:BYTES], raw[BYTES : 2 * BYTES], int.from_bytes(raw[2 * BYTES :], "little", signed=True))
