"""Where candidates come from: sources behind one small protocol; the ranker scores the union of what they name.

A source names items by id. It reads the replica's state and may keep something made of it, which it brings up to date
when the state's `changes` has moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from online_model.features import CATEGORY, MATCHES, NUMBERS, SELLER, WORD
from online_model.serving.filters import Allowed
from online_model.serving.state import AVAILABLE, CATEGORY_ROW, SELLER_ROW, STAMP, WORD_ROWS, State

REFRESH_MS = 60_000  # an item's age moves its prior slowly: all priors are renewed this often, …
RENEWED = 4_096  # … so many at a request: about 2 ms


@dataclass(frozen=True)
class Query:
    """One request: the user as vectors, and the moment."""

    item: np.ndarray  # float32 [D] of `Ranker.towers`: what its dot product with an item's row says
    content: np.ndarray  # float32 [D]: the same of its content
    past: np.ndarray  # int64 [1, HISTORY] ids of the user's history, 0 none
    now_ms: int
    allowed: Allowed | None = None  # what the sources may name; None: what is available
    prior: float = 1.0  # how much what hangs on no user counts


class Source(Protocol):
    """One place that candidates come from."""

    def candidates(self, query: Query) -> np.ndarray:
        """Item ids int64 [m]. They need not be available, known, or new to the other sources; but one that looks at
        `query.allowed` only afterwards finds little behind a narrow filter."""
        ...


def union(sources: list[Source], query: Query) -> np.ndarray:
    """Distinct item ids int64 [n], ascending, of all sources."""
    return np.unique(np.concatenate([source.candidates(query) for source in sources]))


class ExactIndex:
    """The items with the largest affinity (`Ranker.towers`).

    An exact scan: the vectors change with every version, and an approximate index that is not rebuilt as often loses
    most of its recall (20,000 × 64, all vectors replaced: 0.53–0.69), while the scan costs 0.05 µs an item. What is
    of a category, a seller or a word is scored once for all of its items.
    """

    def __init__(self, state: State, limit: int) -> None:
        self._state, self._limit = state, limit
        self._numbers = np.empty((0, NUMBERS - MATCHES), np.float32)  # by item row
        self._prior = np.empty(0, np.float32)  # by item row
        self._masked = np.empty(0, np.float32)  # the same; -inf where it is not available
        self._seen = -1  # the state's changes that these are of
        self._renewed_ms, self._next = 0, 0  # when it was begun to renew all rows, and the next one of them

    def candidates(self, query: Query) -> np.ndarray:
        state, items = self._state, self._state.items
        self._refresh(query.now_ms)
        scores = items.scores(query.item) + torch.from_numpy(self._base(query))
        for table, column in ((CATEGORY, CATEGORY_ROW), (SELLER, SELLER_ROW)):
            of_group = state.tables[table].scores(query.content)
            scores += of_group[torch.from_numpy(items.used(column))]
        if len(state.tables[WORD]):
            of_word = state.tables[WORD].scores(query.content)
            words = torch.from_numpy(items.used(WORD_ROWS))
            scores += of_word[words].sum(1) / (words != 0).sum(1).clamp(min=1)
        best, rows = torch.topk(scores, min(self._limit, items.end), sorted=False)
        return items.ids_of(rows[best > -torch.inf].numpy())

    def _base(self, query: Query) -> np.ndarray:
        """What the scores begin with, float32 [end]: -inf where an item may not be named."""
        if query.allowed is None and query.prior == 1:
            return self._masked
        there = self._state.items.used(AVAILABLE) if query.allowed is None else query.allowed.rows
        return np.where(there, np.float32(query.prior) * self._prior, -np.float32(np.inf))

    def _refresh(self, now_ms: int) -> None:
        """Bring the numbers and the priors up to date with the state, those that hang on time or on other rows slice by
        slice: a request must not wait for a million."""
        state, items = self._state, self._state.items
        stale = state.linked > self._seen or now_ms - self._renewed_ms >= REFRESH_MS
        if stale and self._next >= items.end:  # not before the last time is over: it would never get to the last rows
            self._renewed_ms, self._next = now_ms, 0
        if state.changes == self._seen and self._next >= items.end:
            return
        self._renew(np.flatnonzero(items.used(STAMP) > self._seen), now_ms)
        self._renew(np.arange(self._next, min(self._next + RENEWED, items.end)), now_ms)
        self._next += RENEWED
        self._prior = self._numbers @ state.ranker.tower_numbers.numpy()
        self._masked = np.where(items.used(AVAILABLE), self._prior, -np.float32(np.inf))
        self._seen = state.changes

    def _renew(self, rows: np.ndarray, now_ms: int) -> None:
        end = self._state.items.end
        if len(self._numbers) < end:
            more = np.zeros((end - len(self._numbers), NUMBERS - MATCHES), np.float32)
            self._numbers = np.concatenate((self._numbers, more))
        self._numbers[rows] = self._state.numbers(rows, now_ms)


class Neighbours:
    """The items that are clicked after those of the user's history, the most similar ones (neighbours.py)."""

    def __init__(self, state: State, limit: int) -> None:
        self._state, self._limit = state, limit

    def candidates(self, query: Query) -> np.ndarray:
        state = self._state
        if not self._limit or not state.ranker.settings.neighbours:
            return np.empty(0, np.int64)
        ids = np.unique(state.items.columns["neighbours"][state.items.find(query.past[0])])
        ids = ids[(state.cards.available if query.allowed is None else query.allowed.slots)[state.cards.find(ids)]]
        if len(ids) > self._limit:
            similarity = state.similar(query.past, ids, query.now_ms)
            ids = ids[np.argpartition(-similarity, self._limit)[: self._limit]]
        return ids


class Newest:
    """The items that came last: those that statistics say nothing of yet."""

    def __init__(self, state: State, limit: int) -> None:
        self._state, self._limit = state, limit
        self._changes, self._ids = -1, np.empty(0, np.int64)

    def candidates(self, query: Query) -> np.ndarray:
        cards = self._state.cards
        if query.allowed is not None:
            return cards.newest(self._limit, query.allowed.slots)
        if self._changes != cards.changes:
            self._changes, self._ids = cards.changes, cards.newest(self._limit)
        return self._ids


class Popular:
    """The items with the most clicks and other interactions, whoever asks."""

    def __init__(self, state: State, limit: int) -> None:
        self._state, self._limit = state, limit
        self._changes, self._ids = -1, np.empty(0, np.int64)
        self._taken = np.empty(0, np.int64)  # clicks and other interactions by item row

    def candidates(self, query: Query) -> np.ndarray:
        state = self._state
        if self._changes != state.changes:
            self._taken = state.items.used("clicks") + state.items.used("interactions")
            self._changes, self._ids = state.changes, self._most(state.items.used(AVAILABLE))
        return self._ids if query.allowed is None else self._most(query.allowed.rows)

    def _most(self, among: np.ndarray) -> np.ndarray:
        taken = self._taken * among
        rows = np.flatnonzero(taken)
        if len(rows) > self._limit:
            rows = rows[np.argpartition(-taken[rows], self._limit)[: self._limit]]
        return self._state.items.ids_of(rows)
