"""A budget of bytes per second holds rows back and forgets none: a dict replica, and a dict of what it waits for."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_store.columns import MOMENTUM
from embedding_store.delta import Assembler, Version, encode, row_bytes
from embedding_store.encoding import decode_weights, encode_weights
from embedding_store.snapshot import read_snapshot, snapshot_of
from online_model.examples import Part
from online_model.settings import FeatureSettings, RankerSettings, TrainerSettings
from online_model.trainer import Trainer, open_trainer
from tests.embedding_store.killed import killed
from tests.online_model.killing import learn_and_be_killed
from tests.online_model.logs import START, make_blocks, make_rows

pytestmark = pytest.mark.usefixtures("one_thread")

REFRESH_MS = 4_000
BLOCKS, BLOCK = 40, 16
SMALL = TrainerSettings(
    batch_size=8, features=FeatureSettings(dim=8, users=24, items=210, categories=20), negatives=4, window=200,
    ranker=RankerSettings(hidden=8, second=4), recent_items=20, refresh_s=REFRESH_MS / 1000,
)  # fmt: skip
ROWS = make_rows(BLOCKS * BLOCK, users=60, items=300)  # more than memory has room for

Replica = dict[tuple[str, int], bytes]  # (table, id) → what is served of the row


def rows_of(tables, encoding: str) -> Replica:
    """The rows as a replica sees them, by table and id."""
    out: Replica = {}
    for table, rows in tables:
        served = rows.without(MOMENTUM)
        weights = encode_weights(served.columns["weights"], encoding)
        columns = {**served.columns, "weights": decode_weights(weights, encoding)}
        for i, id_ in enumerate(served.ids.tolist()):
            out[table, id_] = b"".join(columns[name][i].tobytes() for name in sorted(columns))
    return out


class Run:
    """A trainer that crashes and comes back, the dict that follows it, and what that must be waiting for."""

    def __init__(self, folder: Path, model: TrainerSettings) -> None:
        self.folder, self.model, self.now, self.copies = folder, model, START, 0
        self.trainer = self._open()
        self.log = []  # blocks, as they were first offered
        self.replica: Replica = {}
        self.place, self.last_ms = (0, 0), 0
        self.waiting: dict[tuple[str, int], int] = {}  # (table, id) → when it was first held back
        self.noted: dict[tuple[str, int], int] = {}  # the same, as of when the row was last committed
        self.assembler = Assembler()
        self.next_rows = 0

    def learn(self, forgotten: int | None = None) -> None:
        if forgotten is not None:
            rows = ROWS.take(slice(forgotten, forgotten + 1))
            rows.part = np.full(1, Part.FORGET, np.uint8)
        else:
            rows = ROWS.take(slice(self.next_rows, self.next_rows + BLOCK))
            self.next_rows = (self.next_rows + BLOCK) % len(ROWS)
        (block,) = make_blocks(rows, BLOCK, first=10 * len(self.log), users=forgotten is None)
        self.log.append(block)
        self._offer(len(self.log) - 1)

    def _offer(self, number: int) -> None:
        self.trainer.offer(self.log[number], number)
        while True:
            if self.trainer.commit_due():
                self.commit(0)
            if not self.trainer.step():
                return

    def commit(self, later_ms: int, publish: bool = True) -> None:
        self.now += later_ms
        self.waiting = {key: min(since, self.now) for key, since in self.waiting.items()}
        due = any(since <= self.now - REFRESH_MS for since in self.waiting.values())
        tables = self.trainer.tables
        touched = [(table, i) for table, rows in tables.touched().items() for i in rows.ids.tolist()]
        gone = {(table, i) for table, ids in tables.gone().items() for i in ids.tolist()}
        parts = self.trainer.commit()
        if parts is None:
            assert not touched
            assert not due, "a quiet interval does not put the refresh off"
            return
        version = self._whole(parts)
        sent = {(table, i) for table, rows in version.tables.items() for i in rows.ids.tolist()}
        self._check_size(version, sum(map(len, parts)), due)
        assert touched or sent or not self.waiting or version.dense, "no version for nothing"
        for key in gone:
            self.waiting.pop(key, None)
            self.noted.pop(key, None)
        for key in touched:
            self.waiting.setdefault(key, self.now)
        self.noted |= {key: self.waiting[key] for key in touched}
        assert sent <= self.waiting.keys()
        for key in sent:
            del self.waiting[key], self.noted[key]
        assert not (due and self.waiting), "all that is owed goes when the oldest has waited long enough"
        oldest = min(self.waiting.values(), default=self.now)
        assert version.info["owed"] == {"rows": len(self.waiting), "oldest_ms": self.now - oldest}
        self.last_ms = self.now
        if publish:
            self.publish()

    def publish(self) -> None:
        """The outbox, to a replica that may have some of it."""
        for sequence, parts in self.trainer.store.outbox():
            version = self._whole(parts)
            if (version.epoch, version.sequence) > self.place:
                self.place = (version.epoch, version.sequence)
                for table, ids in version.gone.items():
                    for i in ids.tolist():
                        self.replica.pop((table, i), None)
                self.replica |= rows_of(version.tables.items(), "fp32")
            self.trainer.store.acknowledge(sequence)
        stored = rows_of(
            ((t, rows) for t in self.trainer.store.layouts for rows in self.trainer.store.iter_rows(t)),
            self.model.encoding,
        )
        differing = {key for key in stored.keys() | self.replica.keys() if stored.get(key) != self.replica.get(key)}
        assert differing <= self.waiting.keys(), "a row that is not as the trainer's is owed"

    def crash(self) -> None:
        """As kill -9 leaves it: the store's files, never closed; what was not committed is offered again."""
        digest = self.trainer.digest()
        self.copies += 1
        killed(self.trainer.store, self._path(self.copies))
        shutil.rmtree(self._path(self.copies - 1))
        self.trainer, self.waiting = self._open(), dict(self.noted)
        assert self.trainer.digest() == digest
        assert self.trainer.owed["rows"] == len(self.waiting)
        if self.trainer.sequence:
            self.publish()
        begin = self.trainer.positions[0].source_offset if 0 in self.trainer.positions else 0
        for number in range(begin, len(self.log)):
            self._offer(number)

    def end(self) -> None:
        self.commit(0)
        self.commit(REFRESH_MS)
        self.publish()
        assert not self.waiting
        assert self.replica == rows_of(self.trainer.tables.digest_rows(), self.model.encoding)
        self.trainer.store.close()

    def _check_size(self, version: Version, size: int, due: bool) -> None:
        rows = sum(
            row_bytes(self.trainer.store.layouts[table], self.model.encoding) * len(rows)
            for table, rows in version.tables.items()
        )
        allowed = self.model.row_bytes_per_s * max(0, self.now - self.last_ms) // 1000
        assert rows <= allowed or due or version.base is None
        fixed = encode(replace(version, tables={}), rows=self.model.encoding)
        assert size <= sum(map(len, fixed)) + rows + 256 * 20, "what is counted is what is sent, but for headers"

    def _whole(self, parts: list[bytes]) -> Version:
        (version,) = [v for v in map(self.assembler.add, parts) if v]
        return version

    def _open(self) -> Trainer:
        return open_trainer(self.model, self._path(self.copies), lambda: self.now)

    def _path(self, copy: int) -> Path:
        return self.folder / f"store-{copy}"


