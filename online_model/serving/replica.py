"""A replica: the model as of one version, and the answers it gives.

`apply`, `rank` and `recommend` are synchronous and belong on one thread (the event loop's): each sees whole versions
only. Scoring never writes: an unknown user or item is scored with the default row and allocates nothing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

from embedding_store.delta import Version
from embedding_store.faults import fault
from embedding_store.ids import feature_id
from online_model.examples import QUERY_WORDS
from online_model.features import ITEM, USER, WORD, UserFeatures, matches, user_features, words_of
from online_model.feedback import probabilities, strategy
from online_model.history import history_hash
from online_model.neighbours import neighbour_numbers
from online_model.ranker import CLICK, PURCHASE, WATCH, Contexts, Items
from online_model.serving.api import (
    Context,
    Id,
    ModelInfo,
    Ranked,
    Ranking,
    RankRequest,
    Recommendation,
    RecommendRequest,
    Scenario,
    Shown,
)
from online_model.serving.approximate import Index
from online_model.serving.candidates import Neighbours, Newest, Popular, Query, Source, union
from online_model.serving.errors import NotReady, VersionGap
from online_model.serving.explore import explore
from online_model.serving.settings import ReplicaSettings, Scoring
from online_model.serving.state import State
from online_model.settings import FeatureSettings, RankerSettings

SCENARIO_INDEX = {name: index for index, name in enumerate(get_args(Scenario))}


def wall_clock_ms() -> int:
    """The time, ms UTC."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class _Context:
    """A user at this moment, in a scenario: what the network is given, and the hash of the state it was made of."""

    inputs: Contexts  # of one
    mean: torch.Tensor  # [1, D] of the history
    past: UserFeatures  # of one
    entries: list[np.ndarray]  # int64 [1, HISTORY] each: ids of the history's items, categories, sellers
    feature_hash: int
    now_ms: int
    scoring: Scoring


