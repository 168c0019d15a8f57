"""A log through Kafka and its workers, with faults, makes the examples that it makes without Kafka."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from replay.simulator import SimulatorSettings, simulate_to
from replay.sinks import JsonlSink
from streams.topics import TopicSettings, create_topics
from tests.streams.children import running, wait_for

pytestmark = pytest.mark.broker

JOIN = {"wait_ms": 3_000, "watch_wait_ms": 5_000}
SMALL = {"features": {"dim": 8, "users": 10_000, "items": 20_000, "categories": 100}, "batch_size": 256}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Ten minutes of simulated users, events of ms resolution."""
    with JsonlSink(tmp_path / "log.jsonl.gz") as sink:
        simulate_to(sink, SimulatorSettings(users=500, requests_per_s=4), seconds=600)
    return tmp_path / "log.jsonl.gz"


@pytest.fixture
def config(broker: str, topic_prefix: str, tmp_path: Path) -> Path:
    file = tmp_path / "headrace.toml"
    model = SMALL["features"]
    file.write_text(f"""
        data_dir = "{tmp_path}/data"
        [topics]
        prefix = "{topic_prefix}"
        [join]
        ticks = "log"
        wait_ms = {JOIN["wait_ms"]}
        watch_wait_ms = {JOIN["watch_wait_ms"]}
        [model]
        batch_size = {SMALL["batch_size"]}
        features = {{ {", ".join(f"{name} = {value}" for name, value in model.items())} }}
        """)
    return file


def _replay(config: Path, log: Path, *options: str) -> dict:
    command = [sys.executable, "-m", "deploy.cli", "replay", "events", str(log), "--config", str(config), "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.nightly
def test_kafka_and_direct_make_the_same_examples(
    broker: str, topic_prefix: str, config: Path, log: Path, tmp_path: Path
) -> None:
    topics = {"prefix": topic_prefix, "partitions": 4}
    create_topics(broker, TopicSettings(**topics))
    shared = {"bootstrap": broker, "data_dir": tmp_path / "data", "topics": topics}
    join = shared | {"join": JOIN, "ticks": "log"}
    train = shared | {"model": SMALL, "device": "cpu"}
    with running("join", tmp_path / "join", **join) as one, running("train", tmp_path / "train", **train) as two:
        wait_for(lambda: "joining partitions" in one.says, child=one)
        wait_for(lambda: "training on partitions" in two.says, child=two)
        faults = ("--duplicates", "0.05", "--shuffle-ms", "250", "--garbage", "0.01", "--fault-seed", "3")
        through = _replay(config, log, "--bootstrap", broker, "--speed", "50", *faults)
    direct = _replay(config, log, "--direct", "--deterministic")
    faulty = _replay(config, log, "--direct", "--deterministic", *faults)
    assert through["faults"]["shuffled"] > 100
    assert through["balance"]["duplicates"] > 100
    assert through["events_rejected"] == through["faults"]["garbage"] > 10
    assert through["balance"]["late"] == 0
    assert direct["examples"] > 10_000
    assert through["examples_digest"] == faulty["examples_digest"] == direct["examples_digest"]
    for figures in (through, direct, faulty):
        assert figures["lost"] == figures["duplicated"] == 0
        assert figures["trained_examples"] == figures["examples"]
    other = _replay(config, log, "--direct", "--deterministic", "--seed", "1")
    assert other["examples_digest"] == direct["examples_digest"]
    assert other["checkpoint_digest"] != direct["checkpoint_digest"]
