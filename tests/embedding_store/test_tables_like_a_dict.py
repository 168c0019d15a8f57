"""Tables over a store answer like a dict in which nothing is ever evicted, committed or crashed.

The dict knows the rules (sightings, halving, expiry) and no tiers: so what the tables hold does not hang on when
commits, evictions, reloads or crashes happened.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import MOMENTUM, TOUCHED, WEIGHTS, TableRows
from embedding_store.expiry import GRAIN_MS
from embedding_store.initial import first_weights
from embedding_store.specs import Optimizer, RowRules, TableSettings, TableSpec
from embedding_store.tables import EmbeddingTables
from tests.embedding_store.killed import killed

CAPACITY, DIM = 6, 4
IDS = st.lists(st.one_of(st.integers(0, 12), st.sampled_from([-(2**63), 2**63 - 1])), min_size=1, max_size=4)
AFTER, HALF_LIFE = 3 * GRAIN_MS, 2 * GRAIN_MS


class Plain:
    """The reference: {id: [times learned, event time of the last]}."""

    def __init__(self, admit_after: int, expire_after: int) -> None:
        self.admit_after, self.expire_after = admit_after, expire_after
        self.now = 0
        self.rows: dict[int, list[int]] = {}
        self.seen: dict[int, int] = {}

    def advance(self, now: int) -> None:
        for _ in range(now // HALF_LIFE - self.now // HALF_LIFE):
            self.seen = {i: n // 2 for i, n in self.seen.items()}
        self.now = now
        if self.expire_after:
            border = (now - self.expire_after) // GRAIN_MS * GRAIN_MS
            self.rows = {i: row for i, row in self.rows.items() if row[1] >= border}

    def learn(self, ids: list[int]) -> None:
        for i in sorted({i for i in ids if i not in self.rows} - {0}):
            self.seen[i] = self.seen.get(i, 0) + ids.count(i)
            if self.seen[i] >= self.admit_after:
                self.rows[i] = [0, 0]
        for i in {i for i in ids if i in self.rows}:
            self.rows[i] = [self.rows[i][0] + 1, self.now]


class TablesLikeADict(RuleBasedStateMachine):
    @initialize(
        admit_after=st.sampled_from([1, 2, 3]), expires=st.booleans(), evict=st.sampled_from(["lru", "lfu", "score"]),
        optimizer=st.sampled_from(["row_wise_adagrad", "adagrad", "sgd"]), begun=st.booleans(),
    )  # fmt: skip
    def begin(self, admit_after: int, expires: bool, evict: str, optimizer: Optimizer, begun: bool) -> None:
        rules = RowRules(
            admit_after=admit_after, admit_cells=1 << 14, admit_half_life_ms=HALF_LIFE,
            expire_after_ms=AFTER if expires else 0, evict=evict, evict_half_life=2,
        )  # fmt: skip
        settings = TableSettings(
            dim=DIM, capacity=CAPACITY, rules=rules, optimizer=optimizer, initialiser="signs" if begun else "zero",
            init_scale=0.5,
        )  # fmt: skip
        self.spec = TableSpec("t", ("t",), settings, {"n": ("<i8", ())})
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-test-"))
        self.stores = 0
        self.plain = Plain(admit_after, AFTER if expires else 0)
        self.committed = copy.deepcopy(self.plain)
        self.store = CheckpointStore(self.folder / "0", {"t": self.spec.layout})
        self.tables = EmbeddingTables([self.spec], store=self.store)

    @rule(batches=st.lists(st.tuples(IDS, st.integers(0, GRAIN_MS)), min_size=1, max_size=8))
    def learn(self, batches: list[tuple[list[int], int]]) -> None:
        for ids, passed in batches:
            if not self.has_room(len(ids)):
                self.commit()  # of the time before this step: what expires by it is still in the store
            self.plain.advance(self.plain.now + passed)
            self.step(ids)

    def has_room(self, ids: int) -> bool:
        """Whether so many may come: the quick answer is that of counting."""
        found = self.tables.has_room("t", ids)
        assert found == (self.tables.room("t") >= ids)
        return found

    def step(self, ids: list[int]) -> None:
        self.tables.begin_step(self.plain.now)
        at = self.tables.rows("t", np.array(ids), admit=True)
        self.plain.learn(ids)
        at = np.unique(at[at > 0])
        self.tables.column("t", "n")[at] += 1
        columns = self.tables.read_rows("t", at)
        self.tables.write_rows("t", at, {n: columns[n] + 1 for n in (WEIGHTS, MOMENTUM) if n in columns})
        self.tables.touch("t", at)
        assert self.tables.dropped("t") == 0

    @rule(ids=IDS)
    def read(self, ids: list[int]) -> None:
        self.tables.begin_step()
        if not self.has_room(len(ids)):
            return  # a reader may find no room for what is only in the store: it then sees the default row
        at = self.tables.rows("t", np.array(ids), admit=False)
        expected = [self.plain.rows.get(i, [0])[0] for i in ids]
        columns = self.tables.read_rows("t", at)
        assert columns["n"].tolist() == expected
        known = np.array([i if i in self.plain.rows else 0 for i in ids])
        self.holds_what_was_learned(TableRows(known, columns))

    def holds_what_was_learned(self, rows: TableRows) -> None:
        """First weights by the id (0: none) and 1 more each time it was learned; the optimizer's state counts too."""
        times = rows.columns["n"][:, None]
        assert (rows.columns[WEIGHTS] == first_weights(self.spec.settings, rows.ids) + times).all()
        state = rows.columns.get(MOMENTUM, times)
        assert (state == (times if state.ndim == 2 else times[:, 0])).all()

    @rule(grains=st.floats(0, 4))
    def pass_time(self, grains: float) -> None:
        self.plain.advance(self.plain.now + int(grains * GRAIN_MS))
        self.tables.begin_step(self.plain.now)

    @rule(ids=IDS)
    def forget(self, ids: list[int]) -> None:
        self.tables.forget("t", np.array(ids))
        for i in ids:
            self.plain.rows.pop(i, None)

    @rule()
    def commit(self) -> None:
        head, tables = self.store.head(), self.tables
        commit = Commit(1, head.sequence + 1 if head else 1, b"", rows=tables.touched(), blobs=tables.sketches())
        commit.gone, commit.notes = tables.gone(), tables.notes()
        self.store.commit(commit)
        self.tables.clear_touched()
        self.committed = copy.deepcopy(self.plain)

    @rule(restore=st.booleans())
    def crash(self, restore: bool) -> None:
        """The files as they are on the disk, as a kill -9 leaves them: nothing was flushed or closed."""
        self.stores += 1
        path = self.folder / str(self.stores)
        killed(self.store, path)
        self.store = CheckpointStore(path, {"t": self.spec.layout})
        self.tables = EmbeddingTables([self.spec], store=self.store)
        if restore:
            self.tables.restore()
        self.plain = copy.deepcopy(self.committed)
        self.tables.begin_step(self.plain.now)

    @rule()
    def checkpoint(self) -> None:
        copied = self.folder / "copy"
        self.store.checkpoint(copied)
        with CheckpointStore(copied, self.store.layouts, read_only=True) as frozen:
            found = {i: n for rows in frozen.iter_rows("t") for i, n in zip(rows.ids, rows.columns["n"], strict=True)}
        assert found == {i: row[0] for i, row in self.committed.rows.items()}
        shutil.rmtree(copied)

    @invariant()
    def holds_the_rows_of_the_dict(self) -> None:
        if not hasattr(self, "tables"):
            return
        found = {}
        for _, rows in self.tables.digest_rows():
            self.holds_what_was_learned(rows)
            times = rows.columns.get(TOUCHED, np.zeros(len(rows), np.int64))
            found |= {i: list(row) for i, *row in zip(rows.ids.tolist(), rows.columns["n"], times, strict=True)}
        timed = bool(self.plain.expire_after)
        assert found == {i: [n, t * timed] for i, (n, t) in self.plain.rows.items()}

    def teardown(self) -> None:
        if not hasattr(self, "tables"):
            return
        self.commit()
        if self.plain.expire_after:  # one note a row, under its time: so sweeps find all, and nothing is left behind
            ids, times = self.store.noted_before("t", 1 << 60)
            expected = {i: t // GRAIN_MS * GRAIN_MS for i, (_, t) in self.plain.rows.items()}
            assert dict(zip(ids.tolist(), times.tolist(), strict=True)) == expected
        self.store.close()
        shutil.rmtree(self.folder)


TestTablesLikeADict = TablesLikeADict.TestCase
TestTablesLikeADict.pytestmark = [pytest.mark.timeout(600)]  # stores are opened hundreds of times: a slow disk
TestTablesLikeADict.settings = settings(
    max_examples=12, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
