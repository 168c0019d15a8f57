"""Candidates among more items than a scan can score in time: an inverted file, made anew as the model moves on.

An item is the vector [its weights; its content; its prior], a query [a; b; 1]: the inner product is the affinity
(`Ranker.towers`). Every version moves all vectors a little (a category's row is part of each of its items), so the file
is stale by up to the time between two rebuilds. That costs recall only, never the order: what it finds is scored anew,
exactly. The recall is measured while serving, and what is too low is mended at once.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import faiss
import numpy as np
import torch

from online_model.serving.candidates import ExactIndex, Query
from online_model.serving.settings import ReplicaSettings
from online_model.serving.state import AVAILABLE, STAMP, State

COPIED = 2_048  # rows that a query copies for a rebuild: it pauses no request for more than about 2 ms
REPLACED = 512  # rows that a query replaces
GATHERED = 4_096  # rows that a filter leaves are all scored, without the file: about 2 ms
OVERSAMPLED = 3  # × what is asked for is taken from the file, and scored exactly
CHURN = 0.3  # of the rows replaced, or waiting for it: then the cells fit the items no longer
PROBES, LEAST_PROBES = 16, 4  # the recall is the mean over so many; it counts from so few on
QUICK_FROM = 100_000  # items: from there on the first cells are coarse ones, made in a fifth of the time
QUERIES = 32  # of the last are kept: they say how many cells a new file must look into
QUICK_QUERIES = 8  # … the coarse one, whose best rows are found by passes over all
_NONE = np.empty(0, np.int64)

log = logging.getLogger(__name__)


def vectors(state: State, rows: np.ndarray, now_ms: int) -> np.ndarray:
    """[weights; content; prior] of item rows int64 [n] as they are now, float32 [n, 2 D + 1]."""
    item, content = state.vectors(rows)
    prior = state.numbers(rows, now_ms) @ state.ranker.tower_numbers.numpy()
    return np.concatenate((item.numpy(), content.numpy(), prior[:, None]), axis=1)


class Cells:
    """faiss's IVF over item rows: vectors in cells by their nearest centre; a query looks into the best few cells.

    Inner products are searched for, but cells are made by Euclidean distance, with lengths: the prior, and how well an
    item is known, are in the length.
    """

    def __init__(self, rows: np.ndarray, points: np.ndarray, changes: int, threads: int = 1) -> None:
        """rows int64 [n], n ≥ 1, their vectors float32 [n, d] as of the state's `changes`. Takes seconds for a million:
        not for the thread that serves. With several threads, of all cores, it makes a quarter of the cells, of fewer
        points: a query then looks at more rows for the same recall.
        """
        faiss.omp_set_num_threads(threads)  # of this thread; one: the other cores serve
        count = max(1, min(int((2 if threads == 1 else 0.5) * len(rows) ** 0.5), len(rows) // 39))  # k-means wants 39 …
        self._file = faiss.IndexIVFFlat(faiss.IndexFlatIP(points.shape[1]), points.shape[1], count,
                                        faiss.METRIC_INNER_PRODUCT)  # fmt: skip
        self._file.cp.spherical = False
        self._file.cp.max_points_per_centroid = 64  # … points a centre
        self._file.cp.niter = 10 if threads == 1 else 5
        self._file.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]  # removing: no scan
        self._file.train(points)
        self._file.add_with_ids(points, rows)
        self._held = np.zeros(int(rows.max()) + 1, bool)  # by item row
        self._held[rows] = True
        self._seen = changes
        self._built, self._replaced = len(rows), 0
        self.waiting = _NONE  # rows that versions have touched, ascending, and that are not replaced yet

    @property
    def churn(self) -> float:
        """Rows replaced since it was built, or waiting for it, over those it was built of."""
        return (self._replaced + len(self.waiting)) / self._built

    def tune(self, points: np.ndarray, rows: np.ndarray, queries: np.ndarray, limit: int, recall: float) -> None:
        """Look into as few cells (a power of two) as find `recall` of the best `limit` for queries float32 [q, d]."""
        best = []
        for some in np.array_split(queries, max(1, len(queries) // 8)):  # one pass over the points for eight of them
            for score in np.ascontiguousarray((points @ some.T).T):
                best.append(rows[np.argpartition(-score, limit - 1)[:limit]] if limit < len(rows) else rows)
        cells = 1
        while cells < self._file.nlist:
            self._file.nprobe = cells
            found = self._file.search(queries, OVERSAMPLED * limit)[1]
            hits = [np.isin(b, f).mean() for b, f in zip(best, found, strict=True)]
            if np.mean(hits) >= recall:
                return
            cells *= 2
        self._file.nprobe = self._file.nlist

    def search(self, query: np.ndarray, most: int, among: np.ndarray | None = None, least: int = 0) -> np.ndarray:
        """At most so many item rows int64 [m], by their inner product with query float32 [d], as the file has them.

        among: bool by row; of those only. More cells are looked into the fewer they are, and all for less than `least`.
        """
        if among is None:
            rows = self._file.search(query[None], most)[1][0]
            return rows[rows >= 0]
        chosen = faiss.IDSelectorBitmap(np.packbits(among, bitorder="little"))  # type: ignore[call-arg, arg-type]
        share = max(1, int(np.count_nonzero(among))) / max(1, self._file.ntotal)
        cells = min(self._file.nlist, int(np.ceil(self._file.nprobe / share)))
        for nprobe in (cells, self._file.nlist):
            wanted = faiss.SearchParametersIVF(sel=chosen, nprobe=nprobe)  # type: ignore[call-arg]
            rows = self._file.search(query[None], most, params=wanted)[1][0]
            rows = rows[rows >= 0]
            if len(rows) >= least or cells == self._file.nlist:
                break
        return rows

    def follow(self, state: State, now_ms: int) -> None:
        """Replace rows that versions have touched: REPLACED at most, those it does not hold first."""
        if state.changes != self._seen:
            touched = np.flatnonzero(state.items.used(STAMP) > self._seen)
            self.waiting, self._seen = np.union1d(self.waiting, touched), state.changes
        if not len(self.waiting):
            return
        if len(self._held) < state.items.end:
            self._held = np.concatenate((self._held, np.zeros(state.items.end, bool)))
        available = state.items.columns[AVAILABLE]
        waiting = self.waiting[self._held[self.waiting] | available[self.waiting]]
        order = np.argsort(self._held[waiting], kind="stable")
        now, self.waiting = waiting[order[:REPLACED]], np.sort(waiting[order[REPLACED:]])
        gone, come = now[self._held[now]], now[available[now]]
        self._file.remove_ids(faiss.IDSelectorArray(gone))
        self._file.add_with_ids(vectors(state, come, now_ms), come)
        self._held[gone] = False
        self._held[come] = True
        self._replaced += len(now)


class _Copy:
    """The available items of a moment, copied slice by slice between requests. What versions touch meanwhile may be
    copied before or after: it is replaced anyway, as all that was touched since `changes`.
    """

    def __init__(self, state: State) -> None:
        self.changes = state.changes
        self.rows = np.flatnonzero(state.items.used(AVAILABLE))
        self.points = np.empty((len(self.rows), 2 * state.ranker.dim + 1), np.float32)
        self._done = 0

    def go_on(self, state: State, now_ms: int, hurry: bool) -> bool:
        """Copy the next slice, in a hurry a sixteenth of all; whether it was the last."""
        end = self._done + max(COPIED, len(self.rows) // 16 if hurry else 0)
        self.points[self._done : end] = vectors(state, self.rows[self._done : end], now_ms)
        self._done = end
        return end >= len(self.rows)

    def all(self, state: State, now_ms: int, threads: int) -> None:
        """Copy everything at once: for a state that nobody changes meanwhile."""

        def copied(start: int) -> None:
            with torch.inference_mode():
                rows = self.rows[start : start + 8 * COPIED]
                self.points[start : start + 8 * COPIED] = vectors(state, rows, now_ms)

        with ThreadPoolExecutor(threads, "index") as pool:
            deque(pool.map(copied, range(0, len(self.rows), 8 * COPIED)), maxlen=0)


class ApproximateIndex:
    """The items with the largest affinity, nearly: a source (`Source`) for very many items.

    A rebuild takes its copy on the thread that serves, a slice a request, makes cells of it on another thread, and
    serves from them, by one assignment, once they have what versions changed meanwhile. It is due every `rebuild_s`
    if versions came, past CHURN, and when the mean recall of the last probes (every `probe_every`-th request is
    answered by the exact scan too) is below `least_recall`; below `exact_below_recall`, and before the first cells are
    there, the exact scan answers. Time is that of the queries.
    """

    def __init__(
        self, state: State, exact: ExactIndex, settings: ReplicaSettings, executor: Executor | None = None
    ) -> None:
        # executor: a thread of its own by default, for whose build the process waits at exit
        self._state, self._exact, self._settings = state, exact, settings
        self._executor = executor or ThreadPoolExecutor(1, "index")
        self._cells: Cells | None = None  # those that serve
        self._copy: _Copy | None = None  # a rebuild is in one of these three at most: being copied, …
        self._building: Future[Cells] | None = None  # … built, …
        self._next: Cells | None = None  # … brought up to date
        self._begun_ms, self._of = 0, 0  # when the last rebuild began, and the state's changes then
        self._queries: deque[np.ndarray] = deque(maxlen=QUERIES)
        self._recalls: deque[float] = deque(maxlen=PROBES)
        self._asked = 0
        self._coarse = False  # those that serve are the first, made in a hurry
        self._distrusted = False  # the exact scan answers until the next cells are there

    @property
    def recall(self) -> float | None:
        """The mean recall of the last probes, of the cells that serve; None before the first."""
        return float(np.mean(self._recalls)) if self._recalls else None

    @property
    def serves(self) -> bool:
        """Whether answers come from cells, not from the exact scan."""
        return self._cells is not None and not self._distrusted

    def candidates(self, query: Query) -> np.ndarray:
        faiss.omp_set_num_threads(1)  # of this thread, as for torch: a request is too small to be shared out
        wanted = np.concatenate((query.item, query.content, np.array([query.prior], np.float32)))
        self._queries.append(wanted)
        self._rebuild(query.now_ms)
        if self._cells is None or self._distrusted:
            return self._exact.candidates(query)
        if query.allowed is not None and np.count_nonzero(query.allowed.rows) <= GATHERED:
            return self._nearest(np.flatnonzero(query.allowed.rows), wanted, query.now_ms)
        rows = self._found(self._cells, wanted, query)
        if rows is None:
            return self._exact.candidates(query)
        ids = self._nearest(rows, wanted, query.now_ms)
        self._asked += 1
        if self._asked % self._settings.probe_every == 0:
            self._probe(query, ids)
        return ids

    def prepare(self, now_ms: int) -> None:
        """Make the first cells here and now, before anything is asked, on all cores; takes seconds for a million items.
        From QUICK_FROM on they are coarse, and the first requests begin a rebuild. What users ask for is not known yet,
        so that is taken to be what is like some item."""
        copy, dim = _Copy(self._state), self._state.ranker.dim
        cores = os.cpu_count() or 1
        copy.all(self._state, now_ms, cores)
        if len(copy.rows):
            self._coarse = len(copy.rows) >= QUICK_FROM
            some = copy.points[np.random.default_rng(0).integers(len(copy.rows), size=QUERIES)]
            like = some[:, :dim] + some[:, dim:-1]
            queries = np.concatenate((like, like, np.ones((QUERIES, 1), np.float32)), axis=1)
            self._queries.extend(queries)  # until there are as many of those that were asked
            threads = cores if self._coarse else 1
            tuning = queries[:QUICK_QUERIES] if self._coarse else queries
            self._cells = _built(copy, tuning, self._settings.nearest, self._settings.least_recall, threads)
            faiss.omp_set_num_threads(1)
            self._begun_ms, self._of = now_ms, copy.changes

    def _found(self, cells: Cells, wanted: np.ndarray, query: Query) -> np.ndarray | None:
        """Rows that may be the nearest ones; None where the cells cannot say: they hold what is available only."""
        available, most = self._state.items.used(AVAILABLE), OVERSAMPLED * self._settings.nearest
        if query.allowed is None:
            rows = cells.search(wanted, most)
            return rows[available[rows]]
        allowed = query.allowed.rows
        sold_out = np.flatnonzero(allowed & ~available)
        if len(sold_out) > GATHERED:
            return None
        rows = cells.search(wanted, most, allowed & available, self._settings.nearest)
        return np.concatenate((rows, sold_out))

    def _nearest(self, rows: np.ndarray, wanted: np.ndarray, now_ms: int) -> np.ndarray:
        """The best of these rows, by their vectors of now: item ids."""
        limit = self._settings.nearest
        if len(rows) > limit:
            score = vectors(self._state, rows, now_ms) @ wanted
            rows = rows[np.argpartition(-score, limit)[:limit]]
        return self._state.items.ids_of(rows)

    def _probe(self, query: Query, ids: np.ndarray) -> None:
        best = self._exact.candidates(query)
        if len(best):
            self._recalls.append(float(np.isin(best, ids).mean()))
        recall = self._measured()
        if recall is not None and recall < self._settings.exact_below_recall:
            self._distrusted = True
            log.warning("the index finds %.2f of the best items: all are scanned until it is rebuilt", recall)

    def _measured(self) -> float | None:
        return self.recall if len(self._recalls) >= LEAST_PROBES else None

    def _rebuild(self, now_ms: int) -> None:
        """What a request does for the cells: bring them up to date, and a rebuild one step on."""
        if self._building is not None and self._building.done():
            building, self._building = self._building, None
            if (error := building.exception()) is None:
                self._next = building.result()
            else:  # no memory for it, perhaps: no request is to fail of that
                self._of = -1  # it is due again, though no version comes
                log.error("the index could not be rebuilt (%s: %s): later again", type(error).__name__, error)
        for cells in (self._cells, self._next):
            if cells is not None:
                cells.follow(self._state, now_ms)
        if self._next is not None and len(self._next.waiting) <= (len(self._cells.waiting) if self._cells else 0):
            self._cells, self._next, self._distrusted, self._coarse = self._next, None, False, False
            self._recalls.clear()
        if self._copy is None and self._building is None and self._next is None and self._is_due(now_ms):
            self._copy = _Copy(self._state)
            self._begun_ms, self._of = now_ms, self._state.changes
        # Where all items are scanned anyway, a slice of about that cost ends it sooner.
        if self._copy is not None and self._copy.go_on(self._state, now_ms, hurry=not self.serves):
            copy, self._copy = self._copy, None
            if len(copy.rows):
                queries, limit = np.stack(self._queries), self._settings.nearest
                self._building = self._executor.submit(_built, copy, queries, limit, self._settings.least_recall)

    def _is_due(self, now_ms: int) -> bool:
        if self._cells is None or self._distrusted or self._coarse or self._cells.churn > CHURN:
            return True
        recall = self._measured()
        if recall is not None and recall < self._settings.least_recall:
            return True
        return now_ms - self._begun_ms >= 1000 * self._settings.rebuild_s and self._state.changes != self._of


def _built(copy: _Copy, queries: np.ndarray, limit: int, least_recall: float, threads: int = 1) -> Cells:
    """Cells that find more than the least recall by half of what is missing: the other half is for drift."""
    cells = Cells(copy.rows, copy.points, copy.changes, threads)
    cells.tune(copy.points, copy.rows, queries, limit, (1 + least_recall) / 2)
    return cells


class Index:
    """The items with the largest affinity, by the exact scan or, past `exact_up_to` rows, by cells.

    The scan costs by the rows that the table of items ever used, which grow only: there is no way back. A replica that
    loads a snapshot begins with the items that there are.
    """

    def __init__(self, state: State, settings: ReplicaSettings, executor: Executor | None = None) -> None:
        """executor: see `ApproximateIndex`."""
        self._state, self._settings, self._executor = state, settings, executor
        self._exact = ExactIndex(state, settings.nearest)
        self._approximate: ApproximateIndex | None = None

    @property
    def recall(self) -> float | None:
        """`ApproximateIndex.recall`; None for the exact scan."""
        return self._approximate.recall if self._approximate else None

    @property
    def approximate(self) -> bool:
        """Whether answers come from cells."""
        return self._approximate is not None and self._approximate.serves

    def prepare(self, now_ms: int) -> None:
        """`ApproximateIndex.prepare` where it is needed: else many requests would wait for the scan of all items."""
        chosen = self._chosen()
        if isinstance(chosen, ApproximateIndex):
            chosen.prepare(now_ms)

    def candidates(self, query: Query) -> np.ndarray:
        return self._chosen().candidates(query)

    def _chosen(self) -> ExactIndex | ApproximateIndex:
        if self._approximate is None and self._state.items.end - 1 > self._settings.exact_up_to:
            self._approximate = ApproximateIndex(self._state, self._exact, self._settings, self._executor)
        return self._approximate or self._exact
