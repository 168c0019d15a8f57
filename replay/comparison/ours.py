"""Headrace itself in the comparison: the very trainer, and serving copies that follow it at intervals.

One trainer learns the stream, whoever of `headrace`, `frozen` and `retrained` asks for it first. What serves is a copy:
kept up with the trainer after every batch, or only now and then, as the interval says. Training is deterministic, so a
model that is trained from scratch, one epoch in the order of the stream, is bit for bit the online model of that
moment: `retrained` takes it from there, and twenty trainings cost one (test_comparison_ours.py trains them apart).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from embedding_store.errors import UsageError
from embedding_store.tables import EmbeddingTables
from online_model.batch import Candidates
from online_model.catalogue import CatalogueItem
from online_model.examples import Block, Examples
from online_model.features import table_specs
from online_model.ranker import CLICK, Ranker
from online_model.settings import TrainerSettings
from online_model.trainer import Trainer, feedback_of
from replay.comparison.stream import Batch

# One in so many positives is ranked among so many others by the trainer itself, to know which way to go by.
RANKED_OF, RANKED_AMONG = 8, 50


class Model:
    """A trainer without a store: all rows in memory, no commits."""

    def __init__(self, settings: TrainerSettings) -> None:
        self.ranker = Ranker(settings.features.dim, settings.ranker, len(feedback_of(settings).extra))
        self.tables = EmbeddingTables(table_specs(settings.features))
        self.trainer = Trainer(settings, self.tables, self.ranker, None, lambda: 0)
        self._blocks = 0

    def learn(self, rows: Examples) -> None:
        """One step: the rows are a batch. Raises UsageError where a table is full: an id would be learned by nobody."""
        at = self._blocks
        self._blocks += 1
        self.trainer.offer(Block(0, at, at + 1, at + 1, int(rows.closed.max()), examples=rows), at)
        while self.trainer.step():
            pass
        if any(self.tables.dropped(table) for table in self.tables.specs):
            sizes = self.trainer.settings.features
            raise UsageError(
                f"the tables are too small for this log: raise model.features.users ({sizes.users:,}), items"
                f" ({sizes.items:,}) or categories ({sizes.categories:,})"
            )

    def score(self, candidates: Candidates) -> np.ndarray:
        """Probabilities of a click, float64 [N]."""
        if not len(candidates.item):  # a batch of purchases alone
            return np.empty(0)
        p, _ = self.trainer.score(candidates)
        return p[:, CLICK].astype(np.float64)

    def order(self, candidates: Candidates, way: int) -> np.ndarray:
        """What is next, float64 [N], by one of WAYS."""
        _, ways = self.trainer.score(candidates)
        return ways[:, way].astype(np.float64)


class Leader:
    """The model that learns, batch by batch, and what of it has changed for each that follows.

    Its users call `learn` with every batch, in order; the first of them makes it learn.
    """

    def __init__(self, settings: TrainerSettings) -> None:
        if not settings.ranked_of:
            settings = msgspec.structs.replace(settings, ranked_of=RANKED_OF, ranked_among=RANKED_AMONG)
        self.settings, self.model = settings, Model(settings)
        self._learned = self._told = -1
        self._followers: list[Copy] = []

    def copy(self) -> Copy:
        """A serving copy, as the model is now; `Copy.sync` brings it up to date."""
        if self._learned >= 0:
            raise ValueError("a copy follows from the beginning")
        self._followers.append(copy := Copy(self))
        return copy

    def catalogue(self, batch_number: int, items: Sequence[CatalogueItem]) -> None:
        if items and batch_number > self._told:
            self.model.trainer.catalogue(items)
            self._told = batch_number
            self._note()

    def learn(self, batch: Batch) -> None:
        if batch.number <= self._learned:
            return
        self._learned = batch.number
        self.model.learn(batch.rows)
        self._note()

    def _note(self) -> None:
        """Tells the followers which rows have changed."""
        if not self._followers:
            return
        tables = self.model.tables
        touched, gone = {name: rows.ids for name, rows in tables.touched().items()}, tables.gone()
        tables.clear_touched()
        for follower in self._followers:
            follower.note(touched, gone)


class Copy:
    """A serving copy of a leader's model: what is copied at a `sync` is what has changed since the last one."""

    def __init__(self, leader: Leader) -> None:
        self._leader, self._model, self._way = leader, Model(leader.settings), 0
        self._changed: dict[str, list[np.ndarray]] = {}
        self._gone: dict[str, list[np.ndarray]] = {}
        self.syncs = self.rows = 0

    def score(self, candidates: Candidates) -> np.ndarray:
        """As `Model.score`, of the model of the last sync."""
        return self._model.score(candidates)

    def order(self, candidates: Candidates) -> np.ndarray:
        return self._model.order(candidates, self._way)

    def note(self, touched: dict[str, np.ndarray], gone: dict[str, np.ndarray]) -> None:
        for kept, new in ((self._changed, touched), (self._gone, gone)):
            for table, ids in new.items():
                kept.setdefault(table, []).append(ids)

    def sync(self) -> None:
        """Scores are the leader's from now on."""
        source, own = self._leader.model, self._model
        for table, parts in self._gone.items():
            own.tables.forget(table, np.concatenate(parts))
        for table, parts in self._changed.items():
            ids = np.unique(np.concatenate(parts))
            at = source.tables.rows(table, ids, admit=False)
            ids, at = ids[at > 0], at[at > 0]
            mine = own.tables.rows(table, ids, admit=True, at_once=True)
            own.tables.write_rows(table, mine, source.tables.read_rows(table, at))
            self.rows += len(ids)
        own.ranker.load_weights(source.ranker.weights())
        self._way = source.trainer.next_way
        own.tables.clear_touched()
        self._changed, self._gone = {}, {}
        self.syncs += 1


