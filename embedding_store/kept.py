"""Kept checkpoints: copies of the whole store, everything in it, to go back to. `Copies` of RocksDB's own checkpoints.

Unlike a snapshot, which holds what replicas need, a kept checkpoint is a store: optimizer, positions and outbox too.
Where the folder is on the store's own file system its tables are hard links: keeping costs what has changed since, and
a broken disk takes both. A backup is one elsewhere, at any URL that fsspec knows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from embedding_store.checkpoint import CheckpointStore
from embedding_store.copies import Copies, Manifest
from embedding_store.errors import CorruptRecord, StoreError
from embedding_store.faults import fault
from embedding_store.signing import Signer

_EPOCH = 10**12  # of a copy's number: epochs come before sequences
Describe = Callable[[CheckpointStore], dict[str, Any]]


class KeptCheckpoints:
    """Those in the folder at `url`, a path or a URL. All methods may be called in any thread, block, and raise
    StoreError where the folder cannot be read or written. `signer`: signs them, and refuses to go back to others."""

    def __init__(self, url: str, signer: Signer | None = None) -> None:
        self.url = url
        self._copies = Copies(url, signer)

    def keep(
        self, store: CheckpointStore, describe: Describe, keep: int, stopped: Callable[[], bool] = lambda: False
    ) -> tuple[int, int] | None:
        """Keeps the last commit of `store`; all but the `keep` newest go. Returns its place; None: there is no commit.

        Commits may go on meanwhile. 1. RocksDB copies itself by hard links beside the store. 2. The copy is opened and
        read through: what is damaged is not kept. `describe` says what is noted with it. 3. Its files are put, the
        manifest last. 4. Older ones go.
        """
        with store.copied(".keep") as copy:
            fault("keep.copied")
            with CheckpointStore(copy, store.layouts, read_only=True) as frozen:
                head = frozen.head()
                if head is None:
                    return None
                about = describe(frozen)
                frozen.scan()  # also what is not described
            fault("keep.read")
            self._copies.put(copy, number_of(head.place), about, keep, stopped, link=".sst")
            return head.place

    def newest_first(self) -> Iterator[Manifest]:
        """Those that are whole; `about` is what `describe` said."""
        return self._copies.newest_first()

    def oldest(self) -> tuple[int, int] | None:
        """The place of the oldest; None: there is none."""
        return min((place_of_number(m.number) for m in self.newest_first()), default=None)

    def find(self, place: tuple[int, int] | None) -> Manifest:
        """The one of a version (epoch, sequence); None: the newest. Raises StoreError where it is not there."""
        for manifest in self.newest_first():
            if place in (None, place_of_number(manifest.number)):
                return manifest
        wanted = "no checkpoint is kept" if place is None else "checkpoint {}.{} is not kept".format(*place)
        raise StoreError(f"{wanted} in {self.url}: `headrace checkpoint list` shows those that are")

    def damages(self, manifest: Manifest) -> list[str]:
        """What is wrong with a kept one, by file."""
        return self._copies.damages(manifest)

    def damaged_manifests(self) -> list[str]:
        """What cannot be told any more, by file."""
        return self._copies.damaged_manifests()

    def fetch(self, manifest: Manifest, directory: Path) -> None:
        """Makes `directory` a store out of a kept one.

        Raises CorruptRecord where it is not as it was (Forged: not as it was signed), DiskFull.
        """
        shutil.rmtree(directory, ignore_errors=True)
        self._copies.fetch(manifest, directory)
        with CheckpointStore(directory, None, read_only=True) as store:
            head = store.head()
            if head is None or number_of(head.place) != manifest.number:
                raise CorruptRecord(f"{self.url}/{manifest.number} is not the commit that it says: take an older one")


def number_of(place: tuple[int, int]) -> int:
    """The number of a copy: in the order of (epoch, sequence)."""
    return place[0] * _EPOCH + place[1]


def place_of_number(number: int) -> tuple[int, int]:
    """The inverse of `number_of`."""
    return divmod(number, _EPOCH)
