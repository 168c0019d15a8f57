"""doctor: each of the things that go wrong most is found, with a remedy; what is all right passes."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from kafka import KafkaProducer

from deploy import doctor, machine_checks, store_checks
from deploy.cli import run
from deploy.settings import Settings, load
from embedding_store.rocks import open_db
from streams.join_store import META, JoinStore
from streams.joiner import JoinSettings
from streams.topics import TopicSettings
from tests.deploy.test_cli import ROOT

Mount = namedtuple("Mount", "mountpoint fstype")


def settings_of(data_dir: Path, **more: object) -> Settings:
    return load(None, {}, {"data_dir": str(data_dir), **more})


@pytest.mark.parametrize(
    ("kind", "ok", "said"),
    [("ext4", True, ""), ("nfs4", False, "disk of this machine"), ("overlay", True, "volume"), ("tmpfs", True, "disk")],
)
def test_the_file_system_of_the_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, ok: bool, said: str
) -> None:
    mounts = [Mount("/", "xfs"), Mount(str(tmp_path), kind), Mount(f"{tmp_path}-beside", "nfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    check = machine_checks.file_system(tmp_path / "data" / "not" / "made")
    assert (check.ok, said in check.remedy, bool(check.remedy)) == (ok, True, bool(said))
    assert check.detail.startswith(kind)


@pytest.mark.parametrize(("limit", "ok", "remedy"), [(256, False, True), (1_500, True, True), (10_000, True, False)])
def test_the_limit_of_file_handles(monkeypatch: pytest.MonkeyPatch, limit: int, ok: bool, remedy: bool) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, 1 << 20))
    check = machine_checks.file_handles(4)
    assert (check.ok, bool(check.remedy)) == (ok, remedy)
    assert not remedy or "ulimit -n 3072" in check.remedy


@pytest.mark.parametrize(
    ("limit", "ok", "remedy"), [("max", True, False), ("2000000000", True, True), ("9", False, True)]
)
def test_memory_is_that_of_the_control_group_where_it_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, ok: bool, remedy: bool
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 << 30))
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    check = machine_checks.memory(tmp_path / "memory.max")
    assert (check.ok, bool(check.remedy)) == (ok, remedy)


def test_a_port_that_somebody_else_has(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (check,) = machine_checks.ports(settings_of(tmp_path, **{"serve.port": port}))
    assert not check.ok
    assert f"pid {os.getpid()}" in check.detail
    assert "HEADRACE_SERVE_PORT" in check.remedy
    assert [*machine_checks.ports(settings_of(tmp_path, **{"serve.port": port}))] == []


def test_a_lock_is_told_with_who_has_it_and_whether_that_is_stopped(tmp_path: Path) -> None:
    assert machine_checks.locks(tmp_path / "nowhere").ok
    program = (
        "import sys; from embedding_store.rocks import open_db\n"
        f"db = open_db({str(tmp_path / 'train')!r}, ['meta']); print('open', flush=True); sys.stdin.read(); db.close()"
    )
    held = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert held.stdin is not None
    assert held.stdout is not None
    with held:
        assert held.stdout.readline() == b"open\n"
        check = machine_checks.locks(tmp_path)
        assert check.ok
        assert f"train by pid {held.pid}" in check.detail
        os.kill(held.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, held.pid, os.WSTOPPED)
        check = machine_checks.locks(tmp_path)
        assert not check.ok
        assert "stopped" in check.detail
        os.kill(held.pid, signal.SIGCONT)
        held.stdin.close()
        held.wait(60)
    assert machine_checks.locks(tmp_path).detail == "no store is in use", "what is left of a lock is none"


def test_a_lock_of_another_container_is_told(tmp_path: Path) -> None:
    (tmp_path / "LOCK").touch()
    inode = (tmp_path / "LOCK").stat().st_ino
    table = tmp_path / "locks"
    line = f"POSIX  ADVISORY  WRITE 0 00:1b:{inode} 0 EOF"
    table.write_text(f"1: {line}\n1: -> {line}\n")
    assert machine_checks.holder(tmp_path / "LOCK", table) == 0
    table.write_text("1: POSIX  ADVISORY  WRITE 1 00:1b:1 0 EOF\n")
    assert machine_checks.holder(tmp_path / "LOCK", table) is None


def test_a_broker_without_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_checks.broker_space(tmp_path).ok
    (tmp_path / "kafka" / "data").mkdir(parents=True)
    assert machine_checks.broker_space(tmp_path).remedy == ""
    (tmp_path / "kafka" / "broker.log").write_text("a\n" * 500_000 + "IOException: No space left on device\n")
    assert "none left once" in machine_checks.broker_space(tmp_path).detail
    monkeypatch.setattr(machine_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000))
    assert not machine_checks.broker_space(tmp_path).ok


def test_a_store_of_another_version_is_told(tmp_path: Path) -> None:
    JoinStore(tmp_path / "join" / "0", JoinSettings()).close()
    JoinStore(tmp_path / "join" / "10", JoinSettings()).close()
    told = store_checks.store_checks(settings_of(tmp_path))
    assert [(check.name, check.ok) for check in told] == [("store join/0", True), ("store join/10", True)]
    db = open_db(tmp_path / "join" / "10", [META])
    batch = db.batch()
    batch.put_all(META, [b"made"], [b"\x82\xa6format\x01\xa8settings\x80"])  # {"format": 1, "settings": {}}
    db.write(batch, sync=True)
    db.close()
    bad = store_checks.store_checks(settings_of(tmp_path))[1]
    assert not bad.ok
    assert "has format 1" in bad.detail
    assert bad.remedy


def test_topics_that_are_missing_or_forget_too_soon(
    tmp_path: Path, broker: str, topics: TopicSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"bootstrap": broker, "topics.prefix": topics.prefix, "topics.partitions": 1}
    assert doctor._topics(settings_of(tmp_path, **more)).ok
    longer = doctor._topics(settings_of(tmp_path, **more, **{"join.purchase_window_ms": 30 * 86_400_000}))
    assert not longer.ok
    assert "retention.ms" in longer.detail
    missing = doctor._topics(settings_of(tmp_path, **more | {"topics.prefix": topics.prefix + "no."}))
    assert not missing.ok
    assert "does not exist" in missing.detail


def test_a_clock_behind_kafka_s(
    tmp_path: Path, broker: str, topics: TopicSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, **{"bootstrap": broker, "topics.prefix": topics.prefix, "topics.partitions": 1})
    assert doctor._clock(settings).detail == "no record yet to compare with"
    producer = KafkaProducer(bootstrap_servers=broker)
    producer.send(topics.events_dead, b"x").get(60)
    producer.close()
    assert doctor._clock(settings).ok
    monkeypatch.setattr(doctor.time, "time", lambda now=doctor.time.time: now() - 600)
    behind = doctor._clock(settings)
    assert not behind.ok
    assert "NTP" in behind.remedy


def test_settings_that_nobody_knows_are_a_finding_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_probed", list)
    (tmp_path / "headrace.toml").write_text("[join]\nwait_m = 3\n[tran]\nranks = 2\n")
    assert run(["doctor", "--json"]) == 1
    checks = {c["name"]: c for c in json.loads(capfd.readouterr().out.splitlines()[-1])["checks"]}
    assert not checks["settings"]["ok"]
    assert "tran is not a setting; did you mean train?" in checks["settings"]["detail"]
    assert {"locks", "memory", "file system"} <= set(checks), "the others are told too"
