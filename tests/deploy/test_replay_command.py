"""headrace replay as its users type it: what is wrong is one line, what was stopped goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from kafka import KafkaConsumer, TopicPartition

from deploy import replaying
from deploy.cli import run
from deploy.replaying import begin
from embedding_store.errors import UsageError
from replay.simulator import SimulatorSettings, simulate_to
from replay.sinks import JsonlSink
from streams.topics import TopicSettings, create_topics

MODEL = 'model.batch_size = 64\nmodel.features = { dim = 8, users = 4000, items = 20000, categories = 1000 }\n'


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def log() -> str:
    with JsonlSink("log.jsonl") as sink:
        simulate_to(sink, SimulatorSettings(users=300, requests_per_s=20), events=8_000)
    Path("headrace.toml").write_text(MODEL)
    return "log.jsonl"


def _line(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert run(["replay", *arguments]) == code
    said = capfd.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "which log?"),
        (("taobao", "none.csv", "--direct", "--max-speed"), "--direct goes without Kafka"),
        (("taobao", "none.csv", "--resume"), "add --direct"),
        (("taobao", "none.csv", "--speed", "2", "--max-speed"), "exclude each other"),
        (("tabao", "log.jsonl", "--direct"), "no reader is named 'tabao'"),
        (("events", "log.jsonl", "--direct", "--resume"), "there is no replay to resume"),
        (("events", "log.jsonl", "--direct", "--from", "yesterday"), "not a time"),
        (("events", "log.jsonl", "--direct", "--from", "2031-01-02"), "there is no event between"),
        (("events", "log.jsonl", "--direct", "--from", "2026-01-02", "--until", "2026-01-01"), "must be after"),
    ],
)
def test_wrong_usage_is_one_line(
    capfd: pytest.CaptureFixture[str], log: str, arguments: tuple[str, ...], said: str
) -> None:
    assert said in _line(capfd, *arguments)


def test_a_missing_log_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert "none.csv" in _line(capfd, "taobao", "none.csv", "--direct", code=1)


def test_without_a_broker_it_says_how_to_start_one(capfd: pytest.CaptureFixture[str], log: str) -> None:
    assert "headrace broker start" in _line(capfd, "events", log, code=1)


def _figures(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert run(["replay", "events", "log.jsonl", "--direct", "--deterministic", "--json", *arguments]) == 0
    return json.loads(capfd.readouterr().out)


def test_stopped_by_ctrl_c_it_is_resumed_and_ends_the_same(capfd: pytest.CaptureFixture[str], log: str) -> None:
    whole = _figures(capfd, "--data-dir", "whole")
    program = (
        "import os, signal, sys; from replay import direct, joining; from deploy.cli import run\n"
        "joining.SLICE, direct.COMMIT_SECONDS, direct.COMMIT_SHARE, slices = 100, 0.0, float('inf'), []  # each slice\n"
        "def commit(self, before=direct.DirectReplay._commit):\n"
        "    before(self); slices.append(self)\n"
        "    if len(slices) == 5: os.kill(os.getpid(), signal.SIGINT)\n"
        "direct.DirectReplay._commit = commit\n"
        f"sys.exit(run(['replay', 'events', '{log}', '--direct', '--deterministic', '--data-dir', 'stopped']))"
    )
    stopped = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (stopped.returncode, stopped.stderr) == (130, "headrace: stopped\n")
    Path("headrace.toml").write_text(MODEL + "join.wait_ms = 4000\n")
    assert "of another settings" in _line(
        capfd, "events", log, "--direct", "--deterministic", "--resume", "--data-dir", "stopped"
    )
    Path("headrace.toml").write_text(MODEL + "log.max_rejected_share = 0.5\n")
    assert "of another reading of it" in _line(
        capfd, "events", log, "--direct", "--deterministic", "--resume", "--data-dir", "stopped"
    )
    Path("headrace.toml").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("replay.joining.SLICE", 100)
        resumed = _figures(capfd, "--resume", "--data-dir", "stopped")
    assert resumed["resumed_at"] > 3
    for name in ("examples_digest", "prequential", "balance", "lost", "duplicated"):
        assert resumed[name] == whole[name]


def test_what_is_resumed_otherwise_is_told_by_the_option_that_says_it(tmp_path: Path) -> None:
    about = {"log": ["events"], "determinism": True}
    begin(tmp_path / "replay", False, about)
    begin(tmp_path / "replay", True, about)
    with pytest.raises(UsageError, match=r"was of another determinism \(--deterministic\): give the same, or leave"):
        begin(tmp_path / "replay", True, about | {"determinism": False})


@pytest.mark.broker
def test_a_play_pauses_and_goes_on(broker: str, topic_prefix: str, log: str) -> None:
    topics = TopicSettings(prefix=topic_prefix, partitions=2)
    create_topics(broker, topics)
    Path("headrace.toml").write_text(f'[topics]\nprefix = "{topic_prefix}"\npartitions = 2\n')
    command = [sys.executable, "-m", "deploy.cli", "replay", "events", log, "--bootstrap", broker, "--no-wait"]
    places = [TopicPartition(topics.events, p) for p in range(2)]
    with closing(KafkaConsumer(bootstrap_servers=broker, auto_offset_reset="earliest")) as consumer:
        consumer.assign(places)

        def come(timeout_ms: int) -> int:
            return sum(map(len, consumer.poll(timeout_ms=timeout_ms).values()))

        with subprocess.Popen([*command, "--speed", "4", "--json"], stdout=subprocess.PIPE, text=True) as playing:
            try:
                before = come(60_000)
                playing.send_signal(signal.SIGUSR1)
                while count := come(1_000):  # at this pace some 80 records come in a second
                    before += count
                assert playing.poll() is None
                playing.send_signal(signal.SIGUSR2)
                out, _ = playing.communicate(timeout=120)
            finally:
                playing.kill()
        assert playing.returncode == 0
        result = json.loads(out)
        assert 0 < before < result["records"] + result["ticks"] == sum(consumer.end_offsets(places).values())


@pytest.mark.broker
def test_a_play_that_no_worker_learns_ends_with_1_and_with_all_keys(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, broker: str, topic_prefix: str, log: str
) -> None:
    monkeypatch.setattr(replaying, "STALL_S", 1.0)
    create_topics(broker, TopicSettings(prefix=topic_prefix, partitions=2))
    Path("headrace.toml").write_text(f'[topics]\nprefix = "{topic_prefix}"\npartitions = 2\n')
    assert run(["replay", "events", log, "--bootstrap", broker, "--max-speed", "--json"]) == 1
    told = capfd.readouterr()
    result = json.loads(told.out.splitlines()[-1])
    assert result["events_in"] >= 8_000
    assert {result[key] for key in replaying.NOT_LEARNED} == {None}
    assert "the workers have not learned it" in told.err
    assert 'learn of a log with ticks = "log"' in told.err
