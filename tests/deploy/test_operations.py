"""docs/operations.md: its procedures are run as they stand there, in one shell, with real workers on a real Kafka."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy import broker
from deploy.dashboards.alerts import ALERTS
from deploy.processes import free_port
from streams.topics import TopicSettings, overview
from tests.deploy.test_cli import ROOT, environment

DOC = ROOT / "docs" / "operations.md"
BLOCK = re.compile(r"^<!-- run: ([a-z-]+) -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTINGS = """\
[topics]
partitions = 2
[join]
snapshots = "{home}/shared"
snapshot_interval_s = 5
metrics_port = {join}
[train]
snapshot_interval_s = 60
checkpoint_interval_s = 3600
metrics_port = {train}
[model]
batch_size = 64
[model.features]
dim = 8
users = 4000
items = 4000
categories = 100
[model.guard]
tasks = []
[serve]
port = {serve}
[simulator]
users = 200
items = 300
"""


def blocks() -> dict[str, str]:
    return dict(BLOCK.findall(DOC.read_text()))


class Shell:
    """One bash for all blocks, as an operator has one: its jobs and variables stay."""

    def __init__(self, home: Path) -> None:
        tools = home / "bin"
        tools.mkdir()
        for name, command in (("headrace", "-m deploy.cli"), ("python", "")):
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
            (tools / name).chmod(0o755)
        more = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        self._output = (home / "output.txt").open("w+b")
        self._bash = subprocess.Popen(
            ["bash", "-eu", "-o", "pipefail", "-s"], cwd=home, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._output, env=environment(**more), text=True, start_new_session=True,
        )  # fmt: skip
        self.home = home

    def run(self, block: str) -> str:
        """What it prints. It must succeed, command by command."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{block}\nprintf '\\n@@done\\n'\n")
        self._bash.stdin.flush()
        lines = []
        for line in self._bash.stdout:
            if line == "@@done\n":
                return "".join(lines).rstrip("\n")
            lines.append(line)
        errors = (self.home / "output.txt").read_text()[-2_000:]
        logs = {path.name: path.read_text()[-800:] for path in self.home.glob("*.log")}
        pytest.fail(f"a command failed in\n{block}\nit printed\n{''.join(lines)}\n{errors}\n{logs}")

    def close(self) -> None:
        """Ends all that it started, also where a command failed and bash has gone."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGTERM)  # workers drain; bash, without a terminal, ends by it too
        with contextlib.suppress(BrokenPipeError):
            self._bash.stdin.close()
        self._bash.wait(120)
        self._bash.stdout.close()
        self._output.close()
        broker.stop(self.home / ".headrace")


def until(ask: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := ask()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.3)
    return found


class System:
    """What can be seen of the workers from outside."""

    def __init__(self, shell: Shell, ports: dict[str, int]) -> None:
        self._shell, self._ports = shell, ports

    def ask(self, name: str, path: str) -> str:
        """The answer; "" while there is none."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._ports[name]}{path}", timeout=5) as answer:
                return answer.read().decode()
        except (OSError, urllib.error.URLError):
            return ""

    def learned(self) -> int:
        found = re.search(r"^headrace_train_rows_total (\S+)$", self.ask("train", "/metrics"), re.MULTILINE)
        return int(float(found[1])) if found else 0

    def until_quiet(self) -> int:
        """Rows learned, when they have not become more for two seconds, and are some."""
        while (before := until(self.learned, "the trainer learns")) != (time.sleep(2), self.learned())[1]:
            pass
        return before

    def listed(self) -> dict[str, Any]:
        """`headrace checkpoint list`."""
        return json.loads(self._shell.run("headrace checkpoint list --json").splitlines()[-1])

    def epoch_served(self) -> int:
        """Of the replica."""
        answer = self.ask("serve", "/v1/model")
        return json.loads(answer)["epoch"] if answer else 0


