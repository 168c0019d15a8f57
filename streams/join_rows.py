"""The rows that a joiner makes of what it knows, as columns in the end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import orjson
from xxhash import xxh3_64_intdigest

from embedding_store.ids import feature_id, hash_text
from online_model.examples import COLUMNS, Counts, Examples, Part, Source, example_key, forget_key, row_id
from online_model.history import EMPTY, as_array
from streams.events import Action, Click, Forget
from streams.join_state import Shown, Window

# An enum is slow to hash and to pack.
SHOWN, LATE_CLICK, WATCH, PURCHASE, NOT_BOUGHT, FORGET = map(int, Part)
IMPRESSION, IMPLICIT = map(int, Source)
_WRAP = (1 << 64) - 1
_PARTS = [f"\x00{part}".encode() for part in map(int, Part)]


class Rows:
    """The rows of one call of `process`; `counts.rows` counts them. Of `unclicked_of` rows SHOWN without a click one
    is kept, by its id."""

    def __init__(self, counts: Counts, unclicked_of: int) -> None:
        self._rows: list[tuple] = []
        self._counts = counts
        self._unclicked_of, self._rate = unclicked_of, 1.0 / unclicked_of

    def example(
        self, shown: Shown, place: int, part: int, closed: int,
        click: int = -1, purchase: int = -1, play: int = -1, duration: int = -1,
    ) -> None:  # fmt: skip
        """A row of an impression's example."""
        item, rate = shown.items[place], 1.0
        # As `row_id` and `hash_text` have it, at half the cost: the key is encoded once, and numpy makes the numbers
        # signed.
        key = example_key(shown.request, item).encode("utf-8", "surrogatepass")
        id_ = xxh3_64_intdigest(key + _PARTS[part])
        if click == 0:
            rate = self._rate
            if rate < 1.0 and id_ % self._unclicked_of:
                return
        self._counts.rows += 1
        self._rows.append((
            id_, xxh3_64_intdigest(key), part, IMPRESSION, shown.ts, closed, shown.user, shown.ids[place],
            shown.scenario, shown.positions[place] if shown.positions else -1,
            shown.propensities[place] if shown.propensities else math.nan, rate,
            click, purchase, play, duration, -1, shown.history, raw(item),
        ))  # fmt: skip

    def window(
        self, window: Window, part: int, closed: int, user: int, item: int, raw_item: str, id_: int,
        click: int = -1, purchase: int = -1, delay: int = -1,
    ) -> None:  # fmt: skip
        """A row of an example that was clicked, and is not, or no longer, open. `id_`: of the row."""
        self._counts.rows += 1
        self._rows.append((
            id_ & _WRAP, window.example_id & _WRAP, part, window.source, window.ts, closed, user, item,
            window.scenario, window.position, math.nan if window.propensity is None else window.propensity, 1.0,
            click, purchase, -1, -1, delay, window.history, raw_item,
        ))  # fmt: skip

    def forget(self, event: Forget, event_id: str, user: int, closed: int) -> None:
        """The row that says that a user is to be forgotten."""
        key = forget_key(event_id, event.user)
        self._counts.rows += 1
        self._rows.append((
            row_id(key, FORGET) & _WRAP, hash_text(key) & _WRAP, FORGET, IMPRESSION, event.ts, closed, user, 0,
            0, -1, math.nan, 1.0, -1, -1, -1, -1, -1, EMPTY, "null",
        ))  # fmt: skip

    def columns(self) -> Examples:
        """All of them."""
        if not self._rows:
            return Examples.empty()
        columns: list[Any] = list(zip(*self._rows, strict=True))
        for i, (name, (dtype, _)) in enumerate(COLUMNS.items()):
            if name == "history":
                columns[i] = as_array(columns[i])
            elif name in ("row_id", "example_id"):
                ids = np.array(columns[i], np.uint64).view(np.int64)
                ids[ids == 0] = 1  # as `hash_text` has it
                columns[i] = ids
            else:
                columns[i] = np.array(columns[i], dtype)
        return Examples(*columns)


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


def raw(item: str | int) -> str:
    """An item's id as JSON text."""
    return orjson.dumps(item).decode()


def item_of(event: Action) -> tuple[int, str]:
    """(feature id, JSON text) of an action's item."""
    return feature_id("item", event.item), raw(event.item)
