"""Workers as processes of their own, for the tests that kill them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from embedding_store.faults import VARIABLE, arm_from
from tests.processes import processes


class Child:
    """A worker process; its stderr is kept in a file. environment: variables of its own."""

    def __init__(
        self, kind: str, log: Path, environment: Mapping[str, object] | None = None, **settings: Any
    ) -> None:
        self.log, variables = log, {name: str(value) for name, value in (environment or {}).items()}
        self._arguments = (kind, str(log), variables, json.dumps(settings, default=str))
        self.start()

    def start(self) -> None:
        self._log_from = len(self.said)
        self.process = processes.Process(target=_run, args=self._arguments)  # no daemon: it may have processes itself
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> int | None:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.wait(60)

    def wait(self, seconds: float) -> int | None:
        """The exit code of a worker that ends by itself."""
        self.process.join(seconds)
        return self.process.exitcode

    @property
    def pid(self) -> int | None:
        return self.process.pid

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def says(self) -> str:
        """What it said since it was started last."""
        return self.said[self._log_from :]

    def fail_if_ended(self) -> None:
        if not self.process.is_alive():
            raise AssertionError(f"the worker ended ({self.process.exitcode}): {self.said}")


def _run(kind: str, log: str, variables: dict[str, str], settings: str) -> None:
    os.environ.update(variables)
    arm_from(variables.get(VARIABLE, ""))  # it was looked for when its parent was started
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 2)
    _KINDS[kind](**json.loads(settings))


@contextlib.contextmanager
def running(kind: str, log: Path, **settings: Any) -> Iterator[Child]:
    child = Child(kind, log, **settings)
    try:
        yield child
    finally:
        child.kill()


def wait_for(true: Any, seconds: float = 180.0, child: Child | None = None, what: str = "") -> Any:
    """The first value of `true()` that is true. Asked half of the time at most: what is waited for needs the cores."""
    began = time.monotonic()
    deadline = began + seconds
    while not (value := true()):
        if child is not None:
            child.fail_if_ended()
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what} {child.said if child else ''}")
        time.sleep(max(0.05, time.monotonic() - began))
        began = time.monotonic()
    return value


def read_all(
    bootstrap: str | dict[str, Any], topic: str, committed: bool = True
) -> dict[int, list[ConsumerRecord]]:
    """All records of a topic by partition, up to its end as it is now; of transactions the committed ones only.

    bootstrap: HOST:PORT, or all that a client is made with.
    """
    return asyncio.run(_read_all(bootstrap, topic, committed))


async def _read_all(bootstrap: str | dict[str, Any], topic: str, committed: bool) -> dict[int, list[ConsumerRecord]]:
    level = "read_committed" if committed else "read_uncommitted"
    where = {"bootstrap_servers": bootstrap} if isinstance(bootstrap, str) else bootstrap
    consumer = AIOKafkaConsumer(topic, **where, isolation_level=level, auto_offset_reset="earliest")
    async with consumer:
        partitions = sorted(consumer.assignment())
        ends = await consumer.end_offsets(partitions)
        records: dict[int, list[ConsumerRecord]] = {p.partition: [] for p in partitions}
        while any([await consumer.position(p) < ends[p] for p in partitions]):
            for partition, some in (await consumer.getmany(timeout_ms=200)).items():
                records[partition.partition] += some
        return records


def group_offsets(bootstrap: str, group: str, topic: str, partitions: int) -> list[int | None]:
    """The offsets that a group has committed, by partition."""
    return asyncio.run(_group_offsets(bootstrap, group, [TopicPartition(topic, p) for p in range(partitions)]))


async def _group_offsets(bootstrap: str, group: str, partitions: list[TopicPartition]) -> list[int | None]:
    async with AIOKafkaConsumer(bootstrap_servers=bootstrap, group_id=group, enable_auto_commit=False) as consumer:
        return [await consumer.committed(p) for p in partitions]


class FileFeed:
    """Writes the offsets of each partition to a file, one a line: its store."""

    def __init__(self, folder: Path, fail_at: int, hole_at: int, open_s: float) -> None:
        self._folder, self._fail_at, self._hole_at, self._open_s = folder, fail_at, hole_at, open_s
        self._next: dict[int, int] = {}

    async def open(self, partitions: set[int]) -> Mapping[int, int]:
        await asyncio.sleep(self._open_s)  # as a large snapshot that comes from far away
        for partition in partitions - self._next.keys():
            path = self._folder / f"{partition}.offsets"
            lines = path.read_text().splitlines() if path.exists() else []
            self._next[partition] = int(lines[-1]) + 1 if lines else 0
        with (self._folder / "opened").open("a") as file:
            file.write(f"{os.getpid()} {sorted(partitions)}\n")
        return {p: self._next[p] for p in partitions}

    async def take(self, partition: int, records: list) -> int | None:
        assert {r.partition for r in records} == {partition}
        if records[0].offset <= self._hole_at <= records[-1].offset:
            self._hole_at = -1
            return self._next[partition]  # as if it had not been seen: it must come again
        if records[0].offset > self._next[partition]:
            return self._next[partition]  # was on its way when we went back
        if any(r.offset == self._fail_at for r in records):
            raise RuntimeError("this batch cannot be handled")
        stale = sum(record.offset < self._next[partition] for record in records)
        with (self._folder / f"{partition}.offsets").open("a") as file:
            for record in records:
                if record.offset >= self._next[partition]:
                    file.write(f"{record.offset}\n")
                    self._next[partition] = record.offset + 1
        with (self._folder / "batches").open("a") as file:
            file.write(f"{len(records)} {stale}\n")
        await asyncio.sleep(0.005)
        return None

    async def close(self, partitions: set[int]) -> None:
        for partition in partitions:
            self._next.pop(partition, None)


def _feed(bootstrap: str, topic: str, group: str, folder: str, fail_at: int = -1, hole_at: int = -1,
    member: str | None = None, open_s: float = 0.0, prepare: Any = None) -> None:
    from streams import app, batches

    feed = FileFeed(Path(folder), fail_at, hole_at, open_s)
    intake = batches.Intake(bootstrap, topic, group, member, max_records=500)
    app.run(lambda stop: batches.serve_feed(intake, feed, stop, prepare and partial(prepare, Path(folder))))


def _ordinary_agent(folder: Path, topic: str, app: Any) -> None:
    """An agent of Faust's ordinary path: it writes the offset of each event, one a line."""

    async def take(stream: Any) -> None:
        async for event in stream.events():
            with (folder / f"{event.message.partition}.ordinary").open("a") as file:
                file.write(f"{event.message.offset}\n")

    app.agent(app.topic(topic, value_serializer="raw", key_serializer="raw"), name="ordinary")(take)


