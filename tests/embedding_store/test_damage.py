"""A damaged file is refused, or makes no difference: no flipped or missing byte ever passes for other content."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_store.checkpoint import CLOSED_AT, CheckpointStore, Commit
from embedding_store.errors import CorruptRecord, HeadraceError, StoreError
from embedding_store.kept import KeptCheckpoints
from tests.embedding_store.committing import commit_of
from tests.embedding_store.killed import killed
from tests.embedding_store.made import LAYOUTS

PLACES = 4  # in each file, evenly, in the list of files ten times as many …
ENDS = 12  # … and its last bytes, each third of them
COMMITS = 5
FLUSHED = 3  # what is in tables; the commits after it are in the log of a store that was not closed


def _commit(n: int) -> Commit:
    """Of the rows every other one from the n-th on: what a lost file had no later commit brings back."""
    commit = commit_of(n)
    commit.rows = {table: rows.take(slice(n, None, 2)) for table, rows in commit.rows.items()}
    return commit


@contextlib.contextmanager
def _made(path: Path) -> Iterator[tuple[CheckpointStore, dict[str, int]]]:
    """An open store, and the digest of each of its commits."""
    digests = {}
    with CheckpointStore(path, LAYOUTS) as store:
        for n in range(1, COMMITS + 1):
            store.commit(_commit(n))
            digests[store.digest()] = n
            if n == FLUSHED:
                store.checkpoint(path.with_name("a-copy"))
        yield store, digests


def _damaged(raw: bytes, places_: int = PLACES) -> Iterator[bytes]:
    """The content with one bit flipped, or cut short, at many places."""
    places = {*range(0, len(raw), max(1, len(raw) // places_)), *range(max(0, len(raw) - ENDS), len(raw), 3)}
    for place in sorted(places):
        flipped = bytearray(raw)
        flipped[place] ^= 0x40
        yield bytes(flipped)
        yield raw[:place]


def _outcomes(path: Path, name: str, digests: dict[str, int], strict: bool = False) -> set[str]:
    """What came of opening and reading the store with each damage to one file: "refused", or the commit it is at."""
    raw, broken, found = (path / name).read_bytes(), path.with_name("broken"), set()
    for content in _damaged(raw, PLACES * (10 if "MANIFEST" in name else 1)):
        if strict and not content:
            continue  # a log that ends where a commit does is a shorter log
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(path, broken)
        (broken / name).write_bytes(content)
        try:
            with CheckpointStore(broken, LAYOUTS, read_only=strict, strict=strict) as store:
                store.scan()
                found.add(f"commit {digests.get(store.digest(), 'that never was')}")
        except HeadraceError as error:
            found.add("refused" if str(broken) in str(error) else f"an error that names no file: {error}")
    return found


def _names(path: Path) -> dict[str, list[str]]:
    """The files of a store that say something, by kind. (LOG, LOCK and IDENTITY are for people.)"""
    kinds = {"table": "*.sst", "log": "*.log", "manifest": "MANIFEST*", "current": "CURRENT", "closed": CLOSED_AT}
    told = {kind: [p.name for p in sorted(path.glob(glob)) if p.stat().st_size] for kind, glob in kinds.items()}
    return told | {"options": [p.name for p in (*path.glob("OPTIONS*"), *path.glob("*.json"))]}


def test_a_store_that_was_closed_refuses_every_damage_or_is_as_it_was(tmp_path: Path) -> None:
    with _made(tmp_path / "s") as (_, digests):
        pass
    names = _names(tmp_path / "s")
    assert names["table"]
    for kind, files in names.items():
        for name in files:
            outcomes = _outcomes(tmp_path / "s", name, digests)
            assert outcomes <= {"refused", f"commit {COMMITS}"}, (kind, name)
            assert "refused" in outcomes or kind == "options", (kind, name)
            assert kind != "options" or outcomes == {f"commit {COMMITS}"}, "RocksDB does not read them: no harm"


def test_a_store_that_was_killed_is_refused_or_at_a_whole_commit_as_after_a_power_cut(tmp_path: Path) -> None:
    """Of its log RocksDB takes what comes before the damage: never a part of a commit, never less than is in tables."""
    with _made(tmp_path / "s") as (store, digests):
        killed(store, tmp_path / "killed")
    names = _names(tmp_path / "killed")
    assert names["table"]
    assert names["log"]
    for kind, files in names.items():
        for name in files:
            outcomes = _outcomes(tmp_path / "killed", name, digests)
            after = range(FLUSHED, COMMITS + 1) if kind in ("log", "manifest") else [COMMITS]
            assert outcomes <= {"refused", *(f"commit {n}" for n in after)}, (kind, name)
            if kind == "log":
                assert _outcomes(tmp_path / "killed", name, digests, strict=True) == {"refused"}, "verify finds it"


def test_a_store_without_current_is_not_begun_anew(tmp_path: Path) -> None:
    with _made(tmp_path / "s"):
        pass
    (tmp_path / "s" / "CURRENT").unlink()
    with pytest.raises(StoreError, match="lacks its file CURRENT"):
        CheckpointStore(tmp_path / "s", LAYOUTS)
    assert list((tmp_path / "s").glob("*.sst")), "what is there can still be saved"


def test_of_a_kept_checkpoint_every_damage_is_found_and_named(tmp_path: Path) -> None:
    kept = KeptCheckpoints(str(tmp_path / "kept"))
    with _made(tmp_path / "s") as (store, _):
        assert kept.keep(store, lambda _: {"epoch": 1, "sequence": COMMITS}, keep=2) == (1, COMMITS)
    manifest = kept.find(None)
    assert kept.damages(manifest) == []
    folder = tmp_path / "kept" / str(manifest.number)
    files = [path for path in folder.iterdir() if path.stat().st_size]
    assert {path.suffix for path in files} >= {".sst", ".json", ""}
    for path in files:
        raw = path.read_bytes()
        for content in _damaged(raw):
            path.unlink()  # not in place: it may be a hard link to the store's own
            path.write_bytes(content)
            if path.name == "manifest.json":
                assert [path.name in said for said in kept.damaged_manifests()] == [True]
                assert list(kept.newest_first()) == []
                continue
            assert kept.damages(manifest) == [f"{path} is damaged"]
        if path.name != "manifest.json":
            with pytest.raises(CorruptRecord, match=path.name):
                kept.fetch(manifest, tmp_path / "back")
        path.unlink()
        if path.name != "manifest.json":
            assert kept.damages(manifest) == [f"{path} is missing"]
        path.write_bytes(raw)
    kept.fetch(manifest, tmp_path / "back")
