"""The axes of `headrace bench growth` behind the joiner: trainer, Kafka, replicas. A process a point, on one core.

- memory:     tables with room for `x` users and `x` items in memory, with a store, learn the same rows in steps of
  STEP_ROWS, commits every COMMIT_STEPS, and where little room is left. Per row.
- ranks:      `x` ranks learn the same rows (steps of RANK_ROWS, no store): the processor time of all of them, per row.
- candidates: a replica ranks `x` candidates. Per request; it should be in proportion to them.
- catalogue:  a replica recommends from `x` items. Per request.
- replicas:   `x` readers of `parameters` decode VERSIONS versions, as a replica does before it applies them. The
  processor time of broker, producer and readers, per version; it should be in proportion to them, or less. All of it
  was done once before: a broker that has just started compiles.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from deploy.bench.common import finish, rss_mb

if TYPE_CHECKING:
    from online_model.examples import Block
    from online_model.trainer import Trainer

STEP_ROWS, COMMIT_STEPS, STEPS, WARM_STEPS = 128, 40, 120, 40
RANK_ROWS, RANK_STEPS, RANK_WARM = 1_024, 24, 6
ITEMS, USERS = 20_000, 5_000  # of a replica whose candidates grow
REQUESTS, WARM_REQUESTS = 40, 8
VERSIONS = 60


def _blocks() -> Iterator[Block]:
    """What the joiner makes of the standard mix, for as long as it is asked for."""
    from deploy.bench.growth_join import Log
    from streams.joiner import Joiner, JoinSettings, Record

    joiner, log, offset = Joiner(JoinSettings(open_ms=60_000, wait_ms=1_000), 0), Log(100_000), 0
    while True:
        values = log.slice()
        yield joiner.process([Record(offset + i, None, value) for i, value in enumerate(values)]).block
        offset += len(values)


def _feed(trainer: Trainer, rows: int, blocks: Iterator[tuple[int, Block]]) -> None:
    while trainer.pending < rows:
        number, block = next(blocks)
        trainer.offer(block, number)


def memory_point(folder: str, x: int, seconds: float = 0.0) -> dict[str, Any]:
    """µs a row with room for `x` users and items in memory."""
    import torch

    from online_model.settings import FeatureSettings, TrainerSettings
    from online_model.trainer import open_trainer

    torch.set_num_threads(1)
    settings = TrainerSettings(batch_size=STEP_ROWS, features=FeatureSettings(users=x, items=x))
    trainer = open_trainer(settings, Path(folder) / "store", lambda: 0)
    blocks, cpu, clock, rows, committed, commit = enumerate(_blocks()), 0.0, 0.0, 0, 0, 0.0
    sent = 0
    for step in range(WARM_STEPS + STEPS):
        _feed(trainer, STEP_ROWS, blocks)
        if step == WARM_STEPS:
            cpu = clock = commit = 0.0
            rows, committed, sent = 0, trainer.delta_rows, 0
        began, began_clock = time.process_time(), time.perf_counter()
        if trainer.commit_due() or (step and step % COMMIT_STEPS == 0):
            parts = trainer.commit(dense=False) or []
            trainer.store.acknowledge(trainer.sequence)
            commit += time.process_time() - began
            sent += sum(map(len, parts))
        rows += trainer.step()
        cpu += time.process_time() - began
        clock += time.perf_counter() - began_clock
    touched = trainer.delta_rows - committed
    trainer.store.close()
    return {
        "cpu_us": cpu / rows * 1e6, "clock_us": clock / rows * 1e6, "rss_mb": rss_mb(),
        "rows_touched_a_row": touched / rows, "commit_us_a_touched_row": commit / max(touched, 1) * 1e6,
        "version_bytes_a_touched_row": sent / max(touched, 1),
    }  # fmt: skip


def ranks_point(folder: str, x: int, seconds: float = 0.0) -> dict[str, Any]:
    """µs a row of all `x` ranks together, and what rank 0 and a further one have of it."""
    import torch

    from embedding_store.ranks import Ranks
    from online_model.ranks import FurtherRanks
    from online_model.settings import TrainerSettings
    from online_model.trainer import open_trainer

    torch.set_num_threads(1)
    settings = TrainerSettings(batch_size=RANK_ROWS)
    further = FurtherRanks(x, Path(folder) / "ranks", settings, 0, "cpu", 1) if x > 1 else None
    place = Ranks(0, x, further.meeting) if further else None
    trainer = open_trainer(settings, None, lambda: 0, ranks=place)
    others = [psutil.Process(pid) for pid in further.pids] if further else []
    blocks, rows, used, began = enumerate(_blocks()), 0, [0.0] * x, 0.0
    clock = 0.0
    for step in range(RANK_WARM + RANK_STEPS):
        _feed(trainer, RANK_ROWS, blocks)  # joining is no part of it
        before = _used(others)
        began = time.perf_counter()
        learned = trainer.step()
        if step >= RANK_WARM:
            clock += time.perf_counter() - began
            used = [total + b - a for total, a, b in zip(used, before, _used(others), strict=True)]
            rows += learned
    memory = rss_mb() + sum(other.memory_info().rss for other in others) / 1e6
    if further:
        further.end(trainer.ranks)
    return {
        "cpu_us": sum(used) / rows * 1e6, "clock_us": clock / rows * 1e6, "rss_mb": memory,
        "rank_0_us": used[0] / rows * 1e6,
        "further_rank_us": float(np.mean(used[1:])) / rows * 1e6 if others else None,
    }  # fmt: skip


def _used(others: list[psutil.Process]) -> list[float]:
    """Processor seconds of this process and of others."""
    return [time.process_time(), *(sum(other.cpu_times()[:2]) for other in others)]


def _replica(items: int, users: int) -> tuple[Any, Any]:
    """A made model, and a replica that has it."""
    import torch

    from deploy.bench.serve_parts import Model
    from online_model.serving.replica import Replica
    from online_model.serving.settings import ReplicaSettings

    torch.set_num_threads(1)
    model = Model(items, users)
    settings = model.settings
    replica = Replica(ReplicaSettings(), settings.features, settings.ranker, feedback=settings.feedback)
    replica.apply(model.snapshot())
    replica.prepare()
    return model, replica


def _asked(ask: Callable[[], Any]) -> dict[str, Any]:
    for _ in range(WARM_REQUESTS):
        ask()
    cpu, clock = time.process_time(), time.perf_counter()
    for _ in range(REQUESTS):
        ask()
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    return {"cpu_us": cpu / REQUESTS * 1e6, "clock_us": clock / REQUESTS * 1e6, "rss_mb": rss_mb()}


def candidates_point(folder: str, x: int, seconds: float = 0.0) -> dict[str, Any]:
    """µs a request of `x` candidates; what a version's row costs to apply, and to hold."""
    from online_model.serving.api import RankRequest

    model, replica = _replica(ITEMS, USERS)
    dice = np.random.default_rng(1)

    def ask() -> None:
        some = dice.choice(ITEMS, x, replace=False).tolist()
        replica.rank(RankRequest(user=f"u{dice.integers(USERS)}", candidates=some))

    versions = [model.delta(2 + n, dense=False) for n in range(10)]
    began = time.process_time()
    for version in versions:
        replica.apply(version)
    applied = time.process_time() - began
    rows = sum(len(table) for version in versions for table in version.tables.values())
    held, room = replica.nbytes(), model.settings.features  # it has made room for so many
    return {
        **_asked(ask), "apply_us_a_row": applied / rows * 1e6,
        "replica_bytes": {"user": held["user"] / room.users, "item": held["item"] / room.items},
    }  # fmt: skip


