"""A replica goes from version to version, and over a gap only by a snapshot."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest
from kafka import KafkaProducer

from embedding_store.snapshot import snapshot_of
from online_model.settings import TrainerSettings
from online_model.trainer import Trainer, open_trainer
from streams.topics import TopicSettings
from tests.online_model.logs import make_blocks, make_rows
from tests.streams.children import Child, running, wait_for

pytestmark = pytest.mark.broker


@pytest.fixture
def settings(broker: str, topics: TopicSettings, tmp_path: Path) -> dict:
    about = {"prefix": topics.prefix, "partitions": topics.partitions}
    return {"bootstrap": broker, "data_dir": tmp_path / "data", "topics": about, "port": 0}


class Source:
    """A trainer that makes versions, and the means to send them, or something else."""

    def __init__(self, broker: str, topics: TopicSettings, folder: Path) -> None:
        small = {"features": {"dim": 8, "users": 4_000, "items": 4_000, "categories": 100}}
        settings = msgspec.convert(small, TrainerSettings)
        self.trainer: Trainer = open_trainer(settings, folder / "train", lambda: time.time_ns() // 1_000_000)
        self._blocks = {block.from_offset: block for block in make_blocks(make_rows(2_000), 100)}
        self._snapshots = folder / "data" / "snapshots"
        self._topic = topics.parameters
        self._producer = KafkaProducer(bootstrap_servers=broker)

    def version(self) -> list[bytes]:
        """The parts of the next version."""
        position = self.trainer.positions.get(0)
        self.trainer.offer(self._blocks[position.next if position else 0], 0)
        while self.trainer.step():
            pass
        parts = self.trainer.commit()
        assert parts is not None
        return parts

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self._producer.send(self._topic, part, partition=0)
        self._producer.flush()

    def snapshot(self) -> None:
        snapshot_of(self.trainer.store, self._snapshots)

    def go_back(self, copy: Path) -> None:
        """The trainer's store is an older copy of itself, as after a power cut."""
        published = self.trainer.epoch, self.trainer.sequence
        self.trainer.store.close()
        self.trainer = open_trainer(self.trainer.settings, copy, lambda: time.time_ns() // 1_000_000)
        assert self.trainer.supersede(*published)

    def close(self) -> None:
        self._producer.close()
        self.trainer.store.close()


@pytest.fixture
def source(broker: str, topics: TopicSettings, tmp_path: Path) -> Iterator[Source]:
    made = Source(broker, topics, tmp_path)
    yield made
    made.close()


@pytest.fixture
def served(settings: dict, tmp_path: Path) -> Iterator[Callable[[], tuple[Child, httpx.Client]]]:
    """Starts a replica: gives the process, and a client for it."""
    with ThreadPoolExecutor() as _, httpx.Client(timeout=30) as client:
        children: list[Child] = []

        def start() -> tuple[Child, httpx.Client]:
            child = Child("serve", tmp_path / "serve.log", **settings)
            children.append(child)
            wait_for(lambda: "serving on" in child.said, child=child)
            address = child.said.split("serving on http://")[1].split()[0].replace(" ", ":")
            client.base_url = httpx.URL(f"http://{address}")
            return child, client

        yield start
        for child in children:
            child.kill()


def _sequence(client: httpx.Client) -> int:
    return client.get("/v1/model").json()["sequence"]


def test_versions_are_served_as_they_come(source: Source, served: Callable) -> None:
    child, client = served()
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 503
    ages = []
    for sequence in range(1, 6):
        parts = source.version()
        with ThreadPoolExecutor(1) as pool:
            poll = pool.submit(client.get, "/v1/model", params={"newer_than": sequence - 1, "wait_ms": 20_000})
            start = time.monotonic()
            source.send(*parts)
            assert poll.result().json()["sequence"] == sequence
            ages.append(time.monotonic() - start)
    assert min(ages) < 0.2, "a version is served as soon as it is there"
    wait_for(lambda: client.get("/readyz").status_code == 200)
    answer = client.post("/v1/rank", json={"user": "1", "scenario": "video", "candidates": [1, 2, 3]}).json()
    assert len(answer["items"]) == 3
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(client.get, "/v1/model", params={"newer_than": 99, "wait_ms": 20_000})
        time.sleep(0.3)
        assert child.stop() == 0, child.said
        assert poll.result().json()["sequence"] == 5, "those who wait are answered before the server stops"


def test_a_replica_starts_from_the_newest_snapshot(source: Source, served: Callable) -> None:
    for _ in range(3):
        source.version()  # no longer in the topic
    source.snapshot()
    source.send(*source.version())
    _, client = served()
    wait_for(lambda: _sequence(client) == 4)
    wait_for(lambda: client.get("/readyz").status_code == 200)


def test_over_a_gap_leads_only_a_snapshot(source: Source, served: Callable) -> None:
    child, client = served()
    source.send(*source.version())
    wait_for(lambda: _sequence(client) == 1)
    source.snapshot()  # from before the gap: of no use
    source.version()
    source.send(*source.version())
    wait_for(lambda: client.get("/readyz").status_code == 503)
    assert _sequence(client) == 1, "the version before the gap is served on"
    source.version()
    source.snapshot()
    wait_for(lambda: _sequence(client) == 4, child=child)
    source.send(*source.version())
    wait_for(lambda: _sequence(client) == 5, child=child)
    wait_for(lambda: client.get("/readyz").status_code == 200)


def test_a_model_that_goes_back_is_not_met_by_an_older_snapshot(
    source: Source, served: Callable, tmp_path: Path
) -> None:
    child, client = served()
    source.send(*source.version(), *source.version())
    source.snapshot()
    source.trainer.store.checkpoint(tmp_path / "old")
    source.send(*source.version())
    wait_for(lambda: _sequence(client) == 3, child=child)
    source.go_back(tmp_path / "old")
    source.send(*source.version())
    wait_for(lambda: client.get("/readyz").status_code == 503, child=child)
    assert "version 2.3 goes on from 1.2, this replica holds 1.3" in child.said
    source.snapshot()
    wait_for(lambda: "serving snapshot 2-3" in child.said, child=child)
    wait_for(lambda: client.get("/readyz").status_code == 200)
    assert client.get("/v1/model").json()["epoch"] == 2
    assert "serving snapshot 1-2" not in child.said, "though the version goes on from that"


def test_a_corrupt_version_is_refused_and_led_round(source: Source, served: Callable) -> None:
    child, client = served()
    source.send(*source.version())
    wait_for(lambda: _sequence(client) == 1)
    broken = bytearray(source.version()[0])
    broken[len(broken) // 2] ^= 1
    source.send(bytes(broken))
    wait_for(lambda: "headrace_replica_records_refused_total 1.0" in client.get("/metrics").text)
    assert client.get("/readyz").status_code == 503
    assert _sequence(client) == 1
    source.snapshot()
    source.send(*source.version())
    wait_for(lambda: _sequence(client) == 3, child=child)
    wait_for(lambda: client.get("/readyz").status_code == 200)


def test_a_port_that_is_taken_is_one_line(settings: dict, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with running("serve", tmp_path / "log", **settings | {"port": port}) as child:
            assert child.wait(30) == 1
    assert child.said.splitlines()[-1] == f"headrace: cannot listen on 127.0.0.1:{port}: choose another port"
