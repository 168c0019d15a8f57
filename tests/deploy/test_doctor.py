"""doctor: what works is said to work, what is broken is named with a remedy and does not take the doctor down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import doctor
from deploy.settings import load
from tests.deploy.test_cli import environment, headrace


def by_name(checks: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}


def test_here_everything_works_and_a_kafka_that_is_not_there_is_the_only_failure(tmp_path: Path) -> None:
    ran = headrace("doctor", "--bootstrap", "127.0.0.1:1", "--json", cwd=tmp_path)
    result = json.loads(ran.stdout.splitlines()[-1])
    failed = [check for check in result["checks"] if not check["ok"]]
    assert [check["name"] for check in failed] == ["bootstrap"], failed
    assert failed[0]["remedy"]
    assert not result["ok"]
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("headrace: 1 of ")
    assert {"torch", "torchrec", "fbgemm_gpu", "device", "torchrec look-up", "java", "disk space"} <= {
        check["name"] for check in result["checks"]
    }


def test_spark_without_java_is_told_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    check = doctor._spark()
    assert check.ok
    assert "does not run: install Java 17" in check.detail


def test_it_says_where_settings_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctor._settings(load(), None).detail == "nothing is wrong in them; all are the defaults"
    Path("headrace.toml").write_text("join.wait_ms = 9\n")
    settings = load(None, {"HEADRACE_BOOTSTRAP": "b:1"}, {"data_dir": None})
    assert doctor._settings(settings, None).detail == "nothing is wrong in them; from headrace.toml, environment"


def test_a_reachable_kafka_is_found(broker: str) -> None:
    assert doctor._reachable(broker).ok


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two"),
        ("import os; os.abort()", "the process ended with code -6"),
    ],
)
def test_a_broken_library_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, error: str
) -> None:
    (tmp_path / "broken_library.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    monkeypatch.setattr(doctor, "DEPENDENCIES", (("json", ("orjson",)), ("broken_library", ("broken",))))
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 160.0)
    found = by_name(doctor._probed())
    assert found["json"].ok
    assert found["broken_library"].detail == error
    assert "pip install" in found["broken_library"].remedy


def test_a_data_directory_that_cannot_be_written_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = doctor._writable(tmp_path / "file")
    assert not check.ok
    assert "--data-dir" in check.remedy


def test_the_lock_of_a_broker_that_was_killed_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "kafka").mkdir()
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    status = {"bootstrap": "127.0.0.1:1", "version": "1", "pid": int(dead.stdout), "seconds_to_start": 1.0}
    (tmp_path / "kafka" / "broker.json").write_text(json.dumps(status))
    settings = load(None, environment(), {"data_dir": str(tmp_path)})
    assert doctor._broker(settings).ok
