"""A store of other tables: what was in it stays bit for bit, and a kill leaves the old store or the new one."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_store import faults
from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import MOMENTUM, TOUCHED, WEIGHTS, TableRows, concat, layout
from embedding_store.copies import settle_directory
from embedding_store.digest import Digest
from embedding_store.errors import OtherLayouts, StoreError, StoreLocked, UsageError
from embedding_store.expiry import Notes, grain
from embedding_store.owed import Owed
from embedding_store.reshape import changes, reshape
from embedding_store.specs import RowRules, TableSettings, TableSpec
from embedding_store.tables import EmbeddingTables
from tests.embedding_store.made import assert_same_rows
from tests.streams.children import processes

NOW = 1_700_000_000_000  # event time of the last commit, ms
TOUCHED_TYPE: dict[str, tuple[str, tuple[int, ...]]] = {TOUCHED: ("<i8", ())}
BEFORE = {
    "item": layout(4, {"clicks": ("<i8", ())}),
    "use": layout(4, {}),  # another name goes on from it
    "user": layout(4, {"history": ("|u1", (5,)), **TOUCHED_TYPE}),
}
AFTER = {"item": layout(8, {"clicks": ("<i8", ()), **TOUCHED_TYPE}), "user": BEFORE["user"], "new": layout(4, {})}


def rows_of(layouts: Mapping[str, np.dtype], table: str, ids: list[int], seed: int = 0) -> TableRows:
    """Rows of any layout, drawn from `seed`; TOUCHED is some time before NOW."""
    rng, dtype = np.random.default_rng(seed), layouts[table]
    columns = {n: rng.integers(0, 256, (len(ids), *dtype[n].shape)).astype(dtype[n].base) for n in dtype.names or ()}
    columns[WEIGHTS] += rng.random(columns[WEIGHTS].shape, np.float32)
    if TOUCHED in columns:
        columns[TOUCHED] = NOW - rng.integers(0, 10**9, len(ids))
    return TableRows(np.array(ids, np.int64), columns).sorted()


def fill(path: Path, layouts: Mapping[str, np.dtype], ids: list[int]) -> dict[str, TableRows]:
    """A store with rows of `ids` in each table, dense weights, blobs, a version in the outbox, rows that are owed and
    ids that are gone."""
    rows = {table: rows_of(layouts, table, ids, seed) for seed, table in enumerate(layouts)}
    none = np.empty(0, np.int64)
    notes = {t: Notes(none, none, r.ids, grain(r.columns[TOUCHED])) for t, r in rows.items() if TOUCHED in r.columns}
    blobs = {"card": {1: b"a card"}, **{f".seen.{t}.64.0": {-1: b"halved", 3: b"page"} for t in layouts}}
    owed = {t.encode() + int(i).to_bytes(8, "little", signed=True): bytes(13) for t in layouts for i in ids}
    with CheckpointStore(path, layouts) as store:
        store.remember_gone((0, 0))
        store.commit(Commit(
            3, 7, b"state", {"w": np.ones(3, np.float32)}, rows, blobs, [b"part"],
            gone={table: np.array([77]) for table in layouts}, notes=notes, settings="digest", event_time_ms=NOW,
            records=owed,
        ))  # fmt: skip
    return rows


def nothing(store: CheckpointStore) -> None:
    """The owner has nothing to say."""


def all_of(store: CheckpointStore, table: str) -> TableRows:
    return concat(list(store.iter_rows(table, 3)))


def digest_of(store: CheckpointStore, table: str) -> str:
    digest = Digest(store.layouts)
    digest.rows(table, all_of(store, table))
    return digest.finish({}, b"")


def test_what_stays_is_the_same_bit_for_bit_and_what_goes_leaves_nothing(tmp_path: Path) -> None:
    rows = fill(tmp_path / "s", BEFORE, [5, -9, 3, 2**63 - 1])
    with CheckpointStore(tmp_path / "s", BEFORE) as store:
        digest = digest_of(store, "user")
    said = reshape(tmp_path / "s", AFTER, nothing)
    assert said == ["table new added", "table use removed", "table item widened from dim 4 to 8",
                    f"column item.{TOUCHED} added"]  # fmt: skip
    with CheckpointStore(tmp_path / "s", AFTER) as store:
        assert_same_rows(all_of(store, "user"), rows["user"])
        assert digest_of(store, "user") == digest
        assert not store.has_rows("new")
        item = all_of(store, "item")
        assert item.columns[WEIGHTS][:, :4].tobytes() == rows["item"].columns[WEIGHTS].tobytes()
        assert not item.columns[WEIGHTS][:, 4:].any()
        assert item.columns[TOUCHED].tolist() == [NOW] * 4
        assert_same_rows(item.without(WEIGHTS, TOUCHED), rows["item"].without(WEIGHTS))
        for table in ("item", "user"):  # exactly one note a row, where it is looked for
            ids, times = store.noted_before(table, NOW + 1)
            stored = all_of(store, table)
            at = dict(zip(stored.ids.tolist(), grain(stored.columns[TOUCHED]).tolist(), strict=True))
            assert dict(zip(ids.tolist(), times.tolist(), strict=True)) == at
        assert store.blob_names() == [".seen.item.64.0", ".seen.user.64.0", "card"]
        assert {key[:-8] for key, _ in store.records()} == {b"item", b"user"}
        assert store.gone_since((0, 0))["use"].tolist() == [77], "a way back must not bring it back"
        assert store.outbox() == [(7, [b"part"])]
        head = store.head()
        assert head is not None
        assert (head.place, head.state, head.settings, head.event_time_ms) == ((3, 7), b"state", "digest", NOW)
        store.scan()
        store.commit(Commit(3, 8, b"", rows={"new": rows_of(AFTER, "new", [4])}))
    with CheckpointStore(tmp_path / "s", None, strict=True) as store:
        assert len(all_of(store, "new")) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


@st.composite
def _shapes(draw: st.DrawFn) -> tuple[dict[str, np.dtype], dict[str, np.dtype]]:
    """Layouts, and others that they can become."""
    before, after = {}, {}
    for table in ("a", "b", "c"):
        dims = draw(st.tuples(st.sampled_from([4, 8]), st.sampled_from([0, 0, 4, 12])))
        columns = [{n: t for n, t in {"n": ("<i8", ()), "h": ("|u1", (3,)), TOUCHED: ("<i8", ())}.items()
                    if draw(st.booleans())} for _ in range(2)]  # fmt: skip
        where = draw(st.sampled_from(["both", "both", "before", "after"]))
        if where != "after":
            before[table] = layout(dims[0], columns[0])
        if where != "before":
            after[table] = layout(sum(dims), columns[1])
    return before, after


@settings(max_examples=15, deadline=None)
@given(shapes=_shapes(), ids=st.sets(st.integers(-(2**63), 2**63 - 1), max_size=12))
def test_any_reshaping_is_what_a_plain_loop_over_rows_says(
    shapes: tuple[dict, dict], ids: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    before, after = shapes
    path = tmp_path_factory.mktemp("any") / "s"
    rows = fill(path, before, sorted(ids))
    said = reshape(path, after, nothing)
    assert bool(said) == (before != after)
    with CheckpointStore(path, after) as store:
        for table, dtype in after.items():
            stored = dict(pair for part in store.iter_rows(table) for pair in _by_id(part))
            had = _by_id(rows[table]) if table in rows else []
            assert stored == {i: _plainly(row, dtype) for i, row in had}
            if TOUCHED in (dtype.names or ()):
                assert sorted(store.noted_before(table, NOW + 1)[0].tolist()) == sorted(stored)


def _by_id(rows: TableRows) -> list[tuple[int, dict[str, bytes]]]:
    return [(int(i), {n: c[k].tobytes() for n, c in rows.columns.items()}) for k, i in enumerate(rows.ids)]


def _plainly(row: dict[str, bytes], dtype: np.dtype) -> dict[str, bytes]:
    """The plain reference: bytes of the old row, then zeros."""
    new = {n: row.get(n, b"").ljust(dtype[n].itemsize, b"\x00") for n in dtype.names or ()}
    if TOUCHED in new and TOUCHED not in row:
        new[TOUCHED] = NOW.to_bytes(8, "little")
    return new


def test_rows_are_rewritten_in_chunks_and_none_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = fill(tmp_path / "s", BEFORE, list(range(-500, 500)))
    monkeypatch.setattr("embedding_store.reshape._CHUNK_BYTES", 1_000)
    reshape(tmp_path / "s", AFTER, nothing)
    with CheckpointStore(tmp_path / "s", AFTER) as store:
        item = all_of(store, "item")
    assert item.ids.tolist() == rows["item"].ids.tolist()
    assert item.columns["clicks"].tolist() == rows["item"].columns["clicks"].tolist()


def test_the_state_of_an_optimizer_by_weight_is_widened_too_and_one_of_another_kind_begins_anew(tmp_path: Path) -> None:
    def by_weight(dim: int) -> np.dtype:
        return np.dtype([(WEIGHTS, "<f4", (dim,)), (MOMENTUM, "<f4", (dim,))])

    rows = fill(tmp_path / "s", {"t": by_weight(4)}, [1, 2])["t"]
    assert reshape(tmp_path / "s", {"t": by_weight(8)}, nothing) == ["table t widened from dim 4 to 8"]
    with CheckpointStore(tmp_path / "s", None) as store:
        momentum = all_of(store, "t").columns[MOMENTUM]
    np.testing.assert_array_equal(momentum, np.pad(rows.columns[MOMENTUM], ((0, 0), (0, 4))))
    assert reshape(tmp_path / "s", {"t": layout(8, {})}, nothing) == ["optimizer of table t begun anew"]
    with CheckpointStore(tmp_path / "s", None) as store:
        assert not all_of(store, "t").columns[MOMENTUM].any()
        assert all_of(store, "t").columns[WEIGHTS].any()


@pytest.mark.parametrize(
    ("wanted", "remedy"),
    [
        ({**BEFORE, "item": layout(4, {"clicks": ("<i8", ())}), "user": layout(4, {"history": ("|u1", (6,))})},
         "use the release that wrote the store"),
        ({**BEFORE, "item": layout(4, {"clicks": ("<f8", ())})}, "use the release that wrote the store"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_and_nothing_is_changed(
    wanted: dict, remedy: str, tmp_path: Path
) -> None:
    fill(tmp_path / "s", BEFORE, [1])
    with pytest.raises(UsageError, match=remedy):
        reshape(tmp_path / "s", wanted, nothing)
    _is_as_before(tmp_path, BEFORE)


def test_narrower_rows_are_refused_in_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    wide = {"t": layout(16, {})}
    fill(tmp_path / "s", wide, [1])
    with pytest.raises(UsageError) as refused:
        reshape(tmp_path / "s", {"t": layout(8, {})}, nothing)
    assert str(refused.value) == (
        "the rows of table 't' have dim 16 in the store and 8 in the settings: they cannot be made narrower, set dim "
        "back to 16 or more, or choose an empty data directory"
    )
    _is_as_before(tmp_path, wide)


def _is_as_before(folder: Path, layouts: Mapping[str, np.dtype]) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["s"], "something was left over"
    with CheckpointStore(folder / "s", layouts) as store:
        assert store.head() is not None


def test_where_the_owner_or_the_disk_fails_the_store_is_the_old_one(tmp_path: Path) -> None:
    fill(tmp_path / "s", BEFORE, [1])

    def fail(store: CheckpointStore) -> None:
        raise StoreError("no")

    with pytest.raises(StoreError, match="no"):
        reshape(tmp_path / "s", AFTER, fail)
    _is_as_before(tmp_path, BEFORE)


def test_a_store_that_is_in_use_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path / "s", BEFORE, [1])
    with CheckpointStore(tmp_path / "s", BEFORE), pytest.raises(StoreLocked):
        reshape(tmp_path / "s", AFTER, nothing)
    _is_as_before(tmp_path, BEFORE)


def test_a_store_without_a_commit_is_reshaped_too(tmp_path: Path) -> None:
    CheckpointStore(tmp_path / "s", BEFORE).close()
    reshape(tmp_path / "s", AFTER, nothing)
    with CheckpointStore(tmp_path / "s", AFTER) as store:
        assert store.head() is None
        store.commit(Commit(1, 1, b""))


POINTS = [p for p in faults.POINTS if p.partition(".")[0] in ("reshape", "replace")]


def _killed_at(path: str, point: str) -> None:
    faults.arm(point)
    reshape(Path(path), AFTER, partial(_next, sequence=8))


def _next(store: CheckpointStore, sequence: int) -> None:
    store.commit(Commit(4, sequence, b"reshaped"))


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_the_store_is_the_old_one_or_the_new_one(point: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    rows = fill(path, BEFORE, [1, 2, 3])
    process = processes.Process(target=_killed_at, args=(str(path), point))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, f"{point} was never reached"
    settle_directory(path)
    done = point in ("replace.placed", "reshape.done")
    with CheckpointStore(path, None, strict=True) as store:
        head = store.head()
        assert head is not None
        assert head.place == ((4, 8) if done else (3, 7))
        assert store.layouts == (AFTER if done else BEFORE)
        assert_same_rows(all_of(store, "user"), rows["user"])
        store.content()
    if not done:
        with pytest.raises(OtherLayouts):
            CheckpointStore(path, AFTER)
        reshape(path, AFTER, partial(_next, sequence=8))
    with CheckpointStore(path, AFTER) as store:
        assert store.head().place == (4, 8)  # type: ignore[union-attr]
        item = all_of(store, "item").columns[WEIGHTS]
    assert item[:, :4].tobytes() == rows["item"].columns[WEIGHTS].tobytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"], "something was left over"


def test_tables_go_on_with_a_reshaped_store(tmp_path: Path) -> None:
    """Expiry that is switched on finds the rows that only the store has, what was owed is owed."""
    fill(tmp_path / "s", {"t": layout(4, {})}, list(range(1, 9)))
    rules = RowRules(expire_after_ms=10**7)
    spec = TableSpec("t", ("t",), TableSettings(dim=8, capacity=4, rules=rules))
    reshape(tmp_path / "s", {"t": spec.layout}, nothing)
    with CheckpointStore(tmp_path / "s", {"t": spec.layout}) as store:
        owed = Owed(store, 1, 1, {})
        owed.restore()
        assert owed.rows == 8
        tables = EmbeddingTables([spec], store=store)
        tables.restore()
        tables.begin_step(NOW + 10**6)
        assert (tables.rows("t", np.array([1, 8]), admit=False) > 0).all()
        tables.clear_touched()
        tables.begin_step(NOW + 10**7 + 2 * (1 << 20))
        assert tables.gone()["t"].tolist() == list(range(1, 9))


def test_the_same_layouts_change_nothing_and_other_words_name_each_change() -> None:
    assert changes(BEFORE, BEFORE) == []
    other = {**BEFORE, "user": layout(4, {**TOUCHED_TYPE, "history": ("|u1", (5,))})}
    assert changes(BEFORE, other) == ["columns of table user put in another order"]
    assert changes(BEFORE, {**BEFORE, "item": layout(4, {})}) == ["column item.clicks removed"]
