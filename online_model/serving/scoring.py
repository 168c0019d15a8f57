"""From a user and item ids to probabilities and scores: one pass of the network, slices where time is short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from embedding_store.ids import feature_id
from online_model.examples import QUERY_WORDS
from online_model.features import (
    CATEGORY,
    ITEM,
    SELLER,
    USER,
    WORD,
    UserFeatures,
    item_numbers,
    matches,
    user_features,
    words_of,
)
from online_model.feedback import Strategy, probabilities
from online_model.history import as_array, history_hash
from online_model.neighbours import neighbour_numbers
from online_model.ranker import CLICK, HEADS, PURCHASE, WATCH, Contexts, Items
from online_model.serving.api import Context, Id, Scenario
from online_model.serving.approximate import vectors
from online_model.serving.candidates import Query
from online_model.serving.filters import Allowed
from online_model.serving.live import Coverage, LiveUsers
from online_model.serving.settings import Scoring
from online_model.serving.state import State

SCENARIO_INDEX = {name: index for index, name in enumerate(get_args(Scenario))}
SLICE = 256  # candidates that are scored at a time where time is short; the first so many are scored in any case
AMPLE_S = 1e-4  # a candidate: with so much time before the deadline all are scored at once (it takes some 5 µs)
_TINY = 1e-12  # no score is surer than that


@dataclass(slots=True)
class Asked:
    """A user at this moment, in a scenario: what the network is given, and the hash of the state it was made of."""

    inputs: Contexts  # of one
    mean: torch.Tensor  # [1, D] of the history
    past: UserFeatures  # of one
    entries: list[np.ndarray]  # int64 [1, HISTORY] each: ids of the history's items, categories, sellers
    feature_hash: int
    now_ms: int


@dataclass(slots=True)
class Scored:
    """Candidates with what the model says of them. Those that time did not reach have zeros."""

    ids: np.ndarray  # int64 [n]
    p: np.ndarray  # float32 [n, heads]
    score: np.ndarray  # float32 [n]
    order: np.ndarray  # int64 [n], the best first, those not reached last, by retrieval's affinity
    reached: int  # so many of `order` are scored


class Scorer:
    """Scores with a replica's state. `timer`: seconds, as deadlines are given in."""

    def __init__(
        self, state: State, feedback: Strategy, timer: Callable[[], float], live: LiveUsers | None, coverage: Coverage
    ) -> None:
        self._state, self._feedback, self._timer = state, feedback, timer
        self._live, self._coverage = live, coverage

    def asked(self, user: Id, scenario: str, context: Context, now_ms: int) -> Asked:
        """The user as known here; an unknown one is the default row with an empty history."""
        state = self._state
        user_id = feature_id(USER, user)
        row = state.users.find(np.array([user_id], np.int64))
        history = state.users.columns["history"][row]
        if self._live is not None:
            known = history[0].tobytes() if row[0] else None
            history = as_array([self._live.history(user_id, known, self._coverage, now_ms)])
        past = user_features(history, now_ms)
        rows = state.items.find(past.items[0])
        item, content = state.vectors(rows)
        words = state.tables[WORD].find(words_of(context.query, QUERY_WORDS))[None]
        inputs = Contexts(
            user=state.users.gather(row), entries=(item + content)[None], kinds=torch.from_numpy(past.kinds),
            recency=torch.from_numpy(past.recency), query=state.mean_of_words(words),
            moment=torch.from_numpy(past.context), scenario=torch.tensor([SCENARIO_INDEX[scenario]]),
        )  # fmt: skip
        _, *groups = state.ids(rows)
        entries = [past.items, *(ids[None] for ids in groups)]
        return Asked(inputs, state.ranker.history_mean(inputs), past, entries, history_hash(history[0]), now_ms)

    def query(self, asked: Asked, allowed: Allowed | None = None) -> Query:
        """What the sources of candidates are asked."""
        item, content = self._state.ranker.towers(asked.inputs, asked.mean)
        return Query(item[0].numpy(), content[0].numpy(), asked.past.items, asked.now_ms, allowed)

    def scored(self, asked: Asked, ids: np.ndarray, weigh: Scoring, deadline: float | None = None) -> Scored:
        """Item ids int64 [n] scored and put in order; ties go to what is clicked most, then to what came first in
        `ids`. Past the deadline (seconds of the timer) what is left is not scored; SLICE of them always are."""
        n = len(ids)
        if not n:
            nothing = np.empty(0, np.float32)
            return Scored(ids, np.empty((0, len(HEADS)), np.float32), nothing, np.empty(0, np.int64), 0)
        if deadline is None or n <= SLICE or deadline - self._timer() > n * AMPLE_S:
            p = self.probabilities(asked.inputs, asked.mean, self.items(asked, ids))
            score = self.combined(p, ids, weigh)
            return Scored(ids, p, score, self._order(ids, score), n)
        likely, parts, done = self._by_affinity(asked, ids), [], 0
        while done < n and (done == 0 or self._timer() < deadline):
            some = likely[done : done + SLICE]
            parts.append(self.probabilities(asked.inputs, asked.mean, self.items(asked, ids[some])))
            done += len(some)
        reached = likely[:done]
        p = np.zeros((n, parts[0].shape[1]), np.float32)
        p[reached] = np.concatenate(parts)
        score = np.zeros(n, np.float32)
        score[reached] = self.combined(p[reached], ids[reached], weigh)
        best = reached[self._order(ids[reached], score[reached])]
        return Scored(ids, p, score, np.concatenate((best, likely[done:])), done)

    def items(self, asked: Asked, ids: np.ndarray) -> Items:
        """The candidates of item ids int64 [n] as the network takes them, for this one user."""
        state = self._state
        rows = state.items.find(ids)
        item, content = state.vectors(rows)
        numbers = state.numbers(rows, asked.now_ms)
        groups = state.ids(rows)[1:]
        if not rows.all():
            self._add_cards(ids, content, numbers, groups, asked.now_ms)
        ctx = np.zeros(len(ids), np.int64)
        alike = matches(asked.past, asked.entries, [ids, *groups], ctx)
        near = neighbour_numbers(state.similar(asked.past.items, ids, asked.now_ms))
        return Items(
            item, content, torch.from_numpy(np.concatenate((numbers, alike), axis=1)), torch.from_numpy(near), None,
            torch.from_numpy(ctx),
        )  # fmt: skip

    def probabilities(self, inputs: Contexts, mean: torch.Tensor, items: Items) -> np.ndarray:
        """As served, float32 [n, heads]."""
        return probabilities(self._state.ranker(inputs, items, mean), self._feedback).numpy()

    def combined(self, p: np.ndarray, ids: np.ndarray, weigh: Scoring) -> np.ndarray:
        """The scores float32 [n] of probabilities [n, heads] of item ids int64 [n]."""
        return p[:, CLICK] * self._gain(p, ids, weigh)

    def parts(self, p: np.ndarray, ids: np.ndarray, weigh: Scoring) -> np.ndarray:
        """What click, watch and purchase make of the scores: float32 [n, 3]."""
        parts = (np.full(len(p), weigh.click), weigh.watch * p[:, WATCH], self._value(ids, weigh) * p[:, PURCHASE])
        return p[:, CLICK, None] * np.stack(parts, 1).astype(np.float32)

    def spread(self, p: np.ndarray, ids: np.ndarray, weigh: Scoring, doubt: float) -> np.ndarray:
        """Standard deviations float64 [n] of the scores, by the delta method.

        Each head's logit has the variance 1 / (1 / doubt² + n·p·(1 − p)): n impressions say so much of a click, n
        clicks of a watch and a purchase (the positives of logs without impressions count for each).
        """
        items = self._state.items
        rows, p = items.find(ids), p.astype(np.float64)
        shown, clicks, other = (items.columns[name][rows] for name in ("impressions", "clicks", "interactions"))
        of_head = {CLICK: shown + other, WATCH: clicks + other, PURCHASE: clicks + other}
        click, value = p[:, CLICK], self._value(ids, weigh)
        slope = {CLICK: self._gain(p, ids, weigh), WATCH: click * weigh.watch, PURCHASE: click * value}
        variance = np.full(len(ids), _TINY)
        for head, n in of_head.items():
            bent = p[:, head] * (1 - p[:, head])  # of the probability by the logit
            variance += (slope[head] * bent) ** 2 / (1 / doubt**2 + n * bent)
        return np.sqrt(variance)

    def _gain(self, p: np.ndarray, ids: np.ndarray, weigh: Scoring) -> np.ndarray:
        """What a click is worth, [n]."""
        return weigh.click + weigh.watch * p[:, WATCH] + self._value(ids, weigh) * p[:, PURCHASE]

    def _value(self, ids: np.ndarray, weigh: Scoring) -> np.ndarray | float:
        """What a purchase is worth, [n]."""
        if not weigh.price_power:
            return weigh.purchase
        price = self._state.cards.price[self._state.slots(ids, self._state.items.find(ids))]
        return weigh.purchase * price ** np.float32(weigh.price_power)

    def _order(self, ids: np.ndarray, score: np.ndarray) -> np.ndarray:
        items = self._state.items
        rows = items.find(ids)
        return np.lexsort((-(items.columns["clicks"][rows] + items.columns["interactions"][rows]), -score))

    def _by_affinity(self, asked: Asked, ids: np.ndarray) -> np.ndarray:
        """int64 [n], the largest affinity first: as retrieval has it, without the network."""
        query = self.query(asked)
        wanted = np.concatenate((query.item, query.content, np.ones(1, np.float32)))
        affinity = vectors(self._state, self._state.items.find(ids), asked.now_ms) @ wanted
        return np.argsort(-affinity, kind="stable")

    def _add_cards(
        self, ids: np.ndarray, content: torch.Tensor, numbers: np.ndarray, groups: list[np.ndarray], now_ms: int
    ) -> None:
        """What the cards say of items `ids` that have no row: category and seller, and the rates of these."""
        cards, tables = self._state.cards, self._state.tables
        rows = self._state.items.find(ids)
        bare = np.flatnonzero(rows == 0)
        slots = cards.find(ids[bare])
        bare, slots = bare[slots > 0], slots[slots > 0]
        if not len(bare):
            return
        of = {CATEGORY: cards.categories.ids(cards.category[slots]), SELLER: cards.sellers.ids(cards.seller[slots])}
        rows_of = {ITEM: rows[bare]} | {table: tables[table].find(its) for table, its in of.items()}
        for group, (table, its) in zip(groups, of.items(), strict=True):
            group[bare] = its
            content[torch.from_numpy(bare)] += tables[table].gather(rows_of[table])
        rate = self._state.ranker.click_rate()
        numbers[bare] = item_numbers(lambda table, name: tables[table].columns[name][rows_of[table]], now_ms, rate)
