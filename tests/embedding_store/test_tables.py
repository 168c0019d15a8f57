"""The tables learn the same whatever row an id lives in, and whether it stays in memory or comes and goes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from embedding_store.checkpoint import CheckpointStore, Commit, Digest
from embedding_store.columns import WEIGHTS, TableRows, concat
from embedding_store.errors import DiskFull, StoreError
from embedding_store.specs import TableSettings, TableSpec
from embedding_store.table import Table
from embedding_store.tables import EmbeddingTables
from tests.embedding_store.conftest import SmallDisk

DIM, RATE, EPS = 8, 0.1, 1e-8


pytestmark = pytest.mark.usefixtures("one_thread")


def _specs(capacity: int) -> list[TableSpec]:
    settings = TableSettings(dim=DIM, capacity=capacity, learning_rate=RATE, eps=EPS)
    return [
        TableSpec("user", ("user",), settings, {"history": ("i8", (3,))}),
        TableSpec("item", ("item", "history"), settings, {"clicks": ("f4", ())}),
    ]


def _store(path: Path) -> CheckpointStore:
    return CheckpointStore(path, {spec.name: spec.layout for spec in _specs(1)})


def _digest(tables: EmbeddingTables) -> str:
    digest = Digest({spec.name: spec.layout for spec in tables.specs.values()})
    for name, rows in tables.digest_rows():
        digest.rows(name, rows)
    return digest.finish({}, b"")


def _commit(tables: EmbeddingTables, store: CheckpointStore) -> None:
    head = store.head()
    store.commit(Commit(1, head.sequence + 1 if head else 1, b"", rows=tables.touched(), gone=tables.gone()))
    tables.clear_touched()


def _step(tables: EmbeddingTables, seed: int, of: int = 500, n: int = 12) -> np.ndarray:
    """Learns a batch of ids 1 … `of` drawn from `seed`; what it scored first, float32 [n]."""
    rng = np.random.default_rng(seed)
    tables.begin_step()
    user, item = rng.integers(1, of, n), rng.integers(1, of, n)
    history = rng.integers(1, of, (n, 3)) * (rng.random((n, 3)) < 0.7)
    seen = tables.rows("item", rng.integers(1, of, 3), admit=False)  # something is looked at and not learned
    at = {
        "user": (tables.rows("user", user, admit=True), None),
        "item": (tables.rows("item", item, admit=True), None),
        "history": (tables.rows("item", history.ravel(), admit=True), None),
    }
    assert tables.dropped("item") == tables.dropped("user") == 0
    out = tables.embed(at)
    query = out["user"] + out["history"].view(n, 3, DIM).mean(1) + 0.1
    score = (query * (out["item"] + 0.1)).sum(1)
    torch.nn.functional.softplus(-score).sum().backward()
    tables.column("item", "clicks")[at["item"][0]] += 1
    tables.column("user", "history")[at["user"][0]] = history
    tables.touch("item", at["item"][0])
    tables.touch("user", at["user"][0])
    return np.append(score.detach().numpy(), tables.read_rows("item", seen)[WEIGHTS].sum())


def test_an_unknown_id_a_new_row_and_the_default_row_are_alike() -> None:
    tables = EmbeddingTables(_specs(10))
    rows = tables.rows("item", np.array([7, 0, 8, 7]), admit=True)
    assert rows.tolist() == [1, 0, 2, 1]
    assert tables.rows("item", np.array([99]), admit=False).tolist() == [0]
    assert not tables.embed({"item": (rows, None)})["item"].detach().any()


def test_reads_do_not_admit(tmp_path: Path) -> None:
    with _store(tmp_path / "s") as store:
        tables = EmbeddingTables(_specs(10), store=store)
        tables.rows("item", np.array([7]), admit=True)
        _commit(tables, store)
        tables = EmbeddingTables(_specs(10), store=store)  # 7 is only in the store
        before = _digest(tables)
        rows = tables.rows("item", np.array([7, 8, 9]), admit=False)
        with torch.no_grad():
            tables.embed({"item": (rows, None)})
        assert rows.tolist() == [1, 0, 0]
        assert tables.size("item") == 1
        assert tables.touched() == {}
        assert _digest(tables) == before


@pytest.mark.parametrize("gradient", [1.0, float("inf"), float("nan")])
def test_row_zero_stays_zero(gradient: float) -> None:
    tables = EmbeddingTables(_specs(10))
    rows = tables.rows("item", np.array([7, 0, 8, 0]), admit=True)
    out = tables.embed({"item": (rows, None)})["item"]
    out.backward(torch.where(torch.tensor(rows == 0)[:, None], gradient, 1.0).expand_as(out))
    tables.column("item", "clicks")[rows] += 1
    tables.touch("item", rows)
    zero = tables.read_rows("item", np.array([0]))
    assert not any(column.any() for column in zero.values())
    assert tables.column("item", WEIGHTS)[1:3].all()
    with pytest.raises(ValueError, match="only rows 1"):
        tables.write_rows("item", np.array([0]), {"clicks": np.ones(1)})
    assert sorted(tables.touched()["item"].ids.tolist()) == [7, 8]


def test_features_may_differ_in_length_and_keep_their_order() -> None:
    tables = EmbeddingTables(_specs(100))
    ids = np.arange(50, 0, -1)
    rows = tables.rows("item", ids, admit=True)
    tables.write_rows("item", rows, {WEIGHTS: np.repeat(ids[:, None], DIM, 1).astype(np.float32)})
    out = tables.embed({"history": (rows[::-7], np.array([3, 5], np.int32)), "item": (rows, None)})
    np.testing.assert_array_equal(out["item"].detach().numpy()[:, 3], ids)
    np.testing.assert_array_equal(out["history"].detach().numpy()[:, 0], ids[::-7])
    assert tables.embed({"user": (rows[:0], None)})["user"].shape == (0, DIM)


def test_wrong_rows_never_reach_fbgemm() -> None:
    tables = EmbeddingTables(_specs(10))
    for rows in (np.array([11]), np.array([-1])):
        with pytest.raises(ValueError, match="outside of 0 … 10"):
            tables.embed({"item": (rows, None)})
    with pytest.raises(ValueError, match="no table has the feature"):
        tables.embed({"seller": (np.array([1]), None)})
    with pytest.raises(ValueError, match="lengths for 3"):
        tables.embed({"item": (np.array([1, 1]), np.array([3], np.int32))})


def test_what_learns_is_touched_and_sorted_by_id() -> None:
    tables = EmbeddingTables(_specs(10))
    rows = tables.rows("item", np.array([9, -3, 5]), admit=True)
    tables.clear_touched()
    assert tables.touched() == {}
    tables.embed({"item": (rows[:2], None)})["item"].sum().backward()
    touched = tables.touched()
    assert list(touched) == ["item"]
    assert touched["item"].ids.tolist() == [-3, 9]
    assert touched["item"].columns[WEIGHTS].shape == (2, DIM)
    before = touched["item"].columns[WEIGHTS].copy()
    tables.embed({"item": (rows[:2], None)})["item"].sum().backward()
    np.testing.assert_array_equal(touched["item"].columns[WEIGHTS], before, "they are copies")


@pytest.mark.parametrize("by", ["restore", "load in another order"])
def test_restored_into_other_rows_it_goes_on_bit_for_bit(tmp_path: Path, by: str) -> None:
    """Embeddings, momentum and extras; and twenty further steps, as if nothing had happened."""
    with _store(tmp_path / "a") as store, _store(tmp_path / "b") as other:
        through = EmbeddingTables(_specs(600), store=other)
        stopped = EmbeddingTables(_specs(600), store=store)
        for seed in range(20):
            np.testing.assert_array_equal(_step(through, seed), _step(stopped, seed))
        _commit(stopped, store)
        _commit(through, other)

        resumed = EmbeddingTables(_specs(700), store=store)
        if by == "restore":
            resumed.restore()
        else:
            for name in ("item", "user"):
                rows = concat(list(store.iter_rows(name)))
                resumed.load(name, rows.take(slice(50, None)))
                resumed.load(name, rows.take(slice(50)))
        ids = np.arange(1, 500)
        assert (resumed.rows("item", ids, admit=False) != through.rows("item", ids, admit=False)).any()
        assert _digest(resumed) == _digest(through)
        for seed in range(20, 40):
            np.testing.assert_array_equal(_step(through, seed), _step(resumed, seed))
        assert _digest(resumed) == _digest(through)


@pytest.mark.parametrize("every", [1, 3])
def test_a_table_that_spills_learns_bit_for_bit_like_one_that_does_not(tmp_path: Path, every: int) -> None:
    """Capacity 64 (160) over 500 ids against 1000, however often is committed: scores, rows and store are the same."""
    with _store(tmp_path / "small") as store, _store(tmp_path / "large") as other:
        small = EmbeddingTables(_specs(64 if every == 1 else 160), store=store)
        large = EmbeddingTables(_specs(1000), store=other)
        for seed in range(120):
            np.testing.assert_array_equal(_step(small, seed), _step(large, seed))
            if seed % every == 0:
                _commit(small, store)
        assert small.size("item") <= 160 < large.size("item")
        assert _digest(small) == _digest(large), "also with rows that are not committed yet"
        _commit(small, store)
        _commit(large, other)
        assert _digest(small) == _digest(large) == _digest_of(store)
        assert store.digest() == other.digest()
        resumed = EmbeddingTables(_specs(64), store=store)  # nothing is loaded: each row comes when it is asked for
        if every == 1:
            for seed in range(120, 140):
                np.testing.assert_array_equal(_step(resumed, seed), _step(large, seed))
                _commit(resumed, store)
            assert _digest(resumed) == _digest(large)


def _digest_of(store: CheckpointStore) -> str:
    digest = Digest(store.layouts)
    for name in sorted(store.layouts):
        for rows in store.iter_rows(name):
            digest.rows(name, rows)
    return digest.finish({}, b"")


def test_an_evicted_row_is_scored_as_it_was_learned_and_its_place_starts_from_zero(tmp_path: Path) -> None:
    with _store(tmp_path / "s") as store:
        tables = EmbeddingTables(_specs(4), store=store)
        old = tables.rows("item", np.array([1, 2, 3, 4]), admit=True)
        tables.embed({"item": (old, None)})["item"].sum().backward()
        tables.column("item", "clicks")[old] = 3
        learned = tables.read_rows("item", old[:1])
        _commit(tables, store)
        new = tables.rows("item", np.array([5, 6, 7, 8]), admit=True)
        assert not any(column.any() for column in tables.read_rows("item", new).values())
        assert tables.rows("item", np.array([1]), admit=False).tolist() == [0], "all is dirty: nothing may go"
        _commit(tables, store)
        back = tables.rows("item", np.array([1, 99]), admit=False)
        assert back[0] > 0
        assert back[1] == 0
        for name, column in tables.read_rows("item", back[:1]).items():
            np.testing.assert_array_equal(column, learned[name])
        assert tables.touched() == {}


@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize("evicted", [False, True])
def test_a_forgotten_id_is_nowhere_and_starts_anew(tmp_path: Path, dirty: bool, evicted: bool) -> None:
    with _store(tmp_path / "s") as store:
        tables = EmbeddingTables(_specs(4), store=store)
        ids = np.array([1, 2, 3, 4])
        rows = tables.rows("item", ids, admit=True)
        tables.embed({"item": (rows, None)})["item"].sum().backward()
        tables.column("item", "clicks")[rows] = 3
        _commit(tables, store)
        if evicted:
            tables.rows("item", np.array([5, 6, 7, 8]), admit=True)
            _commit(tables, store)
        if dirty:
            tables.touch("item", tables.rows("item", np.array([2]), admit=False))
        tables.forget("item", np.array([2, 2, 0, 99]))
        assert tables.gone()["item"].tolist() == [2, 99]
        assert tables.rows("item", np.array([2]), admit=False).tolist() == [0], "not from the store either"
        assert [i for t, rows in tables.digest_rows() if t == "item" for i in rows.ids.tolist() if i < 5] == [1, 3, 4]
        _commit(tables, store)
        assert tables.gone() == {}
        assert store.read_rows("item", ids)[0].tolist() == [True, False, True, True]
        new = tables.rows("item", np.array([2]), admit=True)
        assert not any(column.any() for column in tables.read_rows("item", new).values())
        tables.column("item", "clicks")[new] = 1
        tables.forget("item", np.array([2]))
        again = tables.rows("item", np.array([2]), admit=True)
        assert tables.read_rows("item", again)["clicks"].tolist() == [0]
        _commit(tables, store)
        assert store.read_rows("item", ids)[0].all(), "forgotten and back within one commit: it is there, anew"
        assert store.read_rows("item", np.array([2]))[1].columns["clicks"].tolist() == [0]


def test_the_longest_unused_rows_go_first_and_those_in_use_stay(tmp_path: Path) -> None:
    with _store(tmp_path / "s") as store:
        tables = EmbeddingTables(_specs(4), store=store)
        tables.rows("item", np.array([1, 2, 3, 4]), admit=True)
        _commit(tables, store)
        tables.begin_step()
        tables.rows("item", np.array([1]), admit=False)
        tables.begin_step()
        held = tables.rows("item", np.array([2, 4]), admit=False)
        tables.rows("item", np.array([5]), admit=True)  # 3 goes
        tables.rows("item", np.array([6]), admit=True)  # 1 goes
        assert tables.room("item") == 0
        assert tables.rows("item", np.array([7]), admit=True).tolist() == [0]
        assert tables.dropped("item") == 1
        np.testing.assert_array_equal(tables.rows("item", np.array([2, 4]), admit=False), held)
        tables.begin_step()
        assert tables.room("item") == 2, "5 and 6 are not in the store yet"
        tables.rows("item", np.array([2, 4]), admit=False)
        assert tables.rows("item", np.array([7]), admit=True).tolist() == [0], "the longest unused are dirty"


def test_room_is_counted_only_where_little_may_be_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each step would look through all rows in memory, however few it takes."""
    counted = []
    room = Table.room
    monkeypatch.setattr(Table, "room", lambda self: counted.append(self.spec.name) or room(self))
    with _store(tmp_path / "s") as store:
        tables = EmbeddingTables(_specs(100), store=store)
        for start in range(0, 40, 10):
            tables.begin_step()
            assert tables.has_room("item", 10)
            tables.rows("item", np.arange(start + 1, start + 11), admit=True)
        assert not counted
        tables.rows("item", np.arange(1, 41), admit=True)  # marked once more: that might be 80 rows, and is 40
        assert tables.has_room("item", 60)
        assert counted == ["item"]
        assert not tables.has_room("item", 61)
        _commit(tables, store)
        counted.clear()
        assert tables.has_room("item", 100)
        assert not counted, "all are clean"


