"""Each event's effect is in the blocks once, whatever happens to the worker."""

from __future__ import annotations

import asyncio
import heapq
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import orjson
import pytest
from kafka import KafkaProducer

from online_model.examples import Block, Examples
from streams.blocks import decode_block, encode_block
from streams.dead_letters import DeadLetter
from streams.join_store import JoinStore
from streams.joiner import Joiner, JoinSettings, Record
from streams.outlet import Outlet
from streams.topics import TopicSettings, create_topics
from tests.streams.children import Child, convert, group_offsets, read_all, running, wait_for

pytestmark = pytest.mark.broker

PARTITIONS = 4
JOIN = {"wait_ms": 2_000, "watch_wait_ms": 1_000, "open_ms": 60_000}


@pytest.fixture
def topics(broker: str, topic_prefix: str) -> TopicSettings:
    settings = TopicSettings(prefix=topic_prefix, partitions=PARTITIONS)
    create_topics(broker, settings)
    return settings


@pytest.fixture
def settings(broker: str, topics: TopicSettings, tmp_path: Path) -> dict:
    about = {"prefix": topics.prefix, "partitions": topics.partitions}
    return {"bootstrap": broker, "data_dir": tmp_path / "data", "topics": about, "join": JOIN, "ticks": "log"}


def _session(dice: random.Random, n: int, now: int) -> Iterator[tuple[int, str, dict | bytes]]:
    """What one user does in a page view, and what goes wrong on the way: (when it is sent, user, event)."""
    user, request = f"u{dice.randrange(200)}", f"r{n}"
    items = dice.sample(range(500), 8)
    about = {"user": user, "request_id": request, "scenario": "shelf"}
    yield now, user, about | {"kind": "impression", "event_id": f"i{n}", "ts": now, "items": items}
    for i, item in enumerate(items):
        if dice.random() < 0.15:
            acted = now + dice.randrange(1, 4_000)
            click = about | {"kind": "click", "event_id": f"c{n}.{i}", "ts": acted, "item": item}
            yield acted, user, click
            if dice.random() < 0.1:
                yield acted + 300, user, click  # a duplicate
            if dice.random() < 0.3:
                yield acted + 5 + dice.randrange(400), user, about | {
                    "kind": "watch", "event_id": f"w{n}.{i}", "ts": acted + 5, "item": item, "play_ms": 900,
                    "duration_ms": 1_000,
                }  # fmt: skip
            if dice.random() < 0.2:
                bought = {"kind": "purchase", "event_id": f"p{n}.{i}", "ts": acted + 9, "item": item}
                yield acted + 9, user, about | bought
    if dice.random() < 0.02:
        yield now, user, b"poison %d" % n


class Players:
    """Sends sessions in the background, about 1,000 a second; then ends all windows with a tick in each partition."""

    def __init__(self, bootstrap: str, topic: str, seed: int, sessions: int) -> None:
        self._bootstrap, self._topic, self._seed, self._sessions = bootstrap, topic, seed, sessions
        self.records = 0
        self._thread = Thread(target=self._play)

    def __enter__(self) -> Players:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.join()

    def join(self) -> None:
        self._thread.join()

    def play(self) -> int:
        with self:
            pass
        return self.records

    def _play(self) -> None:
        dice, n = random.Random(self._seed), 0
        producer = KafkaProducer(bootstrap_servers=self._bootstrap, linger_ms=5)
        now = int(time.time() * 1000) - 3_600_000
        to_send: list[tuple[int, int, str, bytes]] = []
        while n < self._sessions:
            for _ in range(50):
                n += 1
                for at, user, event in _session(dice, n, now + n * 5):
                    value = event if isinstance(event, bytes) else orjson.dumps(event)
                    heapq.heappush(to_send, (at, len(to_send) + n * 100, user, value))
            while to_send and to_send[0][0] < now + n * 5:
                _, _, user, value = heapq.heappop(to_send)
                producer.send(self._topic, value, key=user.encode())
                self.records += 1
            time.sleep(0.05)
        tick = {"kind": "tick", "event_id": "end", "ts": now + n * 5 + 3_000_000}
        for partition in range(PARTITIONS):
            producer.send(self._topic, orjson.dumps(tick), partition=partition)
            self.records += 1
        producer.close()


def _blocks(broker: str, topics: TopicSettings) -> dict[int, list[Block]]:
    """All blocks; raises unless each goes on where the one before it ended."""
    blocks: dict[int, list[Block]] = {}
    for partition, records in read_all(broker, topics.examples).items():
        blocks[partition] = [decode_block(record.value) for record in records]
        at = 0
        for block in blocks[partition]:
            assert block.partition == partition
            assert block.from_offset == at, f"partition {partition}: [{block.from_offset}, …) after {at}"
            at = block.to_offset
    return blocks


def _joined_up_to(broker: str, topics: TopicSettings) -> int:
    """How many records have had their effect: the offsets of the group that moves with the blocks."""
    offsets = group_offsets(broker, f"{topics.prefix}headrace-join.store", topics.events, PARTITIONS)
    return sum(offset or 0 for offset in offsets)


def _ready(child: Child) -> None:
    wait_for(lambda: "joining partitions" in child.says, child=child)


