"""What a train worker keeps of its store beside it: snapshots, which replicas start from, and whole checkpoints, which
a rollback can go back to. Made in threads of their own, while the training goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from embedding_store.errors import StoreError
from embedding_store.kept import KeptCheckpoints
from embedding_store.snapshot import latest_snapshot, place_of, requests, snapshot_of
from online_model.checkpoints import describe
from online_model.guard import is_held
from online_model.trainer import Trainer
from streams.settings import TrainWorkerSettings

log = logging.getLogger("headrace")

RETRY_SECONDS = 60.0  # after a checkpoint that could not be kept
LOOK_SECONDS = 0.2  # between two looks for replicas that ask for a snapshot
REST = 4.0  # × what the last snapshot took, but …
LEAST_REST = 1.0  # … at least so many seconds lie between two that were asked for


class TrainCopies:
    """Of one trainer. `snapshots` and `checkpoints` run until they are cancelled."""

    def __init__(
        self, settings: TrainWorkerSettings, trainer: Trainer, kept: KeptCheckpoints, thread: ThreadPoolExecutor,
        is_ending: Callable[[], bool],
    ) -> None:  # fmt: skip
        """thread: the trainer's own, in which this is made. is_ending: a checkpoint under way is then given up."""
        self._settings, self._trainer, self._kept, self._thread = settings, trainer, kept, thread
        self._is_ending = is_ending
        self._folder = settings.data_dir / "snapshots"
        self._lock = Lock()  # one snapshot at a time, of the trainer's thread too
        self.epoch_begun = asyncio.Event()  # to be set when one has begun before which versions were held back
        trainer.on_hold = self._snapshot_of_the_last_good
        trainer.store.remember_gone(self._oldest_kept())

    async def snapshots(self) -> None:
        """A snapshot as soon as there is something for a replica to start from, then one every interval.

        Also as soon as an epoch begins, of its first version: replicas may be past where it goes on from. And when a
        replica asks for one (`snapshot.Request`): however many ask, at once or again and again, a fifth of the time
        goes into it at most. While versions are held back there is nothing to answer with: requests wait.
        """
        newest, trainer = await asyncio.to_thread(self.newest), self._trainer
        begins = newest is None or newest[0] != trainer.epoch  # and has no snapshot yet
        due = time.monotonic() + self._settings.snapshot_interval_s
        rested = 0.0
        while True:
            now = time.monotonic()
            asked = requests(self._folder) if now >= rested and trainer.sequence and not trainer.guard.held else {}
            begun = self.epoch_begun.is_set() or (begins and trainer.begun)
            if asked or begun or now >= due:
                self.epoch_begun.clear()
                begins = begins and not begun
                written = await self.snapshot(set().union(*asked.values()))
                for request in asked if written else ():
                    with contextlib.suppress(OSError):  # another user's: it is answered again after a rest
                        request.unlink(missing_ok=True)
                end = time.monotonic()
                rested = end + max(LEAST_REST, REST * (end - now))
                due = end + self._settings.snapshot_interval_s if now >= due else due
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self.epoch_begun.wait()

    async def snapshot(self, anew: Collection[str] = ()) -> bool:
        """In a thread of its own: the training goes on meanwhile. Whether there is one of the last commit now; one that
        was there is written `anew` if its name is among these."""
        trainer = self._trainer
        if not trainer.sequence:
            return False
        try:
            erasures = trainer.erasures
            if erasures > trainer.purged:
                await asyncio.to_thread(trainer.store.purge)
                trainer.purged = erasures
        except StoreError as error:
            log.error("no snapshot: %s", error)
            return False
        return await asyncio.to_thread(self._write_snapshot, anew)

    def newest(self) -> tuple[int, int] | None:
        """(epoch, sequence) of the newest snapshot that this trainer or one before it made; None: there is none."""
        try:
            path = latest_snapshot(self._folder, self._settings.signer)
        except StoreError as error:  # then one is written as if there were none
            log.error("%s", error)
            return None
        return None if path is None else place_of(path)

    def _write_snapshot(self, anew: Collection[str] = ()) -> bool:
        """Of the last commit, unless it was held back. A failure costs replicas time, nothing else."""
        try:
            with self._lock:
                path = snapshot_of(
                    self._trainer.store, self._folder, self._settings.snapshots_kept,
                    lambda version: not is_held(version.info), anew, self._settings.signer,
                )  # fmt: skip
        except StoreError as error:
            log.error("no snapshot: %s", error)
            return False
        if path is not None:
            epoch, sequence = place_of(path)
            log.info("snapshot %s", path.name, extra={"epoch": epoch, "sequence": sequence})
        return path is not None

    def _snapshot_of_the_last_good(self) -> None:
        """The trainer's `on_hold`: replicas that start while versions are held back start from the last good one, also
        when `parameters` has forgotten the versions that lead to it."""
        if self._trainer.sequence:
            self._write_snapshot()

    async def _begun(self) -> None:
        """Until the store has a version of this epoch."""
        while not self._trainer.begun:
            await asyncio.sleep(0.2)

    async def checkpoints(self) -> None:
        """A kept checkpoint every interval, counted from the newest that is there; the first as soon as there is
        something to keep. None while the guard would go back from it. A failure costs a way back, nothing else."""
        interval = self._settings.checkpoint_interval_s
        wait = await asyncio.to_thread(self._seconds_to_keep)
        while True:
            await asyncio.sleep(wait)
            await self._begun()
            if not self._trainer.guard.trusted:
                wait = min(RETRY_SECONDS, interval)
                continue
            try:
                await self._keep()
                wait = interval
            except StoreError as error:
                log.error("no checkpoint was kept: %s", error)
                wait = min(RETRY_SECONDS, interval)

    def _seconds_to_keep(self) -> float:
        try:
            newest = next(self._kept.newest_first(), None)
        except StoreError:
            return 0.0  # keeping one will say so
        if newest is None:
            return 0.0
        return max(0.0, self._settings.checkpoint_interval_s - (time.time() - newest.made_ms / 1000))

    def _oldest_kept(self) -> tuple[int, int]:
        """Where that cannot be told it may be any: training does not hang on a folder elsewhere. Nor where none is
        there: a disk that is not mounted looks like that, and the first that is kept puts it right."""
        try:
            return self._kept.oldest() or (0, 0)
        except StoreError as error:
            log.error("the kept checkpoints cannot be read: %s", error)
            return (0, 0)

    async def _keep(self) -> None:
        """In a thread of its own: the training goes on meanwhile."""
        store, kept, count = self._trainer.store, self._kept, self._settings.checkpoints_kept
        oldest = await asyncio.to_thread(kept.oldest)
        await self._remember_gone(oldest or (0, 0))  # before there is a copy: it may be the oldest
        place = await asyncio.to_thread(kept.keep, store, describe, count, self._is_ending)
        await self._remember_gone(await asyncio.to_thread(kept.oldest))
        if place is not None:
            log.info("kept checkpoint %s.%s", *place, extra={"epoch": place[0], "sequence": place[1]})

    async def _remember_gone(self, since: tuple[int, int] | None) -> None:
        """In the trainer's thread, as all that touches its store."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._trainer.store.remember_gone, since)
