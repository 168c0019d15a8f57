"""Each row is learned once and each version follows the one before it, whatever happens to the worker."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import orjson
import psutil
import pytest
from aiokafka import AIOKafkaProducer
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from msgspec import convert

from deploy.processes import free_port
from embedding_store.checkpoint import CheckpointStore
from embedding_store.delta import Assembler, Version
from embedding_store.errors import UsageError
from embedding_store.ids import feature_id
from embedding_store.snapshot import latest_snapshot, place_of
from online_model.examples import Block
from online_model.features import FeatureSettings, table_specs
from streams.blocks import encode_block
from streams.outlet import Message, Outlet
from streams.settings import TrainWorkerSettings
from streams.topics import TopicSettings
from streams.train_worker import run_train
from tests.online_model.logs import make_blocks, make_rows
from tests.streams.children import Child, read_all, running, wait_for

PARTITIONS = 2

pytestmark = [pytest.mark.broker, pytest.mark.partitions(PARTITIONS)]


@pytest.fixture
def settings(broker: str, topics: TopicSettings, tmp_path: Path) -> dict:
    about = {"prefix": topics.prefix, "partitions": topics.partitions}
    small = {"features": {"dim": 8, "users": 4_000, "items": 4_000, "categories": 100}, "batch_size": 256}
    return {
        "bootstrap": broker, "data_dir": tmp_path / "data", "topics": about, "model": small, "device": "cpu",
    }  # fmt: skip


def _made_blocks(partition: int, rows: int) -> list[Block]:
    return make_blocks(make_rows(rows, seed=partition, users=500, items=300), 60, partition)


def _send(broker: str, topics: TopicSettings, blocks: list[Block], pause: float = 0.0) -> None:
    producer = KafkaProducer(bootstrap_servers=broker, linger_ms=0)
    for block in blocks:
        producer.send(topics.examples, encode_block(block), partition=block.partition)
        time.sleep(pause)
    producer.close()


def _versions(broker: str, topics: TopicSettings) -> list[Version]:
    """All versions; raises unless each goes on from the one before it. A version may be there twice."""
    assembler, versions = Assembler(), []
    for record in read_all(broker, topics.parameters)[0]:
        version = assembler.add(record.value)
        if version is None or (versions and version.sequence <= versions[-1].sequence):
            continue
        before = (versions[-1].epoch, versions[-1].sequence) if versions else None
        assert version.base == before
        versions.append(version)
    return versions


def _learned(version: Version) -> dict[int, tuple[int, int]]:
    """partition → rows learned, sum of their ids."""
    return {int(p): (at["rows"], at["sum"]) for p, at in version.info["partitions"].items()}


def _sum(blocks: list[Block]) -> tuple[int, int]:
    ids = np.concatenate([block.examples.row_id for block in blocks])
    return len(ids), int(ids.view(np.uint64).sum())


def _wait_for_all(broker: str, topics: TopicSettings, blocks: dict[int, list[Block]], child: Child) -> None:
    _wait_for_all_of(lambda: _versions(broker, topics), blocks, child)


def _wait_for_all_of(newest: Callable[[], list[Version]], blocks: dict[int, list[Block]], child: Child) -> None:
    wanted = {p: _sum(some) for p, some in blocks.items()}

    def done() -> bool:
        versions = newest()
        return bool(versions) and _learned(versions[-1]) == wanted

    wait_for(done, 180, child)


def test_each_row_is_learned_once_though_the_worker_is_killed(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    dice = random.Random(9)
    blocks = {p: _made_blocks(p, 9_000) for p in range(PARTITIONS)}
    mixed = [block for pair in zip(*blocks.values(), strict=True) for block in pair]
    sending = Thread(target=_send, args=(broker, topics, mixed, 0.03))
    sending.start()
    with running("train", tmp_path / "log", **settings) as child:
        for _ in range(5):
            wait_for(lambda: "training on partitions" in child.says, child=child)
            time.sleep(dice.uniform(0.1, 1.2))
            child.fail_if_ended()
            child.kill()
            child.start()
        sending.join()
        wait_for(lambda: "training on partitions" in child.says, child=child)
        _wait_for_all(broker, topics, blocks, child)
        assert child.stop() == 0, child.said
    snapshot = latest_snapshot(tmp_path / "data" / "snapshots")
    last = _versions(broker, topics)[-1]
    assert snapshot is not None
    assert snapshot.name == f"{last.epoch}-{last.sequence}"


@pytest.mark.nightly
def test_ranks_learn_each_row_once_though_any_of_them_is_killed(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    """Rank 1 by kill -9, also while it starts: the worker ends and says so. The worker: rank 1 ends too. SIGTERM to
    both is as to one. Then one rank goes on alone.
    """
    blocks = {p: _made_blocks(p, 4_000) for p in range(PARTITIONS)}
    mixed = [block for pair in zip(*blocks.values(), strict=True) for block in pair]
    sending = Thread(target=_send, args=(broker, topics, mixed, 0.05))
    sending.start()
    with running("train", tmp_path / "log", **settings, ranks=2) as child:
        _wait_for_versions(broker, topics, 3, child)
        os.kill(_rank_1(child), signal.SIGKILL)
        assert child.wait(30) == 1
        assert "the 2 ranks of the trainer are no longer together" in child.said.splitlines()[-1]
        child.start()
        wait_for(lambda: "rank 0 of 2" in child.says, child=child)
        os.kill(_rank_1(child), signal.SIGKILL)
        assert child.wait(30) == 1
        assert child.says.splitlines()[-1].startswith("headrace: the 2 ranks of the trainer are no longer together")
        for when in ("rank 0 of 2", "training on partitions"):
            child.start()
            wait_for(lambda: when in child.says, child=child)  # noqa: B023
            rank_1 = _rank_1(child)
            child.kill()
            wait_for(lambda: not psutil.pid_exists(rank_1))  # noqa: B023
        child.start()
        _wait_for_all(broker, topics, blocks, child)
        sending.join()
        rank_1 = _rank_1(child)
        os.kill(rank_1, signal.SIGTERM)
        assert child.stop() == 0, child.said
        assert not psutil.pid_exists(rank_1)
    blocks = {p: blocks[p] + _made_blocks(p, 4_600)[len(blocks[p]) :] for p in blocks}
    _send(broker, topics, [block for p in blocks for block in blocks[p][-10:]])
    with running("train", tmp_path / "log", **settings) as child:
        _wait_for_all(broker, topics, blocks, child)
        assert child.stop() == 0, child.said
    assert {version.epoch for version in _versions(broker, topics)} == {1}


def test_ranks_that_a_launcher_started_are_one_worker(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    """As torchrun tells them who they are. SIGTERM to the first ends both; where one is killed the other ends."""
    blocks = {p: _made_blocks(p, 2_000) for p in range(PARTITIONS)}
    _send(broker, topics, [block for pair in zip(*blocks.values(), strict=True) for block in pair])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place = [meeting | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(2)]
    with (
        running("train", tmp_path / "log-0", **settings, environment=place[0]) as first,
        running("train", tmp_path / "log-1", **settings, environment=place[1]) as second,
    ):
        _wait_for_all(broker, topics, blocks, first)
        assert "rank 0 of 2" in first.says
        assert first.stop() == 0, first.said
        assert second.wait(120) == 0, second.said
        for child in (first, second):
            child.start()
        wait_for(lambda: "training on partitions" in first.says, child=first)
        second.kill()
        _send(broker, topics, [block for p in blocks for block in _made_blocks(p, 2_200)[-2:]])
        assert first.wait(120) == 1
        assert "the 2 ranks of the trainer are no longer together" in first.says.splitlines()[-1]


def test_a_launcher_and_settings_that_differ_are_refused(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": 1, "LOCAL_RANK": 1, "MASTER_ADDR": ""}.items():
        monkeypatch.setenv(name, str(value))
    given = TrainWorkerSettings(bootstrap="127.0.0.1:1", data_dir=settings["data_dir"], ranks=3)
    with pytest.raises(UsageError, match="torchrun started 2 ranks"):
        run_train(given)


def _rank_1(child: Child) -> int:
    """Its process id."""
    found = re.findall(r"rank 0 of 2, with processes (\d+)", child.says)
    return int(found[-1])


def _wait_for_versions(broker: str, topics: TopicSettings, count: int, child: Child) -> None:
    wait_for(lambda: len(_versions(broker, topics)) >= count, child=child)


def test_versions_that_the_store_forgot_are_superseded(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    """As after a power cut: commits that did not wait for the disk are gone, and replicas have their versions."""
    blocks, store = _made_blocks(0, 1_200), tmp_path / "data" / "train"
    for part in (blocks[:10], blocks):
        _send(broker, topics, part[-10:])
        with running("train", tmp_path / "log", **settings) as child:
            _wait_for_all(broker, topics, {0: part}, child)
            assert child.stop() == 0, child.said
        if part is not blocks:
            shutil.copytree(store, tmp_path / "old")
            known = _versions(broker, topics)[-1]
    forgotten = _versions(broker, topics)[-1]
    shutil.rmtree(store)
    (tmp_path / "old").rename(store)
    with running("train", tmp_path / "log", **settings) as child:
        _wait_for_all_of(lambda: _in_epoch(broker, topics, 2), {0: blocks}, child)
        snapshots = tmp_path / "data" / "snapshots"
        wait_for(lambda: place_of(latest_snapshot(snapshots) or Path("0-0"))[0] == 2, child=child)  # not at its end
        assert child.stop() == 0, child.said
    first, *_, last = _in_epoch(broker, topics, 2)
    assert forgotten.sequence > known.sequence
    assert first.base == (known.epoch, known.sequence)
    snapshot = latest_snapshot(tmp_path / "data" / "snapshots")
    assert snapshot is not None
    assert place_of(snapshot) == (2, last.sequence), "a replica past the base needs it"


def test_snapshots_of_which_the_store_knows_nothing_are_superseded(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    """As where store and topic were lost, and the snapshots are elsewhere: replicas start from their newest."""
    blocks, snapshots = _made_blocks(0, 120), tmp_path / "data" / "snapshots"
    (snapshots / "7-3").mkdir(parents=True)
    _send(broker, topics, blocks)
    with running("train", tmp_path / "log", **settings) as child:
        _wait_for_all_of(lambda: _in_epoch(broker, topics, 8), {0: blocks}, child)
        wait_for(lambda: place_of(latest_snapshot(snapshots) or Path("0-0"))[0] == 8, child=child)
        assert child.stop() == 0, child.said
    assert _versions(broker, topics)[0].base is None


def test_a_worker_with_a_wider_model_goes_on_and_replicas_take_it(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    blocks, snapshots = _made_blocks(0, 1_800), tmp_path / "data" / "snapshots"
    wide = settings | {"model": settings["model"] | {"features": settings["model"]["features"] | {"dim": 16}}}
    serve = {name: settings[name] for name in ("bootstrap", "data_dir", "topics")} | {"port": 0}
    _send(broker, topics, blocks[:10])
    with running("serve", tmp_path / "old.log", **serve) as old:
        with running("train", tmp_path / "log", **settings) as child:
            _wait_for_all(broker, topics, {0: blocks[:10]}, child)
            assert child.stop() == 0, child.said
        last = _versions(broker, topics)[-1].sequence
        wait_for(lambda: _served(old)["version"] == f"1.{last}", child=old)
        with running("train", tmp_path / "log", **wide) as child:
            wait_for(lambda: latest_snapshot(snapshots) == snapshots / f"2-{last + 1}", child=child)
            assert "another shape of the model: table category widened from dim 8 to 16; table item" in child.said
            with running("serve", tmp_path / "new.log", **serve) as new:  # while the trainer has nothing to say
                wait_for(lambda: _served(new)["version"] == f"2.{last + 1}", child=new)
                _send(broker, topics, blocks[10:])
                _wait_for_all_of(lambda: _in_epoch(broker, topics, 2), {0: blocks}, child)
                assert child.stop() == 0, child.said
                first, *_, end = _in_epoch(broker, topics, 2)
                assert first.base == (2, last + 1), "no replica of the old width can go on from there"
                for replica in (old, new):
                    wait_for(lambda replica=replica: _served(replica)["version"] == f"2.{end.sequence}", child=replica)
                    assert _served(replica)["info"]["settings"]["features"]["dim"] == 16
                assert "refused" not in old.said


def _served(child: Child) -> dict:
    """What a replica says of its model."""
    wait_for(lambda: "serving on http://" in child.says, child=child)
    address = child.says.split("serving on ")[1].split()[0]
    return httpx.get(f"{address}/v1/model", timeout=30).json()


def _in_epoch(broker: str, topics: TopicSettings, epoch: int) -> list[Version]:
    assembler = Assembler()
    versions = [assembler.add(record.value) for record in read_all(broker, topics.parameters)[0]]
    return [version for version in versions if version is not None and version.epoch == epoch]


def test_the_catalogue_is_learned_before_the_examples(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    producer = KafkaProducer(bootstrap_servers=broker)
    item = orjson.dumps({"kind": "item", "item": 7, "title": "Lamp", "category": "light"})
    for value in (b"not an item", None, item):
        producer.send(topics.items, value, key=b"7")
    producer.close()
    with running("train", tmp_path / "log", **settings) as child:
        first = wait_for(lambda: _versions(broker, topics), child=child)[0]
        assert first.blobs["card"] == {feature_id("item", 7): item}
        _send(broker, topics, _made_blocks(0, 60))
        _wait_for_all(broker, topics, {0: _made_blocks(0, 60)}, child)
        assert child.stop() == 0, child.said
    assert "refused the record at offset 0" in child.said


def test_a_catalogue_may_be_larger_than_the_memory_for_items(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    many = 6_500
    producer = KafkaProducer(bootstrap_servers=broker, linger_ms=20)
    for n in range(many):
        producer.send(topics.items, orjson.dumps({"kind": "item", "item": n, "title": f"Lamp {n}"}), key=b"%d" % n)
    producer.close()
    model = settings["model"]
    assert model["features"]["items"] < many
    with running("train", tmp_path / "log", **settings) as child:
        wait_for(lambda: "training on partitions" in child.said, child=child)
        assert child.stop() == 0, child.said
    features = convert(model["features"], FeatureSettings)
    with CheckpointStore(tmp_path / "data" / "train", {s.name: s.layout for s in table_specs(features)}) as store:
        assert sum(len(rows.ids) for rows in store.iter_rows("item")) == many
    assert len({card for version in _versions(broker, topics) for card in version.blobs.get("card", {})}) == many


def test_rows_go_at_once_and_dense_weights_once_an_interval_also_when_nothing_more_comes(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    blocks = _made_blocks(0, 2_400)
    with running("train", tmp_path / "log", **settings, dense_interval_s=1.5) as child:
        _send(broker, topics, blocks[:1])
        wait_for(lambda: _versions(broker, topics), 60, child)  # it has loaded
        _send(broker, topics, blocks[1:], pause=0.15)

        def all_sent() -> Version | None:
            versions = [v for v in _versions(broker, topics) if _learned(v) == {0: _sum(blocks)}]
            return versions[-1] if versions and not versions[-1].info["owes_dense"] else None

        last = wait_for(all_sent, 60, child)
        versions = _versions(broker, topics)
        without = [version for version in versions if version.tables and not version.dense]
        assert len(without) > 2, "most versions hold rows alone"
        assert all(version.info["owes_dense"] for version in without)
        newest = [version for version in versions if version.dense][-1]
        assert newest.sequence == last.sequence
        assert child.stop() == 0, child.said
    with CheckpointStore(tmp_path / "data" / "train", None) as store:
        head = store.head()
        assert head is not None
        assert {n: w.tobytes() for n, w in newest.dense.items()} == {n: head.dense[n].tobytes() for n in newest.dense}


def test_what_an_aborted_transaction_wrote_is_not_learned(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    block, aborted = _made_blocks(0, 60)[0], _made_blocks(0, 120)[1]
    asyncio.run(_aborted(broker, topics, encode_block(aborted)))
    _send(broker, topics, [block])
    with running("train", tmp_path / "log", **settings) as child:
        _wait_for_all(broker, topics, {0: [block]}, child)
        assert child.stop() == 0, child.said


async def _aborted(broker: str, topics: TopicSettings, value: bytes) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=broker, transactional_id=f"{topics.prefix}aborts")
    async with producer:
        await producer.begin_transaction()
        await producer.send_and_wait(topics.examples, value, partition=0)
        await producer.abort_transaction()


def test_a_second_trainer_is_kept_out(broker: str, topics: TopicSettings, settings: dict, tmp_path: Path) -> None:
    """By the store on this machine, by Kafka on another; the first then loses nothing, though it could not publish."""
    blocks = {0: _made_blocks(0, 9_000)}
    with running("train", tmp_path / "1", **settings) as one:
        wait_for(lambda: "training on partitions" in one.said, child=one)
        with running("train", tmp_path / "2", **settings) as two:
            assert two.wait(60) == 1
            assert "is in use by another process" in two.said.splitlines()[-1]
        sending = Thread(target=_send, args=(broker, topics, blocks[0], 0.002))
        sending.start()
        wait_for(lambda: _versions(broker, topics), child=one)
        asyncio.run(_take_over(broker, f"{topics.prefix}headrace-train"))
        assert one.wait(60) == 1
        assert "another worker took over" in one.said.splitlines()[-1]
        sending.join()
        one.start()
        _wait_for_all(broker, topics, blocks, one)


async def _take_over(broker: str, transactional_id: str) -> None:
    outlet = Outlet(broker, transactional_id)
    await outlet.start()
    await outlet.stop()


def test_missing_blocks_stop_the_worker(broker: str, topics: TopicSettings, settings: dict, tmp_path: Path) -> None:
    blocks = _made_blocks(0, 180)
    _send(broker, topics, [blocks[0], blocks[2]])
    with running("train", tmp_path / "log", **settings) as child:
        assert child.wait(60) == 1
        assert "offset 10 is next, but the block is [20, 30)" in child.said.splitlines()[-1]


def test_after_a_rest_of_which_kafka_kept_nothing_it_goes_on(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    """Behind the last block lies the marker of its transaction, which is deleted with it."""
    blocks = _made_blocks(0, 240)

    async def send(block: Block) -> None:
        outlet = Outlet(broker, f"{topics.prefix}rests")
        await outlet.start()
        await outlet.send([Message(topics.examples, encode_block(block), partition=0)])
        await outlet.stop()

    def empty() -> None:
        with closing(KafkaAdminClient(bootstrap_servers=broker)) as admin:
            admin.delete_records({TopicPartition(topics.examples, 0): -1})

    asyncio.run(send(blocks[0]))
    with running("train", tmp_path / "log", **settings) as child:
        _wait_for_all(broker, topics, {0: blocks[:1]}, child)
        assert child.stop() == 0, child.said
        empty()
        child.start()
        asyncio.run(send(blocks[1]))
        _wait_for_all(broker, topics, {0: blocks[:2]}, child)
        assert child.stop() == 0, child.said
        _send(broker, topics, blocks[2:3])  # this one is deleted before it is learned
        empty()
        child.start()
        _send(broker, topics, blocks[3:])
        assert child.wait(60) == 1
        assert "offset 20 is next, but the block is [30, 40)" in child.said.splitlines()[-1]
