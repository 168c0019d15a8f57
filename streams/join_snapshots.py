"""Shared snapshots of the join stores: what lets a partition go on, on a machine that never had it.

A snapshot is RocksDB's own copy of a lane's store, made between two slices, so of published state; it lies in
`<[join] snapshots>/<topic prefix>join/<partition>/<next offset>/`, whole or not there (embedding_store/copies.py).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from xxhash import xxh3_64_hexdigest

from embedding_store.copies import Copies, replace_directory
from embedding_store.errors import CorruptRecord, DiskFull, StoreError, UsageError
from streams.join_store import JoinStore
from streams.joiner import JoinSettings
from streams.settings import JoinWorkerSettings

log = logging.getLogger("headrace")


def settings_hash(join: JoinSettings) -> str:
    """What tells join settings from others: 16 hex digits."""
    return xxh3_64_hexdigest(msgspec.json.encode(join))


class LaneSnapshots:
    """The snapshots of one partition. Methods block: call them in a thread."""

    def __init__(self, settings: JoinWorkerSettings, partition: int, path: Path) -> None:
        self._settings, self._where, self.path = settings, f"partition {partition}", path
        folder = f"{settings.snapshots.rstrip('/')}/{settings.topics.prefix}join/{partition}"
        self._copies = Copies(folder, settings.signing.signer(settings.topics.events))
        self._about = {
            "topic": settings.topics.events,
            "partition": partition,
            "settings": settings_hash(settings.join),
        }

    def age_s(self) -> float:
        """Of the newest one, in seconds; infinite where there is none. Raises StoreError."""
        newest = next((m for m in self._copies.newest_first() if m.about == self._about), None)
        return float("inf") if newest is None else max(0.0, time.time() - newest.made_ms / 1000)

    def copy(self, store: JoinStore) -> Path:
        """A copy of the store as it is now, by hard links, for `send`. Raises StoreError."""
        copy = self.path.with_name(self.path.name + ".copy")
        shutil.rmtree(copy, ignore_errors=True)  # of a worker that was killed
        store.checkpoint(copy)
        return copy

    def send(self, copy: Path, next_offset: int, stopped: Callable[[], bool]) -> None:
        """Makes a snapshot of what `copy` gave, which is then removed. Raises StoreError."""
        try:
            self._copies.put(copy, next_offset, self._about, self._settings.snapshots_kept, stopped)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def fetch(self, above: int, up_to: int) -> Path | None:
        """The newest good snapshot between these offsets as a directory beside the store; None where there is none.

        A damaged one, also one of a store that was damaged already, is logged, and the next older one taken. Raises
        StoreError where the folder cannot be read, DiskFull.
        """
        fetched = self.path.with_name(self.path.name + ".fetched")
        for manifest in self._copies.newest_first():
            if not above < manifest.number <= up_to:
                continue
            name = f"{self._copies.url}/{manifest.number}"
            if manifest.about != self._about:
                log.error("%s: snapshot %s is of other [join] settings, not taken", self._where, name)
                continue
            shutil.rmtree(fetched, ignore_errors=True)
            try:
                self._copies.fetch(manifest, fetched)
                with JoinStore(fetched, self._settings.join) as store:
                    if store.next_offset != manifest.number:
                        raise CorruptRecord(f"it goes on from {store.next_offset}: delete it")
                    # Its files are those that were copied; whether they were whole then, the store itself must say.
                    store.scan()
            except DiskFull:
                raise
            except (CorruptRecord, StoreError, UsageError) as error:
                log.error("%s: snapshot %s not taken: %s", self._where, name, error)
                continue
            log.info("%s: going on from the snapshot %s", self._where, name)
            return fetched
        shutil.rmtree(fetched, ignore_errors=True)
        return None

    def put_in_place(self, fetched: Path) -> None:
        """What `fetch` gave becomes the store at `path`; the old one goes once it is there. Raises StoreError."""
        shutil.rmtree(replace_directory(self.path, fetched), ignore_errors=True)
