"""One run of `headrace torture`.

    calm     the log through the workers, undisturbed, as fast as it goes
    hurt     the same log, sent while workers are killed and frozen, the broker goes away and comes back, and files are
             damaged and the disk is slow or full
    verdict  of both: the oracle recounts `events`; the checkpoints must have one digest; each answer that a replica
             gave must come from one whole version
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.broker import Broker
from deploy.processes import free_port
from deploy.settings import Layer, Settings
from deploy.torture.cluster import Cluster
from deploy.torture.damage import DiskFaults
from deploy.torture.disk import Disk, unmount
from deploy.torture.faults import GAP_S, ON_DISK, Fault, Kind, plan
from deploy.torture.story import Story
from deploy.torture.verdict import Outcome, outcome
from deploy.torture.watch import Watch
from deploy.workers import LAUNCHER, WorkerFailed
from embedding_store.errors import BrokerError
from replay.oracle import read_topic
from replay.sinks import KafkaSink
from streams.blocks import decode_block
from streams.kafka_clients import client_arguments
from streams.topics import end_offsets

PARTITIONS = 2
EVENTS_A_FAULT = 2_500
FEWEST_EVENTS = 20_000
SETTLE_S = 180.0  # without a row that is taken in or learned, or until the replicas have what was: something hangs
STILL_S = 30.0  # more than a group of consumers needs to take in one that was killed and started again
COPIES_S = 10.0  # between two snapshots; checkpoints are kept half as often
JOIN = {
    "ticks": "log", "wait_ms": 2_000, "open_ms": 60_000, "click_window_ms": 30_000, "watch_wait_ms": 1_000,
    "purchase_window_ms": 300_000, "in_memory": 2_000,
}  # fmt: skip


@dataclass
class Torture:
    """One run. `say` gets a line for each thing that happens."""

    kills: int
    seed: int
    home: Path
    say: Callable[[str], None] = lambda line: None
    launcher: Sequence[str] = LAUNCHER
    events: int = 0  # 0: as many as the faults need
    calm: bool = True  # False: without the undisturbed run, and so without its digest
    workers: Sequence[str] = ("join-0", "join-1", "train", "serve-0", "serve-1")  # that are hurt
    on_disk: Sequence[Kind] | None = None  # what is done to the disk; None: as many as the kills need
    gap_s: tuple[float, float] = GAP_S  # between two faults
    ranks: int = 1  # of the train worker
    patient: bool = False  # nothing is hurt before the trainer has learned something since the last time
    _done: Counter = field(default_factory=Counter, init=False)  # faults, by kind
    _on_disk: DiskFaults = field(init=False)

    def run(self) -> dict[str, Any]:
        """The figures of the command. Raises WorkerFailed where a worker ends that nothing has hurt."""
        unmount(self.home / "hurt" / "data")
        shutil.rmtree(self.home, ignore_errors=True)
        faults, self._done = self._plan(), Counter()
        with contextlib.ExitStack() as stack:
            broker = Broker.start(self.home)
            hurt = Cluster(self._settings("hurt", broker), broker, self.launcher)
            stack.callback(lambda: hurt.broker.stop())
            disk = Disk(hurt.settings.data_dir)
            stack.callback(disk.release)
            self._on_disk = DiskFaults(hurt, disk, self.say)
            hurt.mend = self._on_disk.mend
            expected = None
            if self.calm:
                self.say("an undisturbed run")
                calm = Cluster(self._settings("calm", broker), broker, LAUNCHER)
                expected, _, _ = self._one(calm, self._story(calm.settings), [], watched=False)
            self.say(f"the log, with {len(faults)} faults")
            story = self._story(hurt.settings)
            if any(fault.kind == "full_disk" for fault in faults):
                disk.path.mkdir(parents=True)
                disk.mount()
            found, watch, seconds = self._one(hurt, story, faults)
            seen = watch.held_to(hurt.settings)
            for what, count in sorted(seen.wrong.items()):
                self.say(f"{count} answers {what}")
        on_disk = self._on_disk
        return {
            "kills": self._done["kill"],
            "faults": {
                **dict.fromkeys((fault.kind for fault in faults), 0), **self._done,
                "repeated_records": story.repeated, "spoilt_records": story.spoilt,
            },
            "digest_equal": expected and found.digest == expected.digest,
            "lost": found.lost,
            "duplicated": found.verdict.duplicated,
            "replica_torn_reads": seen.torn,
            "missing_versions": seen.missing_versions,
            "differing_rows": seen.differing_rows(found.rows),
            "undetected_damage": on_disk.undetected,
            "damages": {"files": on_disk.damaged, "refused": on_disk.refused},
            "calm": expected and {"lost": expected.lost, "duplicated": expected.verdict.duplicated},
            "digest": found.digest,
            "calm_digest": expected and expected.digest,
            "events": found.verdict.balance["events_in"],
            "examples": found.verdict.expected_rows,
            "left_out": found.left_out,
            "answers": seen.answers,
            "answers_compared": seen.compared,
            "versions_checked": seen.versions,
            "restarts": hurt.restarts,
            "ends_without_broker": dict(hurt.gave_up),
            "seconds": round(seconds, 1),
            "seed": self.seed,
        }

    def _plan(self) -> list[Fault]:
        return plan(self.kills, self.seed, self.workers, self.gap_s, self.on_disk, self.ranks)

    def _one(
        self, cluster: Cluster, story: Story, faults: list[Fault], watched: bool = True
    ) -> tuple[Outcome, Watch, float]:
        """The whole log through a cluster, which has ended when this returns. `watched`: answers of its replicas."""
        settings = cluster.settings
        began = time.monotonic()
        try:
            cluster.start()
            with KafkaSink(settings.connection, settings.topics.events, settings.topics.items) as sink:
                for item in story.catalogue():
                    sink.send(item)
                sink.flush()
                pace = sum(fault.wait_s + fault.lasts_s for fault in faults)
                feed = _Feed(story, sink, pace)
                cluster.wait_until_ready()  # the catalogue is a version: from here on replicas answer
                watch = Watch([replica.port for replica in cluster.replicas])
                if watched:
                    watch.start()
                feed.start()
                for fault in faults:
                    self._do(fault, cluster)
                    feed.check()
                feed.wait(cluster.revive)
            self._settle(cluster)
            watch.stop()
            cluster.stop("join")
            cluster.stop("train")
            cluster.stop("serve")
        finally:
            cluster.end()
        return outcome(settings), watch, time.monotonic() - began

    def _do(self, fault: Fault, cluster: Cluster) -> None:
        if self.patient:
            cluster.wait_until_it_learns()
        time.sleep(fault.wait_s)  # this is what a fault's plan says, not a wait for something
        cluster.revive()
        self.say(str(fault))
        if fault.kind in ON_DISK:
            self._done[fault.kind] += self._on_disk.do(fault)
            return
        self._done[fault.kind] += 1
        if fault.kind == "kill":
            cluster.kill(fault.target)
        elif fault.kind == "lose_rank":
            cluster.lose_rank()
        elif fault.kind == "freeze":
            cluster.freeze(fault.target, True)
            time.sleep(fault.lasts_s)
            cluster.freeze(fault.target, False)
        else:
            cluster.stop_broker(fault.kind == "kill_broker")
            time.sleep(fault.lasts_s)
            cluster.start_broker()

    def _settle(self, cluster: Cluster) -> None:
        """Returns when all of `events` is joined, all that makes whole batches is learned, and the replicas have it.

        Where the trainer counts otherwise, and stays so for STILL_S, the verdict shall say it.
        """
        settings = cluster.settings
        ends = end_offsets(settings.connection, settings.topics.events)
        rows, training, had, since = None, None, (0.0, 0.0), time.monotonic()
        while (still_s := time.monotonic() - since) < SETTLE_S:
            cluster.revive()
            training = cluster.training()
            sequences = {replica.sequence for replica in cluster.replicas}
            if training:
                has = training["rows_total"], training["pending_rows"]
                had, since = has, since if has == had else time.monotonic()
                if has[1] < settings.model.batch_size and sequences == {training["sequence"]}:
                    if rows is None:
                        rows, since = _joined(settings, ends), time.monotonic()
                    elif sum(has) == rows or still_s > STILL_S:
                        return
            time.sleep(0.25)
        raise WorkerFailed(
            f"nothing has moved for {SETTLE_S:.0f} s: {rows} rows joined, the trainer has learned {had[0]:.0f} and "
            f"holds {had[1]:.0f}; see {settings.data_dir}"
        )

    def _story(self, settings: Settings) -> Story:
        events = self.events or max(FEWEST_EVENTS, EVENTS_A_FAULT * self.kills)
        join = settings.join.join
        return Story(self.seed, events, join.disorder_ms, join.closing_ms)

    def _settings(self, name: str, broker: Broker) -> Settings:
        values = {
            "data_dir": str(self.home / name / "data"), "bootstrap": broker.bootstrap,
            "topics": {"prefix": f"{name}.", "partitions": PARTITIONS},
            "join": {**JOIN, "snapshots": str(self.home / name / "snapshots"), "snapshot_interval_s": COPIES_S},
            "model": {"batch_size": 256, "features": {"users": 1 << 17, "items": 1 << 17, "dim": 16}},
            "train": {
                "deterministic": True, "ranks": self.ranks, "metrics_port": free_port(),
                "snapshot_interval_s": COPIES_S, "checkpoint_interval_s": 2 * COPIES_S,
            },
            "serve": {"port": 0, "live_actions": 0},  # so that an answer is what its version gives, and can be checked
        }  # fmt: skip
        return Settings([Layer("torture", values)])


def _joined(settings: Settings, ends: dict[int, int]) -> int | None:
    """How many rows the blocks in `examples` have, once they are those of all of `events`."""
    reached, rows = dict.fromkeys(ends, 0), 0
    for partition, _, value, _ in read_topic(client_arguments(settings.connection), settings.topics.examples):
        block = decode_block(value or b"")
        reached[partition], rows = max(reached[partition], block.to_offset), rows + len(block.examples)
    return rows if reached == ends else None


class _Feed:
    """Sends a story from a thread of its own, spread over `seconds`."""

    def __init__(self, story: Story, sink: KafkaSink, seconds: float) -> None:
        self._story, self._sink, self._seconds = story, sink, seconds
        self._error: BrokerError | None = None
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Until all is sent and kept. Raises BrokerError."""
        while self._thread.is_alive():
            self._thread.join(0.25)
            meanwhile()
        self.check()

    def check(self) -> None:
        """Raises BrokerError where it has ended with one."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._send(list(self._story.steps()))
        except BrokerError as error:
            self._error = error

    def _send(self, steps: list[tuple[str, bytes] | int]) -> None:
        began = time.monotonic()
        for number, step in enumerate(steps):
            if self._seconds and number % 50 == 0:
                time.sleep(max(0.0, began + self._seconds * number / len(steps) - time.monotonic()))
            if isinstance(step, int):
                self._sink.tick(step)
            else:
                user, value = step
                self._sink.send_raw(value, user)
        self._sink.flush()
