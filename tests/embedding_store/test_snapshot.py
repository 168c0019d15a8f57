"""A snapshot is exactly the version that its name says, whole or not there."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import MOMENTUM, TableRows, concat
from embedding_store.delta import Version
from embedding_store.errors import CorruptRecord, DiskFull, StoreError
from embedding_store.snapshot import latest_snapshot, read_snapshot, snapshot_of, write_snapshot
from tests.embedding_store.committing import commit_of
from tests.embedding_store.conftest import SmallDisk
from tests.embedding_store.made import LAYOUTS, assert_same_rows, assert_same_version, rows_of, version_of


def test_written_and_read(tmp_path: Path) -> None:
    version = version_of(3, n=500)
    version.base = None
    path = write_snapshot(tmp_path / "snapshots", version)
    assert path == tmp_path / "snapshots" / "1-3"
    assert_same_version(read_snapshot(path), version)


def test_the_newest_is_the_largest_version_and_older_ones_go(tmp_path: Path) -> None:
    assert latest_snapshot(tmp_path / "none") is None
    for epoch, sequence in ((1, 9), (1, 10), (2, 3), (1, 11)):
        write_snapshot(tmp_path, Version(epoch, sequence), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1-11", "2-3"]
    assert latest_snapshot(tmp_path) == tmp_path / "2-3"


def test_what_a_crash_left_behind_is_no_snapshot_and_goes(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "part-000000").write_bytes(b"half")
    assert latest_snapshot(tmp_path) is None
    write_snapshot(tmp_path, Version(1, 1))
    assert [p.name for p in tmp_path.iterdir()] == ["1-1"]


def test_a_snapshot_of_a_store_equals_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedding_store.snapshot._CHUNK", 70)
    ids = np.arange(-100, 100)
    said = Version(1, 1, (1, 0), 123, {0: 5}, {"rows": 7}, {"w": np.ones((2, 2), np.float32)})
    dense: dict[str, np.ndarray] = {"w": np.ones((2, 2), np.float32), "adam.w": np.zeros(4)}
    cards = {int(i): b"%d" % i for i in ids}
    with CheckpointStore(tmp_path / "store", LAYOUTS) as store:
        with pytest.raises(StoreError, match="nothing was committed"):
            snapshot_of(store, tmp_path / "snapshots")
        rows = {t: rows_of(t, ids) for t in LAYOUTS}
        store.commit(Commit(1, 1, b"", dense, rows, {"card": cards, "empty": {}}, [], said))
        path = snapshot_of(store, tmp_path / "snapshots")
        version = read_snapshot(path)
        assert (version.epoch, version.sequence, version.base, version.created_ms) == (1, 1, None, 123)
        assert (version.positions, version.info) == ({0: 5}, {"rows": 7})
        assert list(version.dense) == ["w"], "what only the trainer needs stays behind"
        assert version.blobs == {"card": cards}
        for table in LAYOUTS:
            assert_same_rows(version.tables[table], concat(list(store.iter_rows(table))).without(MOMENTUM))
        assert snapshot_of(store, tmp_path / "snapshots") == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["snapshots", "store"]


def test_snapshots_while_commits_go_on_hold_exactly_the_version_of_their_name(tmp_path: Path) -> None:
    """Commit n sets everything to n: one torn row and it shows."""
    with CheckpointStore(tmp_path / "store", LAYOUTS) as store:
        store.commit(commit_of(1))
        stop, failed = threading.Event(), []

        def snapshots() -> None:
            try:
                while not stop.is_set():
                    snapshot_of(store, tmp_path / "snapshots", keep=1000)
            except StoreError as error:
                failed.append(error)

        thread = threading.Thread(target=snapshots)
        thread.start()
        for n in range(2, 150):
            store.commit(commit_of(n))
            store.acknowledge(n)
        stop.set()
        thread.join()
    assert failed == []
    found = list((tmp_path / "snapshots").iterdir())
    assert len(found) > 3
    for path in found:
        version, n = read_snapshot(path), int(path.name.split("-")[1])
        assert version.sequence == n
        assert (version.dense["w"] == n).all()
        assert version.blobs["card"] == {1: b"%d" % n}
        columns = [c for rows in version.tables.values() for c in rows.columns.values()]
        assert len(columns) == 5
        assert all((column == n).all() for column in columns)


def test_a_damaged_or_vanished_snapshot_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedding_store.snapshot._PART_BYTES", 5_000)
    path = write_snapshot(tmp_path, version_of(1, n=500))
    parts = sorted(path.iterdir())
    assert len(parts) > 3
    parts[-1].rename(tmp_path / "kept")
    with pytest.raises(CorruptRecord, match="lacks some of its parts"):
        read_snapshot(path)
    (tmp_path / "kept").rename(parts[-1])
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    with pytest.raises(CorruptRecord):
        read_snapshot(path)
    with pytest.raises(StoreError, match="cannot be read"):
        read_snapshot(tmp_path / "1-99")


def test_a_full_disk_leaves_the_older_snapshot_and_no_half_of_a_new_one(small_disk: SmallDisk) -> None:
    write_snapshot(small_disk.path, version_of(1))
    rng = np.random.default_rng(0)
    rows = TableRows(np.arange(1, 9), {"weights": rng.random((8, 1 << 18), np.float32)})
    with pytest.raises(DiskFull, match="no space left for a snapshot"):
        write_snapshot(small_disk.path, Version(1, 2, tables={"item": rows}))
    assert [p.name for p in small_disk.path.iterdir()] == ["1-1"]
