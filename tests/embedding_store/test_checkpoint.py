"""The store is at a commit, always: after a kill -9, on a full disk, and after opening it again."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import TableRows, concat, layout
from embedding_store.delta import Assembler
from embedding_store.digest import Digest
from embedding_store.errors import DiskFull, PositionError, StoreError, StoreLocked
from tests.embedding_store.committing import IDS
from tests.embedding_store.conftest import SmallDisk
from tests.embedding_store.made import LAYOUTS, assert_same_rows, rows_of

KILLS = 12


def _commit(sequence: int, **changes: Any) -> Commit:
    fields: dict[str, Any] = {"epoch": 1, "sequence": sequence, "state": b"s"}
    return Commit(**(fields | changes))


def _all(store: CheckpointStore, table: str, chunk: int = 7) -> TableRows:
    return concat(list(store.iter_rows(table, chunk)))


def test_what_was_committed_is_there_after_opening_anew(tmp_path: Path) -> None:
    item, user = rows_of("item", [3, -9, 2**63 - 1, -(2**63)]), rows_of("user", [5])
    dense = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(4)}
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        assert store.head() is None
        rows, blobs = {"item": item, "user": user}, {"card": {3: b"c"}}
        store.commit(_commit(1, state=b"one", dense=dense, rows=rows, blobs=blobs))
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        head = store.head()
        assert head is not None
        assert (head.epoch, head.sequence, head.state) == (1, 1, b"one")
        np.testing.assert_array_equal(head.dense["w"], dense["w"])
        assert head.dense["n"] == 4
        assert_same_rows(_all(store, "item"), item.sorted())
        assert_same_rows(_all(store, "user"), user)
        assert list(store.iter_blobs("card")) == [(3, b"c")]


def test_rows_come_in_the_order_of_their_ids_and_the_last_value_holds(tmp_path: Path) -> None:
    ids = np.array([5, -5, 0x7FFF_FFFF_FFFF_FFFF, -1, 1, 256, -(2**63)])
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        store.commit(_commit(1, rows={"item": rows_of("item", ids, seed=1)}))
        store.commit(_commit(2, rows={"item": rows_of("item", ids[:3], seed=2)}))
        out = _all(store, "item")
        np.testing.assert_array_equal(out.ids, np.sort(ids))
        expected = concat([rows_of("item", ids[:3], seed=2), rows_of("item", ids, seed=1).take(slice(3, None))])
        assert_same_rows(out, expected.sorted())


def test_rows_are_read_by_id_in_the_order_asked(tmp_path: Path) -> None:
    rows = rows_of("item", [9, -4, 7, 3])
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        store.commit(_commit(1, rows={"item": rows}))
        found, out = store.read_rows("item", np.array([3, 100, 9, 3, -100]))
        assert found.tolist() == [True, False, True, True, False]
        assert_same_rows(out, rows.take(np.array([3, 0, 3])))
        found, out = store.read_rows("user", np.array([3]))
        assert not found.any()
        assert len(out) == 0
        assert store.has_rows("item")
        assert not store.has_rows("user")


def test_blobs_of_families_whose_names_begin_alike_are_kept_apart(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        store.commit(_commit(1, blobs={"card": {2: b"b", -1: b"a"}, "cards": {1: b"x"}, "a": {0: b""}}))
        assert list(store.iter_blobs("card")) == [(-1, b"a"), (2, b"b")]
        assert list(store.iter_blobs("cards")) == [(1, b"x")]
        assert store.blob_names() == ["a", "card", "cards"]


def test_the_outbox_is_forgotten_only_once_acknowledged_and_outlives_the_process(tmp_path: Path) -> None:
    parts = {n: [b"part %d" % n, b"\x00" * n] for n in (1, 2, 3)}
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        for n in (1, 2, 3):
            store.commit(_commit(n, parts=parts[n]))
        store.commit(_commit(4))  # a commit that no replica must hear of
        assert store.outbox() == [(n, parts[n]) for n in (1, 2, 3)]
        store.acknowledge(1)
        assert store.outbox() == [(n, parts[n]) for n in (2, 3)]
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        assert store.outbox() == [(n, parts[n]) for n in (2, 3)]
        store.acknowledge(3)
        assert store.outbox() == []
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        assert store.outbox() == []


def test_a_commit_that_does_not_follow_is_refused(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        store.commit(_commit(5, epoch=2))
        for wrong in (_commit(5, epoch=2), _commit(6, epoch=1), _commit(4, epoch=3)):
            with pytest.raises(PositionError, match="restore from the store"):
                store.commit(wrong)
        store.commit(_commit(6, epoch=3))


def test_other_tables_or_dimensions_are_refused(tmp_path: Path) -> None:
    CheckpointStore(tmp_path / "s", LAYOUTS).close()
    with pytest.raises(StoreError, match="other tables, dimensions"):
        CheckpointStore(tmp_path / "s", LAYOUTS | {"item": layout(8, {})})
    CheckpointStore(tmp_path / "s", LAYOUTS).close()  # the refusal let go of it


def test_two_trainers_cannot_have_one_store(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "s", LAYOUTS), pytest.raises(StoreLocked, match=str(tmp_path / "s")):
        CheckpointStore(tmp_path / "s", LAYOUTS)


def test_the_digest_is_of_what_is_in_it_not_of_how_it_came(tmp_path: Path) -> None:
    def digest(name: str, *commits: dict, state: bytes | None = None) -> str:
        with CheckpointStore(tmp_path / name, LAYOUTS) as store:
            for n, changes in enumerate(commits, 1):
                store.commit(_commit(n, **changes))
            return store.digest(state)

    rows = rows_of("item", np.arange(-5, 5))
    end = {"dense": {"w": np.ones(3, np.float32)}, "blobs": {"card": {1: b"a"}}}
    whole = digest("a", {"rows": {"item": rows}} | end)
    half = {"rows": {"item": rows.take(slice(5))}, "parts": [b"x"]}
    assert whole == digest("b", half, {"rows": {"item": rows}} | end)
    assert whole != digest("c", {"rows": {"item": rows.take(slice(1, None))}} | end)
    assert whole != digest("d", {"rows": {"item": rows}} | end | {"dense": {"w": np.zeros(3, np.float32)}})
    assert whole != digest("e", {"rows": {"item": rows}} | end | {"blobs": {"card": {1: b"b"}}})
    assert whole != digest("f", {"rows": {"item": rows}} | end | {"state": b"t"})
    assert whole == digest("g", {"rows": {"item": rows}} | end | {"state": b"t"}, state=b"s")


def test_the_digest_does_not_depend_on_chunks() -> None:
    rows = rows_of("item", np.arange(20))
    digests = []
    for size in (20, 7, 1):
        digest = Digest(LAYOUTS)
        for start in range(0, 20, size):
            digest.rows("item", rows.take(slice(start, start + size)))
        digests.append(digest.finish({}, b""))
    assert len(set(digests)) == 1


def test_killed_at_any_moment_the_store_is_at_a_whole_commit(tmp_path: Path) -> None:
    """kill -9 in the middle of committing, again and again, over one store."""
    chance, before = random.Random(5), 0
    for _ in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.embedding_store.committing", str(tmp_path / "s")],
            stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()  # it is under way
        time.sleep(chance.uniform(0, 0.15))
        child.kill()
        said = [int(line) for line in child.stdout.read().split()]
        child.wait()
        child.stdout.close()
        before = _check_whole(tmp_path / "s", max(said, default=before + 1))
    assert before > KILLS


def _check_whole(path: Path, said: int) -> int:
    with CheckpointStore(path, LAYOUTS) as store:
        head = store.head()
        assert head is not None
        n = head.sequence
        assert n >= said, "a commit that was reported done is lost"
        assert head.state == b"%d" % n
        assert (head.dense["w"] == n).all()
        assert list(store.iter_blobs("card")) == [(1, b"%d" % n)]
        for table in LAYOUTS:
            rows = _all(store, table, 1000)
            np.testing.assert_array_equal(rows.ids, IDS)
            assert all((column == n).all() for column in rows.columns.values()), "a torn commit"
        sent = store.outbox()
        assert [sequence for sequence, _ in sent] == list(range(n - len(sent) + 1, n + 1))
        acknowledged = n // 5 * 5 - 2 if n >= 5 else 0  # at most: the kill may have come before
        assert len(sent) >= n - acknowledged, f"versions were forgotten: {sent[0][0]} … {n} are left"
        assert len(sent) < n or n < 20, "nothing was ever forgotten"
        for sequence, parts in sent:
            (version,) = [v for v in map(Assembler().add, parts) if v]
            assert (version.tables["item"].columns["clicks"] == sequence).all()
        return n


def test_a_commit_that_found_no_space_succeeds_once_there_is_some(small_disk: SmallDisk) -> None:
    ids = np.arange(20_000)
    first, second = rows_of("item", ids, seed=1), rows_of("item", ids[:50], seed=2)
    with CheckpointStore(small_disk.path / "s", LAYOUTS) as store:
        store.commit(_commit(1, rows={"item": first}, parts=[b"one"]))
        digest = store.digest()
        too_much = _commit(2, rows={"item": second}, parts=[b"two", b"x" * 4_000_000])
        for _ in range(2):
            with pytest.raises(DiskFull, match="no space left"):
                store.commit(too_much)
        small_disk.grow()
        store.commit(too_much)
        assert store.outbox()[-1][0] == 2
        assert_same_rows(_all(store, "item").take(slice(50)), second)
        assert store.digest() != digest


def test_a_full_disk_leaves_a_store_that_opens_at_the_commit_before(small_disk: SmallDisk) -> None:
    with CheckpointStore(small_disk.path / "s", LAYOUTS) as store:
        store.commit(_commit(1, rows={"item": rows_of("item", np.arange(100))}, parts=[b"one"]))
        digest = store.digest()
        with pytest.raises(DiskFull):
            store.commit(_commit(2, state=b"two", parts=[b"x" * 5_000_000]))
        assert store.digest() == digest
    small_disk.grow()
    with CheckpointStore(small_disk.path / "s", LAYOUTS) as store:
        assert store.digest() == digest
        assert store.outbox() == [(1, [b"one"])]
