"""Commands of README.md and docs/ that need nothing but this machine, run as they stand there (nightly).

operations.md has a test of its own, test_operations.py. What is not here asks for a public log, for another machine or
for a Grafana, and is parsed only (test_docs.py).
"""

from __future__ import annotations

import gzip
import random
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import broker
from deploy.processes import free_port
from tests.deploy.test_cli import environment
from tests.deploy.test_docs import ALL

# In this order, each group in a folder of its own. A name of a file stands for one that is there (`files`).
OFFLINE = """
headrace doctor
headrace init sales.csv
headrace log inspect sales.csv
headrace replay --direct --deterministic

headrace init clicks.csv.gz
headrace log inspect clicks.csv.gz
headrace compare generic clicks.csv.gz
headrace compare generic clicks.csv.gz --settings a.toml b.toml
headrace backfill clicks.csv.gz --out backfill

headrace simulate --events 20000 --out events.jsonl.gz --truth truth.jsonl.gz
headrace simulate --user-model mission --bots 0.05 --out events.jsonl.gz
headrace estimate events log.jsonl --policy headrace
headrace estimate events impressions.jsonl --policy logged
headrace dashboards build --out dashboards
"""
# On a Kafka of their own. `&`: in the background, until the end.
ONLINE = """
headrace broker start
headrace topics create
headrace join &
headrace train &
headrace serve --port 8080 &
curl -s 127.0.0.1:8080/readyz
headrace simulate --events 20000
curl -s 127.0.0.1:8080/v1/recommend -d '{"user": "u1", "scenario": "shelf", "k": 5}'
curl -s 127.0.0.1:8080/v1/rank -d '{"user": "u1", "candidates": ["i1", 42]}'
curl -s 127.0.0.1:8080/v1/rank -d '{"user": "u1", "scenario": "search", "context": {"query": "red shoes"}, "candidates": [1, 2, 3], "shown": 2, "explain": true}'
curl -s 127.0.0.1:8080/v1/recommend -d '{"user": "u1", "filters": {"unseen": true, "categories": [1, 2], "blocked": [7]}, "log": false}'
curl -s '127.0.0.1:8080/v1/items/i7/similar?k=5'
curl -s 127.0.0.1:8080/v1/model
curl -s '127.0.0.1:8080/v1/model?newer_than=0&wait_ms=1000'
curl -s 127.0.0.1:8080/healthz
curl -s 127.0.0.1:8080/metrics
curl -s 127.0.0.1:8080/openapi.json
curl -s 127.0.0.1:8080/docs
headrace replay dead
headrace replay dead --out dead.jsonl
headrace checkpoint list
headrace record --out recording --from-beginning --to-end
headrace log inspect recording
"""  # noqa: E501 - as they stand in the docs


def lines(text: str) -> list[list[str]]:
    return [words for line in text.splitlines() if (words := shlex.split(line))]


def test_what_is_run_stands_in_the_docs() -> None:
    there = {command.words for command in ALL}
    for words in lines(OFFLINE + ONLINE):
        assert tuple(word for word in words if word != "&") in there, shlex.join(words)


def files(home: Path) -> None:
    """What the docs' names stand for: two tables of clicks, settings for one, a log of impressions."""
    dice = random.Random(1)
    rows = ["user,item,time"]
    rows += [f"{dice.randrange(50)},{dice.randrange(80)},{1_700_000_000 + 60 * n}" for n in range(3_000)]
    (home / "sales.csv").write_text("\n".join(rows) + "\n")
    with gzip.open(home / "clicks.csv.gz", "wt") as out:
        out.write("\n".join(rows) + "\n")


class Home:
    """A folder, and what is started in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._port = free_port()
        self._running: list[subprocess.Popen[bytes]] = []
        self._answered = False  # curl, once

    def start(self, words: list[str], log: str) -> subprocess.Popen[bytes]:
        words = [word.replace("8080", str(self._port)) for word in words]
        if words[0] == "headrace":
            words = [sys.executable, "-m", "deploy.cli", *words[1:]]
        else:
            retries = "5" if self._answered else "600"  # the first one waits for the replica
            words += ["--retry", retries, "--retry-delay", "1", "--retry-all-errors", "--fail-with-body"]
        with (self.folder / log).open("wb") as out:
            return subprocess.Popen(words, cwd=self.folder, env=environment(), stdout=out, stderr=subprocess.STDOUT)

    def run(self, number: int, words: list[str]) -> None:
        """It must succeed, or go on in the background."""
        log = f"{number}.log"
        if words[-1] == "&":
            self._running.append(self.start(words[:-1], log))
            return
        with self.start(words, log) as process:
            try:
                code = process.wait(900)
            except BaseException:
                process.kill()
                raise
        self._answered |= words[0] == "curl"
        assert code == 0, f"{shlex.join(words)}: exit {code}\n{(self.folder / log).read_text()[-2_000:]}"

    def stop(self) -> list[int]:
        """SIGTERM to what runs in the background: their exit codes. What does not end is killed."""
        running, self._running = self._running, []
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
        return [process.wait() for process in running]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    files(tmp_path)
    it = Home(tmp_path)
    try:
        yield it
    finally:
        it.stop()
        broker.stop(tmp_path / ".headrace")


@pytest.mark.nightly
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("group", OFFLINE.strip().split("\n\n"), ids=lambda group: group.split()[1])
def test_commands_that_need_no_kafka(home: Home, group: str) -> None:
    for number, words in enumerate(lines(group)):
        for name in {"a.toml", "b.toml"}.intersection(words):  # as `init` wrote it
            shutil.copy(home.folder / "headrace.toml", home.folder / name)
        for name in {"log.jsonl", "impressions.jsonl"}.intersection(words):  # the simulator's
            (home.folder / name).write_bytes(gzip.decompress((home.folder / "events.jsonl.gz").read_bytes()))
        home.run(number, words)
    for made in {"backfill", "dashboards", "truth.jsonl.gz"} & {*shlex.split(group)}:
        assert (home.folder / made).exists(), made


@pytest.mark.nightly
@pytest.mark.broker
@pytest.mark.timeout(3_600)
def test_commands_that_need_a_kafka(home: Home) -> None:
    for number, words in enumerate(lines(ONLINE)):
        home.run(number, words)
    assert home.stop() == [0, 0, 0], "SIGTERM drains"
    assert b'"items"' in (home.folder / "7.log").read_bytes()
