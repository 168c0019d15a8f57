"""What the joiner makes and the trainer learns from: columns of rows, in a block named by its offset range.

An example is (request_id, item). Feedback comes at different times, so an example reaches the trainer in several
parts, each a row with an id of its own and with the features of the moment of the impression (Part).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import IntEnum

import numpy as np
from xxhash import xxh3_64_intdigest

from embedding_store.ids import combine, hash_text
from online_model.history import HISTORY_BYTES

QUERY_WORDS = 4  # of what was searched for, the first so many


class Part(IntEnum):
    """Which feedback a row carries."""

    SHOWN = 0  # clicked within the wait, or not: scored once, before it is learned
    LATE_CLICK = 1  # clicked after it was learned as not clicked
    WATCH = 2  # the longest play
    PURCHASE = 3  # bought after the click
    NOT_BOUGHT = 4  # not bought within `purchase_wait_ms` of the click
    FORGET = 5  # no example: from here on nothing may be known of the user


class Source(IntEnum):
    """Where a row's example comes from."""

    IMPRESSION = 0  # it was shown: a click rate can be claimed
    IMPLICIT = 1  # a log without impressions: a positive; the trainer draws the negatives


def request_name(request_id: str | int) -> int:
    """What names the examples of an impression, beside their items: int64."""
    return hash_text(str(request_id))


def implicit_name(event_id: str | int) -> int:
    """What names the example of an action without an impression, beside its item: int64."""
    return hash_text(f"event:{event_id}")


def forget_name(event_id: str | int) -> int:
    """What names a user's erasure, beside the user: int64."""
    return hash_text(f"forget:{event_id}")


def example_id(name: int, item: int) -> int:
    """The signed 64-bit id of an example, the same in all of its parts. `item`: its feature id."""
    return combine(name, item)


def row_id(example: int, part: int) -> int:
    """The signed 64-bit id of one part of an example: what the balance counts and sums."""
    return combine(example, part)


@dataclass
class Examples:
    """Columns of n rows. Ids are int64 of `embedding_store.ids`; times ms UTC."""

    row_id: np.ndarray  # int64 [n] row_id(example_id, part)
    example_id: np.ndarray  # int64 [n] example_id(name, item): the same in all parts of an example
    part: np.ndarray  # uint8 [n] Part
    source: np.ndarray  # uint8 [n] Source
    ts: np.ndarray  # int64 [n] time of the impression (of the action, where implicit)
    closed: np.ndarray  # int64 [n] event time when the row was complete
    user: np.ndarray  # int64 [n] feature_id("user", …)
    item: np.ndarray  # int64 [n] feature_id("item", …)
    scenario: np.ndarray  # uint8 [n] index in SCENARIOS
    position: np.ndarray  # int16 [n] place on the page, -1 unknown
    propensity: np.ndarray  # float32 [n] probability of having been shown, nan unknown
    rate: np.ndarray  # float32 [n] share of the rows of its kind that are kept: it stands for 1 / rate, a whole number
    click: np.ndarray  # int8 [n] 1, 0, -1 not said by this row
    purchase: np.ndarray  # int8 [n] 1, 0 (so far: the window is still open), -1 not said by this row
    play_ms: np.ndarray  # int64 [n] -1 not said by this row
    duration_ms: np.ndarray  # int64 [n] 0 unknown, -1 not said by this row
    delay_ms: np.ndarray  # int64 [n] of a purchase: from the first click on the example; -1 not said by this row
    query: np.ndarray  # int64 [n, QUERY_WORDS] ids of the words that were searched for, 0 none
    history: np.ndarray  # uint8 [n, HISTORY_BYTES] the user's state as of ts (history.py)
    item_raw: np.ndarray  # object [n] the item's id as it came, as JSON text

    def __len__(self) -> int:
        return len(self.row_id)

    def take(self, index: np.ndarray | slice) -> Examples:
        """The rows at `index`."""
        return Examples(*(getattr(self, f.name)[index] for f in fields(self)))

    @staticmethod
    def empty() -> Examples:
        return Examples(*(np.empty((0, *shape), dtype) for dtype, shape in COLUMNS.values()))

    @staticmethod
    def concat(parts: list[Examples]) -> Examples:
        if not parts:
            return Examples.empty()
        if len(parts) == 1:
            return parts[0]
        return Examples(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Examples)))


COLUMNS: dict[str, tuple[type, tuple[int, ...]]] = {
    "row_id": (np.int64, ()), "example_id": (np.int64, ()), "part": (np.uint8, ()), "source": (np.uint8, ()),
    "ts": (np.int64, ()), "closed": (np.int64, ()), "user": (np.int64, ()), "item": (np.int64, ()),
    "scenario": (np.uint8, ()), "position": (np.int16, ()), "propensity": (np.float32, ()),
    "rate": (np.float32, ()),
    "click": (np.int8, ()), "purchase": (np.int8, ()), "play_ms": (np.int64, ()), "duration_ms": (np.int64, ()),
    "delay_ms": (np.int64, ()), "query": (np.int64, (QUERY_WORDS,)),
    "history": (np.uint8, (HISTORY_BYTES,)), "item_raw": (object, ()),
}  # fmt: skip


_HASHED = np.dtype([(name, dtype, shape) for name, (dtype, shape) in COLUMNS.items() if dtype is not object])


class ExamplesDigest:
    """A digest of a multiset of rows: the same in whatever order and blocks they come.

    Their number, and the sum modulo 2^64 of the hashes of all their columns. Two multisets that differ have the same
    digest with a chance of 2^-64; it is no defence against somebody who makes rows for it.
    """

    def __init__(self) -> None:
        self.rows = self.sum = 0

    def add(self, examples: Examples) -> None:
        """Some more rows."""
        packed = np.empty(len(examples), _HASHED)
        for name in packed.dtype.names or ():
            packed[name] = getattr(examples, name)
        raw, size = packed.tobytes(), packed.itemsize
        for i, item in enumerate(examples.item_raw):
            self.sum += xxh3_64_intdigest(raw[i * size : (i + 1) * size] + str(item).encode("utf-8", "surrogatepass"))
        self.rows += len(examples)
        self.sum &= (1 << 64) - 1

    def hexdigest(self) -> str:
        """24 hex digits: the number of rows, the sum."""
        return f"{self.rows:08x}{self.sum:016x}"


@dataclass
class Counts:
    """The joiner's cumulative balance of one partition, in events (an impression of k items counts k).

    events_in = rejected + duplicates + late + joined + history_only + open + set_aside
    """

    events_in: int = 0
    rejected: int = 0
    duplicates: int = 0
    late: int = 0
    joined: int = 0
    history_only: int = 0
    open: int = 0  # held for disorder, or waiting for a click
    set_aside: int = 0  # of a backlog that was not joined
    rows: int = 0  # rows emitted
    skew_checked: int = 0  # impressions that said what they were scored with
    skew_differs: int = 0  # of these, scored with another state than the joiner's


@dataclass
class Block:
    """What came of the records [from_offset, to_offset) of one partition of `events`."""

    partition: int
    from_offset: int
    to_offset: int
    handled: int  # all records below this offset have had their effect; the rest is held for disorder
    watermark: int  # event time ms; no row of a later block closed before it
    counts: Counts = field(default_factory=Counts)
    examples: Examples = field(default_factory=Examples.empty)
    users: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # [u] whose state changed
    histories: np.ndarray = field(default_factory=lambda: np.empty((0, HISTORY_BYTES), np.uint8))  # [u, …] as it is now
    set_aside: bool = False  # its records were counted and not joined: it has no rows but of users to forget
