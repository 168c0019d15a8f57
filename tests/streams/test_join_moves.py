"""Partitions that move between machines, a broker that goes away, a backlog that is set aside: each effect once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from kafka import TopicPartition
from kafka.admin import KafkaAdminClient
from xxhash import xxh3_64_hexdigest

from deploy.broker import Broker
from embedding_store.copies import File, Manifest
from embedding_store.errors import StoreError
from online_model.examples import Block
from online_model.positions import Position, RowQueue
from replay.oracle import Rules, compare, expect, read_topic
from streams.blocks import decode_block
from streams.join_store import JoinStore
from streams.join_worker import JoinWorker
from streams.joiner import JoinSettings
from streams.settings import JoinWorkerSettings
from streams.topics import MAX_BLOCK_BYTES, TopicSettings, create_topics, end_offsets
from tests.streams.children import Child, convert, read_all, running, wait_for
from tests.streams.joining import (
    JOIN,
    PARTITIONS,
    Players,
    blocks,
    check_against_one_joiner,
    commit_unsent,
    joined_up_to,
    ready,
    rows,
)
from tests.streams.test_topics import set_config

pytestmark = [pytest.mark.broker, pytest.mark.partitions(PARTITIONS)]

OUTAGE_S = float(os.environ.get("BROKER_OUTAGE_S", "5"))  # of the broker; 20 is what is promised


def _settings(broker: str, topics: TopicSettings, tmp_path: Path, **more: object) -> dict:
    """Of a worker on a machine of its own: `data_dir` is to be added."""
    about = {"prefix": topics.prefix, "partitions": topics.partitions}
    shared = {"snapshots": str(tmp_path / "shared"), "snapshot_interval_s": 1.0}
    return {"bootstrap": broker, "topics": about, "join": JOIN, "ticks": "log"} | shared | more


def _snapshots(tmp_path: Path, topics: TopicSettings) -> dict[int, list[int]]:
    """Partition → the offsets of its whole snapshots, in order."""
    folder = tmp_path / "shared" / f"{topics.prefix}join"
    return {
        p: sorted(int(path.parent.name) for path in folder.glob(f"{p}/*/manifest.json")) for p in range(PARTITIONS)
    }


def _wait_until_joined(broker: str, topics: TopicSettings, child: Child) -> list[int]:
    """Until all that is in `events` now has had its effect. Returns the ends of the partitions."""
    ends = list(end_offsets(broker, topics.events).values())

    def joined() -> bool:
        return all(at >= end for at, end in zip(joined_up_to(broker, topics), ends, strict=True))

    wait_for(joined, child=child, what=f"joined up to {ends}")
    return ends


def test_workers_come_and_go_partitions_move_away_and_back_and_the_broker_stops(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = Broker.start(tmp_path / "broker")
        stack.callback(first.stop)
        broker, topics = first.bootstrap, TopicSettings(prefix="moves.", partitions=PARTITIONS)
        create_topics(broker, topics)
        settings = _settings(broker, topics, tmp_path)

        def machine(name: str) -> Child:
            return stack.enter_context(running("join", tmp_path / f"{name}.log", data_dir=tmp_path / name, **settings))

        players = stack.enter_context(Players(broker, topics.events, 6, 1_000_000, pause=0.15))
        one = machine("one")
        ready(one)
        wait_for(lambda: all(_snapshots(tmp_path, topics).values()), child=one, what="first snapshots")
        two = machine("two")
        ready(two)
        assert "going on from the snapshot" in two.says
        one.kill()
        three = machine("three")
        _wait_until_joined(broker, topics, three)  # also what `one` had: its partitions have moved away
        one.start()
        ready(one)  # some are back where they were before
        assert "going on from the snapshot" in one.says or "joining it again" in one.says
        first.stop()
        time.sleep(OUTAGE_S)
        stack.callback(Broker.start(tmp_path / "broker").stop)
        _wait_until_joined(broker, topics, three)  # after the outage
        players.end()
        _wait_until_joined(broker, topics, one)
        for child in (one, two, three):
            child.fail_if_ended()
            assert child.stop() == 0, child.said
        assert rows(check_against_one_joiner(broker, topics)) > 10_000


def _damage(path: Path, at: int) -> None:
    """One bit of byte `at`."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.unlink()  # other snapshots and the store may have it too, by hard links
    path.write_bytes(raw)