def catalogue_point(folder: str, x: int, seconds: float = 0.0) -> dict[str, Any]:
    """µs to recommend from `x` items."""
    from online_model.serving.api import RecommendRequest

    _, replica = _replica(x, USERS)
    users = itertools.cycle(range(USERS))
    return _asked(lambda: replica.recommend(RecommendRequest(user=f"u{next(users)}", k=20)))


def replicas_point(folder: str, x: int, bootstrap: str, broker: int, seconds: float = 0.0) -> dict[str, Any]:
    """µs a version of the broker (its pid), the producer and `x` readers together."""
    from deploy.bench.serve_parts import Model
    from embedding_store.delta import encode

    model = Model(ITEMS, USERS)
    versions = [encode(model.delta(2 + n, dense=n % 5 == 0)) for n in range(VERSIONS)]
    process = psutil.Process(broker)
    asyncio.run(_published(bootstrap, versions, x, process))
    alone = asyncio.run(_published(bootstrap, versions, 0, process))
    used = asyncio.run(_published(bootstrap, versions, x, process))
    reader = max(used["own_us"] - alone["own_us"], 0.0) / x
    return {
        "cpu_us": used["broker_us"] + used["own_us"], "clock_us": used["clock_us"], "rss_mb": rss_mb(),
        "producer_us": alone["own_us"], "broker_us": used["broker_us"], "broker_alone_us": alone["broker_us"],
        "reader_us": reader, "version_bytes": sum(len(part) for parts in versions for part in parts) / VERSIONS,
    }  # fmt: skip