def _mixed(ordinary: str, folder: str, **settings: Any) -> None:
    _feed(folder=folder, **settings, prepare=lambda path, app: _ordinary_agent(path, ordinary, app))


def _join(renew_s: float | None = None, **settings: Any) -> None:
    from streams import join_lane
    from streams.join_worker import JoinWorkerSettings, run_join

    join_lane.RENEW_SECONDS = renew_s or join_lane.RENEW_SECONDS
    run_join(convert(settings, JoinWorkerSettings))


def _train(**settings: Any) -> None:
    from streams.train_worker import TrainWorkerSettings, run_train

    run_train(convert(settings, TrainWorkerSettings))


def _serve(again: str = "", **settings: Any) -> None:
    """again: a JSON file of the section [serve], read at SIGHUP."""
    from embedding_store.errors import UsageError
    from streams.serve_worker import ServeWorkerSettings, run_serve

    def reload() -> ServeWorkerSettings:
        try:
            return convert(settings | json.loads(Path(again).read_text()), ServeWorkerSettings)
        except msgspec.ValidationError as error:
            raise UsageError(str(error)) from None

    run_serve(convert(settings, ServeWorkerSettings), reload if again else None)


def convert(settings: dict[str, Any], type_: Any) -> Any:
    return msgspec.convert(settings, type_, dec_hook=lambda kind, value: kind(value))


_KINDS = {"feed": _feed, "mixed": _mixed, "join": _join, "train": _train, "serve": _serve}