class Online:
    """Headrace: what serves has learned all that came before the batch."""

    probabilistic = True

    def __init__(self, leader: Leader) -> None:
        self._leader, self._next = leader, 0

    def catalogue(self, items: Sequence[CatalogueItem]) -> None:
        self._leader.catalogue(self._next, items)

    def score(self, candidates: Candidates) -> np.ndarray:
        return self._leader.model.score(candidates)

    def order(self, candidates: Candidates) -> np.ndarray:
        model = self._leader.model
        return model.order(candidates, model.trainer.next_way)

    def learn(self, batch: Batch) -> None:
        self._next = batch.number + 1
        self._leader.learn(batch)


class Following:
    """A copy that is brought up to date when `due` says so, after a batch was learned."""

    probabilistic = True

    def __init__(self, leader: Leader, due: Callable[[Batch], bool]) -> None:
        self._leader, self.copy, self._due, self._next = leader, leader.copy(), due, 0

    def catalogue(self, items: Sequence[CatalogueItem]) -> None:
        self._leader.catalogue(self._next, items)

    def score(self, candidates: Candidates) -> np.ndarray:
        return self.copy.score(candidates)

    def order(self, candidates: Candidates) -> np.ndarray:
        return self.copy.order(candidates)

    def learn(self, batch: Batch) -> None:
        self._next = batch.number + 1
        self._leader.learn(batch)
        if self._due(batch):
            self.copy.sync()


def frozen(leader: Leader, batches: int, warm_up: float = 0.2) -> Following:
    """Headrace that has learned the first part of `batches`, and serves so to the end. Until then it is online."""
    last = max(1, round(batches * warm_up)) - 1
    return Following(leader, lambda batch: batch.number <= last)


def retrained(leader: Leader, batches: int, points: int = 20) -> Following:
    """Headrace trained from scratch at `points` equal points of the stream, over all that came before."""
    at = {max(1, round(batches * (n + 1) / points)) - 1 for n in range(points)}
    return Following(leader, lambda batch: batch.number in at)
