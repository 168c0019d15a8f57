"""A replica goes from version to version, and over a gap only by a snapshot."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest

from streams.topics import TopicSettings
from tests.streams.children import Child, running, wait_for
from tests.streams.source import Source

pytestmark = [pytest.mark.broker, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def settings(broker: str, topics: TopicSettings, tmp_path: Path) -> dict:
    about = {"prefix": topics.prefix, "partitions": topics.partitions}
    return {"bootstrap": broker, "data_dir": tmp_path / "data", "topics": about, "port": 0}


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
    assert min(ages) < 1, "a version is served as soon as it is there"
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
    wait_for(lambda: "version 2.3 goes on from 1.2, this replica holds 1.3" in child.said, child=child)
    assert client.get("/readyz").status_code == 503
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


def test_at_sighup_the_policy_is_read_again_and_holds_for_the_replica_that_comes_next(
    settings: dict, source: Source, tmp_path: Path
) -> None:
    file = tmp_path / "again.json"
    ask = {"user": "1", "scenario": "video", "candidates": [1, 2, 3]}
    with running("serve", tmp_path / "log", again=str(file), **settings) as child, httpx.Client(timeout=30) as client:
        wait_for(lambda: "serving on" in child.said, child=child)
        address = child.said.split("serving on http://")[1].split()[0].replace(" ", ":")
        client.base_url = httpx.URL(f"http://{address}")
        source.send(*source.version())
        wait_for(lambda: _sequence(client) == 1, child=child)
        assert child.pid is not None

        def hang_up(serve: dict, says: str) -> None:
            lines = child.said.count("\n")
            file.write_text(msgspec.json.encode(serve).decode())
            os.kill(child.pid, signal.SIGHUP)
            wait_for(lambda: says in "\n".join(child.said.splitlines()[lines:]), child=child)

        first = client.get("/v1/model").json()["policy"]
        everyone = [{"name": "all", "share": 1.0, "scoring": {"click": 9}}]
        serve = {"experiment": "x", "arms": everyone, "nearest": 33}
        hang_up({"serve": serve, "port": 81}, "needs a restart: serve.port, serve.nearest")
        second = client.get("/v1/model").json()["policy"]
        assert second != first
        assert client.post("/v1/rank", json=ask).json()["arm"] == "all"
        hang_up({"serve": {"arms": everyone * 2}}, "not taken: the shares of the arms are 2 together, more than 1")
        assert client.get("/v1/model").json()["policy"] == second, "what is wrong changes nothing"
        source.version()
        source.snapshot()
        source.send(*source.version())  # over a gap: another replica
        wait_for(lambda: _sequence(client) == 3, child=child)
        assert client.get("/v1/model").json()["policy"] == second
        assert client.post("/v1/rank", json=ask).json()["arm"] == "all"
        assert child.stop() == 0


def test_a_port_that_is_taken_is_one_line(settings: dict, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with running("serve", tmp_path / "log", **settings | {"port": port}) as child:
            assert child.wait(30) == 1
    assert child.said.splitlines()[-1] == f"headrace: cannot listen on 127.0.0.1:{port}: choose another port"