async def _published(
    bootstrap: str, versions: list[list[bytes]], readers: int, broker: psutil.Process
) -> dict[str, Any]:
    """µs a version: of the broker, and of this process, in which are who sends them and all readers."""
    from aiokafka import AIOKafkaConsumer, TopicPartition

    from embedding_store.delta import Assembler
    from streams.kafka_clients import client_arguments
    from streams.outlet import Message, Outlet

    topic = f"growth-{readers}-{time.time_ns()}"
    await _made(bootstrap, topic)
    sent, place = len(versions), TopicPartition(topic, 0)
    outlet = Outlet(bootstrap, topic)
    await outlet.start()
    consumers = [
        AIOKafkaConsumer(**client_arguments(bootstrap), isolation_level="read_committed", enable_auto_commit=False,
                         auto_offset_reset="earliest", max_partition_fetch_bytes=16 << 20)
        for _ in range(readers)
    ]  # fmt: skip
    for consumer in consumers:
        await consumer.start()
        consumer.assign([place])
        await consumer.seek_to_beginning()
    cpu, of_broker, clock = time.process_time(), _of(broker), time.perf_counter()

    async def read(consumer: AIOKafkaConsumer) -> None:
        assembler, whole = Assembler(), 0
        while whole < sent:
            for records in (await consumer.getmany(timeout_ms=1_000)).values():
                whole += sum(assembler.add(record.value) is not None for record in records)

    async def publish() -> None:
        for parts in versions:
            await outlet.send([Message(topic, part, partition=0) for part in parts])
            await asyncio.sleep(0.02)  # the trainer's pace, made quicker

    await asyncio.gather(publish(), *(read(consumer) for consumer in consumers))
    cpu, of_broker, clock = time.process_time() - cpu, _of(broker) - of_broker, time.perf_counter() - clock
    for client in consumers:
        await client.stop()
    await outlet.stop()
    return {"broker_us": of_broker / sent * 1e6, "own_us": cpu / sent * 1e6, "clock_us": clock / sent * 1e6}


async def _made(bootstrap: str, topic: str) -> None:
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    from streams.kafka_clients import client_arguments

    admin = AIOKafkaAdminClient(**client_arguments(bootstrap))
    await admin.start()
    await admin.create_topics([NewTopic(topic, 1, 1, topic_configs={"max.message.bytes": str(16 << 20)})])
    await admin.close()


def _of(process: psutil.Process) -> float:
    """Processor seconds."""
    return sum(process.cpu_times()[:2])


def constants_point(folder: str, x: int, seconds: float = 0.0) -> dict[str, Any]:
    """Sizes that no axis has: bytes of an event, of a row in the stores and in the trainer's memory."""
    from deploy.bench.growth_join import Log
    from online_model.features import TABLES
    from online_model.history import HISTORY_BYTES

    log = Log(100_000)
    raw = [value for _ in range(5) for value in log.slice()]
    return {
        "event_bytes": sum(map(len, raw)) / log.events,
        "store_bytes": {spec.name: spec.layout.itemsize + 8 for spec in TABLES if spec.name in ("user", "item")},
        "join_bytes_a_user": 2 * HISTORY_BYTES + 16,
    }  # fmt: skip


if __name__ == "__main__":
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "memory": memory_point, "ranks": ranks_point, "candidates": candidates_point, "catalogue": catalogue_point,
        "replicas": replicas_point, "constants": constants_point,
    }  # fmt: skip
    finish(parts[sys.argv[1]](**json.loads(sys.argv[2])))