def _check_against_one_joiner(broker: str, topics: TopicSettings) -> int:
    """Rows, balance and dead letters are those of a joiner that was never interrupted. Returns the number of rows."""
    blocks, events = _blocks(broker, topics), read_all(broker, topics.events)
    rows, dead = 0, []
    for partition in range(PARTITIONS):
        joiner = Joiner(convert(JOIN, JoinSettings), partition)
        whole = joiner.process(Record(r.offset, r.timestamp, r.value) for r in events[partition])
        got = Examples.concat([block.examples for block in blocks[partition]])
        for name in vars(whole.block.examples):
            np.testing.assert_array_equal(getattr(got, name), getattr(whole.block.examples, name), err_msg=name)
        assert blocks[partition][-1].counts == whole.block.counts
        assert blocks[partition][-1].to_offset == whole.block.to_offset
        rows += len(got)
        dead += whole.dead
    sent = [record for records in read_all(broker, topics.events_dead).values() for record in records]
    letters = [DeadLetter.of(record.headers, record.value) for record in sent]
    assert sorted(letters, key=_place) == sorted(dead, key=_place)
    assert dead, "no poison was sent"
    return rows


def _place(letter: DeadLetter) -> tuple[int, int]:
    return letter.partition, letter.offset


def test_blocks_are_those_of_one_joiner_though_the_worker_is_killed(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    dice = random.Random(3)
    with Players(broker, topics.events, 5, 9_000) as players, running("join", tmp_path / "log", **settings) as child:
        for _ in range(6):
            time.sleep(dice.uniform(1.5, 2.8))  # start-up takes 1.5 s: sometimes it is hit there
            child.fail_if_ended()
            child.kill()
            child.start()
        players.join()
        _ready(child)
        wait_for(lambda: _joined_up_to(broker, topics) == players.records, child=child)
        assert child.stop() == 0, child.said
    assert players.records > 20_000
    assert _check_against_one_joiner(broker, topics) > 20_000


def test_partitions_move_between_workers_of_one_machine(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    with Players(broker, topics.events, 6, 6_000) as players, running("join", tmp_path / "1", **settings) as one:
        wait_for(lambda: "joining partitions 0, 1, 2, 3" in one.said, child=one)
        with running("join", tmp_path / "2", **settings) as two:
            _ready(two)
            two.kill()
            two.start()
            _ready(two)
            assert two.stop() == 0, two.said
        wait_for(lambda: _joined_up_to(broker, topics) == players.records, child=one)
        assert one.stop() == 0, one.said
    _check_against_one_joiner(broker, topics)


def _stopped(child: Child, seconds: float = 60) -> str:
    """The last line of a worker that ends by itself with exit 1."""
    assert child.wait(seconds) == 1, child.said
    return child.said.strip().splitlines()[-1]


def test_a_store_that_fell_behind_catches_up_and_a_lost_one_is_refused(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    """As after a power cut: commits that did not wait for the disk are gone, what they published is not."""
    log, store, old = tmp_path / "log", tmp_path / "data" / "join", tmp_path / "old"
    sent = 0
    for seed in (1, 2):
        sent += Players(broker, topics.events, seed, 100).play()
        with running("join", log, **settings) as child:
            _ready(child)
            wait_for(lambda: _joined_up_to(broker, topics) == sent, child=child)  # noqa: B023
            assert child.stop() == 0, child.said
        if seed == 1:
            shutil.copytree(store, old)
    shutil.rmtree(store)
    with running("join", log, **settings) as child:
        assert "no join store for partition" in _stopped(child)
    shutil.rmtree(store)
    old.rename(store)
    sent += Players(broker, topics.events, 3, 100).play()
    with running("join", log, **settings) as child:
        wait_for(lambda: _joined_up_to(broker, topics) == sent, child=child)
        assert child.stop() == 0, child.said
        assert "joining it again" in child.said
    _check_against_one_joiner(broker, topics)


def test_what_was_committed_and_not_sent_is_sent_once(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    """The crash between commit and publish, made by hand: the store is ahead of the group's offset."""
    sent = Players(broker, topics.events, 4, 200).play()
    records = read_all(broker, topics.events)[0]
    store = JoinStore(tmp_path / "data" / "join" / "0", convert(JOIN, JoinSettings))
    joiner = Joiner(convert(JOIN, JoinSettings), 0, 0, store.state())
    joined = joiner.process(Record(r.offset, r.timestamp, r.value) for r in records[: len(records) // 2])
    store.commit(joined, [encode_block(joined.block), *joined.dead])
    store.close()
    for _ in range(2):
        with running("join", tmp_path / "log", **settings) as child:
            _ready(child)
            wait_for(lambda: _joined_up_to(broker, topics) == sent, child=child)
            assert child.stop() == 0, child.said
    assert _blocks(broker, topics)[0][0].to_offset == len(records) // 2
    _check_against_one_joiner(broker, topics)


def test_a_worker_whose_place_was_taken_stops(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    with running("join", tmp_path / "log", **settings) as child:
        _ready(child)
        asyncio.run(_take_over(broker, f"{topics.prefix}headrace-join-2"))
        Players(broker, topics.events, 8, 50).play()
        assert "another worker took over" in _stopped(child)


async def _take_over(broker: str, transactional_id: str) -> None:
    outlet = Outlet(broker, transactional_id)
    await outlet.start()
    await outlet.stop()


def test_ticks_release_what_is_held_in_an_idle_partition(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    producer = KafkaProducer(bootstrap_servers=broker)
    with running("join", tmp_path / "log", **settings | {"ticks": "live"}) as child:
        about = {"user": "u", "scenario": "shelf", "request_id": "r", "ts": int(time.time() * 1000)}
        shown = about | {"kind": "impression", "event_id": "i", "items": [1, 2, 3]}
        producer.send(topics.events, orjson.dumps(shown), partition=1)
        producer.close()
        rows = wait_for(lambda: sum(len(b.examples) for b in _blocks(broker, topics)[1]), child=child)
        assert rows == 3, "not clicked within wait_ms"
        assert child.stop() == 0, child.said
