"""A log as decisions: each item that was shown, where, with which propensity, and what it earned.

The log goes through the very joiner, which says what was clicked, watched and bought of what was shown; the rest is
read from the impressions themselves. An impression of k items is k decisions, one for each place:
- its propensity is the item's chance to be put in this place, given the places before it on the page (what a replica
  logs, online_model/serving/explore.py; of an impression of one item simply its chance);
- who could have been put there are the items of the log less those in the places before;
- decisions of one user depend on each other, so a user is a cluster; of one request, where a log knows no users.
So what is estimated is one place at a time: the pages before it are as they were logged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from embedding_store.errors import UsageError
from embedding_store.ids import feature_id
from online_model.catalogue import CatalogueItem
from online_model.examples import Examples, Part, example_id, request_name
from online_model.features import ITEM, USER
from online_model.positions import RowQueue
from replay.joining import JoinedLog
from replay.readers import LogReader, Record, in_time_order
from streams.events import SCENARIOS, Impression
from streams.joiner import JoinSettings

Reward: TypeAlias = Literal["click", "watch", "purchase"]
Id: TypeAlias = str | int
MAX_PLACE = 1_000  # places past it are one


@dataclass
class Decisions:
    """n decisions by time, those of a page together, the first place first. `items`: of the log, A of them; `item`
    points into it."""

    items: list[Id]
    item: np.ndarray  # int64 [n]
    place: np.ndarray  # int64 [n] on the page, from 0; 0 where the log does not say
    scenario: np.ndarray  # int64 [n]
    propensity: np.ndarray  # float64 [n] nan: not logged
    reward: np.ndarray  # float64 [n] click, purchase: 0 or 1; watch: seconds of the longest play
    ts: np.ndarray  # int64 [n] ms UTC
    page: np.ndarray  # int64 [n] the impression
    cluster: np.ndarray  # int64 [n] the user, or the request
    example: np.ndarray  # int64 [n] example id

    def __len__(self) -> int:
        return len(self.item)

    def at(self, chosen: np.ndarray) -> Decisions:
        """Those at the mask `chosen`, bool [n]."""
        return Decisions(self.items, *(getattr(self, f.name)[chosen] for f in fields(self)[1:]))

    def known(self, items: Iterable[Id]) -> Decisions:
        """The same decisions, of a log that has these items too."""
        return Decisions(list(dict.fromkeys([*self.items, *items])), *(getattr(self, f.name) for f in fields(self)[1:]))

    def before(self, rows: slice) -> np.ndarray:
        """Which items stand in the places before, bool [m, A], of the decisions at `rows`."""
        start, stop, _ = rows.indices(len(self))
        taken = np.zeros((stop - start, len(self.items)), bool)
        row, back = np.arange(start, stop), 0
        while len(row):
            back += 1
            row = row[row >= back]
            row = row[self.page[row] == self.page[row - back]]
            taken[row - start, self.item[row - back]] = True
        return taken


@dataclass
class Lessons:
    """What a model learns of a log, in order: the catalogue that came, then rows to learn; and the rows that were
    shown."""

    batches: list[tuple[list[CatalogueItem], Examples]] = field(default_factory=list)


def read(
    log: LogReader,
    join: JoinSettings,
    reward: Reward,
    partitions: int = 4,
    batch_size: int | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Decisions, Lessons]:
    """All decisions of a log. With `batch_size` also what a model learns of it, some 400 bytes a decision.

    Raises UsageError where nothing was shown, LogError.
    """
    if not log.has_impressions:
        raise UsageError(f"{log.path}: a {log.name} log does not say what was shown: take a log with impressions")
    join = msgspec.structs.replace(join, implicit=False, unclicked_of=1)
    noted, lessons, joined = _Noted(log.has_users), Lessons(), JoinedLog(join, partitions)
    earned, queue = _Earned(reward), RowQueue(partitions)
    pending: list[CatalogueItem] = []

    def learn(drain: bool) -> None:
        while batch_size and (rows := queue.take(batch_size, drain)) is not None:
            lessons.batches.append((pending.copy(), rows))
            pending.clear()

    for items, blocks in joined.slices(noted.of(in_time_order(log))):
        for block in blocks:
            earned.add(block.examples)
            if batch_size:
                queue.offer(block, 0)
        if batch_size:
            pending += items
            learn(drain=False)
            queue.finished()
        progress(log.progress() or 0.0)
    for block in joined.close():
        earned.add(block.examples)
        if batch_size:
            queue.offer(block, 0)
    learn(drain=True)
    return noted.decisions(*earned.found()), lessons


class _Noted:
    """What the impressions say, noted as they pass."""

    def __init__(self, has_users: bool) -> None:
        self._has_users, self._number = has_users, itertools.count()
        self._items: dict[Id, int] = {}
        self._rows: list[tuple[int | float, ...]] = []

    def of(self, records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            if isinstance(record, Impression):
                self._note(record)
            yield record

    def _note(self, shown: Impression) -> None:
        k, name, page = len(shown.items), request_name(shown.request_id), next(self._number)
        cluster = feature_id(USER, shown.user) if self._has_users else name
        places, scenario = shown.positions or range(k), SCENARIOS.index(shown.scenario)
        chances = shown.propensities or [float("nan")] * k
        for place, item, chance in sorted(zip(places, shown.items, chances, strict=True), key=lambda row: row[0]):
            number, known = self._items.setdefault(item, len(self._items)), min(max(place, 0), MAX_PLACE)
            example = example_id(name, feature_id(ITEM, item))
            self._rows.append((number, known, scenario, chance, shown.ts, page, cluster, example))

    def decisions(self, example: np.ndarray, reward: np.ndarray) -> Decisions:
        """example int64 [m], ascending: of the joiner; reward float64 [m]. What it left out (late, twice) is none."""
        whole = [np.array(column) for column in zip(*self._rows, strict=True)] if self._rows else []
        if not whole or not len(example):
            raise UsageError("nothing was shown in this log; name another")
        own = whole[7]
        at = np.minimum(np.searchsorted(example, own), len(example) - 1)
        first = np.zeros(len(own), bool)
        first[np.unique(own, return_index=True)[1]] = True
        kept = first & (example[at] == own)
        item, place, scenario, propensity, ts, page, cluster, own = (column[kept] for column in whole)
        return Decisions(
            list(self._items),
            item,
            place,
            scenario,
            propensity.astype(np.float64),
            reward[at[kept]],
            ts,
            page,
            cluster,
            own,
        )


class _Earned:
    """What each example earned, from the rows of the joiner."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward
        self._shown: list[np.ndarray] = []
        self._earned: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, rows: Examples) -> None:
        if self._reward == "click":
            value = (rows.click == 1).astype(np.float64)
        elif self._reward == "watch":
            value = np.maximum(rows.play_ms, 0) / 1000
        else:
            value = (rows.purchase == 1).astype(np.float64)
        self._shown.append(rows.example_id[rows.part == Part.SHOWN])
        self._earned.append((rows.example_id[value > 0], value[value > 0]))

    def found(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids of the examples that were shown, int64 [m], ascending; what each earned, float64 [m])."""
        shown = np.unique(np.concatenate([np.empty(0, np.int64), *self._shown]))
        reward = np.zeros(len(shown))
        for example, value in self._earned:
            at = np.searchsorted(shown, example)
            there = (at < len(shown)) & (shown[np.minimum(at, len(shown) - 1)] == example)
            np.maximum.at(reward, at[there], value[there])
        return shown, reward
