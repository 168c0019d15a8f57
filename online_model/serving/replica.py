"""A replica: the model as of one version, and the answers it gives.

`apply`, `rank` and `recommend` are synchronous and belong on one thread (the event loop's): each sees whole versions
only. Scoring never writes: an unknown user or item is scored with the default row and allocates nothing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from embedding_store.delta import Version
from embedding_store.faults import fault
from embedding_store.ids import feature_id, feature_ids
from online_model.features import ITEM
from online_model.feedback import strategy
from online_model.ranker import CLICK, PURCHASE, WATCH
from online_model.serving.alike import alike
from online_model.serving.api import (
    Alike,
    Explanation,
    ModelInfo,
    Ranked,
    Ranking,
    RankRequest,
    Recommendation,
    RecommendRequest,
    Shown,
    SimilarItems,
    SimilarQuery,
)
from online_model.serving.approximate import Index
from online_model.serving.candidates import Neighbours, Newest, Popular, Source, union
from online_model.serving.errors import NotReady, VersionGap
from online_model.serving.explain import explained, moves
from online_model.serving.explore import Draw, Epsilon, Softmax, Thompson, fill
from online_model.serving.filters import allowed
from online_model.serving.live import Action, Coverage, LiveUsers, marks_of
from online_model.serving.policy import Chosen, PolicyInForce
from online_model.serving.rerank import Rules
from online_model.serving.scoring import Asked, Scored, Scorer
from online_model.serving.settings import ReplicaSettings, Scoring
from online_model.serving.state import State
from online_model.settings import FeatureSettings, RankerSettings


def wall_clock_ms() -> int:
    """The time, ms UTC."""
    return time.time_ns() // 1_000_000


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
        timer: Callable[[], float] = time.perf_counter,
        live: LiveUsers | None = None,
    ) -> None:
        """`features`, `ranker`, `feedback`: as the trainer has them (`settings` in a version's info). `timer`: seconds,
        of the deadlines. `live`: what users did that no version holds yet; the replicas before and after this one may
        share it."""
        self.settings = settings
        self.coverage = Coverage()
        self.policy = PolicyInForce(settings)  # of its own until a holder gives it that of the process
        how = strategy(feedback, entire=ranker.entire_space)
        self.state = State(features, ranker, len(how.extra), settings.rows)
        self._scorer = Scorer(self.state, how, timer, live, self.coverage)
        self.index = Index(self.state, settings)
        self.sources: list[Source] = [
            self.index,
            Neighbours(self.state, settings.neighbours),
            Newest(self.state, settings.newest),
            Popular(self.state, settings.popular),
        ]
        self.epoch, self.sequence, self.created_ms = 0, -1, 0
        self._clock = clock
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
        cards, marks = self.state.check(version), marks_of(version)
        fault("apply.checked")
        self.state.change(version, cards)
        fault("apply.changed")
        self.epoch, self.sequence, self.created_ms = version.epoch, version.sequence, version.created_ms
        self._applied_ms = self._clock()
        self._positions = {str(partition): offset for partition, offset in version.positions.items()}
        self._info = version.info
        self.coverage.advance(version, marks)
        fault("apply.done")
        return True

    def prepare(self) -> None:
        """What the first requests would wait for is made now. Not for a thread that serves others meanwhile."""
        self.index.prepare(self._clock())

    @torch.inference_mode()
    def rank(self, request: RankRequest, deadline: float | None = None) -> Ranking:
        """Scores of the candidates (as they are given, known or not), the best first. Raises NotReady.

        Past the deadline (seconds of the timer) what is not scored yet is put behind by retrieval's affinity.
        """
        self._need_model()
        chosen = self.policy.of(request.user)
        asked = self._scorer.asked(request.user, request.scenario, request.context, self._clock())
        ids = feature_ids(ITEM, request.candidates)
        weigh = chosen.scoring(request.scenario)
        scored = self._scorer.scored(asked, ids, weigh, deadline)
        order = scored.order.tolist()
        why = self._explanations(request.explain, asked, scored, weigh, order, [[] for _ in order])
        figures = _figures(scored, scored.order)
        ranked = [
            Ranked(request.candidates[i], *numbers, one) for i, numbers, one in zip(order, figures, why, strict=True)
        ]
        return Ranking(**self._answer(asked, chosen, scored), items=ranked)

    @torch.inference_mode()
    def recommend(self, request: RecommendRequest, deadline: float | None = None) -> Recommendation:
        """At most k items that pass the filters, by the policy of the user's arm; none where none passes. Raises
        NotReady. Past the deadline what is not scored yet is left out."""
        self._need_model()
        state, chosen = self.state, self.policy.of(request.user)
        if not len(state.cards):
            raise NotReady("no item can be recommended yet: send the catalogue to the topic `items`")
        asked = self._scorer.asked(request.user, request.scenario, request.context, self._clock())
        filtered = allowed(state, request.filters, asked.past.items[0])
        ids = union(self.sources, self._scorer.query(asked, filtered))
        slots = state.cards.find(ids)
        there = (state.cards.available if filtered is None else filtered.slots)[slots]
        ids, slots = ids[there], slots[there]
        weigh = chosen.scoring(request.scenario)
        scored = self._scorer.scored(asked, ids, weigh, deadline)
        best = scored.order[: scored.reached]
        of = chosen.reranking, state.cards.category[slots[best]], state.cards.seller[slots[best]]
        page = fill(request.k, len(best), Rules(*of), self._draw(chosen, scored, weigh, request.k), chosen.rng)
        shown = best[page.shown]
        rules = moves(page, Rules(*of)) if request.explain else []
        why = self._explanations(request.explain, asked, scored, weigh, shown.tolist(), rules)
        places = [
            Shown(state.cards.raw[slot], *numbers, one, position=place, propensity=propensity)
            for place, (slot, numbers, one, propensity) in enumerate(
                zip(slots[shown].tolist(), _figures(scored, shown), why, page.propensities, strict=True)
            )
        ]
        return Recommendation(**self._answer(asked, chosen, scored), candidates=scored.reached, items=places)

    @torch.inference_mode()
    def similar(self, item: str | int, query: SimilarQuery) -> SimilarItems:
        """At most k available items like one, by the sum of both similarities. Raises NotReady, UnknownItem."""
        self._need_model()
        now_ms, raw = self._clock(), self.state.cards.raw
        pairs = alike(self.state, self.index, item, query.k, now_ms)
        items = [
            Alike(raw[slot], together + cosine, together, cosine)
            for slot, together, cosine in zip(
                pairs.slots.tolist(), pairs.together.tolist(), pairs.alike.tolist(), strict=True
            )
        ]
        slot = self.state.cards.find(np.array([feature_id(ITEM, item)], np.int64))[0]
        return SimilarItems(raw[slot] if slot else item, **self._model(now_ms), items=items)

    def _draw(self, chosen: Chosen, scored: Scored, weigh: Scoring, k: int) -> Draw:
        """Of the candidates that are scored, the best first."""
        how, best = chosen.exploration, scored.order[: scored.reached]
        if how.policy == "epsilon" or not len(best):
            return Epsilon(how.epsilon)
        if how.policy == "softmax":
            return Softmax(scored.score[best], how.temperature)
        sd = self._scorer.spread(scored.p[best], scored.ids[best], weigh, how.doubt)
        return Thompson(scored.score[best].astype(np.float64), sd, k)

    def _explanations(
        self, wanted: bool, asked: Asked, scored: Scored, weigh: Scoring, which: list[int], rules: list[list[str]]
    ) -> list[Explanation | None]:
        if not wanted or not which:
            return [None] * len(which)
        return explained(self._scorer, asked, scored, weigh, which, rules)

    def _model(self, now_ms: int) -> dict[str, Any]:
        """What each answer says of the model."""
        return {
            "model_version": self.version, "model_age_ms": max(0, now_ms - self.created_ms),
            "learned_to_ms": int(self._info.get("event_time_ms", 0)),
        }  # fmt: skip

    def _answer(self, asked: Asked, chosen: Chosen, scored: Scored) -> dict[str, Any]:
        """The fields of `Answer`."""
        return self._model(asked.now_ms) | {
            "request_id": uuid.uuid4().hex, "feature_hash": asked.feature_hash, "moment_ms": asked.now_ms,
            "arm": chosen.arm, "degraded": scored.reached < len(scored.ids),
        }  # fmt: skip

    def info(self) -> ModelInfo:
        """Which version this is, and what came with it."""
        return ModelInfo(
            self.version, self.epoch, self.sequence, self.created_ms, self._applied_ms, self._positions, self.rows(),
            self._info, self.policy.fingerprint,
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

    def holds(self, user: int, action: Action) -> bool | None:
        """Whether the row of `user` (feature id) is from after `action`; None: there is no row."""
        known = self.state.users.find(np.array([user], np.int64))[0]
        return self.coverage.holds(user, action) if known else None

    def _need_model(self) -> None:
        if self.sequence < 0:
            raise NotReady("no model yet: is the trainer running?")


def _figures(scored: Scored, which: np.ndarray) -> Iterator[tuple[float, float, float, float]]:
    """Score, click, watch and purchase of the candidates `which`."""
    click, watch, purchase = (scored.p[which, head].tolist() for head in (CLICK, WATCH, PURCHASE))
    return zip(scored.score[which].tolist(), click, watch, purchase, strict=True)
