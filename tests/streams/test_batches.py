"""Whole batches, each once, from the feed's own offsets: through kill -9, rebalances and batches that fail."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from kafka import KafkaProducer

from streams.topics import TopicSettings, create_topics
from tests.streams.children import group_offsets, running, wait_for

pytestmark = pytest.mark.broker

PARTITIONS = 4


@pytest.fixture
def topic(broker: str, topic_prefix: str) -> str:
    settings = TopicSettings(prefix=topic_prefix, partitions=PARTITIONS)
    create_topics(broker, settings)
    return settings.events


@pytest.fixture
def feed(broker: str, topic: str, tmp_path: Path) -> dict:
    return {"bootstrap": broker, "topic": topic, "group": f"{topic}-group", "folder": tmp_path}


def _produce(broker: str, topic: str, records: int, partitions: int = PARTITIONS) -> None:
    producer = KafkaProducer(bootstrap_servers=broker, linger_ms=20)
    for i in range(records):
        producer.send(topic, b"%d" % i, partition=i % partitions)
    producer.close()


def _offsets(folder: Path) -> dict[int, list[int]]:
    return {int(path.stem): [int(line) for line in path.read_text().split()] for path in folder.glob("*.offsets")}


def _all_once(folder: Path, records: int) -> bool:
    """Raises if an offset is there twice or out of order; says whether all are there."""
    offsets = _offsets(folder)
    for partition, seen in offsets.items():
        assert seen == list(range(len(seen))), f"partition {partition} is not in order, each once"
    return sum(map(len, offsets.values())) == records


def test_a_killed_worker_goes_on_from_its_own_offsets(broker: str, topic: str, feed: dict, tmp_path: Path) -> None:
    dice = random.Random(7)
    _produce(broker, topic, 20_000)
    with running("feed", tmp_path / "log", **feed, member="a") as child:
        for _ in range(3):
            done = sum(map(len, _offsets(tmp_path).values()))
            wait_for(lambda done=done: sum(map(len, _offsets(tmp_path).values())) > done, child=child)
            wait_for(lambda: dice.random() < 0.3)
            child.kill()
            _produce(broker, topic, 5_000)
            child.start()
        wait_for(lambda: _all_once(tmp_path, 35_000), child=child)
        assert child.stop() == 0, child.said
    lines = (tmp_path / "batches").read_text().splitlines()
    sizes, stale = zip(*(map(int, line.split()) for line in lines), strict=True)
    assert max(sizes) == 500, "a batch is what one fetch brought"
    assert sum(stale) == 0, "nothing was read again"


def test_partitions_move_between_workers(broker: str, topic: str, feed: dict, tmp_path: Path) -> None:
    _produce(broker, topic, 8_000)
    opened = tmp_path / "opened"
    with running("feed", tmp_path / "one.log", **feed) as one:
        wait_for(lambda: _all_once(tmp_path, 8_000), child=one)
        with running("feed", tmp_path / "two.log", **feed) as two:
            wait_for(lambda: opened.read_text().count(f"{two.pid} ") >= 1, child=two)
            wait_for(lambda: opened.read_text().count(f"{one.pid} ") >= 2, child=one)
            _produce(broker, topic, 8_000)
            wait_for(lambda: _all_once(tmp_path, 16_000), child=two)
            assert two.stop() == 0, two.said
        _produce(broker, topic, 8_000)
        wait_for(lambda: _all_once(tmp_path, 24_000), child=one)
        assert one.stop() == 0, one.said


def test_a_batch_that_fails_ends_the_process_and_comes_again(
    broker: str, topic: str, feed: dict, tmp_path: Path
) -> None:
    _produce(broker, topic, 4_000)
    with running("feed", tmp_path / "log", **feed, fail_at=700) as child:
        assert child.wait(60) == 1
        last = child.said.strip().splitlines()[-1]
        assert last == "headrace: RuntimeError: this batch cannot be handled"
    with running("feed", tmp_path / "log", **feed) as child:
        wait_for(lambda: _all_once(tmp_path, 4_000), child=child)


def test_a_feed_can_go_back(broker: str, topic: str, feed: dict, tmp_path: Path) -> None:
    _produce(broker, topic, 8_000)
    with running("feed", tmp_path / "log", **feed, hole_at=900) as child:
        wait_for(lambda: _all_once(tmp_path, 8_000), child=child)


def test_other_topics_of_the_app_keep_the_ordinary_path(
    broker: str, topic: str, topic_prefix: str, feed: dict, tmp_path: Path
) -> None:
    ordinary = TopicSettings(prefix=topic_prefix, partitions=PARTITIONS).events_dead  # of one partition
    mixed = feed | {"ordinary": ordinary, "member": "a"}

    def ordinary_all(records: int) -> bool:
        """Whether the agent saw every event; at least once is Faust's promise, and no offset may be left out."""
        seen = {p: [int(n) for n in p.read_text().split()] for p in tmp_path.glob("*.ordinary")}
        return sum(len(set(offsets)) for offsets in seen.values()) == records

    _produce(broker, topic, 8_000)
    _produce(broker, ordinary, 800, partitions=1)
    with running("mixed", tmp_path / "log", **mixed) as child:
        wait_for(lambda: any(tmp_path.glob("*.ordinary")), child=child)
        child.kill()
        child.start()
        wait_for(lambda: _all_once(tmp_path, 8_000) and ordinary_all(800), child=child)
        assert child.stop() == 0, child.said
    assert group_offsets(broker, feed["group"], ordinary, 1) == [800], "Faust committed them"
    assert group_offsets(broker, feed["group"], topic, PARTITIONS) == [None] * PARTITIONS, "the feed's are not Faust's"


def test_a_stop_in_the_middle_of_a_batch_finishes_it(broker: str, topic: str, feed: dict, tmp_path: Path) -> None:
    _produce(broker, topic, 20_000)
    with running("feed", tmp_path / "log", **feed) as child:
        wait_for(lambda: _offsets(tmp_path), child=child)
        assert child.stop() == 0, child.said
        assert not _all_once(tmp_path, 20_000), "it was stopped in the middle"
        child.start()
        wait_for(lambda: _all_once(tmp_path, 20_000), child=child)
    assert all(int(line.split()[1]) == 0 for line in (tmp_path / "batches").read_text().splitlines())


def test_a_rebalance_in_the_middle_of_a_batch_loses_nothing(
    broker: str, topic: str, feed: dict, tmp_path: Path
) -> None:
    _produce(broker, topic, 40_000)
    opened = tmp_path / "opened"
    with running("feed", tmp_path / "one.log", **feed) as one:
        wait_for(lambda: _offsets(tmp_path), child=one)
        with running("feed", tmp_path / "two.log", **feed) as two:
            wait_for(lambda: opened.read_text().count(f"{two.pid} ") >= 1, child=two)
            _produce(broker, topic, 8_000)
            wait_for(lambda: _all_once(tmp_path, 48_000), child=one)
            assert two.stop() == 0, two.said
        assert one.stop() == 0, one.said


@pytest.mark.nightly
def test_stores_may_take_longer_to_open_than_faust_waits_for_anything(
    broker: str, topic: str, feed: dict, tmp_path: Path
) -> None:
    _produce(broker, topic, 400)
    with running("feed", tmp_path / "log", **feed, open_s=40.0) as child:  # 30 was what it waited
        wait_for(lambda: _all_once(tmp_path, 400), seconds=90, child=child)
        assert child.stop() == 0, child.said
