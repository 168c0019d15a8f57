"""The train worker: blocks of examples in, versions of the model out, each example learned once.

The trainer lives in ONE thread of its own; the event loop only carries data to it and from it. Turn after turn:

1. offer:       blocks, in their order; a block that was seen before is left out, a hole is an error;
2. step:        test-then-train;
3. commit:      when it is due: touched rows, dense weights, positions and the version's bytes, ONE atomic write;
4. publish:     the version's parts to `parameters`, ONE Kafka transaction; the training goes on meanwhile;
5. acknowledge: the version leaves the store's outbox.

Where the guard holds a version back (online_model/guard.py) there is nothing to publish in 4. Where it wants a
rollback the worker ends and begins anew, in the same process, with the store gone back.

Killed before 3, the blocks since the last commit are read again, from the offsets that the commit holds. Killed between
3 and 5, the stored bytes are sent again; a replica knows a version that it has. The store's LOCK and the transactional
id keep a second trainer out. Not guaranteed: that two runs commit at the same places; nor that they cut the same
batches, but for `deterministic`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: its threads must not spin on shared cores
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA refuses to be deterministic without it

import torch
from aiokafka import ConsumerRecord

from embedding_store.copies import settle_directory
from embedding_store.errors import PositionError, StoreError, UsageError
from embedding_store.faults import fault
from embedding_store.kept import KeptCheckpoints
from embedding_store.ranks import Launch, Ranks, launched
from online_model.catalogue import CatalogueItem
from online_model.examples import Block
from online_model.further_rank import run_launched
from online_model.guard import roll_back_if_due
from online_model.ranks import FurtherRanks, begin_again, let_go
from online_model.trainer import Trainer, open_trainer
from streams import app, batches
from streams.backfill import Backfill, Piece
from streams.blocks import decode_block
from streams.catalogue import CHUNK, CatalogueReader
from streams.listener import serve_metrics
from streams.outlet import Outlet
from streams.published import newest_version, signed
from streams.settings import LARGEST_BATCHES, TrainWorkerSettings
from streams.train_copies import TrainCopies
from streams.train_figures import TrainFigures

log = logging.getLogger("headrace")
T = TypeVar("T")
# The processes of further ranks, if it has started them; this one's place among all, if there are several.
Ranked: TypeAlias = tuple[FurtherRanks | None, Ranks | None]

COMMIT_SECONDS = 0.1  # between two commits, while the trainer keeps up
COMMIT_SHARE = 0.15  # of the trainer's time; where commits take longer, they become rarer …
BEHIND_SHARE, BEHIND_SECONDS, BEHIND_ROWS = 0.05, 1.0, 10_000  # … rarer still, to so long, where so many rows wait …
RARE_SECONDS = 10.0  # … up to here: one that hung for minutes, with its disk or a rank, says nothing about the next
GATHER_SECONDS = 0.075  # between two turns, while the trainer keeps up …
GATHER_BYTES = 100_000  # … unless so much has come
TURN_SECONDS = 0.05  # of learning; up to LONG_TURN_SECONDS where no commit is due: between two turns nothing is learned
LONG_TURN_SECONDS = 0.25
MAX_WAITING_BYTES = 64 << 20  # of blocks that wait for the trainer; the others stay in Kafka
MAX_PENDING_ROWS = 100_000  # offered to the trainer and not learned
BEFORE = -1  # where a block of the backfill lies in `examples`: what follows it is at 0
ITEMS_AT_ONCE = 1_000  # of the catalogue: then it is looked whether there is room
VERSIONS_AHEAD = 4  # committed and not yet published


def run_train(settings: TrainWorkerSettings) -> None:
    """Train in the foreground until SIGTERM or SIGINT. Fatal errors end the process with exit 1 and one line.

    Under torchrun this process is one of the ranks: the first is the worker, the others follow it until it stops.
    """
    launch = launched()
    if launch is not None and settings.ranks not in (1, launch.size):
        raise UsageError(f"torchrun started {launch.size} ranks, [train] ranks says {settings.ranks}: leave that out")
    if launch is not None and launch.rank > 0:
        device, partitions, threads = _ways(settings)
        run_launched(launch, settings.model, partitions, device, threads)
    else:
        app.run(lambda stop: _train(settings, stop, launch), worker="train", logs=settings.logs)


async def _train(settings: TrainWorkerSettings, stop: asyncio.Event, launch: Launch | None) -> None:
    topics = settings.topics
    intake = batches.Intake(
        bootstrap=settings.connection,
        topic=topics.examples,
        group=f"{topics.prefix}headrace-train",
        member=app.member_name("train", settings.store),
        committed_only=True,
        min_bytes=1,  # a block is worth an answer
        wait_ms=500,
        max_records=500,
    )
    ranks, again = None, True
    while again:
        worker = TrainWorker(settings, launch, ranks)
        await worker.start()
        stopping = asyncio.create_task(_pass_on(stop, worker.ending))
        await worker.learn_backfill()
        if not worker.ending.is_set():
            await batches.serve_feed(intake, worker, worker.ending)
        stopping.cancel()
        again = not stop.is_set()  # it ended by itself, to begin anew with a rollback
        ranks = await worker.stop(again)


async def _pass_on(event: asyncio.Event, other: asyncio.Event) -> None:
    await event.wait()
    other.set()


class TrainWorker:
    """The feed of `examples`, and the tasks round the trainer."""

    def __init__(
        self, settings: TrainWorkerSettings, launch: Launch | None = None, ranks: Ranked | None = None
    ) -> None:
        """launch: of the first rank, where something else starts the others. ranks: as of a worker before it in this
        process."""
        self.settings, self._launch, self._ranked = settings, launch, ranks
        self._signer = settings.signer
        self.ending = asyncio.Event()  # set by its owner to stop it, or by itself, for a rollback
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trainer")
        self._outlet = Outlet(settings.connection, f"{settings.topics.prefix}headrace-train")
        self._catalogue = CatalogueReader(settings.connection, settings.topics.items)
        self._expected: dict[int, int] = {}  # partition of examples → offset of the next record to take
        self._changed = asyncio.Condition()  # of what follows
        self._waiting: deque[ConsumerRecord | Piece] = deque()
        self._waiting_bytes = 0
        self._followed: set[int] = set()  # partitions of which a block came from the topic after a backfill
        self._items: list[CatalogueItem] = []
        self._pending = 0  # rows, records or items that were taken from these and are not learned; 0: none
        self._draining = False
        self._dirty = False  # something was offered since the last commit, or replicas wait for rows
        self._stalled = False  # deterministic: there is no whole batch below the smallest watermark
        self._commit_due = self._dense_due = 0.0
        self._turned = 0.0  # when the last turn began
        self._versions: asyncio.Queue[tuple[int, list[bytes]] | None] = asyncio.Queue(VERSIONS_AHEAD)
        self._published = 0  # the last sequence that is in Kafka
        self._tasks: list[asyncio.Task] = []
        told = lambda: (self._waiting_bytes, self._published)  # noqa: E731
        self._figures = TrainFigures(settings, told)
        self._metrics = self._figures.metrics
        self._backfill = Backfill(settings.backfill) if settings.backfill else None

    # --- start and stop -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the store, fence an old trainer, publish what perhaps was not published, read the catalogue.

        Where there is a backfill to be learned the catalogue is read after it.

        Raises StoreLocked, StoreError, BrokerError, FencedError, UsageError.
        """
        if self._backfill is not None:
            self._backfill.check(self.settings.topics)
        self._loop = asyncio.get_running_loop()
        self._trainer = await self._in_thread(self._open)
        await self._outlet.start()  # nobody else publishes from now on
        await self._supersede()
        for sequence, parts in await self._in_thread(self._trainer.store.outbox):
            log.info("sending version %s again", sequence, extra=_version(self._trainer.epoch, sequence))
            fault("recover.resend")
            await self._publish(sequence, parts)
        self._dirty = self._trainer.owes or self._trainer.owes_dense
        self._begin(self._train(), self._publisher())
        await self._catalogue.start()
        if self._backfill is None:
            await self._read_catalogue()
        copies = self._copies
        self._begin(copies.snapshots(), copies.checkpoints())
        self._begin(*self._figures.tasks(self._trainer))
        if self._backfill is None:
            self._begin(self._follow_catalogue())
        port = self.settings.metrics_port
        self._end_metrics = serve_metrics(self._metrics.registry, port, self._figures.unwell, self.settings.http)

    def _begin(self, *tasks: Coroutine[Any, Any, None]) -> None:
        for task in map(asyncio.create_task, tasks):
            task.add_done_callback(app.fail_loudly)
            self._tasks.append(task)

    async def learn_backfill(self) -> None:
        """What the trainer has not learned of the backfill goes to it, before anything of the topics, and then the
        catalogue as it is now. Returns when that is so (a deterministic one still holds what is not below the smallest
        watermark), or when the worker is ending.

        Raises PositionError where the trainer has learned something else; CorruptRecord, StoreError.
        """
        if self._backfill is None:
            return
        trainer = self._trainer
        positions = {partition: at.next for partition, at in trainer.positions.items()}
        if self._backfill.is_behind(positions, trainer.mark):
            pieces: Iterator[Piece] = iter(())
        else:
            log.info("learning the backfill %s", self._backfill.folder.url)
            pieces = self._backfill.pieces(positions, trainer.mark)
        while not self.ending.is_set() and (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            await self._put([piece], piece.size)
        async with self._changed:
            await self._changed.wait_for(lambda: not (self._waiting or self._pending) or self.ending.is_set())
        if not self.ending.is_set():
            log.info("going on from the backfill with %s", self.settings.topics.examples)
            await self._read_catalogue()
            self._begin(self._follow_catalogue())

    async def _read_catalogue(self) -> None:
        """As it is now. Returns when all of it is in the tables, or when the worker is ending."""
        while not self.ending.is_set() and (items := await self._catalogue.read_to_end()) is not None:
            await self._offer_items(items)
        async with self._changed:
            await self._changed.wait_for(lambda: not (self._items or self._pending) or self.ending.is_set())

    async def stop(self, again: bool = False) -> Ranked | None:
        """Learn what is here already (not before a rollback), commit, publish, close the store.

        `again`: another worker is about to begin in this process; returns the ranks for it.
        """
        training, publishing, *others = self._tasks
        for task in others:
            task.cancel()
        self._draining = True
        async with self._changed:
            self._changed.notify_all()
        await training
        await publishing
        await asyncio.gather(*others, return_exceptions=True)
        await self._copies.snapshot()
        await self._in_thread(self._close, again)
        await self._catalogue.stop()
        await self._outlet.stop()
        self._end_metrics()
        self._thread.shutdown()
        return self._ranked

    async def _supersede(self) -> None:
        """Where replicas may have seen versions that the store has forgotten, sent or as a snapshot: a new epoch."""
        published = await newest_version(
            self.settings.connection, self.settings.topics.parameters, self._signer
        )
        snapshot = await asyncio.to_thread(self._copies.newest)
        seen = max(published or (0, 0), snapshot or (0, 0))
        if await self._in_thread(self._trainer.supersede, *seen):
            log.warning(
                "there was a version %s.%s, the store is at %s: going on from there in epoch %s",
                *seen, self._trainer.sequence, self._trainer.epoch,
                extra=_version(self._trainer.epoch, self._trainer.sequence),
            )  # fmt: skip

    def _open(self) -> Trainer:
        settings = self.settings
        device, partitions, threads = _ways(settings)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(settings.deterministic)
        kept = KeptCheckpoints(settings.checkpoints_url, self._signer)
        _refuse_to_begin_anew(settings.store, kept)
        went_back = not settings.model.guard.rollback or roll_back_if_due(settings.store, kept)
        if self._ranked is None:
            self._ranked = self._meet(device, partitions, threads)
        further, ranks = self._ranked
        trainer = open_trainer(settings.model, settings.store, now_ms, partitions, device, settings.sync, ranks)
        if further is not None:
            further.tidy()
        if not went_back:
            trainer.give_up_rollback()
        self._copies = TrainCopies(settings, trainer, kept, self._thread, lambda: self._draining)
        version = _version(trainer.epoch, trainer.sequence)
        log.info("training on %s from version %s.%s", device, *version.values(), extra=version)
        return trainer

    def _meet(self, device: str, partitions: int, threads: int) -> Ranked:
        settings = self.settings
        if self._launch is not None:
            log.info("rank 0 of %s", self._launch.size)
            return None, Ranks(0, self._launch.size, self._launch, device)
        if settings.ranks == 1:
            return None, None
        folder = settings.data_dir / "ranks"
        further = FurtherRanks(settings.ranks, folder, settings.model, partitions, device, threads)
        further.watch(app.die)
        log.info("rank 0 of %s, with processes %s", settings.ranks, ", ".join(map(str, further.pids)))
        return further, Ranks(0, settings.ranks, further.meeting, device)

    def _close(self, again: bool) -> None:
        further, ranks = self._ranked or (None, None)
        if again and ranks is not None:
            begin_again(ranks)
        elif further is not None:
            further.end(self._trainer.ranks)
        elif ranks is not None:
            let_go(ranks)
        self._trainer.store.acknowledge(self._published)
        self._trainer.store.close()

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        """Whatever touches the trainer or its store runs in the trainer's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    # --- the feed -----------------------------------------------------------------------------------------------

    async def open(self, partitions: set[int]) -> Mapping[int, int]:
        """What was taken in stays taken in: the trainer outlives a rebalance."""
        for partition in partitions - self._expected.keys():
            position = self._trainer.positions.get(partition)
            self._expected[partition] = position.source_offset if position else 0
        log.info("training on partitions %s", ", ".join(map(str, sorted(partitions))))
        return {p: self._expected[p] for p in partitions}

    async def take(self, partition: int, records: list[ConsumerRecord]) -> None:
        expected = self._expected.get(partition)
        fresh = [record for record in records if expected is not None and record.offset >= expected]
        if not fresh:
            return
        self._expected[partition] = fresh[-1].offset + 1
        await self._put(fresh, sum(len(record.value) for record in fresh))

    async def _put(self, records: Sequence[ConsumerRecord | Piece], size: int) -> None:
        """Waits for room, then they wait for the trainer. size: bytes."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting_bytes < MAX_WAITING_BYTES or self.ending.is_set())
            self._waiting.extend(records)
            self._waiting_bytes += size
            self._figures.progress.wanted()
            self._changed.notify_all()

    async def close(self, partitions: set[int]) -> None:
        """Nothing to let go of: a trainer elsewhere is kept out by the transactional id."""

    # --- turns --------------------------------------------------------------------------------------------------

    async def _train(self) -> None:
        while True:
            records, items, last = await self._next_work()
            for version in await self._in_thread(self._turn, records, items, last):
                await self._versions.put(version)
            if last or self._trainer.rollback_due:
                await self._versions.put(None)
                break
        async with self._changed:
            self.ending.set()
            self._changed.notify_all()

    async def _next_work(self) -> tuple[list[ConsumerRecord | Piece], list[CatalogueItem], bool]:
        """What has come, as soon as there is something to do; the flag: it is the last turn."""
        pending = 0 if self._stalled else self._trainer.pending
        async with self._changed:
            self._pending = pending
            if not pending:
                self._changed.notify_all()  # who waits for it to be learned
                seconds = max(0.0, self._commit_due - time.monotonic()) if self._dirty else None
                await self._changes(seconds, lambda: bool(self._waiting or self._items or self._draining))
                # A step costs the same for ten rows as for two hundred: a little patience saves most of them. But not
                # past a commit that is due: what has come till then is to be in it, and it is not to wait for more.
                pause = min(self._turned + GATHER_SECONDS, self._commit_due) - time.monotonic()
                await self._changes(max(0.0, pause), lambda: self._waiting_bytes > GATHER_BYTES or self._draining)
            self._turned = time.monotonic()
            records: list[ConsumerRecord | Piece] = []
            if pending < MAX_PENDING_ROWS:
                records = list(self._waiting)
                self._waiting.clear()
                self._waiting_bytes = 0
                self._pending += len(records)
            items, self._items = self._items, []
            self._pending += len(items)
            self._changed.notify_all()
        return records, items, self._draining and not (records or items or pending)

    async def _changes(self, seconds: float | None, enough: Callable[[], bool]) -> None:
        """Under the lock: return when it is `enough`, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait_for(enough)

    def _turn(
        self, records: list[ConsumerRecord | Piece], items: list[CatalogueItem], last: bool
    ) -> list[tuple[int, list[bytes]]]:
        """One turn in the trainer's thread. Returns (sequence, parts) of the versions that it committed."""
        trainer, versions = self._trainer, []
        trainer.store.acknowledge(self._published)
        for record in records:
            if isinstance(record, Piece):
                block, offset = record.block, BEFORE
                versions += self._put_items(record)
            else:
                block, offset = decode_block(record.value), record.offset
            if block is not None:
                if trainer.short_of(len(block.users)):
                    versions += self._commit()
                self._require_next(block, offset)
                trainer.offer(block, offset)
        versions += self._learn_items(items)
        self._dirty = self._dirty or bool(records or items)
        now, self._stalled = time.monotonic(), False
        end = max(now + TURN_SECONDS, min(now + LONG_TURN_SECONDS, self._commit_due))
        while time.monotonic() < end and trainer.pending and not trainer.commit_due() and not self._stalled:
            with self._metrics.step.time():
                rows = trainer.step(rows=self._rows_a_step())
            self._stalled = not rows
            if rows:
                self._metrics.batch.observe(rows)
        if last or trainer.commit_due() or (self._dirty and time.monotonic() >= self._commit_due):
            versions += self._commit(everything=last)
        self._figures.progress.made(more=bool(self._waiting) or (trainer.pending > 0 and not self._stalled))
        return versions

    def _require_next(self, block: Block, offset: int) -> None:
        """After a backfill the topic has the block that begins where that ends. Raises PositionError."""
        position = self._trainer.positions.get(block.partition)
        if self._backfill is None or offset == BEFORE or block.partition in self._followed or position is None:
            return
        self._followed.add(block.partition)
        part = self._backfill.parts.get(block.partition)
        if part is not None and position.next == part.next_offset and block.from_offset > position.next:
            raise PositionError(
                f"partition {block.partition}: the backfill ends at {position.next}, {self.settings.topics.examples} "
                f"begins with {block.from_offset}: make a backfill that ends there, and start `headrace join` with it"
            )

    def _put_items(self, piece: Piece) -> list[tuple[int, list[bytes]]]:
        """The catalogue in a piece of the backfill; `mark` counts its records. Returns as `_turn`."""
        versions = self._learn_items(piece.items)
        self._trainer.mark += piece.read
        return versions

    def _learn_items(self, items: Sequence[CatalogueItem]) -> list[tuple[int, list[bytes]]]:
        """A catalogue may be larger than the memory for items: those that are committed make room. Returns as `_turn`.
        """
        versions: list[tuple[int, list[bytes]]] = []
        size = min(ITEMS_AT_ONCE, self.settings.model.features.items)
        for start in range(0, len(items), size):
            some = items[start : start + size]
            if self._trainer.short_of(len(some)):
                versions += self._commit()
            self._trainer.catalogue(some)
        return versions

    def _rows_a_step(self) -> int:
        """The more wait the more are learned at once: a step costs nearly the same for many rows as for few, and where
        it falls behind freshness is worth more than that each batch knows the one before. What waits is cut in steps
        alike: the few rows that would be left over cost a whole one. Not more than there is room for without a commit.
        """
        size, waiting = self.settings.model.batch_size, self._trainer.pending
        if self.settings.deterministic:
            return size
        most = min(max(2 * size, waiting // 2), LARGEST_BATCHES * size)
        rows = math.ceil(waiting / math.ceil(waiting / most))
        while rows > size and self._trainer.commit_due(rows):
            rows //= 2
        return max(rows, min(size, waiting))

    def _commit(self, everything: bool = False) -> list[tuple[int, list[bytes]]]:
        """(sequence, parts) of the version, if anything has changed. `everything`: also all that replicas wait for."""
        trainer, start, held = self._trainer, time.monotonic(), self._trainer.guard.held
        with self._metrics.commit.time():
            parts = trainer.commit(everything, dense=everything or start >= self._dense_due)
        if parts is not None:
            self._figures.committed()
        if parts and not trainer.owes_dense:
            self._dense_due = start + self.settings.dense_interval_s
        if held and not trainer.guard.held:
            self._loop.call_soon_threadsafe(self._copies.epoch_begun.set)
        seconds = time.monotonic() - start
        pause = max(COMMIT_SECONDS, seconds / COMMIT_SHARE)
        if trainer.pending > BEHIND_ROWS:
            pause = max(pause, min(seconds / BEHIND_SHARE, BEHIND_SECONDS))
        self._commit_due = start + min(pause, RARE_SECONDS)
        self._dirty = (trainer.pending > 0 and not self._stalled) or trainer.owes or trainer.owes_dense
        return [(trainer.sequence, parts)] if parts else []

    async def _publisher(self) -> None:
        """Versions go out one after the other, in their order."""
        while (version := await self._versions.get()) is not None:
            await self._publish(*version)

    async def _publish(self, sequence: int, parts: list[bytes]) -> None:
        topic = self.settings.topics.parameters
        fault("publish.begun")
        with self._metrics.publish.time():
            await self._outlet.send([signed(part, topic, self._signer) for part in parts])
        self._metrics.published(parts)
        fault("publish.sent")
        self._published = sequence  # the next turn acknowledges it

    async def _follow_catalogue(self) -> None:
        while True:
            await self._offer_items(await self._catalogue.read())

    async def _offer_items(self, items: Sequence[CatalogueItem]) -> None:
        """Waits for room, then they wait for the trainer."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._items) < CHUNK or self.ending.is_set())
            self._items += items
            self._changed.notify_all()


def _version(epoch: int, sequence: int) -> dict[str, int]:
    """Fields of a log line that is about a version."""
    return {"epoch": epoch, "sequence": sequence}


def _ways(settings: TrainWorkerSettings) -> tuple[str, int, int]:
    """(device, partitions of a deterministic run or 0, threads): the same on all ranks."""
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.deterministic:
        return device, settings.topics.partitions, 1
    return device, 0, settings.threads


def _refuse_to_begin_anew(store: Path, kept: KeptCheckpoints) -> None:
    """Where the store is gone and there is a way back to it. Raises StoreError."""
    settle_directory(store)
    if not (store / "CURRENT").exists() and kept.oldest() is not None:
        raise StoreError(
            f"the store {store} is missing, but {kept.url} has checkpoints of it: `headrace checkpoint rollback` "
            "brings it back; to begin anew remove them"
        )


def now_ms() -> int:
    return time.time_ns() // 1_000_000
