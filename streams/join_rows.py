"""The rows that a joiner makes of what it knows, as columns in the end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import orjson
from xxhash import xxh3_64_intdigest

from embedding_store.ids import hash_text
from online_model.examples import COLUMNS, Counts, Examples, Part, Source, example_key, forget_key, row_id
from online_model.history import EMPTY, as_array
from streams.events import Click, Forget
from streams.join_state import Shown, Window

# An enum is slow to hash and to pack.
SHOWN, LATE_CLICK, WATCH, PURCHASE, NOT_BOUGHT, FORGET = map(int, Part)
IMPRESSION, IMPLICIT = map(int, Source)
_WRAP = (1 << 64) - 1
COMMON = (
    "part", "source", "ts", "closed", "user", "scenario", "rate", "click", "purchase", "play_ms", "duration_ms",
    "delay_ms", "history",
)  # fmt: skip
_PARTS = [f"\x00{part}".encode() for part in map(int, Part)]


class Rows:
    """The rows of one call of `process`; `counts.rows` counts them. Of `unclicked_of` rows SHOWN without a click one
    is kept, by its id.

    The rows of an impression that nobody clicked share most of their columns: rows are kept in groups, each with its
    length, its common columns (COMMON), and the others row by row.
    """

    def __init__(self, counts: Counts, unclicked_of: int) -> None:
        self._counts = counts
        self._unclicked_of, self._rate = unclicked_of, 1.0 / unclicked_of
        self._lengths: list[int] = []
        self._common: list[tuple] = []
        self._own: list[tuple] = []  # row_id and example_id (unsigned), item, position, propensity, item_raw

    def unclicked(self, shown: Shown, places: list[int], closed: int) -> None:
        """Rows SHOWN of examples of an impression, not clicked."""
        before, of = len(self._own), self._unclicked_of
        positions, propensities, suffix = shown.positions, shown.propensities, _PARTS[SHOWN]
        for place in places:
            # As `row_id` and `hash_text` have it, at half the cost: the key is encoded once, and numpy makes the
            # numbers signed.
            item = shown.items[place]
            key = example_key(shown.request, item).encode("utf-8", "surrogatepass")
            id_ = xxh3_64_intdigest(key + suffix)
            if of == 1 or id_ % of == 0:
                self._own.append((
                    id_, xxh3_64_intdigest(key), shown.ids[place], positions[place] if positions else -1,
                    propensities[place] if propensities else math.nan, item,
                ))  # fmt: skip
        self._group(
            len(self._own) - before, SHOWN, IMPRESSION, shown.ts, closed, shown.user, shown.scenario, self._rate,
            0, -1, -1, -1, -1, shown.history,
        )  # fmt: skip

    def example(
        self, shown: Shown, place: int, part: int, closed: int,
        click: int = -1, purchase: int = -1, play: int = -1, duration: int = -1,
    ) -> None:  # fmt: skip
        """A row of an impression's example."""
        item = shown.items[place]
        key = example_key(shown.request, item).encode("utf-8", "surrogatepass")
        self._own.append((
            xxh3_64_intdigest(key + _PARTS[part]), xxh3_64_intdigest(key), shown.ids[place],
            shown.positions[place] if shown.positions else -1,
            shown.propensities[place] if shown.propensities else math.nan, item,
        ))  # fmt: skip
        self._group(
            1, part, IMPRESSION, shown.ts, closed, shown.user, shown.scenario, 1.0, click, purchase, play, duration, -1,
            shown.history,
        )  # fmt: skip

    def window(
        self, window: Window, part: int, closed: int, user: int, item: int, as_it_came: str | int, id_: int,
        click: int = -1, purchase: int = -1, delay: int = -1,
    ) -> None:  # fmt: skip
        """A row of an example that was clicked, and is not, or no longer, open. `id_`: of the row."""
        self._own.append((
            id_ & _WRAP, window.example_id & _WRAP, item, window.position,
            math.nan if window.propensity is None else window.propensity, as_it_came,
        ))  # fmt: skip
        self._group(
            1, part, window.source, window.ts, closed, user, window.scenario, 1.0, click, purchase, -1, -1, delay,
            window.history,
        )  # fmt: skip

    def forget(self, event: Forget, event_id: str, user: int, closed: int) -> None:
        """The row that says that a user is to be forgotten."""
        key = forget_key(event_id, event.user)
        self._own.append((row_id(key, FORGET) & _WRAP, hash_text(key) & _WRAP, 0, -1, math.nan, None))
        self._group(1, FORGET, IMPRESSION, event.ts, closed, user, 0, 1.0, -1, -1, -1, -1, -1, EMPTY)

    def columns(self) -> Examples:
        """All of them."""
        if not self._own:
            return Examples.empty()
        lengths = np.array(self._lengths)
        common = dict(zip(COMMON, zip(*self._common, strict=True), strict=True))
        history = as_array(list(common.pop("history"))).repeat(lengths, axis=0)
        columns: dict[str, Any] = {}
        for name, values in common.items():
            columns[name] = np.array(values, COLUMNS[name][0]).repeat(lengths)
        row_ids, example_ids, items, positions, propensities, as_they_came = zip(*self._own, strict=True)
        texts = {item: orjson.dumps(item).decode() for item in set(as_they_came)}
        return Examples(
            row_id=_signed(row_ids), example_id=_signed(example_ids), item=np.array(items, np.int64),
            position=np.array(positions, np.int16), propensity=np.array(propensities, np.float32),
            history=history, item_raw=np.array([texts[item] for item in as_they_came], object), **columns,
        )  # fmt: skip

    def _group(self, length: int, *common: Any) -> None:
        if length:
            self._counts.rows += length
            self._lengths.append(length)
            self._common.append(common)


def _signed(ids: tuple[int, ...]) -> np.ndarray:
    """int64 [n] of unsigned 64-bit hashes, 0 replaced by 1: as `hash_text` has it."""
    signed = np.array(ids, np.uint64).view(np.int64)
    signed[signed == 0] = 1
    return signed


def window_of_impression(event: Click, shown: Shown, place: int) -> Window:
    """What a purchase of what was shown and clicked makes a row from."""
    key = example_key(shown.request, shown.items[place])
    return Window(
        event.ts, event.ts, row_id(key, PURCHASE), row_id(key, NOT_BOUGHT), hash_text(key), IMPRESSION, shown.ts,
        shown.scenario, shown.positions[place] if shown.positions else -1,
        shown.propensities[place] if shown.propensities else None, shown.history,
    )  # fmt: skip


def window_of_click(event: Click, key: str, scenario: int, history: bytes) -> Window:
    """The same of a click that is an example by itself, named `key`."""
    return Window(
        event.ts, event.ts, row_id(key, PURCHASE), row_id(key, NOT_BOUGHT), hash_text(key), IMPLICIT, event.ts,
        scenario, -1, None, history,
    )  # fmt: skip
