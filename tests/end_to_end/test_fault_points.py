"""The train worker on a real Kafka: crashed between commit and acknowledgement, and taken back to a kept checkpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from kafka import KafkaProducer

from embedding_store.delta import Assembler, Version
from embedding_store.faults import VARIABLE
from embedding_store.kept import KeptCheckpoints
from online_model.examples import Block
from streams.blocks import encode_block
from streams.topics import TopicSettings
from tests.deploy.test_cli import environment, headrace
from tests.online_model.logs import make_blocks, make_rows
from tests.streams.children import read_all, running, wait_for

pytestmark = pytest.mark.broker

WORKER_POINTS = ["publish.begun", "publish.sent", "recover.resend"]  # only the worker itself comes to these
ROWS = 6_000


@pytest.fixture
def home(broker: str, topics: TopicSettings, tmp_path: Path) -> Path:
    """A working directory with a headrace.toml; all state is in it."""
    (tmp_path / "headrace.toml").write_text(
        f'bootstrap = "{broker}"\ndata_dir = "data"\n[topics]\nprefix = "{topics.prefix}"\npartitions = 1\n'
        '[train]\ndevice = "cpu"\n'
        "[model]\nbatch_size = 256\n[model.features]\ndim = 8\nusers = 4000\nitems = 4000\ncategories = 100\n"
    )
    return tmp_path


@pytest.fixture
def blocks() -> list[Block]:
    return make_blocks(make_rows(ROWS, users=500, items=300), 60)


def _send(broker: str, topics: TopicSettings, blocks: list[Block]) -> None:
    producer = KafkaProducer(bootstrap_servers=broker, linger_ms=0)
    for block in blocks:
        producer.send(topics.examples, encode_block(block), partition=block.partition)
    producer.close()


def _train(home: Path, fault: str = "") -> subprocess.Popen[bytes]:
    with (home / "said").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", "train"], cwd=home, env=environment(**{VARIABLE: fault}), stderr=said
        )


def _versions(broker: str, topics: TopicSettings) -> list[Version]:
    """What is in `parameters`, in its order."""
    assembler = Assembler()
    return [v for record in read_all(broker, topics.parameters)[0] if (v := assembler.add(record.value)) is not None]


def _learned(version: Version) -> tuple[int, int]:
    at = version.info["partitions"]["0"]
    back = at["rolled_back"]
    return at["rows"] + sum(b["rows"] for b in back), (at["sum"] + sum(b["sum"] for b in back)) % 2**64


def _sum(blocks: list[Block]) -> tuple[int, int]:
    ids = [int(i) for block in blocks for i in block.examples.row_id]
    return len(ids), sum(ids) % 2**64


def _until_learned(broker: str, topics: TopicSettings, blocks: list[Block], epoch: int = 1) -> None:
    def done() -> bool:
        versions = _versions(broker, topics)
        return bool(versions) and versions[-1].epoch >= epoch and _learned(versions[-1]) == _sum(blocks)

    wait_for(done, 90, what="all blocks are learned")


def _ends(process: subprocess.Popen[bytes], home: Path, point: str) -> None:
    assert process.wait(90) == -signal.SIGKILL, f"{point} was never reached: {(home / 'said').read_text()}"


@pytest.mark.nightly
def test_crashed_between_commit_and_acknowledgement_each_version_is_sent_and_each_row_learned_once(
    broker: str, topics: TopicSettings, home: Path, blocks: list[Block]
) -> None:
    half = len(blocks) // 2
    _send(broker, topics, blocks[:half])
    for point in ("publish.sent", "recover.resend", "publish.begun"):  # the second finds what the first left behind
        _ends(_train(home, point), home, point)
    _send(broker, topics, blocks[half:])
    process = _train(home)
    try:
        _until_learned(broker, topics, blocks)
    finally:
        process.terminate()
        assert process.wait(60) == 0, (home / "said").read_text()
    at: tuple[int, int] | None = None
    for version in _versions(broker, topics):
        place = (version.epoch, version.sequence)
        assert version.base == at or place == at, "a version is missing, or another one stands in its place"
        at = place
    told = json.loads(headrace("checkpoint", "verify", "--json", cwd=home).stdout)
    assert (told["ok"], told["versions"][0]["version"]) == (True, "{}.{}".format(*at or (0, 0)))


@pytest.fixture
def replica(broker: str, topics: TopicSettings, home: Path, free_tcp_port: int) -> Iterator[Callable[[], dict]]:
    """A serving replica: a call says what it serves, {} before the first version."""
    about = {"prefix": topics.prefix, "partitions": 1}
    with running(
        "serve", home / "replica", bootstrap=broker, data_dir=home / "data", topics=about, port=free_tcp_port
    ) as child:
        wait_for(lambda: "serving on" in child.said, child=child)

        def model() -> dict:
            answer = httpx.get(f"http://127.0.0.1:{free_tcp_port}/v1/model")
            return answer.json() if answer.status_code == 200 else {}

        yield model


@pytest.mark.nightly
def test_taken_back_to_a_kept_checkpoint_replicas_follow_and_the_balance_holds(
    broker: str, topics: TopicSettings, home: Path, blocks: list[Block], replica: Callable[[], dict]
) -> None:
    first, half = len(blocks) // 4, len(blocks) // 2
    kept = KeptCheckpoints(str(home / "data" / "checkpoints"))
    _send(broker, topics, blocks[:first])
    process = _train(home)
    wait_for(lambda: kept.oldest() is not None, 90, what="a checkpoint is kept while the training goes on")
    _send(broker, topics, blocks[first:half])
    _until_learned(broker, topics, blocks[:half])
    assert "stop that worker" in headrace("checkpoint", "rollback", cwd=home).stderr
    process.terminate()
    assert process.wait(60) == 0, (home / "said").read_text()
    wait_for(lambda: replica().get("sequence") == _versions(broker, topics)[-1].sequence)
    done = headrace("checkpoint", "rollback", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    process = _train(home)
    try:
        wait_for(lambda: replica().get("epoch") == 2, 90, what="the replica is past it and loads the snapshot")
        _send(broker, topics, blocks[half:])
        _until_learned(broker, topics, blocks)
    finally:
        process.terminate()
        assert process.wait(60) == 0, (home / "said").read_text()
    last = _versions(broker, topics)[-1]
    at = last.info["partitions"]["0"]
    assert at["rows"] == ROWS - told["set_aside_rows"]
    assert 0 < told["set_aside_rows"] < ROWS // 2
    wait_for(lambda: replica().get("sequence") == last.sequence)


@pytest.mark.nightly
def test_a_store_that_is_lost_is_not_begun_anew_while_there_is_a_way_back(
    broker: str, topics: TopicSettings, home: Path, blocks: list[Block]
) -> None:
    kept = KeptCheckpoints(str(home / "data" / "checkpoints"))
    _send(broker, topics, blocks[:20])
    process = _train(home)
    wait_for(lambda: kept.oldest() is not None, 90)
    process.kill()
    process.wait()
    (home / "data" / "train").rename(home / "lost")
    process = _train(home)
    assert process.wait(60) == 1
    assert "`headrace checkpoint rollback` brings it back" in (home / "said").read_text().splitlines()[-1]
    assert headrace("checkpoint", "rollback", cwd=home).returncode == 0
    process = _train(home)
    try:
        _until_learned(broker, topics, blocks[:20], epoch=2)
    finally:
        process.terminate()
        assert process.wait(60) == 0, (home / "said").read_text()