@contextmanager
def system(home: Path) -> Iterator[tuple[Shell, System]]:
    ports = {name: free_port() for name in ("join", "train", "serve")}
    (home / "headrace.toml").write_text(SETTINGS.format(home=home, **ports))
    shell = Shell(home)
    shell.run(f"export HEADRACE_SERVE_PORT={ports['serve']}")
    try:
        yield shell, System(shell, ports)
    finally:
        shell.close()


def lose_and_restore(run: Callable[[str], str], seen: System, home: Path) -> dict[str, Any]:
    """From backup to a restored model, which it gives."""
    run("backup")
    kept = seen.listed()["versions"][1]
    assert kept["where"] == "kept"
    assert list((home / "recording").glob("**/*.parquet"))
    run("lost")
    assert not (home / ".headrace" / "train").exists()
    run("restore")
    restored = seen.listed()["versions"][0]
    assert restored["digest"] == kept["digest"]
    assert restored["epoch"] > kept["epoch"]
    run("restart")
    until(lambda: seen.epoch_served() == restored["epoch"], "the replica follows the restored model")
    return restored


def reshard(run: Callable[[str], str], seen: System, shell: Shell) -> None:
    """One rank, two, one."""
    run("two-ranks")
    before = until(seen.learned, "two ranks are up")
    shell.run("headrace simulate --events 500 --seconds 3 --seed 3")
    until(lambda: seen.learned() > before, "two ranks learn")
    both = seen.until_quiet()
    run("one-rank")
    assert until(seen.learned, "one rank is up") == both, "and it goes on where they were"


@pytest.mark.nightly
@pytest.mark.broker
@pytest.mark.timeout(1_800)
def test_the_procedures_do_what_they_say(tmp_path: Path) -> None:
    todo = blocks()
    with system(tmp_path) as (shell, seen):

        def run(name: str) -> str:
            return shell.run(todo.pop(name))

        run("install")
        run("events")
        first = seen.until_quiet()
        assert first > 100
        restored = lose_and_restore(run, seen, tmp_path)

        run("join-lost")
        until(lambda: seen.ask("join", "/metrics"), "the join worker is back")
        shell.run("headrace simulate --events 1000 --seconds 5 --seed 2")
        until(lambda: seen.learned() > first + 500, "what is new is learned")
        more = seen.until_quiet()

        assert re.search(r"[1-9][\d,]* rows", run("rollback")), "it says how much was set aside"
        assert seen.until_quiet() < more, "what was set aside is not in the model"
        back = seen.listed()["versions"][0]
        assert back["epoch"] > restored["epoch"]
        until(lambda: seen.epoch_served() == back["epoch"], "the replica follows the way back")

        rows = seen.learned()
        run("upgrade")
        until(lambda: seen.ask("serve", "/readyz"), "the replica is ready again")
        assert seen.until_quiet() == rows, "nothing is lost, nothing is learned twice"
        reshard(run, seen, shell)

        run("forget")
        time.sleep(2)
        bootstrap = json.loads(shell.run("headrace broker status --json"))["bootstrap"]
        dead = overview(bootstrap, TopicSettings(partitions=2))["events.dead"]
        assert dead["ends"] == {0: 0}, "it was an event as it should be"

        contents = run("bundle")
        assert "stores.json" in contents
        assert "logs/train.log" in contents
    assert todo == {}, "blocks that no test runs"


def test_every_block_that_is_to_be_run_has_a_name_of_its_own_and_is_sound_shell() -> None:
    text = DOC.read_text()
    assert len(blocks()) == text.count("<!-- run:")
    for name, block in blocks().items():
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{name}: {done.stderr}"


def test_every_alert_has_its_section() -> None:
    sections = set(re.findall(r"^### (\S+)$", DOC.read_text(), re.MULTILINE))
    assert {alert.name for alert in ALERTS} <= sections


def test_links_lead_to_files_that_are_there() -> None:
    for link in set(re.findall(r"\]\(([\w.-]+\.md)\)", DOC.read_text())):
        assert (DOC.parent / link).is_file(), link
