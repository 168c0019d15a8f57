"""headrace estimate: its JSON, its report, one line where it is used wrongly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deploy.cli import run
from tests.replay.bandit_worlds import World

KEYS = {"policy", "estimates", "logged", "support", "report"}
EACH = {"value", "low", "high", "ess", "estimable", "why"}


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """2,000 decisions of a known world as a table."""
    monkeypatch.chdir(tmp_path)
    drawn = World(decisions=2_000, rate=0.1).draw(0)
    lines = ["timestamp,item_id,position,click,propensity_score," + ",".join(f"user_feature_{i}" for i in range(4))]
    for n in range(2_000):
        time = f"2019-11-24 00:{n // 60:02}:{n % 60:02}+00:00"
        lines.append(f"{time},{drawn.item[n]},1,{int(drawn.reward[n])},{drawn.propensity[n]},a,b,c,d{n % 7}")
    Path("log.csv").write_text("\n".join(lines) + "\n")
    return "log.csv"


def _json(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capfd.readouterr()
    assert run(["estimate", *arguments, "--json"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    return json.loads(line)


def test_the_logged_policy_has_the_logs_mean_and_the_report_stands_alone(
    capfd: pytest.CaptureFixture[str], log: str
) -> None:
    found = _json(capfd, "openbandit", log, "--policy", "logged", "--report", "out/here.html")
    assert set(found) >= KEYS
    assert list(found["estimates"]) == ["ips", "snips", "dm", "dr"]
    for one in found["estimates"].values():
        assert set(one) >= EACH
        assert one["estimable"] == (one["why"] == "") == (one["low"] is not None)
    for name in ("ips", "snips", "dr"):
        assert found["estimates"][name]["value"] == pytest.approx(found["logged"]["value"])
        assert found["estimates"][name]["ess"] == pytest.approx(2_000)
    assert found["logged"]["n"] == 2_000
    assert found["report"] == str(Path("out/here.html"))
    report = Path("out/here.html").read_text("utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", report), "nothing is fetched"
    assert report.count("Plotly.newPlot") >= 3
    for text in ("doubly robust", "effective sample", "log.csv"):
        assert text in report


def test_a_policy_that_learns_is_judged_on_the_rest(capfd: pytest.CaptureFixture[str], log: str) -> None:
    found = _json(capfd, "openbandit", log, "--policy", "popular", "--temperature", "2", "--split", "0.4")
    assert found["policy"] == "popular"
    assert found["logged"]["n"] == 1_200
    assert found["report"] == str(Path(".headrace/estimate.html"))
    clipped = _json(capfd, "openbandit", log, "--policy", "popular", "--split", "0.4", "--clip", "1.5")
    assert clipped["support"]["largest_weight"] == 1.5
    assert clipped["support"]["clipped"] > 0


def test_what_cannot_be_said_is_said_on_the_terminal(capfd: pytest.CaptureFixture[str], log: str) -> None:
    capfd.readouterr()
    assert run(["estimate", "openbandit", log, "--policy", "popular", "--epsilon", "0.001"]) == 0
    assert "Not estimable: " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which log?"),
        (["openbandit", "log.csv", "--policy", "best"], "no policy is named best"),
        (["openbandit", "log.csv", "--policy", "served"], "--served FILE"),
        (["openbandit", "log.csv", "--policy", "popular", "--split", "0"], "learns from the first part"),
        (["openbandit", "log.csv", "--epsilon", "0.1", "--temperature", "2"], "not both"),
        (["openbandit", "log.csv", "--reward", "smile"], "--reward"),
    ],
)
def test_wrong_usage_is_one_line(capfd: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    capfd.readouterr()
    assert run(["estimate", *arguments]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1
