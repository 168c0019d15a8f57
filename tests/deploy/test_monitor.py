"""`headrace monitor` shows a system that it did not start, says what is away, and shows it again when it is back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.broker import Broker
from deploy.cli import run
from deploy.page.visit_routes import HEADER
from deploy.processes import free_port
from deploy.scraping import Scraped
from streams.topics import TopicSettings, create_topics
from tests.deploy.shop import shop
from tests.streams.children import wait_for

METRICS = """\
# TYPE headrace_train_lag_records gauge
headrace_train_lag_records{partition="0"} 3.0
headrace_train_lag_records{partition="1"} 4.0
# TYPE headrace_train_sequence gauge
headrace_train_sequence 17.0
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total %s
# TYPE process_resident_memory_bytes gauge
process_resident_memory_bytes 2.5e+08
"""


class Monitoring:
    """The command in a process of its own, and its page."""

    def __init__(self, process: subprocess.Popen, url: str) -> None:
        self.process, self.url = process, url

    def sample(self) -> dict[str, Any]:
        """The newest one; {} before the first."""
        try:
            samples = httpx.get(f"{self.url}samples.json").json()
        except httpx.TransportError:
            return {}
        return samples[-1] if samples else {}

    def until(self, true: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The first sample of which that is true."""
        return wait_for(lambda: (now := self.sample()) and true(now) and now)

    def end(self) -> dict[str, Any]:
        """Ctrl-C: the last sample, after exit 0."""
        self.process.send_signal(signal.SIGINT)
        out, _ = self.process.communicate(timeout=30)
        assert self.process.returncode == 0
        return json.loads(out.splitlines()[-1])


@contextmanager
def monitoring(broker: str, topics: TopicSettings, replica: str, *more: object) -> Iterator[Monitoring]:
    port = free_port()
    options = ["--bootstrap", broker, "--replica", replica, "--port", port, "--json", *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "monitor", *map(str, options)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"HEADRACE_TOPICS_PREFIX": topics.prefix,
                          "HEADRACE_TOPICS_PARTITIONS": str(topics.partitions)},
    )  # fmt: skip
    try:
        yield Monitoring(process, f"http://127.0.0.1:{port}/")
    finally:
        process.kill()
        process.communicate()


def click(url: str) -> dict[str, Any]:
    """What comes of the click of a user of the page, by stage."""
    with httpx.Client(base_url=url, headers={HEADER: "1"}, timeout=40) as http:
        answer = http.post("/visit/recommend", json={"user": "u0"})
        assert answer.status_code == 200, answer.text
        asked = {"request_id": answer.json()["request_id"], "place": 0, "kind": "click"}
        with http.stream("POST", "/visit/act", json=asked) as news:
            lines = [json.loads(line[6:]) for line in news.iter_lines() if line.startswith("data: ")]
    return {line["stage"]: line for line in lines}


def test_a_replica_that_is_away_is_named_and_shown_when_it_is_there(
    broker: str, topics: TopicSettings, tmp_path: Path
) -> None:
    port, metrics = free_port(), free_port()
    replica = f"http://127.0.0.1:{port}"
    with monitoring(broker, topics, replica, "--metrics-port", metrics, "--scrape", replica) as it:
        away = it.until(lambda sample: len(sample["problems"]) == 2)
        with shop(broker, topics, tmp_path, port):
            there = it.until(lambda sample: not sample["problems"])
            assert {"history", "learned"} <= click(it.url).keys()
            fresh = it.until(lambda sample: sample["freshness_ms"]["count"] > 0)
            text = httpx.get(f"http://127.0.0.1:{metrics}/metrics").text
        again = it.until(lambda sample: sample["problems"])
        last = it.end()
    assert f"the replica at {replica} does not answer since" in away["problems"][0]
    assert (there["replica_version"], there["trainer_version"]) == ("1.1", None)
    assert [one["name"] for one in there["processes"]] == ["serve"]
    assert [one["partition"] for one in there["offsets"]] == [0]
    assert not {"ctr", "lost", "recount"} & there.keys()
    assert 0 < fresh["freshness_ms"]["p50"] == fresh["freshness_ms"]["stages"]["servable"]
    assert 'headrace_freshness_seconds_count{stage="servable"}' in text
    assert again["replica_version"] == last["replica_version"] == "1.2"


@pytest.mark.nightly
def test_who_only_looks_writes_nothing(broker: str, topics: TopicSettings, tmp_path: Path) -> None:
    with shop(broker, topics, tmp_path) as made, monitoring(broker, topics, made.url, "--no-probe") as it:
        sample = it.until(lambda sample: sample["offsets"] and sample["t"] > 3)
        assert httpx.get(f"{it.url}visit").json()["open"] is False
        last = it.end()
    assert "freshness_ms" not in sample
    assert [one["end"] for one in last["offsets"]] == [0]


@pytest.mark.nightly
def test_a_kafka_that_is_away_is_named_and_used_again_when_it_is_back(tmp_path: Path) -> None:
    topics = TopicSettings(prefix="away.", partitions=1)
    with Broker.start(tmp_path / "kafka") as first:
        create_topics(first.bootstrap, topics)
        with shop(first.bootstrap, topics, tmp_path) as made, monitoring(first.bootstrap, topics, made.url) as it:
            it.until(lambda sample: not sample["problems"] and sample["offsets"])
            first.stop()
            away = it.until(lambda sample: sample["problems"])
            with Broker.start(tmp_path / "kafka") as second:
                assert second.bootstrap == first.bootstrap
                ends = away["offsets"][0]["end"]
                it.until(lambda sample: not sample["problems"] and sample["offsets"][0]["end"] > ends)
                assert {"history", "learned"} <= click(it.url).keys()
            it.until(lambda sample: sample["problems"])
            it.end()
    assert first.bootstrap in away["problems"][0]


@pytest.mark.parametrize("option", ["--replica", "--scrape"])
@pytest.mark.parametrize("url", ["localhost:8080", "ftp://127.0.0.1/", "http://", "http://127.0.0.1:8080/?a=b"])
def test_an_address_that_is_none_is_said_in_one_line(
    option: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["monitor", "--bootstrap", "127.0.0.1:9", option, url]) == 2
    assert capsys.readouterr().err.strip() == f"headrace: {option} {url}: write it as http://127.0.0.1:8080"


def test_a_process_is_read_from_its_metrics() -> None:
    scraped = Scraped("http://127.0.0.1:9101/metrics")
    assert scraped.report() == {"name": "127.0.0.1:9101", "state": "down"}
    scraped.take(METRICS % 10, at=100.0)
    scraped.take(METRICS % 11, at=104.0)
    scraped.error = ""
    assert scraped.report() == {"name": "train", "state": "up", "cores": 0.25, "memory_mb": 250.0, "lag": 7.0}
    with pytest.raises(ValueError, match="<html>"):
        scraped.take("<html>", at=105.0)
