"""What was not signed by the trainer is refused, however well it is made: snapshots, copies, records."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from xxhash import xxh3_64_hexdigest

from embedding_store.columns import TableRows
from embedding_store.copies import MANIFEST, Copies, File, Manifest, inside
from embedding_store.delta import Version
from embedding_store.errors import CorruptRecord, Forged, UsageError
from embedding_store.secret import Secret
from embedding_store.signing import SEAL, Signer, SigningSettings, read_keys
from embedding_store.snapshot import latest_snapshot, read_snapshot, write_snapshot

OLD, NEW, OTHER = (Secret(letter * 64) for letter in "abc")
SIGNER = Signer([NEW], "parameters")
VERSION = Version(1, 2, tables={"item": TableRows(np.arange(3), {"weights": np.ones((3, 4), np.float32)})})


def test_the_first_key_signs_and_all_are_accepted() -> None:
    both = Signer([NEW, OLD], "parameters")
    both.check(Signer([OLD], "parameters").sign("version", b"x"), "version", b"x")
    Signer([NEW], "parameters").check(both.sign("version", b"x"), "version", b"x")
    with pytest.raises(Forged):
        Signer([OLD], "parameters").check(both.sign("version", b"x"), "version", b"x")


@pytest.mark.parametrize(
    ("made_by", "what", "data", "reason"),
    [
        (Signer([OTHER], "parameters"), "version", b"x", "forged"),
        (Signer([NEW], "b.parameters"), "version", b"x", "forged"),
        (SIGNER, "snapshot 1-2", b"x", "forged"),
        (SIGNER, "version", b"y", "forged"),
        (SIGNER, "versio", b"nx", "forged"),  # where one text ends is signed too
        (None, "version", b"x", "unsigned"),
    ],
)
def test_another_key_place_or_text_is_refused(made_by: Signer | None, what: str, data: bytes, reason: str) -> None:
    signature = None if made_by is None else made_by.sign(what, data)
    with pytest.raises(Forged) as error:
        SIGNER.check(signature, "version", b"x")
    assert error.value.reason == reason
    assert "\n" not in str(error.value)


def test_keys_are_read_from_a_file_and_weak_ones_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of June\n{NEW.reveal()}\n\n{OLD.reveal()}\n")
    assert read_keys(file) == [NEW, OLD]
    assert SigningSettings().signer("parameters") is None
    assert SigningSettings(key_file=file).signer("parameters") is not None
    for wrong in ("short\n", "# none\n"):
        file.write_text(wrong)
        with pytest.raises(UsageError, match="32 characters or more") as error:
            read_keys(file)
        assert "short" not in str(error.value).replace("32 characters", "")


def test_a_snapshot_is_taken_only_as_it_was_signed(tmp_path: Path) -> None:
    good = write_snapshot(tmp_path, VERSION, signer=SIGNER)
    (tmp_path / "10-1").mkdir()
    assert latest_snapshot(tmp_path) == tmp_path / "10-1"
    assert read_snapshot(good, SIGNER).sequence == 2
    assert read_snapshot(good).sequence == 2, "without a key the signature is not looked at"
    with pytest.raises(Forged, match="not signed with a key of ours"):
        read_snapshot(good, Signer([OTHER], "parameters"))

    elsewhere = tmp_path / "9-9"
    shutil.copytree(good, elsewhere)
    with pytest.raises(Forged):  # an old one under a newer name
        read_snapshot(elsewhere, SIGNER)
    assert latest_snapshot(tmp_path, SIGNER) == good, "or whoever can write here could lead the epoch anywhere"

    forged = write_snapshot(tmp_path / "forged", Version(1, 2, tables=VERSION.tables, info={"made": "up"}))
    with pytest.raises(Forged, match="not signed"):
        read_snapshot(forged, SIGNER)
    shutil.copy(good / SEAL, forged / SEAL)
    with pytest.raises(Forged, match="part-000000 is not what was signed"):
        read_snapshot(forged, SIGNER)
    shutil.copy(good / "part-000000", forged / "part-000000")
    read_snapshot(forged, SIGNER)
    shutil.copy(good / "part-000000", forged / "part-000001")
    with pytest.raises(Forged, match="part-000001"):
        read_snapshot(forged, SIGNER)


@pytest.mark.parametrize(
    "attack",
    ["a file", "the manifest", "a file and the manifest", "the signature", "no signature", "another number"],
)
def test_a_copy_is_taken_only_as_it_was_signed(tmp_path: Path, attack: str) -> None:
    source, place = tmp_path / "source", tmp_path / "copies" / "7"
    source.mkdir()
    (source / "rows").write_bytes(b"rows")
    copies = Copies(str(tmp_path / "copies"), SIGNER)
    copies.put(source, 7, {"rows": 4}, keep=2)
    manifest = next(copies.newest_first())
    copies.fetch(manifest, tmp_path / "good")
    assert not copies.damages(manifest)
    _hurt(place, attack)
    manifest = next(copies.newest_first())
    with pytest.raises(CorruptRecord) as error:
        copies.fetch(manifest, tmp_path / "bad")
    assert "\n" not in str(error.value)
    assert isinstance(error.value, Forged) == (attack != "a file")
    assert copies.damages(manifest)
    if attack != "a file":  # what a checksum cannot see
        Copies(str(tmp_path / "copies")).fetch(manifest, tmp_path / "taken")


def _hurt(place: Path, attack: str) -> None:
    if attack in ("a file", "a file and the manifest"):
        (place / "rows").write_bytes(b"rowz")
    if attack == "the manifest":
        seal_anew(place, about={"rows": 5})
    if attack == "a file and the manifest":
        seal_anew(place, files=[File("rows", 4, xxh3_64_hexdigest(b"rowz"))])
    if attack == "the signature":
        (place / SEAL).write_bytes((place / SEAL).read_bytes().replace(b"hmac", b"hnac"))
    if attack == "no signature":
        (place / SEAL).unlink()
    if attack == "another number":
        seal_anew(place, number=8)
        place.rename(place.with_name("8"))


def seal_anew(place: Path, **changes: object) -> None:
    """A manifest as somebody who knows the format makes it."""
    manifest = msgspec.json.decode((place / MANIFEST).read_bytes(), type=Manifest)
    manifest = msgspec.structs.replace(manifest, **changes)
    manifest = msgspec.structs.replace(manifest, xxh3=manifest.digest())
    (place / MANIFEST).write_bytes(msgspec.json.encode(manifest))


@pytest.mark.parametrize("name", ["../rows", "/etc/hostname", "a/b", "..", ".", ""])
def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    source, place = tmp_path / "source", tmp_path / "copies" / "7"
    source.mkdir()
    (source / "rows").write_bytes(b"rows")
    copies = Copies(str(tmp_path / "copies"))
    copies.put(source, 7, {}, keep=2)
    seal_anew(place, files=[File(name, 4, xxh3_64_hexdigest(b"rows"))])
    manifest = next(copies.newest_first())
    with pytest.raises(CorruptRecord, match="not in its folder"):
        copies.fetch(manifest, tmp_path / "fetched")
    assert "not in its folder" in copies.damages(manifest)[0]


def test_a_link_in_the_folder_does_not_lead_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "rows").symlink_to("/etc/hostname")
    with pytest.raises(CorruptRecord, match="not in its folder"):
        inside(tmp_path, "rows")


def test_a_manifest_is_on_the_disk_after_what_it_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut leaves no manifest whose files are not there: each file, then the folder, then the manifest."""
    source, synced = tmp_path / "source", list[tuple[str, list[str] | bytes]]()
    source.mkdir()
    (source / "rows").write_bytes(b"rows")
    sync = os.fsync

    def watched(handle: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{handle}"))
        held = sorted(path.name for path in place.iterdir()) if place.is_dir() else place.read_bytes()
        synced.append((place.name, held))
        sync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    Copies(str(tmp_path / "copies"), SIGNER).put(source, 7, {}, keep=2)
    names = [name for name, _ in synced]
    assert names == ["rows", SEAL, "7", MANIFEST, "7", "copies"]
    assert dict(synced[:3])["rows"] == b"rows"
    assert synced[2][1] == ["rows", SEAL], "the manifest comes after them"
    assert synced[3][1] == (tmp_path / "copies" / "7" / MANIFEST).read_bytes()
