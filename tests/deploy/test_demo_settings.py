"""Which settings the demo's workers get, whatever lies in the folder where it is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.demo.run import _fitted, _opened
from deploy.settings import DemoOptions, Layer, Settings, load
from embedding_store.errors import UsageError
from streams.events import Click
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


def test_a_log_of_one_s_own_is_read_by_the_columns_of_the_settings(tmp_path: Path) -> None:
    log = tmp_path / "own.csv"
    log.write_text("who,what,when\n1,10,1511600005\n")
    options = DemoOptions(log="generic", path=str(log))
    with pytest.raises(UsageError, match=r"\[log.columns\]"):
        _opened(Settings([]), options)
    columns = {"user": "who", "item": "what", "time": "when"}
    settings = Settings([Layer("test", {"log": {"columns": columns}})])
    (click,) = (record for record in _opened(settings, options).records() if isinstance(record, Click))
    assert (click.user, click.ts) == ("1", 1_511_600_005_000)
