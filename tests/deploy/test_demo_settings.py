"""Which settings the demo's workers get, whatever lies in the folder where it is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.demo.run import _fitted
from deploy.settings import DemoOptions, Settings, load
from streams.settings import JoinWorkerSettings

INIT = '[log]\nformat = "taobao"\npath = "log.csv"\n[join]\nimplicit = true\nticks = "log"\n'  # of `headrace init`


@pytest.fixture
def beside_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    Path("headrace.toml").write_text(INIT)
    Path("log.csv").write_text("1,10,3,pv,1511600005\n" * 3)
    Path("shown.jsonl").write_text(
        '{"kind":"impression","event_id":"a","user":"u","ts":1,"request_id":"r","scenario":"shelf","items":["i"]}\n'
    )
    return load()


def _join(settings: Settings, options: DemoOptions) -> JoinWorkerSettings:
    return _fitted(settings, options, Path("home"), "127.0.0.1:1").join


def test_simulated_users_are_joined_by_the_clock_of_now_beside_the_settings_of_a_log(beside_a_log: Settings) -> None:
    join = _join(beside_a_log, DemoOptions())
    assert (join.ticks, join.join.implicit) == ("live", False)


@pytest.mark.parametrize(("log", "path", "implicit"), [("taobao", "log.csv", True), ("events", "shown.jsonl", False)])
def test_a_log_is_joined_by_its_own_time(beside_a_log: Settings, log: str, path: str, implicit: bool) -> None:
    for settings, expected in ((Settings([]), implicit), (beside_a_log, True)):
        join = _join(settings, DemoOptions(log=log, path=path))
        assert (join.ticks, join.join.implicit) == ("log", expected)
