"""Several streams of one log, joined or cut into batches otherwise, and one set of what all are measured on.

Each has batches of its own, and what learns it learns those. Measured are

- the examples (request and item) that all have, with the features that each stream's own joiner gave them;
- as a click where any of them has joined one: the others have missed what the user did;
- at one moment of event time in all: when the first of them has the example complete. Else one that waits longer would
  have learned, until it scores, clicks that the others cannot know;
- beside negatives, and at ranked positions, that were drawn once, from one of them: the one whose key sorts first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from embedding_store.errors import UsageError
from online_model.batch import candidates_of
from online_model.examples import Examples, Part
from replay.comparison.harness import Scores
from replay.comparison.stream import OTHERS, Batch, Labelled, Positions, Stream


@dataclass
class _Side:
    """What one stream is scored on."""

    stream: Stream  # its batches, with what is measured in `scored` and `ranked`
    order: np.ndarray  # int64 [n] which of the candidates each score is of
    position_order: np.ndarray  # int64 [m] and each ranked position


@dataclass
class Sides:
    """The streams by their key, and what is said of them."""

    by_key: dict[bytes, _Side]
    key: bytes  # of the one that negatives and positions are drawn from
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def drawn_from(self) -> Stream:
        return self.by_key[self.key].stream

    def in_one_order(self, scores: Scores, key: bytes) -> Scores:
        """The scores on the stream `key`, in the order of `drawn_from`."""
        own, first = self.by_key[key], self.by_key[self.key]
        return replace(
            scores, score=_reordered(scores.score, own.order, first.order),
            ranked={
                name: _reordered(values, own.position_order, first.position_order)
                for name, values in scores.ranked.items()
            },
        )  # fmt: skip


def _reordered(values: np.ndarray, order: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    by_id = np.empty_like(values)
    by_id[order] = values
    return by_id[wanted]


def align(streams: Mapping[bytes, Stream]) -> Sides:
    """What is measured is the same in all. Raises UsageError where they have no example in common."""
    key = min(streams)
    if len(streams) == 1:
        stream = streams[key]
        scores = sum(len(batch.scored.label) for batch in stream.batches)
        positions = sum(len(batch.ranked.user) for batch in stream.batches if batch.ranked is not None)
        return Sides({key: _Side(stream, np.arange(scores), np.arange(positions))}, key)
    shown = {name: _Shown.of(stream) for name, stream in streams.items()}
    common = shown[key].once()
    for one in shown.values():
        common = common[np.isin(common, one.once())]
    if not len(common):
        raise UsageError("the settings have no example in common: nothing can be compared; look at their [join]")
    exam = _Exam.of(streams[key], common)
    chosen = {name: one.of_examples(common) for name, one in shown.items()}
    labels = np.stack([one.label for one in chosen.values()])
    exam.label = labels.max(0)
    complete = np.stack([one.rows.closed for one in chosen.values()]).min(0)
    sides = {name: _side(streams[name], chosen[name], exam, complete) for name in streams}
    about = {
        "examples": len(common),
        "left_out": {name: len(one.label) - len(common) for name, one in shown.items()},
        "clicks_that_not_all_have": int((labels.min(0) != exam.label).sum()),
    }
    return Sides(sides, key, about)


@dataclass
class _Shown:
    """The rows SHOWN of a stream that it is measured on."""

    rows: Examples
    label: np.ndarray  # float32 [n] as it turned out
    batch: np.ndarray  # int64 [n] the number of its batch

    @staticmethod
    def of(stream: Stream) -> _Shown:
        rows, labels, numbers = [], [], []
        for batch in stream.batches:
            own = batch.scored.example != 0
            shown = batch.rows.take(batch.rows.part == Part.SHOWN)
            rows.append(shown.take(np.isin(shown.example_id, batch.scored.example[own])))
            labels.append(batch.scored.label[own])
            numbers.append(np.full(len(rows[-1]), batch.number))
        return _Shown(Examples.concat(rows), np.concatenate(labels), np.concatenate(numbers))

    def once(self) -> np.ndarray:
        """The examples, in order of the stream, without those whose name was used again."""
        examples, count = np.unique(self.rows.example_id, return_counts=True)
        return self.rows.example_id[~np.isin(self.rows.example_id, examples[count > 1])]

    def of_examples(self, examples: np.ndarray) -> _Shown:
        order = np.argsort(self.rows.example_id, kind="stable")
        at = order[np.searchsorted(self.rows.example_id, examples, sorter=order)]
        return _Shown(self.rows.take(at), self.label[at], self.batch[at])


@dataclass
class _Exam:
    """What is measured, by the number of its example in `common` [n]."""

    known: np.ndarray  # bool [n]
    label: np.ndarray  # float32 [n]
    beside: np.ndarray  # int64 [m] numbers of the examples that negatives stand beside
    drawn: np.ndarray  # int64 [m, k] these, their items …
    drawn_known: np.ndarray  # bool [m, k] … and whether each had been seen
    ranked: np.ndarray  # int64 [p] numbers of the examples ranked among others
    among: np.ndarray  # int64 [p, OTHERS] these
    ranked_known: np.ndarray  # bool [p]

    @staticmethod
    def of(stream: Stream, common: np.ndarray) -> _Exam:
        """As drawn in `stream`; `common`: examples, in its order."""
        order = np.argsort(common, kind="stable")

        def numbers(examples: np.ndarray) -> np.ndarray:
            """−1 where an example is not common."""
            at = order[np.minimum(np.searchsorted(common, examples, sorter=order), len(common) - 1)]
            return np.where(common[at] == examples, at, -1)

        known = np.zeros(len(common), bool)
        parts: dict[str, list[np.ndarray]] = {"beside": [], "drawn": [], "drawn_known": [], "ranked": [],
                                              "among": [], "ranked_known": []}  # fmt: skip
        for batch in stream.batches:
            scored, own = batch.scored, batch.scored.example != 0
            at = numbers(scored.example[own])
            known[at[at >= 0]] = scored.known[own][at >= 0]
            measured = batch.beside[np.isin(batch.beside, scored.example[own])]
            beside = numbers(measured)
            kept = beside >= 0
            parts["beside"].append(beside[kept])
            width = batch.drawn.shape[1] if batch.drawn.size else 0
            if width and len(measured):
                drawn = scored.take(np.flatnonzero(~own))
                parts["drawn"].append(drawn.candidates.item.reshape(-1, width)[kept])
                parts["drawn_known"].append(drawn.known.reshape(-1, width)[kept])
            if batch.ranked is not None:
                ranked = numbers(_example_of(batch))
                there = ranked >= 0
                parts["ranked"].append(ranked[there])
                items = batch.ranked.candidates.item.reshape(-1, 1 + OTHERS)
                parts["among"].append(items[there, 1:])
                parts["ranked_known"].append(batch.ranked.known[there])
        empty = {"beside": np.empty(0, np.int64), "drawn": np.empty((0, 0), np.int64), "drawn_known":
                 np.empty((0, 0), bool), "ranked": np.empty(0, np.int64), "among": np.empty((0, OTHERS), np.int64),
                 "ranked_known": np.empty(0, bool)}  # fmt: skip
        joined = {name: np.concatenate(some) if some else empty[name] for name, some in parts.items()}
        return _Exam(known, np.empty(0, np.float32), **joined)


def _example_of(batch: Batch) -> np.ndarray:
    """The examples of the positions that are ranked in a batch, int64 [m]."""
    assert batch.ranked is not None
    order = np.argsort(batch.rows.row_id, kind="stable")
    return batch.rows.example_id[order[np.searchsorted(batch.rows.row_id, batch.ranked.row_id, sorter=order)]]


def _side(stream: Stream, own: _Shown, exam: _Exam, complete: np.ndarray) -> _Side:
    """The stream's batches, each with what is scored before it: what is complete by its end, and was not before.

    complete: int64 [n] ms of event time from which an example is complete in one of the streams.
    """
    ends = np.maximum.accumulate([batch.to_ms for batch in stream.batches])
    when = np.minimum(np.searchsorted(ends, complete), own.batch)
    n, width = len(complete), exam.drawn.shape[1]
    orders, position_orders, batches = [], [], []
    for batch in stream.batches:
        at = np.flatnonzero(when == batch.number)
        rows = own.rows.take(at)
        beside = np.flatnonzero(when[exam.beside] == batch.number) if width else np.empty(0, np.int64)
        drawn = exam.drawn[beside]
        candidates, every, _ = candidates_of(rows, np.searchsorted(at, exam.beside[beside]), drawn)
        label, example = exam.label[at][every], rows.example_id[every]
        label[len(at) :] = example[len(at) :] = 0
        known = np.concatenate((exam.known[at], exam.drawn_known[beside].ravel()))
        scored = Labelled(candidates, label, rows.user[every], rows.ts[every], example, known)
        orders += [at, (n + beside[:, None] * width + np.arange(width)).ravel()]
        ranked = np.flatnonzero(when[exam.ranked] == batch.number)
        position_orders.append(ranked)
        positions = _positions(own.rows.take(exam.ranked[ranked]), exam, ranked) if len(ranked) else None
        batches.append(replace(batch, scored=scored, ranked=positions))
    return _Side(replace(stream, batches=batches), np.concatenate(orders), np.concatenate(position_orders))


def _positions(rows: Examples, exam: _Exam, ranked: np.ndarray) -> Positions:
    c, every, _ = candidates_of(rows, np.arange(len(rows)), exam.among[ranked])
    order = np.argsort(every, kind="stable")  # each click before its others
    candidates = replace(c, item=c.item[order], ctx=c.ctx[order], position=np.full(len(order), -1, np.int64))
    return Positions(candidates, rows.user, rows.row_id, exam.ranked_known[ranked])
