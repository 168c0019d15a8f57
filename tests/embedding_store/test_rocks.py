"""RocksDB's errors become errors with a remedy, and a database that failed to write can be written again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from embedding_store.errors import DiskFull, StoreError, StoreLocked
from embedding_store.rocks import Db, open_db
from tests.embedding_store.conftest import SmallDisk


def _put(db: Db, family: str, **pairs: str) -> None:
    batch = db.batch()
    batch.put_all(family, (k.encode() for k in sorted(pairs)), (pairs[k].encode() for k in sorted(pairs)))
    db.write(batch)


def test_a_batch_goes_into_several_families_and_is_there_after_opening_anew(tmp_path: Path) -> None:
    with open_db(tmp_path / "db", ["a", "b"]) as db:
        batch = db.batch()
        batch.into("a")[b"k"] = b"1"
        batch.into("b")[b"k"] = b"2"
        batch.into("default")[b"k"] = b"3"
        db.write(batch)
    with open_db(tmp_path / "db", ["a"]) as db:  # families that are there need not be named
        assert [db.get(f, b"k") for f in ("a", "b", "default")] == [b"1", b"2", b"3"]
        assert db.get_many("a", [b"k", b"x"]) == [b"1", None]


def test_items_come_in_order_from_a_key_on(tmp_path: Path) -> None:
    with open_db(tmp_path / "db", ["a"]) as db:
        _put(db, "a", x="1", y="2", z="3")
        assert [k for k, _ in db.items("a", b"xx")] == [b"y", b"z"]
        batch = db.batch()
        batch.delete_range("a", b"x", b"z")
        db.write(batch)
        assert list(db.items("a")) == [(b"z", b"3")]


def test_closing_lets_go_of_the_lock_though_families_were_used(tmp_path: Path) -> None:
    for _ in range(3):
        db = open_db(tmp_path / "db", ["a"])
        _put(db, "a", k="v")
        assert db.get("a", b"k") == b"v"
        db.close()
        db.close()
        with pytest.raises(StoreError, match="is closed"):
            db.get("a", b"k")


def test_a_second_opening_says_who_is_in_the_way(tmp_path: Path) -> None:
    with open_db(tmp_path / "db", []), pytest.raises(StoreLocked, match="in use by another process: stop"):
        open_db(tmp_path / "db", [])


def test_another_process_is_told_that_the_store_is_locked(tmp_path: Path) -> None:
    code = f"from embedding_store.rocks import open_db; open_db({str(tmp_path / 'db')!r}, [])"
    with open_db(tmp_path / "db", []):
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StoreLocked: the store" in child.stderr


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose a directory"):
        open_db(tmp_path / "file", [])


def test_a_reader_sees_what_is_written_without_the_lock(tmp_path: Path) -> None:
    with open_db(tmp_path / "db", ["a"]) as db:
        _put(db, "a", k="v")
        with open_db(tmp_path / "db", ["a"], read_only=True) as reader:
            assert reader.get("a", b"k") == b"v"
            with pytest.raises(StoreError):
                _put(reader, "a", k="w")


def test_a_full_disk_is_named_and_once_there_is_space_writing_goes_on(small_disk: SmallDisk) -> None:
    db = open_db(small_disk.path / "db", ["a"])
    acknowledged: list[bytes] = []
    with pytest.raises(DiskFull, match="no space left"):
        _write_for_ever(db, acknowledged)
    assert [k for k, _ in db.items("a")] == acknowledged, "reads show all that was acknowledged, and no more"
    with pytest.raises(DiskFull):
        _put(db, "a", k="v")
    small_disk.grow()
    _put(db, "a", k="v")
    assert [k for k, _ in db.items("a")] == [*acknowledged, b"k"]
    db.close()


def _write_for_ever(db: Db, acknowledged: list[bytes]) -> None:
    while True:
        key = b"%04d" % len(acknowledged)
        batch = db.batch()
        batch.into("a")[key] = os.urandom(100_000)
        db.write(batch)
        acknowledged.append(key)
