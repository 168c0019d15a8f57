"""headrace record and headrace replay recording as their users type them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kafka import TopicPartition
from kafka.admin import KafkaAdminClient

from deploy.cli import run
from replay.recording import EVENTS, Recording
from replay.sinks import KafkaSink
from streams.events import Click, Impression, Item
from streams.topics import TopicSettings
from tests.streams.children import wait_for


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(broker: str, topics: TopicSettings) -> str:
    """Settings for the topics, which have 300 events in them."""
    Path("headrace.toml").write_text(
        f'bootstrap = "{broker}"\ndata_dir = "data"\ntopics = {{ prefix = "{topics.prefix}", partitions = 1 }}\n'
        "model.batch_size = 64\nmodel.features = { dim = 8, users = 4000, items = 2000, categories = 100 }\n"
    )
    send(broker, topics, 0)
    return "headrace.toml"


def send(broker: str, topics: TopicSettings, first: int) -> None:
    """100 requests of two items, each with a click on one."""
    with KafkaSink(broker, topics.events, topics.items) as sink:
        sink.send(Item(item=1, title="one"))
        for n in range(first, first + 100):
            shown = Impression(event_id=f"i{n}", ts=10_000 * n, user=n % 7, request_id=n, items=[1, 2])
            sink.send(shown)
            sink.send(Click(event_id=f"c{n}", ts=10_000 * n + 9, user=n % 7, request_id=n, item=1 + n % 2))


def _json(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert run([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def _line(capfd: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    assert run(arguments) == code
    return capfd.readouterr().err.strip().splitlines()[-1]


def test_recorded_it_is_a_log_of_every_command(capfd: pytest.CaptureFixture[str], config: str) -> None:
    done = _json(capfd, "record", "--out", "rec", "--from-beginning", "--to-end", "--rows-per-file", "50")
    assert (done["events"], done["items"], done["files"], done["gaps"]) == (300, 1, 5, [])
    seen = _json(capfd, "log", "inspect", "rec")
    assert (seen["format"], seen["rows"], seen["rejected"], seen["duplicates"]) == ("recording", 201, 0, 0)
    assert _json(capfd, "record", "--out", "rec", "--seconds", "0.1")["records"] == 0


def test_sigterm_writes_what_waits_and_ends_well(
    capfd: pytest.CaptureFixture[str], config: str, broker: str, topics: TopicSettings
) -> None:
    record = ["record", "--out", "rec", "--from-beginning", "--rows-per-file", "150", "--json"]
    words = [sys.executable, "-m", "deploy.cli", *record]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert "recording" in child.stderr.readline()
        assert "another recorder writes to rec" in _line(capfd, "record", "--out", "rec", code=2)
        wait_for(lambda: list(Path("rec").rglob("*.parquet")), 60)  # the other 50 wait: no file is due for a minute
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert json.loads(out)["records"] == 200
    assert Recording("rec").next_offsets(EVENTS) == {0: 200}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("taobao", "none.csv", "--direct", "--continue"), "are of: headrace replay recording DIR"),
        (("recording", "rec", "--direct", "--to-end"), "--to-end is of --continue"),
        (("recording", "rec", "--direct", "--drop", "0.1"), "as it is"),
        (("recording", "rec", "--direct", "--from", "2026-01-01"), "as it is"),
        (("recording", "rec", "--direct", "--from-checkpoint", "last"), "--from-checkpoint last: versions are named"),
        (("dead", "--continue"), "replay dead knows"),
    ],
)
def test_wrong_usage_is_one_line(capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    assert said in _line(capfd, "replay", *arguments, code=2)


def test_without_a_recording_it_says_how_to_make_one(capfd: pytest.CaptureFixture[str]) -> None:
    assert "`headrace record` makes one" in _line(capfd, "replay", "recording", "none", "--direct", code=1)


def test_offsets_that_kafka_has_deleted_are_said_before_anything_is_done(
    capfd: pytest.CaptureFixture[str], config: str, broker: str, topics: TopicSettings
) -> None:
    _json(capfd, "record", "--out", "rec", "--from-beginning", "--to-end")
    send(broker, topics, 100)
    with KafkaAdminClient(bootstrap_servers=broker) as admin:
        admin.delete_records({TopicPartition(topics.events, 0): 250})
    said = _line(capfd, "replay", "recording", "rec", "--direct", "--continue", "--to-end", code=1)
    assert "has deleted the records 200 to 250: raise retention.ms" in said
    assert not Path("data/replay").exists()


def test_it_goes_on_to_where_the_topics_end(
    capfd: pytest.CaptureFixture[str], config: str, broker: str, topics: TopicSettings
) -> None:
    _json(capfd, "record", "--out", "rec", "--from-beginning", "--to-end")
    send(broker, topics, 100)
    direct = ("--direct", "--deterministic")
    through = _json(capfd, "replay", "recording", "rec", *direct, "--continue", "--to-end")
    assert (through["events_in"], through["live_records"], through["stopped"]) == (600, 201, False)
    _json(capfd, "record", "--out", "rec", "--to-end")
    whole = _json(capfd, "replay", "recording", "rec", *direct)
    for key in ("examples_digest", "checkpoint_digest", "balance", "examples"):
        assert through[key] == whole[key]
    again = _json(capfd, "replay", "recording", "rec", *direct, "--resume")
    assert again["checkpoint_digest"] == whole["checkpoint_digest"]
    assert "of another determinism" in _line(capfd, "replay", "recording", "rec", "--direct", "--resume", code=2)
    none = _line(capfd, "replay", "recording", "rec", *direct, "--from-checkpoint", "1.5", code=1)
    assert "checkpoint 1.5 is not kept" in none