class Replica:
    """Empty at first; a snapshot or the very first version makes it one that serves.

    A replica that has fallen behind is not mended: load the snapshot into a fresh one and serve from that.
    """

    def __init__(
        self,
        settings: ReplicaSettings,
        features: FeatureSettings,
        ranker: RankerSettings,
        clock: Callable[[], int] = wall_clock_ms,
        feedback: str = "calibrated",
    ) -> None:
        """`features`, `ranker`, `feedback`: as the trainer has them (`settings` in a version's info)."""
        self.settings = settings
        self._feedback = strategy(feedback, entire=ranker.entire_space)
        self.state = State(features, ranker, len(self._feedback.extra), settings.rows)
        self.index = Index(self.state, settings)
        self.sources: list[Source] = [
            self.index,
            Neighbours(self.state, settings.neighbours),
            Newest(self.state, settings.newest),
            Popular(self.state, settings.popular),
        ]
        self.epoch, self.sequence, self.created_ms = 0, -1, 0
        self._clock = clock
        self._rng = np.random.default_rng(settings.policy.exploration.seed)
        self._applied_ms = 0
        self._positions: dict[str, int] = {}
        self._info: dict = {}

    @property
    def version(self) -> str:
        """The version served, "epoch.sequence"; "" before the first."""
        return f"{self.epoch}.{self.sequence}" if self.sequence >= 0 else ""

    def apply(self, version: Version) -> bool:
        """Go to `version`. False, and no change, if this replica is there or past it already.

        All or nothing: whatever is raised, the replica is as it was. Raises VersionGap if `version` does not go on from
        the one held, or is a snapshot and this replica is not empty; CorruptRecord if it does not fit.
        """
        held, name = (self.epoch, self.sequence), f"{version.epoch}.{version.sequence}"
        if self.sequence >= 0 and (version.epoch, version.sequence) <= held:
            return False
        if version.base != (held if self.sequence >= 0 else None):
            base = "all" if version.base is None else "{}.{}".format(*version.base)
            raise VersionGap(
                f"version {name} goes on from {base}, this replica holds {self.version or 'none'}: load the newest "
                "snapshot into a fresh replica"
            )
        fault("apply.begun")
        cards = self.state.check(version)
        fault("apply.checked")
        self.state.change(version, cards)
        fault("apply.changed")
        self.epoch, self.sequence, self.created_ms = version.epoch, version.sequence, version.created_ms
        self._applied_ms = self._clock()
        self._positions = {str(partition): offset for partition, offset in version.positions.items()}
        self._info = version.info
        fault("apply.done")
        return True

    def prepare(self) -> None:
        """What the first requests would wait for is made now. Not for a thread that serves others meanwhile."""
        self.index.prepare(self._clock())

    @torch.inference_mode()
    def rank(self, request: RankRequest) -> Ranking:
        """Scores of the candidates (as they are given, known or not), the best first. Raises NotReady."""
        self._need_model()
        context = self._context(request.user, request.scenario, request.context)
        ids = np.array([feature_id(ITEM, item) for item in request.candidates], np.int64)
        p, score = self._score(context, ids)
        order = np.argsort(-score, kind="stable").tolist()
        ranked = [Ranked(request.candidates[i], *self._figures(p, score, i)) for i in order]
        return Ranking(**self._answer(context), items=ranked)

    @torch.inference_mode()
    def recommend(self, request: RecommendRequest) -> Recommendation:
        """At most k items that pass the filters, with exploration. Raises NotReady."""
        self._need_model()
        state, context = self.state, self._context(request.user, request.scenario, request.context)
        item, content = state.ranker.towers(context.inputs, context.mean)
        ids = union(self.sources, Query(item[0].numpy(), content[0].numpy(), context.past.items, context.now_ms))
        slots = state.cards.find(ids)
        ids, slots = (a[state.cards.available[slots]] for a in (ids, slots))
        if len(ids) == 0:
            raise NotReady("no item can be recommended yet: send the catalogue to the topic `items`")
        p, score = self._score(context, ids)
        epsilon = self.settings.policy.exploration.epsilon
        shown, propensities = explore(np.argsort(-score, kind="stable"), request.k, epsilon, self._rng)
        places = [
            Shown(state.cards.raw[slots[i]], *self._figures(p, score, i), position=place, propensity=propensity)
            for place, (i, propensity) in enumerate(zip(shown, propensities, strict=True))
        ]
        return Recommendation(**self._answer(context), candidates=len(ids), items=places)

    @staticmethod
    def _figures(p: np.ndarray, score: np.ndarray, i: int) -> tuple[float, float, float, float]:
        """Score, click, watch and purchase of candidate i."""
        return float(score[i]), float(p[i, CLICK]), float(p[i, WATCH]), float(p[i, PURCHASE])

    def _answer(self, context: _Context) -> dict[str, Any]:
        """The fields of `Answer`."""
        return {
            "request_id": uuid.uuid4().hex, "model_version": self.version,
            "model_age_ms": max(0, context.now_ms - self.created_ms),
            "learned_to_ms": int(self._info.get("event_time_ms", 0)), "feature_hash": context.feature_hash,
            "moment_ms": context.now_ms, "arm": "", "degraded": False,
        }  # fmt: skip

    def info(self) -> ModelInfo:
        """Which version this is, and what came with it."""
        return ModelInfo(
            self.version, self.epoch, self.sequence, self.created_ms, self._applied_ms, self._positions, self.rows(),
            self._info,
        )  # fmt: skip

    def recall(self) -> float | None:
        """Of the index of items, as measured of late (`ApproximateIndex`); None while all items are scanned."""
        return self.index.recall

    def nbytes(self) -> dict[str, int]:
        """Bytes reserved for rows, by table. The index of a large catalogue takes about as much as its items."""
        return {name: table.nbytes for name, table in self.state.tables.items()}

    def rows(self) -> dict[str, int]:
        """Rows held, by table; cards under "card"."""
        return {name: len(table) for name, table in self.state.tables.items()} | {"card": len(self.state.cards)}

    def _need_model(self) -> None:
        if self.sequence < 0:
            raise NotReady("no model yet: is the trainer running?")

    def _context(self, user: Id, scenario: str, context: Context) -> _Context:
        state = self.state
        row = state.users.find(np.array([feature_id(USER, user)], np.int64))
        now_ms = self._clock()
        history = state.users.columns["history"][row]
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
        return _Context(
            inputs, state.ranker.history_mean(inputs), past, entries, history_hash(history[0]), now_ms,
            getattr(self.settings.policy, scenario),
        )  # fmt: skip

    def _score(self, context: _Context, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities float32 [n, heads] and scores float32 [n] of item ids int64 [n]."""
        state = self.state
        rows = state.items.find(ids)
        item, content = state.vectors(rows)
        ctx = np.zeros(len(ids), np.int64)
        alike = matches(context.past, context.entries, [ids, *state.ids(rows)[1:]], ctx)
        numbers = np.concatenate((state.numbers(rows, context.now_ms), alike), axis=1)
        near = neighbour_numbers(state.similar(context.past.items, ids, context.now_ms))
        logits = state.ranker(
            context.inputs,
            Items(item, content, torch.from_numpy(numbers), torch.from_numpy(near), None, torch.from_numpy(ctx)),
            context.mean,
        )
        p = probabilities(logits, self._feedback).numpy()
        weigh = context.scoring
        gain = weigh.click + weigh.watch * p[:, WATCH] + weigh.purchase * p[:, PURCHASE]
        return p, p[:, CLICK] * gain
