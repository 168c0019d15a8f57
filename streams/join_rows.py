"""The rows that a joiner makes of what it knows, as columns in the end."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from embedding_store.ids import combine_all
from online_model.examples import (
    COLUMNS,
    QUERY_WORDS,
    Counts,
    Examples,
    Part,
    Source,
    forget_name,
    implicit_name,
)
from online_model.features import words_of
from online_model.history import EMPTY, as_array
from streams.events import SCENARIOS, Click, Forget
from streams.join_state import Shown, Window

# An enum is slow to hash and to pack.
SHOWN, LATE_CLICK, WATCH, PURCHASE, NOT_BOUGHT, FORGET = map(int, Part)
IMPRESSION, IMPLICIT = map(int, Source)
SCENARIO = {name: i for i, name in enumerate(SCENARIOS)}
NO_QUERY = bytes(8 * QUERY_WORDS)
COMMON = (
    "name", "part", "source", "ts", "closed", "user", "scenario", "rate", "click", "purchase", "play_ms", "duration_ms",
    "delay_ms", "history", "query",
)  # fmt: skip


class Rows:
    """The rows of one call of `process`. Of `unclicked_of` rows SHOWN without a click one is kept, by its id.

    The rows of an impression that nobody clicked share most of their columns: rows are kept in groups, each with its
    length, its common columns (COMMON), and the others row by row.
    """

    def __init__(self, unclicked_of: int) -> None:
        self._unclicked_of, self._rate = unclicked_of, 1.0 / unclicked_of
        self._lengths: list[int] = []
        self._common: list[tuple] = []
        self._items: list[int] = []
        self._as_they_came: list[str | int | None] = []
        self._positions: list[int] = []
        self._propensities: list[float] = []

    def unclicked(self, shown: Shown, closed: int) -> int:
        """Rows SHOWN of the examples of an impression that were not clicked. Returns how many these are."""
        if not shown.clicked:
            n = len(shown.ids)
            self._items += shown.ids
            self._as_they_came += shown.items
            self._positions += shown.positions or (-1,) * n
            self._propensities += shown.propensities or (math.nan,) * n
        else:
            places = [place for place in range(len(shown.ids)) if place not in shown.clicked]
            n = len(places)
            for place in places:
                self._example(shown, place)
        if n:
            self._lengths.append(n)
            self._common.append((
                shown.request, SHOWN, IMPRESSION, shown.ts, closed, shown.user, shown.scenario, self._rate,
                0, -1, -1, -1, -1, shown.history, shown.query,
            ))  # fmt: skip
        return n

    def example(
        self, shown: Shown, place: int, part: int, closed: int,
        click: int = -1, purchase: int = -1, play: int = -1, duration: int = -1,
    ) -> None:  # fmt: skip
        """A row of an impression's example."""
        self._example(shown, place)
        self._lengths.append(1)
        self._common.append((
            shown.request, part, IMPRESSION, shown.ts, closed, shown.user, shown.scenario, 1.0, click, purchase, play,
            duration, -1, shown.history, shown.query,
        ))  # fmt: skip

    def window(
        self, window: Window, part: int, closed: int, user: int, item: int, as_it_came: str | int,
        click: int = -1, purchase: int = -1, delay: int = -1,
    ) -> None:  # fmt: skip
        """A row of an example that was clicked, and is not, or no longer, open."""
        propensity = math.nan if window.propensity is None else window.propensity
        self._own(item, as_it_came, window.position, propensity)
        self._lengths.append(1)
        self._common.append((
            window.name, part, window.source, window.ts, closed, user, window.scenario, 1.0, click, purchase, -1, -1,
            delay, window.history, window.query,
        ))  # fmt: skip

    def forget(self, event: Forget, event_id: str, user: int, closed: int) -> None:
        """The row that says that a user is to be forgotten."""
        self._own(user, None, -1, math.nan)
        self._lengths.append(1)
        self._common.append((
            forget_name(event_id), FORGET, IMPRESSION, event.ts, closed, user, 0, 1.0, -1, -1, -1, -1, -1, EMPTY, b"",
        ))  # fmt: skip

    def columns(self, counts: Counts) -> Examples:
        """All of them, in the order of `closed`, at one time in the order in which they were made; counted."""
        if not self._lengths:
            return Examples.empty()
        lengths = np.array(self._lengths)
        common: dict[str, Any] = dict(zip(COMMON, zip(*self._common, strict=True), strict=True))
        histories = as_array(list(common.pop("history")))
        words = b"".join(query or NO_QUERY for query in common.pop("query"))
        queries: np.ndarray = np.frombuffer(words, np.int64).reshape(-1, QUERY_WORDS)
        names = np.array(common.pop("name"), np.int64)
        columns: dict[str, np.ndarray] = {n: np.array(values, COLUMNS[n][0]) for n, values in common.items()}
        groups = np.arange(len(lengths)).repeat(lengths)
        order = np.argsort(columns["closed"][groups], kind="stable")
        groups = groups[order]
        items = np.array(self._items, np.int64)[order]
        example_ids = combine_all(names[groups], items)
        row_ids = combine_all(example_ids, columns["part"][groups])
        if self._unclicked_of > 1:
            clicked = columns["click"][groups] != 0
            kept = clicked | (row_ids.view(np.uint64) % np.uint64(self._unclicked_of) == 0)
            order, groups, items = order[kept], groups[kept], items[kept]
            example_ids, row_ids = example_ids[kept], row_ids[kept]
        items[columns["part"][groups] == FORGET] = 0
        texts = {item: orjson.dumps(item).decode() for item in set(self._as_they_came)}
        as_they_came = np.array([texts[item] for item in self._as_they_came], object)
        counts.rows += len(order)
        return Examples(
            row_id=row_ids, example_id=example_ids, item=items, history=histories[groups], query=queries[groups],
            item_raw=as_they_came[order],
            position=np.array(self._positions, np.int16)[order],
            propensity=np.array(self._propensities, np.float32)[order],
            **{name: column[groups] for name, column in columns.items()},
        )  # fmt: skip

    def _example(self, shown: Shown, place: int) -> None:
        self._own(
            shown.ids[place], shown.items[place], shown.positions[place] if shown.positions else -1,
            shown.propensities[place] if shown.propensities else math.nan,
        )  # fmt: skip

    def _own(self, item: int, as_it_came: str | int | None, position: int, propensity: float) -> None:
        self._items.append(item)
        self._as_they_came.append(as_it_came)
        self._positions.append(position)
        self._propensities.append(propensity)


def window_of_impression(event: Click, shown: Shown, place: int) -> Window:
    """What a purchase of what was shown and clicked makes a row from."""
    return Window(
        event.ts, event.ts, shown.request, IMPRESSION, shown.ts, shown.scenario,
        shown.positions[place] if shown.positions else -1,
        shown.propensities[place] if shown.propensities else None, shown.history, shown.query,
    )  # fmt: skip


def window_of_click(event: Click, event_id: str, history: bytes) -> Window:
    """The same of a click that is an example by itself."""
    return Window(
        event.ts, event.ts, implicit_name(event_id), IMPLICIT, event.ts, SCENARIO[event.scenario], -1, None, history,
        b"",
    )  # fmt: skip


def query_of(context: dict[str, Any] | None) -> bytes:
    """The words of what was searched for, `query` in an impression's context, as in Shown; nothing where it is no text.
    """
    text = context.get("query") if context else None
    return _words(text) if isinstance(text, str) else b""


@lru_cache(maxsize=4096)
def _words(text: str) -> bytes:
    ids = words_of(text, QUERY_WORDS)
    return ids.tobytes() if ids.any() else b""
