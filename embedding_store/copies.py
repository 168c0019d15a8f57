"""Numbered copies of a directory on any file system that fsspec knows: each whole and verified, or not there at all.

    FOLDER/<number>/<the directory's files>
    FOLDER/<number>/signature.json     where a key is set: SHA-256 of the files, signed with the manifest (signing.py)
    FOLDER/<number>/manifest.json      written last: names, sizes and checksums of the files, and what the owner says

A copy without a good manifest does not count, so half an upload is never taken. What the manifest says is checked when
the copy is fetched. Several processes may use one folder: at worst a copy that two of them write is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import fsspec.core
import msgspec
from fsspec.implementations.local import LocalFileSystem
from msgspec import Struct
from xxhash import xxh3_64, xxh3_64_hexdigest

from embedding_store.errors import CorruptRecord, DiskFull, Forged, HeadraceError, StoreError
from embedding_store.faults import fault
from embedding_store.signing import SEAL, Signer

FORMAT = 1
MANIFEST = "manifest.json"
_CHUNK = 4 << 20


class Hashed(Protocol):
    """Of hashlib."""

    def update(self, data: bytes, /) -> None: ...


class File(Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a copy."""

    name: str
    size: int  # bytes
    xxh3: str  # of its bytes, 64 bits in hex


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """What a copy holds."""

    format: int
    number: int
    made_ms: int  # UTC
    about: dict[str, Any]  # its owner's
    files: list[File]
    xxh3: str = ""  # of the manifest itself, with this field empty

    def digest(self) -> str:
        return xxh3_64_hexdigest(msgspec.json.encode(msgspec.structs.replace(self, xxh3="")))


