"""What is counted of items, categories and sellers, and what else their rows take from examples.

The trainer sees all examples in one order, so the counts are its own; they are parts of the rows and reach replicas in
the versions. They are added after a batch was learned: a score is made of what came before.
"""

from __future__ import annotations

import numpy as np

from embedding_store.tables import EmbeddingTables
from online_model.examples import Examples, Part, Source
from online_model.features import CATEGORY, ITEM, SELLER, heat
from online_model.history import entry_items
from online_model.neighbours import added, left, near
from online_model.ranker import WATCH_TIME
from online_model.watching import learned, plays_at


def count(tables: EmbeddingTables, rows: Examples, at: np.ndarray) -> None:
    """Counts n examples. at: int64 [n] rows of their items, 0 where the table is full."""
    shown, impression = rows.part == Part.SHOWN, rows.source == Source.IMPRESSION
    said = impression & (shown | (rows.part == Part.LATE_CLICK))
    stands_for = np.rint(1 / rows.rate).astype(np.int64)
    counted = {
        "impressions": shown & impression, "clicks": said & (rows.click == 1), "interactions": shown & ~impression,
    }  # fmt: skip
    owners = {ITEM: at}
    for table in (CATEGORY, SELLER):
        owners[table] = tables.rows(table, tables.values(ITEM, table, at), admit=False)
    for table, own in owners.items():
        for column, which in counted.items():
            there = which & (own > 0)
            tables.add(table, column, own[there], stands_for[there])


def warm(tables: EmbeddingTables, rows: Examples, at: np.ndarray, now_ms: int) -> None:
    """What is clicked, or done otherwise, at `now_ms`. at: int64 [n] rows of the items."""
    said = (rows.part == Part.SHOWN) | (rows.part == Part.LATE_CLICK)
    clicked = np.flatnonzero(said & (rows.click == 1) & (at > 0))
    distinct, which, times = np.unique(at[clicked], return_inverse=True, return_counts=True)
    _befriend(tables, distinct, which, times, rows.history[clicked], now_ms)
    warmth = heat(tables.values(ITEM, "heat", distinct), tables.values(ITEM, "heat_ms", distinct), now_ms)
    tables.set(ITEM, "heat", distinct, warmth + times[:, None].astype(np.float32))
    tables.set(ITEM, "heat_ms", distinct, np.full(len(distinct), now_ms))


def _befriend(
    tables: EmbeddingTables, at: np.ndarray, which: np.ndarray, times: np.ndarray, history: np.ndarray, now_ms: int
) -> None:
    """Co-clicks of the items at rows `at` int64 [m], clicked so many `times`; which: int64 [n] whose each click is;
    history: uint8 [n, HISTORY_BYTES] as of then. To be called before `heat_ms` moves."""
    items, weights, taken, since = (
        tables.values(ITEM, name, at) for name in ("neighbours", "nearness", "taken", "heat_ms")
    )
    past = entry_items(history)
    by_place = near(past)
    click, place = np.nonzero(by_place)
    items, weights = added(
        items, left(weights, since, now_ms), which[click], past[click, place], by_place[click, place]
    )
    tables.set(ITEM, "neighbours", at, items)
    tables.set(ITEM, "nearness", at, weights.astype(np.float32))
    tables.set(ITEM, "taken", at, (left(taken, since, now_ms) + times).astype(np.float32))


def watched(tables: EmbeddingTables, rows: Examples, at: np.ndarray, plays: np.ndarray) -> np.ndarray:
    """`plays` with the examples' own, and the items' durations as they were last."""
    played = np.flatnonzero(rows.play_ms >= 0)
    known = played[(rows.duration_ms[played] > 0) & (at[played] > 0)]
    last = known[len(known) - 1 - np.unique(at[known][::-1], return_index=True)[1]]
    tables.set(ITEM, "duration", at[last], rows.duration_ms[last])
    return learned(plays, rows.play_ms[played], rows.duration_ms[played])


def predicted_plays(rows: Examples, p: np.ndarray, plays: np.ndarray | None) -> np.ndarray:
    """Predicted watch time in ms, float32 [n], of the rows that say how long the play was; nan elsewhere."""
    out = np.full(len(rows), np.nan, np.float32)
    played = np.flatnonzero(rows.play_ms >= 0)
    if plays is not None and len(played):
        out[played] = plays_at(plays, p[played, WATCH_TIME], rows.duration_ms[played])
    return out