def _damage_before_it_was_copied(snapshot: Path) -> None:
    """A row of a table; the manifest vouches for it: the store was damaged when the snapshot was made."""
    path, place = _damaged_where_only_a_reader_sees_it(snapshot), snapshot / "manifest.json"
    manifest = msgspec.json.decode(place.read_bytes(), type=Manifest)
    found = File(path.name, _size(path), xxh3_64_hexdigest(path.read_bytes()))
    files = [found if file.name == path.name else file for file in manifest.files]
    assert files != manifest.files
    manifest = msgspec.structs.replace(manifest, files=files)
    place.write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, xxh3=manifest.digest())))


def _damaged_where_only_a_reader_sees_it(snapshot: Path) -> Path:
    """The table: to open the store does not read that block of it."""
    trial = snapshot.parents[2] / "trial"
    for path in sorted(snapshot.glob("*.sst"), key=_size, reverse=True):
        for at in range(0, _size(path), _size(path) // 20):
            shutil.rmtree(trial, ignore_errors=True)
            shutil.copytree(snapshot, trial, ignore=shutil.ignore_patterns("manifest.json"))
            _damage(trial / path.name, at)
            with contextlib.suppress(StoreError), JoinStore(trial, convert(JOIN, JoinSettings)) as store:
                try:
                    store.scan()
                except StoreError:
                    _damage(path, at)
                    return path
    raise AssertionError("every table is read whole when the store is opened")


def _size(path: Path) -> int:
    return path.stat().st_size


def test_a_lost_store_is_restored_from_the_newest_snapshot_that_is_sound(
    broker: str, topics: TopicSettings, tmp_path: Path
) -> None:
    settings, stores = _settings(broker, topics, tmp_path, data_dir=tmp_path / "data"), tmp_path / "data" / "join"
    with running("join", tmp_path / "log", **settings) as child:
        for seed in (1, 2):
            Players(broker, topics.events, seed, 100, last=False).play()
            ends = [[end] for end in _wait_until_joined(broker, topics, child)]
            wait_for(lambda: [s[-1:] for s in _snapshots(tmp_path, topics).values()] == ends, child=child)  # noqa: B023
        assert child.stop() == 0, child.said
    folder = tmp_path / "shared" / f"{topics.prefix}join"
    kept = _snapshots(tmp_path, topics)
    assert all(len(some) == 2 for some in kept.values()), "two are kept"
    largest = max((p for p in (folder / "0" / str(kept[0][1])).iterdir() if p.name != "manifest.json"), key=_size)
    _damage(largest, _size(largest) // 2)
    max((folder / "1" / str(kept[1][1])).glob("*.sst")).unlink()
    _damage_before_it_was_copied(folder / "2" / str(kept[2][1]))
    shutil.rmtree(stores)
    Players(broker, topics.events, 3, 100, last=False).play()
    with running("join", tmp_path / "log", **settings) as child:
        _wait_until_joined(broker, topics, child)
        assert child.stop() == 0, child.said
        assert "is damaged" in child.says
        assert "lacks" in child.says
        assert "Corruption" in child.says
        for partition, number in enumerate((kept[0][0], kept[1][0], kept[2][0], kept[3][1])):
            assert f"partition {partition}: going on from the snapshot {folder}/{partition}/{number}" in child.says
    shutil.rmtree(stores)
    shutil.rmtree(folder)  # Kafka still has all of it
    Players(broker, topics.events, 4, 100).play()
    with running("join", tmp_path / "log", **settings) as child:
        _wait_until_joined(broker, topics, child)
        assert child.stop() == 0, child.said
    check_against_one_joiner(broker, topics)


def test_a_store_older_than_what_kafka_has_is_refused(broker: str, topics: TopicSettings, tmp_path: Path) -> None:
    settings, data = _settings(broker, topics, tmp_path, snapshots=""), tmp_path / "data"
    with running("join", tmp_path / "log", data_dir=data, **settings) as child:
        for seed in (1, 2):
            Players(broker, topics.events, seed, 50, last=False).play()
            _wait_until_joined(broker, topics, child)
            if seed == 1:
                assert child.stop() == 0, child.said
                shutil.copytree(data, tmp_path / "old")
                child.start()
        assert child.stop() == 0, child.said
    admin = KafkaAdminClient(bootstrap_servers=broker)
    admin.delete_records({TopicPartition(topics.events, 0): end_offsets(broker, topics.events)[0]})
    admin.close()
    for folder, says in (("old", "Kafka has records from"), ("none", "no join store for partition")):
        with running("join", tmp_path / f"{folder}.log", data_dir=tmp_path / folder, **settings) as child:
            assert child.wait(60) == 1
            assert says in child.said.strip().splitlines()[-1]


def test_a_store_that_committed_what_another_worker_sent_otherwise_is_replaced(
    broker: str, topics: TopicSettings, tmp_path: Path
) -> None:
    """Made by hand: the zombie committed a block from where it was, while the other one's blocks went out."""
    data, zombie = tmp_path / "data", tmp_path / "zombie"
    settings = _settings(broker, topics, tmp_path, snapshot_interval_s=0.2)
    with running("join", tmp_path / "log", data_dir=data, **settings) as child:
        for seed in (1, 2):
            Players(broker, topics.events, seed, 50, last=False).play()
            ends = _wait_until_joined(broker, topics, child)
            if seed == 1:
                assert child.stop() == 0, child.said
                shutil.copytree(data, zombie)
                child.start()
        wait_for(lambda: _snapshots(tmp_path, topics)[0][-1:] == ends[:1], child=child, what=f"a snapshot at {ends}")
        assert child.stop() == 0, child.said
    Players(broker, topics.events, 3, 50).play()
    commit_unsent(zombie / "join" / "0", 0, read_all(broker, topics.events)[0])
    with running("join", tmp_path / "log", data_dir=zombie, **settings) as child:
        _wait_until_joined(broker, topics, child)
        assert f"partition 0: going on from the snapshot {tmp_path}" in child.says
        assert child.stop() == 0, child.said
    check_against_one_joiner(broker, topics)


@pytest.fixture
def impatient(broker: str, topics: TopicSettings, tmp_path: Path) -> dict:
    more = {"backlog": "newest", "newest_after_s": 1.5, "data_dir": tmp_path / "data"}
    return _settings(broker, topics, tmp_path, snapshots="", **more)


def _trained(found: Mapping[int, list[Block]]) -> dict[int, Position]:
    """What the trainer books of the blocks, when it has learned them and was started again in the middle."""
    positions = {}
    for partition, some in found.items():
        queue = RowQueue()
        for number, block in enumerate(some):
            if number == len(some) // 2:
                state = queue.state()
                queue = RowQueue()
                queue.load(state)
            queue.offer(block, number)
            while queue.take(1_000, drain=False) is not None:
                pass
            queue.finished()
        positions |= {partition: queue.positions[partition]}
    return positions


def test_newest_first_books_the_gap_as_set_aside_once_and_for_all(
    broker: str, topics: TopicSettings, impatient: dict, tmp_path: Path
) -> None:
    """The trainer and the oracle agree with the joiner on what that is, also when the gap is joined again."""
    log, store = tmp_path / "log", tmp_path / "data" / "join"
    with running("join", log, **impatient) as child:
        ready(child)
        Players(broker, topics.events, 1, 300, last=False).play()
        before = _wait_until_joined(broker, topics, child)
        assert child.stop() == 0, child.said
    shutil.copytree(store, tmp_path / "old")
    Players(broker, topics.events, 2, 300, last=False).play()
    backlog = list(end_offsets(broker, topics.events).values())
    time.sleep(2)  # Kafka's clock: what it has stamped is old now
    with running("join", log, **impatient) as child:
        _wait_until_joined(broker, topics, child)
        assert child.says.count("is set aside") == PARTITIONS
        Players(broker, topics.events, 3, 300, last=False).play()
        _wait_until_joined(broker, topics, child)
        assert child.stop() == 0, child.said
    shutil.rmtree(store)
    (tmp_path / "old").rename(store)
    Players(broker, topics.events, 4, 300).play()
    with running("join", log, **impatient | {"backlog": "oldest"}) as child:
        _wait_until_joined(broker, topics, child)
        assert "joining it again" in child.says
        assert child.stop() == 0, child.said
    gap = {p: [[before[p], backlog[p]]] for p in range(PARTITIONS)}
    found = check_against_one_joiner(broker, topics, gap)
    assert not any(len(block.examples) for some in found.values() for block in some if block.set_aside)
    positions = _trained(found)
    assert {p: at.set_aside for p, at in positions.items()} == gap
    expected = expect(read_topic(broker, topics.events), Rules.of(convert(JOIN, JoinSettings)), gap)
    verdict = compare(expected, {p: (at.rows, at.sum) for p, at in positions.items()})
    assert (verdict.lost, verdict.duplicated, verdict.differing) == (0, 0, [])
    assert verdict.balance["set_aside"] > 1_000
    counts = [at.counts for at in positions.values()]
    assert verdict.balance == {name: sum(getattr(c, name) for c in counts) for name in verdict.balance}


def test_a_partition_that_is_taken_away_while_it_is_opened_is_let_go_of(
    broker: str, topics: TopicSettings, tmp_path: Path
) -> None:
    settings = _settings(broker, topics, tmp_path, data_dir=str(tmp_path / "here"))

    async def open_and_close() -> None:
        first, second = (JoinWorker(convert(settings, JoinWorkerSettings)) for _ in range(2))
        await first.start()
        await second.start()
        opening = asyncio.create_task(first.open({0, 1}))
        await asyncio.sleep(0)  # it has begun
        await first.close({0})
        assert (await opening).keys() == {1}
        assert (await second.open({0})).keys() == {0}  # its store is free
        await first.close({1})
        await second.close({0})
        await first.stop()
        await second.stop()

    asyncio.run(open_and_close())


def test_what_kafka_did_not_take_and_what_it_perhaps_took_are_there_once(
    broker: str, topics: TopicSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Players(broker, topics.events, 1, 100).play()
    records = read_all(broker, topics.events)[0]
    settings = _settings(broker, topics, tmp_path, data_dir=tmp_path / "data", snapshots="")

    async def refused(times: int) -> None:
        while caplog.text.count("trying again") < times:
            await asyncio.sleep(0.01)

    async def join() -> None:
        worker = JoinWorker(convert(settings, JoinWorkerSettings))
        await worker.start()
        await worker.open({0})
        lane = worker.lanes[0]
        set_config(broker, topics.examples, "max.message.bytes", "100")
        await lane.take(records)
        await refused(1)
        assert lane.next_offset == 0
        set_config(broker, topics.examples, "max.message.bytes", str(MAX_BLOCK_BYTES))
        while lane.next_offset < len(records):
            await asyncio.sleep(0.01)
        # As if the answer had been lost: it is refused now, Kafka is asked, and has it already.
        set_config(broker, topics.examples, "max.message.bytes", "100")
        outbox = lane._store.outbox()
        async with lane._between_slices:  # as a slice does
            await lane._publish(outbox, decode_block(outbox[0]))
        await refused(2)
        await worker.close({0})
        await worker.stop()

    asyncio.run(join())
    assert blocks(broker, topics)[0][-1].to_offset == len(records)
