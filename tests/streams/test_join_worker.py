"""Each event's effect is in the blocks once, whatever happens to the worker."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from contextlib import closing
from pathlib import Path

import orjson
import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition

from streams.outlet import Outlet
from streams.topics import TopicSettings
from tests.streams.children import Child, read_all, running, wait_for
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

pytestmark = [pytest.mark.broker, pytest.mark.partitions(PARTITIONS)]


@pytest.fixture
def settings(broker: str, topics: TopicSettings, tmp_path: Path) -> dict:
    about = {"prefix": topics.prefix, "partitions": topics.partitions}
    return {"bootstrap": broker, "data_dir": tmp_path / "data", "topics": about, "join": JOIN, "ticks": "log"}


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
        ready(child)
        wait_for(lambda: sum(joined_up_to(broker, topics)) == players.records, child=child)
        assert child.stop() == 0, child.said
    assert players.records > 20_000
    assert rows(check_against_one_joiner(broker, topics)) > 20_000


def test_partitions_move_between_workers_of_one_machine(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    with Players(broker, topics.events, 6, 6_000) as players, running("join", tmp_path / "1", **settings) as one:
        wait_for(lambda: "joining partitions 0, 1, 2, 3" in one.said, child=one)
        with running("join", tmp_path / "2", **settings) as two:
            ready(two)
            two.kill()
            two.start()
            ready(two)
            assert two.stop() == 0, two.said
        wait_for(lambda: sum(joined_up_to(broker, topics)) == players.records, child=one)
        assert one.stop() == 0, one.said
    check_against_one_joiner(broker, topics)


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
            ready(child)
            wait_for(lambda: sum(joined_up_to(broker, topics)) == sent, child=child)  # noqa: B023
            assert child.stop() == 0, child.said
        if seed == 1:
            shutil.copytree(store, old)
    shutil.rmtree(store)
    with running("join", log, **settings) as child:
        said = _stopped(child)
        assert "no join store for partition" in said
        assert "[join] snapshots (an empty folder will do: Kafka still has all)" in said
    shutil.rmtree(store)
    old.rename(store)
    sent += Players(broker, topics.events, 3, 100).play()
    with running("join", log, **settings) as child:
        wait_for(lambda: sum(joined_up_to(broker, topics)) == sent, child=child)
        assert child.stop() == 0, child.said
        assert "joining it again" in child.said
    check_against_one_joiner(broker, topics)


def test_what_was_committed_and_not_sent_is_sent_once(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    """The crash between commit and publish, made by hand: the store is ahead of the group's offset."""
    sent = Players(broker, topics.events, 4, 200).play()
    records = read_all(broker, topics.events)[0]
    commit_unsent(tmp_path / "data" / "join" / "0", 0, records[: len(records) // 2])
    for _ in range(2):
        with running("join", tmp_path / "log", **settings) as child:
            ready(child)
            wait_for(lambda: sum(joined_up_to(broker, topics)) == sent, child=child)
            assert child.stop() == 0, child.said
    assert blocks(broker, topics)[0][0].to_offset == len(records) // 2
    check_against_one_joiner(broker, topics)


def test_the_group_s_offset_is_said_anew_while_nothing_comes(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    """Kafka forgets it after a week in which nothing was joined."""
    sent = Players(broker, topics.events, 8, 100).play()
    with running("join", tmp_path / "log", **settings, renew_s=0.5) as child:
        wait_for(lambda: sum(joined_up_to(broker, topics)) == sent, child=child)
        with closing(KafkaAdminClient(bootstrap_servers=broker)) as admin:
            admin.delete_groups([f"{topics.prefix}headrace-join.store"])
        wait_for(lambda: sum(joined_up_to(broker, topics)) == sent, child=child)
        sent += Players(broker, topics.events, 9, 100).play()
        wait_for(lambda: sum(joined_up_to(broker, topics)) == sent, child=child)
        assert child.stop() == 0, child.said
    check_against_one_joiner(broker, topics)


def test_records_that_kafka_deleted_before_they_were_joined_stop_the_worker(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    sent = Players(broker, topics.events, 10, 100).play()
    with running("join", tmp_path / "log", **settings) as child:
        wait_for(lambda: sum(joined_up_to(broker, topics)) == sent, child=child)
        assert child.stop() == 0, child.said
        Players(broker, topics.events, 11, 100).play()
        with closing(KafkaAdminClient(bootstrap_servers=broker)) as admin:
            admin.delete_records({TopicPartition(topics.events, p): -1 for p in range(PARTITIONS)})
        child.start()
        Players(broker, topics.events, 12, 100).play()
        said = _stopped(child)
        assert "Kafka has deleted records from" in said
        assert "raise retention.ms" in said


def test_a_worker_whose_place_was_taken_stops(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    with running("join", tmp_path / "log", **settings) as child:
        ready(child)
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
        found = wait_for(lambda: rows(blocks(broker, topics)), child=child)
        assert found == 3, "not clicked within wait_ms"
        assert child.stop() == 0, child.said