def test_without_a_store_a_full_table_turns_ids_away() -> None:
    tables = EmbeddingTables(_specs(2))
    assert tables.rows("item", np.array([1, 2, 3]), admit=True).tolist() == [1, 2, 0]
    assert tables.dropped("item") == 1
    rows = tables.touched()["item"]
    with pytest.raises(StoreError, match="raise its capacity"):
        EmbeddingTables(_specs(1)).load("item", rows)


def test_rows_of_a_failed_commit_are_in_the_next_one(tmp_path: Path, small_disk: SmallDisk) -> None:
    with _store(small_disk.path / "s") as store, _store(tmp_path / "other") as other:
        tables, twin = EmbeddingTables(_specs(600), store=store), EmbeddingTables(_specs(600), store=other)
        for seed in range(5):
            _step(tables, seed)
            _step(twin, seed)
        with pytest.raises(DiskFull):
            store.commit(Commit(1, 1, b"", rows=tables.touched(), parts=[b"x" * 5_000_000]))
        for seed in range(5, 8):
            _step(tables, seed)
            _step(twin, seed)
        small_disk.grow()
        _commit(tables, store)
        _commit(twin, other)
        assert store.digest() == other.digest()


def test_two_runs_are_the_same_bit_for_bit() -> None:
    digests = set()
    for _ in range(2):
        tables = EmbeddingTables(_specs(1000))
        for seed in range(30):
            _step(tables, seed, n=100)
        digests.add(_digest(tables))
    assert len(digests) == 1


def test_rows_of_memory_and_store_come_as_one_sorted_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedding_store.table._CHUNK", 5)
    with _store(tmp_path / "s") as store:
        tables = EmbeddingTables(_specs(8), store=store)
        for start in range(-10, 30, 8):
            ids = np.arange(start, start + 8)
            rows = tables.rows("item", ids[ids != 0], admit=True)
            tables.write_rows("item", rows, {"clicks": ids[ids != 0]})
            if start < 22:
                _commit(tables, store)
        out: TableRows = concat([rows for _, rows in tables.digest_rows()])
        expected = np.array([i for i in range(-10, 30) if i != 0])
        np.testing.assert_array_equal(out.ids, expected)
        np.testing.assert_array_equal(out.columns["clicks"], expected.astype(np.float32))
