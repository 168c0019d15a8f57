"""The stream that all systems are shown: batches of joined examples, with the candidates that each is scored on.

A log goes through the very joiners, and its rows leave in the order of (closing time, example id), as in a
deterministic replay: the batches are those that its trainer would take. What was shown is scored; in a log without
impressions each positive and the negatives that the trainer draws for it. All of it is made once and kept (some 400
bytes a row), so that every system sees the same bytes, whatever the others do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from embedding_store.errors import UsageError
from online_model.batch import Candidates, candidates_of
from online_model.catalogue import CatalogueItem
from online_model.examples import Examples, Part, Source
from online_model.features import mix
from online_model.negatives import RecentItems
from online_model.positions import RowQueue
from online_model.settings import TrainerSettings
from replay.joining import JoinedLog
from replay.readers import Record
from streams.events import Item
from streams.joiner import JoinSettings

RANKED = 5_000  # positions at which a positive is ranked among others
OTHERS = 200  # that it is ranked among


@dataclass
class Labelled:
    """N candidates, and what is known of them."""

    candidates: Candidates
    label: np.ndarray  # float32 [N] 1: clicked, 0: not
    user: np.ndarray  # int64 [N] ids
    ts: np.ndarray  # int64 [N] ms UTC
    example: np.ndarray  # int64 [N] ids, 0: drawn
    known: np.ndarray  # bool [N] its item had been seen before this batch

    def take(self, index: np.ndarray) -> Labelled:
        """The candidates at `index`, of the same contexts."""
        c = self.candidates
        candidates = replace(c, item=c.item[index], ctx=c.ctx[index], position=c.position[index])
        return Labelled(candidates, *(column[index] for column in _columns(self)))


@dataclass
class Positions:
    """m moments at which somebody clicked: the item clicked, then OTHERS that were active before it."""

    candidates: Candidates  # of m contexts, [m · (1 + OTHERS)]
    user: np.ndarray  # int64 [m]
    row_id: np.ndarray  # int64 [m]
    known: np.ndarray  # bool [m] the item clicked had been seen before this batch


@dataclass
class Batch:
    """What comes at once: scored as a whole, then learned."""

    number: int
    catalogue: list[CatalogueItem]  # known from before it on
    rows: Examples  # as the joiner made them, in all parts
    scored: Labelled  # what was shown, or done and drawn; labels as they turned out in the end
    lessons: (
        Labelled  # what a learner of clicks learns now, in the order of the rows, each with its negatives behind it
    )
    # The negatives: examples [m] that they stand beside, in the order of `scored`, and their items [m, k].
    beside: np.ndarray
    drawn: np.ndarray
    ranked: Positions | None = None

    @property
    def to_ms(self) -> int:
        """Event time at its end."""
        return int(self.rows.closed.max())


@dataclass
class Stream:
    """All batches of a log, in order."""

    batches: list[Batch] = field(default_factory=list)
    implicit: bool = False  # without impressions: negatives are drawn
    events: int = 0  # an impression of k items as k
    rejected: int = 0
    items: int = 0  # distinct, of what is scored
    users: int = 0


def read_stream(
    records: Iterable[Record],
    join: JoinSettings,
    model: TrainerSettings,
    partitions: int,
    limit: int | None = None,
    progress: Callable[[int], None] = lambda events: None,
    from_ms: int | None = None,
) -> Stream:
    """The stream of `records` (by time), at most the first `limit` events of them. `progress` is told of each slice.

    `from_ms`: what was shown before is learned, and neither scored nor ranked. Nothing is downsampled, whatever
    `join.unclicked_of` says. Raises UsageError where there is nothing to score.
    """
    stream = Stream(implicit=join.implicit)
    log = JoinedLog(join, partitions)
    queue, makes = RowQueue(partitions), _Maker(model)
    pending: list[CatalogueItem] = []
    for items, blocks in log.slices(_first(records, limit)):
        pending += items
        for block in blocks:
            queue.offer(block, 0)
        while (rows := queue.take(model.batch_size, drain=False)) is not None:
            stream.batches.append(makes.batch(rows, pending))
            pending = []
        queue.finished()
        progress(log.events)
    for block in log.close():
        queue.offer(block, 0)
    while (rows := queue.take(model.batch_size, drain=True)) is not None:
        stream.batches.append(makes.batch(rows, pending))
        pending = []
    stream.events, stream.rejected = log.events, log.counts().rejected
    _settle(stream, from_ms)
    _choose_positions(stream, model, from_ms)
    return stream


def _first(records: Iterable[Record], limit: int | None) -> Iterator[Record]:
    """Up to the `limit`-th event; records of the catalogue are none."""
    if limit is None:
        yield from records
        return
    left = limit
    for record in records:
        if not isinstance(record, Item):
            if not left:
                return
            left -= 1
        yield record


class _Maker:
    """Rows to batches. The negatives are the trainer's own: the same items, by the same hash."""

    def __init__(self, model: TrainerSettings) -> None:
        self._model, self._number = model, itertools.count()
        self._recent = RecentItems(model.recent_items)

    def batch(self, rows: Examples, catalogue: list[CatalogueItem]) -> Batch:
        said = rows.take(rows.click >= 0)
        shown = said.part == Part.SHOWN
        implicit = np.flatnonzero(shown & (said.source == Source.IMPLICIT))
        model = self._model
        drawn = self._recent.draw(said.row_id[implicit], said.item[implicit], model.negatives, model.seed)
        self._recent.push(rows.item[rows.part == Part.SHOWN])
        if not drawn.size and len(implicit):  # nothing to hold the very first positives against
            said, drawn = said.take(shown & (said.source == Source.IMPRESSION)), drawn[:0]
            shown, implicit = said.part == Part.SHOWN, implicit[:0]
        number = next(self._number)
        return Batch(
            number, catalogue, rows, _scored(said, shown, implicit, drawn), _lessons(said, implicit, drawn),
            said.example_id[implicit], drawn,
        )  # fmt: skip


