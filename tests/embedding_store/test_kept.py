"""A kept checkpoint is the whole store as of one commit, taken while others follow; what went since is remembered."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.errors import StoreError
from embedding_store.kept import KeptCheckpoints, number_of, place_of_number
from tests.embedding_store.committing import commit_of
from tests.embedding_store.made import LAYOUTS, rows_of


@pytest.fixture(params=["folder", "memory"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> KeptCheckpoints:
    return KeptCheckpoints(str(tmp_path / "kept") if request.param == "folder" else f"memory://{uuid.uuid4()}/kept")


def _about(store: CheckpointStore) -> dict:
    head = store.head()
    assert head is not None
    return {"epoch": head.epoch, "sequence": head.sequence, "digest": store.digest()}


def _places(kept: KeptCheckpoints) -> list[tuple[int, int]]:
    return [place_of_number(manifest.number) for manifest in kept.newest_first()]


def test_it_comes_back_as_the_store_was_optimizer_and_outbox_too(kept: KeptCheckpoints, tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        assert kept.keep(store, _about, keep=2) is None, "nothing is committed"
        for n in (1, 2, 3):
            store.commit(commit_of(n))
            digest = store.digest()
            assert kept.keep(store, _about, keep=2) == (1, n)
        outbox = store.outbox()
        store.commit(commit_of(4))
    assert _places(kept) == [(1, 3), (1, 2)]
    assert kept.oldest() == (1, 2)
    manifest = kept.find((1, 3))
    kept.fetch(manifest, tmp_path / "back")
    with CheckpointStore(tmp_path / "back", None) as back:
        assert back.layouts == LAYOUTS
        assert back.digest() == digest == manifest.about["digest"]
        assert back.outbox() == outbox
        back.commit(commit_of(5))
    kept.fetch(manifest, tmp_path / "again")
    with CheckpointStore(tmp_path / "again", None) as again:
        assert again.digest() == digest, "what was done with a fetched one does not reach the kept one"
    assert not list(tmp_path.glob("s.*")), "nothing is left beside the store"


def _check_not_kept_once_damaged(kept: KeptCheckpoints, table: Path) -> None:
    """A bit of the table, a file of a store, is flipped."""
    raw = bytearray(table.read_bytes())
    raw[len(raw) // 3] ^= 1
    table.write_bytes(raw)
    with CheckpointStore(table.parent, LAYOUTS) as store, pytest.raises(StoreError, match=table.name):
        kept.keep(store, _about, keep=2)
    assert _places(kept) == []


def test_a_store_with_damage_in_what_nobody_describes_is_not_kept(kept: KeptCheckpoints, tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        store.remember_gone((0, 0))
        commit = commit_of(1)
        commit.gone = {"user": np.arange(1_000, 2_000)}
        store.commit(commit)
    table = next(file for file in (tmp_path / "s").glob("*.sst") if b"gone" in file.read_bytes())
    _check_not_kept_once_damaged(kept, table)


def test_where_it_can_a_kept_checkpoint_shares_the_tables_of_the_store(tmp_path: Path) -> None:
    kept = KeptCheckpoints(str(tmp_path / "kept"))
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        store.commit(commit_of(1))
        kept.keep(store, _about, keep=2)
        tables = list((tmp_path / "kept").glob("*/*.sst"))
        assert tables
        assert all((store.path / path.name).samefile(path) for path in tables)


def test_a_later_epoch_comes_after_an_earlier_one_whatever_the_sequence(tmp_path: Path) -> None:
    kept = KeptCheckpoints(str(tmp_path / "kept"))
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        store.commit(Commit(1, 900, b""))
        kept.keep(store, _about, keep=5)
    with CheckpointStore(tmp_path / "t", LAYOUTS) as store:
        store.commit(Commit(2, 7, b""))
        kept.keep(store, _about, keep=5)
    assert _places(kept) == [(2, 7), (1, 900)]
    assert place_of_number(number_of((3, 12))) == (3, 12)
    with pytest.raises(StoreError, match=r"checkpoint 1\.901 is not kept"):
        kept.find((1, 901))


def test_damage_that_rocksdb_can_see_is_not_kept(tmp_path: Path) -> None:
    kept = KeptCheckpoints(str(tmp_path / "kept"))
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        store.commit(commit_of(1))
    table = max((tmp_path / "s").glob("*.sst"), key=lambda path: path.stat().st_size)
    _check_not_kept_once_damaged(kept, table)


def test_what_is_gone_is_noted_while_an_older_checkpoint_is_kept_and_not_longer(tmp_path: Path) -> None:
    def forget(store: CheckpointStore, sequence: int, *ids: int) -> None:
        store.commit(Commit(1, sequence, b"", gone={"user": np.array(ids, np.int64)}))

    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        store.commit(Commit(1, 1, b"", rows={"user": rows_of("user", [5, -6, 7, 8])}))
        forget(store, 2, 5)
        assert store.gone_since((0, 0)) == {}, "nobody could bring it back"
        store.remember_gone((1, 2))
        forget(store, 3, 7, -6)
        digest = store.digest()
    with CheckpointStore(tmp_path / "s", LAYOUTS) as store:
        assert store.digest() == digest
        assert store.gone_since((1, 2))["user"].tolist() == [-6, 7]
        assert store.gone_since((1, 3)) == {}
        store.remember_gone((1, 2))
        forget(store, 4, 8)
        assert store.gone_since((1, 2))["user"].tolist() == [-6, 7, 8]
        store.remember_gone((1, 3))  # the oldest kept one is now of 3
        assert store.gone_since((0, 0))["user"].tolist() == [8]
        assert store.digest() != digest
        store.remember_gone(None)
        assert store.gone_since((0, 0)) == {}