class Copies:
    """The copies in the folder at `url`, a path or a URL. Every method may be called from any thread, and blocks.

    `signer`: copies are signed, and what is not is not fetched. Raises StoreError where there is no such kind of file
    system, or its package is missing.
    """

    def __init__(self, url: str, signer: Signer | None = None) -> None:
        self.url, self._signer = url, signer
        with mapped_errors(url):
            try:
                self._system, self._root = fsspec.core.url_to_fs(url)
            except (ValueError, ImportError) as error:
                raise StoreError(f"{url}: {error}: install what it needs, or choose another address") from error

    def put(
        self,
        directory: Path,
        number: int,
        about: dict[str, Any],
        keep: int,
        stopped: Callable[[], bool] = lambda: False,
        link: str = "",
    ) -> None:
        """Copies the files of `directory`, which must not change meanwhile, and removes all but the `keep` newest.

        1. The files; 2. the manifest; 3. older copies go, and what was left unfinished. If there is a copy `number`
        already nothing is done. Files whose name ends in `link` (they never change) become hard links where the copies
        are on the same file system. Raises StoreError where it cannot be written, or where `stopped` says so in
        between.
        """
        if self._manifest(number) is not None:
            return
        place = self._place(number)
        with mapped_errors(place):
            if self._system.exists(place):
                self._system.rm(place, recursive=True)  # half of one
            self._system.makedirs(place, exist_ok=True)
            files, sha256 = [], {}
            for path in sorted(directory.iterdir()):
                hashed = None if self._signer is None else hashlib.sha256()
                linked = bool(link) and path.suffix == link
                files.append(self._put_file(path, f"{place}/{path.name}", stopped, linked, hashed))
                if hashed is not None:
                    sha256[path.name] = hashed.hexdigest()
                fault("copy.file")
            fault("copy.files")
            manifest = Manifest(FORMAT, number, time.time_ns() // 1_000_000, about, files)
            manifest = msgspec.structs.replace(manifest, xxh3=manifest.digest())
            raw = msgspec.json.encode(manifest)
            if self._signer is not None:
                self._write(f"{place}/{SEAL}", self._signer.seal(f"copy {number}", sha256, raw))
            self._sync(place)  # the manifest is never there before what it vouches for
            self._write(f"{place}/{MANIFEST}", raw)
            self._sync(place)
            self._sync(self._root)
            fault("copy.manifest")
            self._remove_old(number, keep)
            fault("copy.done")

    def newest_first(self) -> Iterator[Manifest]:
        """The whole copies. Raises StoreError where the folder cannot be read."""
        for number in self._numbers():
            if (manifest := self._manifest(number)) is not None:
                yield manifest

    def fetch(self, manifest: Manifest, directory: Path) -> None:
        """Makes `directory`, which must not exist, out of a copy. It is on the disk when this returns.

        Raises CorruptRecord where a file is missing or not as it was (Forged: not as it was signed); StoreError
        (DiskFull) where it cannot be read or written. The directory may then be there in part.
        """
        place = self._place(manifest.number)
        with mapped_errors(place):
            signed = self._signed(manifest)
            directory.mkdir(parents=True)
            for file in manifest.files:
                hashed = None if signed is None else hashlib.sha256()
                target = inside(directory, file.name)
                try:
                    with self._system.open(f"{place}/{file.name}", "rb") as source:
                        found = write_synced(target, source, hashed)
                except FileNotFoundError as error:
                    raise CorruptRecord(f"{place} lacks {file.name}: delete it, an older one is taken") from error
                if found != file:
                    raise CorruptRecord(f"{place}/{file.name} is damaged: delete {place}, an older one is taken")
                if signed is not None and hashed is not None and signed[file.name] != hashed.hexdigest():
                    raise Forged(f"{place}/{file.name} is not what was signed: delete {place}", "forged")
            sync_directory(directory)

    def damages(self, manifest: Manifest) -> list[str]:
        """Reads a copy through: what is wrong with it, by file; none: it is as it was. Raises StoreError."""
        place, wrong = self._place(manifest.number), []
        with mapped_errors(place):
            try:
                signed = self._signed(manifest)
                for file in manifest.files:
                    inside(Path("copy"), file.name)
            except CorruptRecord as error:
                return [str(error)]
            for file in manifest.files:
                hashed = hashlib.sha256()
                try:
                    with self._system.open(f"{place}/{file.name}", "rb") as source:
                        found = _pump(file.name, source, None, hashed)
                except FileNotFoundError:
                    wrong.append(f"{place}/{file.name} is missing")
                else:
                    if found != file:
                        wrong.append(f"{place}/{file.name} is damaged")
                    elif signed is not None and signed[file.name] != hashed.hexdigest():
                        wrong.append(f"{place}/{file.name} is not what was signed")
        return wrong

    def damaged_manifests(self) -> list[str]:
        """The manifests that cannot be taken for one. (A copy without any was not finished.) Raises StoreError."""
        return [
            f"{self._place(number)}/{MANIFEST} is damaged, or of another release"
            for number in self._numbers()
            if self._manifest(number) is None and self._system.exists(f"{self._place(number)}/{MANIFEST}")
        ]

    def _signed(self, manifest: Manifest) -> dict[str, str] | None:
        """The SHA-256 that the copy's files must have; None: no key is set. Raises Forged."""
        if self._signer is None:
            return None
        place = self._place(manifest.number)
        try:
            raw = self._system.cat_file(f"{place}/{SEAL}")
        except FileNotFoundError:
            raw = None
        signed = self._signer.unsealed(raw, f"copy {manifest.number}", msgspec.json.encode(manifest))
        if signed.keys() != {file.name for file in manifest.files}:
            raise Forged(f"{place}: its manifest and its signature name other files: delete it", "forged")
        return signed

    def _put_file(
        self, path: Path, place: str, stopped: Callable[[], bool], link: bool, hashed: Hashed | None
    ) -> File:
        with path.open("rb") as source:
            if link and isinstance(self._system, LocalFileSystem):
                with contextlib.suppress(OSError):  # another file system, or one without links
                    os.link(path, place)
                    return _pump(path.name, source, None, hashed, stopped)
            with self._system.open(place, "wb") as target:
                file = _pump(path.name, source, target, hashed, stopped)
                self._sync_file(target)
                return file

    def _write(self, place: str, content: bytes) -> None:
        with self._system.open(place, "wb") as target:
            target.write(content)
            self._sync_file(target)

    def _sync_file(self, target: BinaryIO) -> None:
        """Where it is a file here: an object store has kept it when it is closed."""
        if isinstance(self._system, LocalFileSystem):
            target.flush()
            os.fsync(target.fileno())

    def _sync(self, place: str) -> None:
        if isinstance(self._system, LocalFileSystem):
            sync_directory(Path(place))

    def _place(self, number: int) -> str:
        return f"{self._root}/{number}"

    def _numbers(self) -> list[int]:
        """Of all copies, whole or not, the newest first."""
        with mapped_errors(self.url):
            self._system.invalidate_cache()  # others write here too
            try:
                found = [str(path).rstrip("/").rpartition("/")[2] for path in self._system.ls(self._root, detail=False)]
            except FileNotFoundError:
                return []
        return sorted((int(name) for name in found if name.isdecimal()), reverse=True)

    def _manifest(self, number: int) -> Manifest | None:
        """None where the copy is not whole, or of another format."""
        with mapped_errors(self._place(number)):
            try:
                raw = self._system.cat_file(f"{self._place(number)}/{MANIFEST}")
            except FileNotFoundError:
                return None
        try:
            manifest = msgspec.json.decode(raw, type=Manifest)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None
        sound = manifest.format == FORMAT and manifest.number == number and manifest.xxh3 == manifest.digest()
        return manifest if sound else None

    def _remove_old(self, number: int, keep: int) -> None:
        """All below the `keep` newest whole copies; a newer one that is not whole may be in the making."""
        whole = 0
        for other in self._numbers():
            if other <= number and whole >= keep:
                with contextlib.suppress(FileNotFoundError):  # somebody else was quicker
                    self._system.rm(self._place(other), recursive=True)
            elif self._manifest(other) is not None:
                whole += 1


def inside(directory: Path, name: str) -> Path:
    """The file of that name in `directory`. Raises CorruptRecord where the name leads elsewhere."""
    path = (directory / name).resolve()
    if path.parent != directory.resolve() or path.name != name:
        raise CorruptRecord(f"a manifest names the file {name!r}, which is not in its folder: delete that copy")
    return path


def write_synced(path: Path, source: BinaryIO, hashed: Hashed | None = None) -> File:
    """Writes the rest of `source` to the new file `path`, down to the disk. `hashed`: gets the bytes too."""
    with path.open("wb") as target:
        file = _pump(path.name, source, target, hashed)
        target.flush()
        os.fsync(target.fileno())
    return file


def sync_directory(path: Path) -> None:
    """Brings the names in a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_directory(path: Path, new: Path) -> Path:
    """Puts the directory `new` where `path` is. Returns where the old one, if there was one, is now: remove it when the
    new one is good.

    Killed in the middle, `settle_directory` makes it right. Raises StoreError.
    """
    aside = _aside(path)
    with mapped_errors(path):
        if path.exists():
            path.rename(aside)
            fault("replace.aside")
        new.rename(path)
        sync_directory(path.parent)
        fault("replace.placed")
    return aside


def settle_directory(path: Path) -> None:
    """After a `replace_directory` that was perhaps cut short: the new directory if it is in place, else the old one."""
    aside = _aside(path)
    with mapped_errors(path):
        if not aside.exists():
            return
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".replaced")


def _pump(
    name: str, source: BinaryIO, target: BinaryIO | None, hashed: Hashed | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> File:  # fmt: skip
    """Copies the rest of `source`, or (target None) only reads it."""
    size, digest = 0, xxh3_64()
    while chunk := source.read(_CHUNK):
        if stopped():
            raise StoreError(f"the copying of {name} was stopped: the copy before it is still there")
        if target is not None:
            target.write(chunk)
        digest.update(chunk)
        if hashed is not None:
            hashed.update(chunk)
        size += len(chunk)
    return File(name, size, digest.hexdigest())


@contextmanager
def mapped_errors(place: Path | str) -> Iterator[None]:
    """What a file system, or its client, raises becomes a StoreError (DiskFull) of one line."""
    try:
        yield
    except HeadraceError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left for {place}: free some; nothing that was there is lost") from error
        # What the clients of object stores raise of their own is no OSError. Of Python's own, the others are bugs.
        if isinstance(error, OSError) or type(error).__module__ != "builtins":
            text = " ".join(str(error).split())
            raise StoreError(f"{place} cannot be read or written ({text}): check the address and its rights") from error
        raise