def _scored(said: Examples, shown: np.ndarray, implicit: np.ndarray, drawn: np.ndarray) -> Labelled:
    """The rows SHOWN, then the negatives."""
    place = np.cumsum(shown) - 1
    return _labelled(said.take(shown), place[implicit], drawn)


def _lessons(said: Examples, implicit: np.ndarray, drawn: np.ndarray) -> Labelled:
    """All that say something about a click, each with its negatives behind it."""
    every = _labelled(said, implicit, drawn)
    order = np.argsort(np.concatenate((np.arange(len(said)), np.repeat(implicit, drawn.shape[1]))), kind="stable")
    return every.take(order)


def _columns(labelled: Labelled) -> tuple[np.ndarray, ...]:
    return labelled.label, labelled.user, labelled.ts, labelled.example, labelled.known


def _labelled(rows: Examples, implicit: np.ndarray, drawn: np.ndarray) -> Labelled:
    candidates, every, _ = candidates_of(rows, implicit, drawn)
    label = rows.click[every].astype(np.float32)
    example = rows.example_id[every]
    label[len(rows) :] = example[len(rows) :] = 0
    return Labelled(candidates, label, rows.user[every], rows.ts[every], example, np.zeros(len(every), bool))


def _settle(stream: Stream, from_ms: int | None) -> None:
    """Labels as they turned out: a click that came after its example was learned makes it a positive all the same.

    What was shown before `from_ms` is not scored.
    """
    late = [b.rows.example_id[b.rows.part == Part.LATE_CLICK] for b in stream.batches]
    clicked = np.unique(np.concatenate(late)) if late else np.empty(0, np.int64)
    seen = np.empty(0, np.int64)
    for batch in stream.batches:
        batch.scored.label[np.isin(batch.scored.example, clicked)] = 1
        batch.scored.known = np.isin(batch.scored.candidates.item, seen)
        seen = np.union1d(seen, batch.scored.candidates.item)
        if from_ms is not None:
            batch.scored = batch.scored.take(np.flatnonzero(batch.scored.ts >= from_ms))
    scored = [batch.scored for batch in stream.batches]
    if not 0 < sum(part.label.sum() for part in scored) < sum(len(part.label) for part in scored):
        raise UsageError(
            "there is nothing to score in this log, or it is all clicks or none: take more of it, or a log with both"
        )
    stream.users = len(np.unique(np.concatenate([part.user for part in scored])))
    stream.items = len(np.unique(np.concatenate([part.candidates.item for part in scored])))


def _choose_positions(stream: Stream, model: TrainerSettings, from_ms: int | None) -> None:
    """RANKED clicks on what was shown from `from_ms` on, chosen by the hash of seed and row id, and for each OTHERS
    active items of before its batch.

    Only where so many are known. The others are distinct, and drawn evenly: neither by popularity nor from all items.
    """
    start = np.iinfo(np.int64).min if from_ms is None else from_ms
    recent, found = RecentItems(model.recent_items), []
    salt = mix(np.array([model.seed], np.int64))[0]
    for batch in stream.batches:
        rows = batch.rows
        shown = (rows.part == Part.SHOWN) & (rows.click == 1) & (rows.ts >= start)
        if len(recent) > OTHERS:
            ids = rows.row_id[shown]
            found.append(np.stack((mix(ids ^ salt.astype(np.int64)), ids.view(np.uint64)), 1))
        recent.push(rows.item[rows.part == Part.SHOWN])
    keys = np.concatenate(found) if found else np.empty((0, 2), np.uint64)
    chosen = np.sort(keys[np.argsort(keys[:, 0], kind="stable")[:RANKED], 1])
    recent, seen = RecentItems(model.recent_items), np.empty(0, np.int64)
    for batch in stream.batches:
        rows = batch.rows
        at = np.flatnonzero(
            (rows.part == Part.SHOWN) & (rows.click == 1) & np.isin(rows.row_id.view(np.uint64), chosen)
        )
        if len(at) and len(recent) > OTHERS:
            batch.ranked = _positions(rows.take(at), recent.items(), seen, salt)
        seen = np.union1d(seen, rows.item)
        recent.push(rows.item[rows.part == Part.SHOWN])


def _positions(rows: Examples, active: np.ndarray, seen: np.ndarray, salt: np.uint64) -> Positions:
    drawn = np.empty((len(rows), OTHERS), np.int64)
    for i, (row_id, item) in enumerate(zip(rows.row_id.view(np.uint64), rows.item, strict=True)):
        others = active[active != item]
        dice = np.random.default_rng([int(salt), int(row_id)])
        drawn[i] = others[dice.choice(len(others), OTHERS, replace=False)]
    c, every, _ = candidates_of(rows, np.arange(len(rows)), drawn)
    order = np.argsort(every, kind="stable")  # each click before its others
    candidates = replace(c, item=c.item[order], ctx=c.ctx[order], position=np.full(len(order), -1, np.int64))
    return Positions(candidates, rows.user, rows.row_id, np.isin(rows.item, seen))