STEPS = st.one_of(
    st.just(("learn",)),
    st.tuples(st.just("commit"), st.sampled_from([-2_000, 0, 60, 250, 1_000, 3_000]), st.booleans()),
    st.just(("crash",)),
    st.tuples(st.just("learn"), st.integers(0, BLOCKS * BLOCK - 1)),
)


@pytest.mark.timeout(600)
@settings(max_examples=15, deadline=None)
@given(
    steps=st.lists(STEPS, min_size=5, max_size=30),
    rate=st.sampled_from([500, 4_000, 20_000]),
    encoding=st.sampled_from(["fp32", "int8"]),
)
def test_no_row_is_forgotten_and_no_byte_too_many_is_sent(steps, rate, encoding) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), msgspec.structs.replace(SMALL, row_bytes_per_s=rate, encoding=encoding))
        run.learn()
        run.commit(100)
        for name, *arguments in steps:
            getattr(run, name)(*arguments)
        run.end()


def log():
    return make_blocks(ROWS.take(slice(0, 400)), 40)


def opened(path: Path, rate: int = 4_000) -> Trainer:
    """By a clock that goes 10 ms a row that was learned."""
    trainers: list[Trainer] = []
    model = msgspec.structs.replace(SMALL, row_bytes_per_s=rate, features=FeatureSettings(dim=8))

    def now() -> int:
        positions = trainers[0].positions if trainers else {}
        return START + 10 * (positions[0].rows if positions else 0)

    trainers.append(open_trainer(model, path, now))
    return trainers[0]


@pytest.mark.timeout(400)
def test_after_a_kill_9_the_model_is_the_same_and_what_was_owed_still_is(tmp_path: Path) -> None:
    whole = opened(tmp_path / "whole", 0)
    for number, block in enumerate(log()):
        whole.offer(block, number)
        while whole.step():
            pass
    whole.commit()
    kills = (3, 7, 5)  # after so many commits
    learn_and_be_killed(__name__, tmp_path / "killed", kills)
    trainer = opened(tmp_path / "killed")
    assert trainer.digest() == whole.digest()
    assert trainer.owed["rows"] > 20, "the budget is far too small for what was learned"
    replica: Replica = {}
    assembler = Assembler()
    for _, parts in trainer.store.outbox():  # nothing was acknowledged: all versions are there
        for version in filter(None, map(assembler.add, parts)):
            replica |= rows_of(version.tables.items(), "fp32")
    rows = rows_of(trainer.tables.digest_rows(), "fp32")
    assert sum(replica.get(key) != row for key, row in rows.items()) <= trainer.owed["rows"]
    assert replica != rows
    for part in trainer.commit(everything=True):
        if (version := assembler.add(part)) is not None:
            assert version.dense == {}, "nothing was learned since"
            replica |= rows_of(version.tables.items(), "fp32")
    assert replica == rows
    snapshot = read_snapshot(snapshot_of(trainer.store, tmp_path / "snapshots"))
    assert rows_of(snapshot.tables.items(), "fp32") == rows
    assert snapshot.dense.keys() == trainer.store.version().dense.keys() == whole._ranker.weights().keys()
    for t in (trainer, whole):
        t.store.close()
