"""A copy of a directory is whole and as it was, or it is not taken."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from embedding_store.copies import Copies, replace_directory, settle_directory
from embedding_store.errors import CorruptRecord, StoreError


@pytest.fixture(params=["folder", "memory"])
def copies(request: pytest.FixtureRequest, tmp_path: Path) -> Copies:
    return Copies(str(tmp_path / "copies") if request.param == "folder" else f"memory://{uuid.uuid4()}/copies")


def _directory(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "CURRENT").write_text(text)
    (path / "000007.sst").write_bytes(text.encode() * 1_000)
    return path


def _numbers(copies: Copies) -> list[int]:
    return [manifest.number for manifest in copies.newest_first()]


def test_a_copy_comes_back_as_it_was_and_older_ones_go(copies: Copies, tmp_path: Path) -> None:
    assert _numbers(copies) == []
    for number in (9, 10, 111):
        copies.put(_directory(tmp_path / f"of {number}", f"at {number}"), number, {"partition": 3}, keep=2)
    assert _numbers(copies) == [111, 10]
    newest = next(copies.newest_first())
    copies.fetch(newest, tmp_path / "back")
    assert newest.about == {"partition": 3}
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "of 111").iterdir()
    }


def test_half_of_a_copy_is_none_and_is_made_anew(copies: Copies, tmp_path: Path) -> None:
    directory = _directory(tmp_path / "d", "whole")
    with pytest.raises(StoreError, match="stopped"):
        copies.put(directory, 5, {}, keep=2, stopped=lambda: True)
    assert _numbers(copies) == []
    copies.put(directory, 5, {}, keep=2)
    assert _numbers(copies) == [5]


def test_what_is_damaged_or_missing_is_refused(tmp_path: Path) -> None:
    copies = Copies(str(tmp_path / "copies"))
    for number in (1, 2, 3):
        copies.put(_directory(tmp_path / f"of {number}", f"at {number}"), number, {}, keep=3)
    damaged = tmp_path / "copies" / "3" / "000007.sst"
    damaged.write_bytes(b"b" + damaged.read_bytes()[1:])
    (tmp_path / "copies" / "2" / "CURRENT").unlink()
    manifest = tmp_path / "copies" / "1" / "manifest.json"
    three, two, one = copies.newest_first()
    with pytest.raises(CorruptRecord, match=r"000007\.sst is damaged"):
        copies.fetch(three, tmp_path / "back 3")
    with pytest.raises(CorruptRecord, match="lacks CURRENT"):
        copies.fetch(two, tmp_path / "back 2")
    copies.fetch(one, tmp_path / "back 1")
    manifest.write_bytes(manifest.read_bytes().replace(b'"size":', b'"size":1', 1))
    assert _numbers(copies) == [3, 2], "a manifest that was changed is none"


def test_replacing_a_directory_never_loses_both(tmp_path: Path) -> None:
    path, new = tmp_path / "store", tmp_path / "new"
    _directory(path, "old")
    settle_directory(path)
    path.rename(tmp_path / "store.replaced")  # as if killed between the two renames
    settle_directory(path)
    assert (path / "CURRENT").read_text() == "old"
    aside = replace_directory(path, _directory(new, "new"))
    assert (aside / "CURRENT").read_text() == "old"
    settle_directory(path)  # as if killed before the old one was removed
    assert (path / "CURRENT").read_text() == "new"
    assert not aside.exists()


def test_an_address_that_nothing_can_open_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="choose another address"):
        Copies("nonsense://bucket/x")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be read or written"):
        Copies(str(tmp_path / "file")).put(_directory(tmp_path / "d", "x"), 1, {}, keep=1)
