"""Several ranks hold what one would: rows, counts, expiry and store do not hang on how many there are."""

from __future__ import annotations

import copy
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.codec import Message
from embedding_store.columns import TOUCHED
from embedding_store.errors import CorruptRecord, RankLost, UsageError
from embedding_store.expiry import GRAIN_MS
from embedding_store.ranks import Ranks
from embedding_store.sharded import ShardedTables, TableConfig
from embedding_store.specs import RowRules, TableSettings, TableSpec
from embedding_store.tables import EmbeddingTables
from tests.embedding_store.killed import killed
from tests.embedding_store.test_tables_like_a_dict import AFTER, DIM, HALF_LIFE, Plain
from tests.processes import processes

STEPS = 100


def on_ranks(size: int, meeting: Path, work: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """Runs `work(ranks, *arguments)` in a process for each rank; their exit codes."""
    every = [processes.Process(target=_run, args=(rank, size, meeting, work, *arguments)) for rank in range(size)]
    for process in every:
        process.start()
    for process in every:
        process.join(300)
        process.kill()
    return [process.exitcode for process in every]


def _run(rank: int, size: int, meeting: Path, work: Callable[..., Any], *arguments: Any) -> None:
    work(Ranks(rank, size, meeting if size > 1 else None), *arguments)


class _Machine:
    """Random calls, of a seed: the same on all ranks, which all hold the dict that says what must come of them."""

    def __init__(self, ranks: Ranks, folder: Path, seed: int) -> None:
        self.ranks, self.folder, self.dice = ranks, folder, random.Random(seed)
        rules = RowRules(
            admit_after=1 + seed % 3, admit_cells=1 << 14, admit_half_life_ms=HALF_LIFE,
            expire_after_ms=AFTER * (seed % 2), evict=("lru", "lfu", "score")[seed % 3],
        )  # fmt: skip
        self.spec = TableSpec("t", ("t",), TableSettings(dim=DIM, capacity=16, rules=rules), {"n": ("<i8", ())})
        self.plain = Plain(rules.admit_after, rules.expire_after_ms)
        self.committed = copy.deepcopy(self.plain)
        self.sequence = self.stores = 0

    def open(self) -> None:
        first = self.ranks.rank == 0
        self.store = CheckpointStore(self.folder / str(self.stores), {"t": self.spec.layout}) if first else None
        self.tables = EmbeddingTables([self.spec], store=self.store, ranks=self.ranks)

    def learn(self) -> None:
        ids = [self.dice.randrange(40) for _ in range(self.dice.randrange(1, 5))]
        self.plain.advance(self.plain.now + self.dice.randrange(GRAIN_MS))
        self.tables.begin_step(self.plain.now)
        if not self.tables.has_room("t", len(ids)):
            self.commit()
        at = self.tables.rows("t", np.array(ids), admit=True)
        self.plain.learn(ids)
        at = np.unique(at[at > 0])
        self.tables.add("t", "n", at, np.ones(len(at), np.int64))
        self.tables.touch("t", at)
        assert self.tables.dropped("t") == 0

    def read(self) -> None:
        ids = [self.dice.randrange(40) for _ in range(4)]
        self.tables.begin_step()
        if self.tables.has_room("t", len(ids)):
            at = self.tables.rows("t", np.array(ids), admit=False)
            expected = [self.plain.rows.get(i, [0])[0] for i in ids]
            assert self.tables.values("t", "n", at).tolist() == expected

    def pass_time(self) -> None:
        self.plain.advance(self.plain.now + self.dice.randrange(4 * GRAIN_MS))
        self.tables.begin_step(self.plain.now)

    def forget(self) -> None:
        i = self.dice.randrange(40)
        self.tables.forget("t", np.array([i]))
        self.plain.rows.pop(i, None)

    def commit(self) -> None:
        rows, notes = self.tables.touched(), self.tables.notes()
        self.sequence += 1
        if self.store is not None:
            commit = Commit(1, self.sequence, b"", rows=rows, blobs=self.tables.sketches(), gone=self.tables.gone())
            commit.notes = notes
            self.store.commit(commit)
        self.tables.clear_touched()
        self.committed = copy.deepcopy(self.plain)
        self.check()

    def crash(self) -> None:
        self.stores += 1
        if self.store is not None:
            killed(self.store, self.folder / str(self.stores))
        self.plain = copy.deepcopy(self.committed)
        self.open()
        if self.dice.random() < 0.5:
            self.tables.restore()
        self.tables.begin_step(self.plain.now)

    def check(self) -> None:
        if self.store is None:
            return
        found = {}
        for rows in self.store.iter_rows("t"):
            times = rows.columns.get(TOUCHED, np.zeros(len(rows), np.int64)).tolist()
            found |= {i: [n, t] for i, n, t in zip(rows.ids.tolist(), rows.columns["n"].tolist(), times, strict=True)}
        timed = bool(self.plain.expire_after)
        assert found == {i: [n, t * timed] for i, (n, t) in self.committed.rows.items()}
        if timed:  # one note a row, under its time
            ids, grains = self.store.noted_before("t", 1 << 60)
            assert dict(zip(ids.tolist(), grains.tolist(), strict=True)) == {
                i: t // GRAIN_MS * GRAIN_MS for i, (_, t) in self.committed.rows.items()
            }

    def leave(self) -> None:
        """All is committed; another number of ranks may go on (`take_over`)."""
        self.commit()
        if self.store is not None:
            self.store.close()
            kept = (self.plain, self.dice, self.sequence, self.stores)
            (self.folder / "left").write_bytes(pickle.dumps(kept))

    def take_over(self) -> None:
        raw = self.ranks.from_first(lambda: (self.folder / "left").read_bytes())
        self.plain, self.dice, self.sequence, self.stores = pickle.loads(raw)
        self.committed = copy.deepcopy(self.plain)


def _random_calls(ranks: Ranks, folder: Path, seed: int, goes_on: bool) -> None:
    machine = _Machine(ranks, folder, seed)
    if goes_on:
        machine.take_over()
    machine.open()
    machine.pass_time()
    rare = [machine.forget, machine.commit, machine.pass_time, machine.crash]
    calls = [machine.learn] * 8 + [machine.read] * 4 + rare
    for _ in range(STEPS):
        machine.dice.choice(calls)()
    machine.leave()


@pytest.mark.parametrize(("seed", "sizes"), [(0, (2, 1)), (1, (2, 3)), (2, (1, 2)), (3, (3, 2)), (5, (2, 1, 2))])
def test_any_calls_on_any_number_of_ranks_hold_the_rows_of_a_dict(
    seed: int, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    for number, size in enumerate(sizes):
        done = on_ranks(size, tmp_path / f"meeting-{number}", _random_calls, tmp_path, seed, number > 0)
        assert done == [0] * size


def _sums(ranks: Ranks) -> None:
    spec = TableSpec("t", ("t",), TableSettings(dim=4, capacity=100, learning_rate=0.1))
    tables = EmbeddingTables([spec], ranks=ranks)
    ids = np.arange(1, 41)
    rows = tables.rows("t", ids, admit=True)
    assert len(set(rows.tolist())) == 40
    assert 10 < int(ranks.owns(ids).sum()) < 30, "shared by their hashes"
    part = ranks.part(40)
    out = tables.embed({"t": (rows[part], None)})["t"]
    (out.sum() * 2).backward()  # every gradient is 2: their mean square is 4
    learned = tables.values("t", "weights", rows)
    np.testing.assert_allclose(learned, np.full((40, 4), -0.1, np.float32), rtol=1e-6)
    both = tables.embed({"t": (rows[:3], None)})["t"]  # the same three rows on both
    both.sum().backward()
    momentum = tables.values("t", "momentum", rows)
    np.testing.assert_allclose(momentum[:3], 4 + ranks.size**2, rtol=1e-6, err_msg="gradients of ranks add up")
    np.testing.assert_allclose(momentum[3:], 4)


def test_gradients_of_all_ranks_reach_the_rows_wherever_they_lie(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path / "meeting", _sums) == [0, 0]


class _Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def _nothing_of_ours_is_pickled(ranks: Ranks, store: Path) -> None:
    pickled: list[Any] = []
    before = distributed_c10d._object_to_tensor

    def seen(value: Any, *others: Any) -> Any:
        pickled.append(value)
        return before(value, *others)

    distributed_c10d._object_to_tensor = seen  # all of torch's collectives of objects go through it
    _random_calls(ranks, store, 1, goes_on=False)
    assert ranks.every((ranks.rank, "a")) == [(0, "a"), (1, "a")]
    assert ranks.at_first(ranks.rank) == ([0, 1] if ranks.rank == 0 else [])
    assert ranks.least(3 - ranks.rank) == 2
    assert {type(value).__name__ for value in pickled} <= {"bool", "ShardedTensorMetadata"}, "TorchRec's own alone"
    os.chdir(store)
    if ranks.rank == 0:
        dist.broadcast_object_list([_Harmful()], 0)  # what a rank that was taken over could send
    else:
        with pytest.raises(CorruptRecord, match=r"posix\.mkdir: start all ranks"):
            dist.broadcast_object_list([None], 0)
    assert not (store / "harm").exists()


def test_nothing_that_is_pickled_is_run_between_ranks(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path / "meeting", _nothing_of_ours_is_pickled, tmp_path) == [0, 0]


def _forge(ranks: Ranks, message: np.ndarray) -> None:
    """Rank 0 sends this for a message; what the other makes of it."""
    if ranks.rank == 0:
        dist.broadcast(torch.tensor([len(message)]), 0)
        dist.broadcast(torch.from_numpy(message), 0)
        return
    with pytest.raises(CorruptRecord, match="damaged"):
        ranks.from_first(lambda: None)


def _what_others_send_is_not_believed(ranks: Ranks) -> None:
    message = Message(["any", np.arange(100)]).bytes()
    _forge(ranks, message[:-1])
    _forge(ranks, np.full(40, 0xFF, np.uint8))
    for size in (1 << 62, -1, 0):
        if ranks.rank == 0:
            dist.broadcast(torch.tensor([size]), 0)
        else:
            with pytest.raises(CorruptRecord, match=f"says that its message has {size} bytes"):
                ranks.from_first(lambda: None)
    if ranks.rank == 0:
        for size in (1 << 62, 100):
            with pytest.raises(CorruptRecord, match="bytes" if size > 100 else "damaged"):
                ranks.at_first(None)
        with pytest.raises(TypeError, match="cannot be sent"):
            ranks.from_first(object)
        return
    dist.send(torch.tensor([1 << 62]), 0)
    dist.send(torch.tensor([100]), 0)
    dist.send(torch.full((100,), 0xFF, dtype=torch.uint8), 0)
    with pytest.raises(RankLost):  # the first has nothing to send, and ends
        ranks.from_first(lambda: None)


def test_what_other_ranks_send_is_not_believed(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path / "meeting", _what_others_send_is_not_believed) == [0, 0]


def _lost(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os._exit(9)
    with pytest.raises(RankLost, match="start it again"):
        ranks.sum(np.ones(1))


def test_a_rank_that_is_lost_ends_the_others(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path / "meeting", _lost) == [0, 9]


def _lost_before_its_tables(ranks: Ranks) -> None:
    if ranks.rank == 0:
        os._exit(9)  # as where its store is damaged
    with pytest.raises(RankLost, match="start it again"):
        ShardedTables([TableConfig("item", 8, 4, ("item",), 0.1, 1e-8, "row_wise_adagrad")], torch.device("cpu"), ranks)


def test_a_rank_that_is_lost_before_its_tables_are_made_ends_the_others_too(tmp_path: Path) -> None:
    """TorchRec asks the other ranks when it makes tables: who is left has no traceback to print behind the reason."""
    assert on_ranks(2, tmp_path / "meeting", _lost_before_its_tables) == [9, 0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_ranks_that_meet_on_a_full_disk_say_so() -> None:
    """As a store does that finds no space: an operator, and the torture, know what to do."""
    said = "from pathlib import Path; from embedding_store.ranks import Ranks; Ranks(0, 2, Path('/dev/full'))"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=60, check=False)
    assert "DiskFull: no space left for the file by which the ranks meet" in done.stderr.splitlines()[-1]


def test_a_process_is_in_one_group() -> None:
    Ranks()
    with pytest.raises(UsageError, match="is rank 0 of 1 already"):
        Ranks(1, 2)
