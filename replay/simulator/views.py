"""A log as a table of views: a row for each item that was shown, with what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from embedding_store.errors import LogError
from replay.readers.base import Record
from streams.events import Cart, Click, Event, Favourite, Forget, Impression, Item, Purchase, Scenario, Tick, Watch


@dataclass(frozen=True)
class Views:
    """Arrays by view, in the order of the log; `page` numbers the impressions from 0.

    `user` and `item` index `users` and `items`. Times in ms; a delay or a watch time of -1: there was none.
    """

    users: list[str | int]
    items: list[str | int]
    page: np.ndarray  # int64
    ts: np.ndarray  # int64
    user: np.ndarray  # int64
    item: np.ndarray  # int64
    position: np.ndarray  # int64
    scenario: np.ndarray  # str
    click_ms: np.ndarray  # int64, from the view
    play_ms: np.ndarray  # int64, the longest
    duration_ms: np.ndarray  # int64, 0: not known
    purchase_ms: np.ndarray  # int64, from the click
    cart: np.ndarray  # bool
    favourite: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.page)

    @property
    def clicked(self) -> np.ndarray:
        """bool"""
        return self.click_ms >= 0

    def where(self, chosen: np.ndarray | slice) -> Views:
        """Some of the views, by a bool mask or a slice; users and items keep their numbers."""
        arrays = {name: value[chosen] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return Views(self.users, self.items, **arrays)

    def halves(self, how: str) -> tuple[Views, Views]:
        """Whole pages, cut in two. `how`: "time" (first and second half), "alternate" (every other page) or "users"
        (every other user)."""
        if how == "users":
            second = self.user % 2 == 1
        else:
            pages, page = np.unique(self.page, return_inverse=True)
            second = page % 2 == 1 if how == "alternate" else page >= len(pages) // 2
        return self.where(~second), self.where(second)


@dataclass
class _Row:
    page: int
    ts: int
    user: int
    item: int
    position: int
    scenario: Scenario
    click_ms: int = -1
    play_ms: int = -1
    duration_ms: int = 0
    purchase_ms: int = -1
    cart: bool = False
    favourite: bool = False


def views_of(records: Iterable[Record]) -> Views:
    """The views of a log, its records by time or not far from it. An action belongs to its request's view of the item,
    without a request to the newest view of the item by the user. A view that comes twice counts once.

    LogError if nothing was shown: a click rate cannot be had from a log of clicks.
    """
    users: dict[str | int, int] = {}
    items: dict[str | int, int] = {}
    rows: list[_Row] = []
    asked: dict[tuple[str | int, str | int], _Row] = {}  # (request, item)
    newest: dict[tuple[str | int, str | int], _Row] = {}  # (user, item)
    pages = 0
    for record in records:
        if isinstance(record, Item | Tick | Forget):
            continue
        if isinstance(record, Impression):
            fresh = [(n, item) for n, item in enumerate(record.items) if (record.request_id, item) not in asked]
            for n, item in fresh:
                user, place = users.setdefault(record.user, len(users)), items.setdefault(item, len(items))
                position = record.positions[n] if record.positions else n
                row = _Row(pages, record.ts, user, place, position, record.scenario)
                asked[record.request_id, item] = newest[record.user, item] = row
                rows.append(row)
            pages += bool(fresh)
        else:
            found = asked.get((record.request_id, record.item)) if record.request_id is not None else None
            found = found or newest.get((record.user, record.item))
            if found is not None and found.ts <= record.ts:
                _note(found, record)
    if not rows:
        raise LogError("nothing was shown in this log: fit to one with impressions")
    return Views(list(users), list(items), **{name: np.array([getattr(row, name) for row in rows])
                                              for name in _Row.__dataclass_fields__})  # fmt: skip


def _note(row: _Row, action: Event) -> None:
    match action:
        case Click() if row.click_ms < 0:
            row.click_ms = action.ts - row.ts
        case Watch() if action.play_ms > row.play_ms:
            row.play_ms, row.duration_ms = action.play_ms, action.duration_ms
        case Purchase() if row.purchase_ms < 0 <= row.click_ms:
            row.purchase_ms = max(0, action.ts - row.ts - row.click_ms)
        case Cart():
            row.cart = True
        case Favourite():
            row.favourite = True
