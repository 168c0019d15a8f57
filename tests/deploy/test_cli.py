"""The command as users meet it, in real processes: exit codes, one line for what is wrong, JSON as the last line."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from deploy.cli import app

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HEADRACE_") or name == "HEADRACE_CACHE"
    }
    return own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def headrace(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments], cwd=cwd, env=environment(**more), capture_output=True,
        text=True, stdin=subprocess.DEVNULL, timeout=170, check=False,
    )  # fmt: skip


def commands(group: Any, above: str = "") -> Iterator[tuple[str, bool]]:
    """All that can be typed, and whether it is a group."""
    for name, command in getattr(group, "commands", {}).items():
        typed = f"{above} {name}".strip()
        yield typed, hasattr(command, "commands")
        yield from commands(command, typed)


COMMANDS = dict(commands(get_command(app)))


def test_every_command_has_help_with_an_example_and_quickly(tmp_path: Path) -> None:
    program = (
        "import sys; from deploy.cli import run\n"
        f"for command in {list(COMMANDS)!r}:\n"
        "    print('##', command, run([*command.split(), '--help']))\n"
        "print(*(m for m in ('torch', 'faust', 'kafka', 'numpy', 'httpx') if m in sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    *helps, imported = ran.stdout.split("##")
    assert len(COMMANDS) > 40
    assert len(helps) == len(COMMANDS)
    for (command, group), text in zip(COMMANDS.items(), helps, strict=True):
        assert f"Usage: headrace {command}" in text
        assert group or "Example: headrace" in text
    assert imported.split() == [*[*COMMANDS][-1].split(), "0"]  # nothing slow was imported


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("", 2, "headrace: Missing command; see `headrace --help`"),
        ("broker", 2, "headrace: Missing command; see `headrace broker --help`"),
        ("demo --secnds 3", 2, "headrace: No such option: --secnds"),
        ("demo --seconds soon", 2, "headrace: Invalid value for '--seconds'"),
        ("demo --log taobao", 2, "headrace: a log needs both"),
        ("demo --log taobao --path nowhere.csv", 2, "headrace: nowhere.csv: there is no such file"),
        ("demo --log taobao --path x --seed 3", 2, "headrace: --rate and --seed are of simulated users"),
        ("demo --log taobao --path x --rate 3 --seconds 9", 2, "headrace: --rate and --seed are of simulated users"),
        ("demo --config nowhere.toml", 2, "headrace: nowhere.toml: No such file"),
        ("broker status", 1, "headrace: no broker runs on .headrace: `headrace broker start"),
        ("join", 1, "headrace: no broker runs on .headrace"),
        ("replay taobao nowhere.csv", 1, "headrace: nowhere.csv: No such file"),
        ("replay klingon nowhere.csv", 2, "headrace: no reader is named 'klingon'"),
        ("replay taobao x --speed 2 --max-speed", 2, "headrace: --speed and --max-speed exclude each other"),
        ("simulate --policy worst --out x.jsonl", 2, "headrace: no policy is named 'worst'"),
        ("simulate --out no/such/folder/x.jsonl", 1, "headrace: no/such/folder/x.jsonl: No such file"),
        ("topics create --bootstrap 127.0.0.1:1", 1, "headrace: no Kafka answers at 127.0.0.1:1"),
        ("dashboards push --url abc --token x", 2, "headrace: 'abc' is not the address of a server"),
        ("dashboards push --url http://host:abc --token x", 2, "headrace: 'http://host:abc' is not the address"),
        ("dashboards validate --prometheus http://[::1", 2, "headrace: 'http://[::1' is not the address of a server"),
        ("bench growth --folder not-there", 2, "headrace: not-there is no folder that can be written to"),
        ("dashboards push --url http://127.0.0.1:1 --token x", 1, "headrace: no Grafana answers"),
        ("dashboards validate --prometheus http://127.0.0.1:1", 1, "headrace: no Prometheus answers"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(tmp_path: Path, arguments: str, code: int, said: str) -> None:
    ran = headrace(*arguments.split(), cwd=tmp_path)
    assert ran.returncode == code, ran.stderr
    assert ran.stderr.startswith(said)
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


def test_a_wrong_setting_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text("[join]\nwait_m = 3\n")
    ran = headrace("join", "--bootstrap", "127.0.0.1:1", cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr == "headrace: headrace.toml: join.wait_m is not a setting; did you mean join.wait_ms?\n"


@pytest.mark.parametrize("how", [{"arguments": ["broker", "status", "--debug"]}, {"HEADRACE_DEBUG": "1"}])
def test_debug_shows_the_traceback(tmp_path: Path, how: dict) -> None:
    ran = headrace(*how.pop("arguments", ["broker", "status"]), cwd=tmp_path, **how)
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr


def test_json_is_the_only_line_of_stdout_and_the_file_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    (tmp_path / "headrace.toml").write_text("[simulator]\nusers = 50\nitems = 40\n")
    results = []
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        ran = headrace("simulate", "--events", "500", "--seed", "3", "--out", name, "--json", cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        (only,) = ran.stdout.splitlines()
        results.append(json.loads(only))
    assert results[0] == results[1]
    assert results[0]["events"] >= 500
    assert results[0]["seed"] == 3
    assert 0 < results[0]["true_ctr"] < 1
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    lines = gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).splitlines()
    kinds = {json.loads(line)["kind"] for line in lines}
    assert {"item", "impression"} <= kinds


def test_a_failing_command_still_prints_its_json(tmp_path: Path) -> None:
    ran = headrace("broker", "status", "--json", cwd=tmp_path)
    assert ran.returncode == 1
    assert json.loads(ran.stdout) == {"bootstrap": None, "version": None, "pid": None, "seconds_to_start": None}


def test_what_libraries_print_does_not_spoil_the_json(tmp_path: Path) -> None:
    program = (
        "import os\nfrom deploy.commands.common import Output\n"
        "with Output(True) as out:\n"
        "    print('chatter'); os.system('echo from a child')\n"
        "    out.result({'a': 1})\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert ran.stdout == '{"a":1}\n'
    assert ran.stderr == "chatter\nfrom a child\n" or sorted(ran.stderr.split("\n")) == ["", "chatter", "from a child"]


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_a_reader_that_has_gone_is_no_traceback(tmp_path: Path, json_flag: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "dashboards", "build", "--out", "d", *json_flag], cwd=tmp_path,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert said == ""


def test_ctrl_c_is_one_word_and_130(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "simulate", "--seconds", "1e9", "--out", "x.jsonl"], cwd=tmp_path,
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "x.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()  # it would go on for ever
    assert process.returncode == 130
    assert said == "headrace: stopped\n"


@pytest.mark.parametrize("worker", ["train", "serve"])
def test_a_worker_that_is_stopped_while_it_starts_exits_0(tmp_path: Path, worker: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "deploy.cli", worker, "--after-stdin"], cwd=tmp_path,
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stderr is not None
    for line in process.stderr:  # it is in the middle of importing torch
        if line.split()[-1].startswith("torch."):
            break
    process.send_signal(signal.SIGTERM)
    process.stderr.read()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(60) == 0


def test_topics_replay_and_join_on_a_real_kafka(tmp_path: Path, broker: str, topic_prefix: str) -> None:
    (tmp_path / "headrace.toml").write_text(
        f'bootstrap = "{broker}"\n[topics]\nprefix = "{topic_prefix}"\n[join]\nimplicit = true\n'
    )
    rows = "".join(f"{u},{i},{i % 7},pv,{1_511_600_000 + u}\n" for u in range(1, 40) for i in range(1, 6))
    (tmp_path / "log.csv").write_text(rows)
    made = headrace("topics", "create", "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert f"{topic_prefix}events" in json.loads(made.stdout)["topics"]
    worker = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "join"], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        played = headrace("replay", "taobao", "log.csv", "--max-speed", "--no-wait", "--json", cwd=tmp_path)
        assert played.returncode == 0, played.stderr
        result = json.loads(played.stdout)
        assert (result["events_in"], result["events_rejected"]) == (195, 0)
        assert worker.poll() is None
    finally:
        worker.send_signal(signal.SIGTERM)
        _, said = worker.communicate(timeout=60)
    assert worker.returncode == 0, said
