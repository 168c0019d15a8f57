"""headrace compare: figures of every system, a report that needs nothing else, one line where it is used wrongly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deploy.cli import run

MODEL = """
model = { batch_size = 128, features.dim = 8, features.users = 2000, features.items = 4000, features.categories = 200 }
simulator = { users = 60, items = 400, requests_per_s = 5.0 }
"""
KEYS = {"auc", "ne", "ndcg_at_10", "hr_at_10", "calibration"}


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("headrace.toml").write_text(MODEL)
    assert run(["simulate", "--events", "6000", "--out", "log.jsonl"]) == 0
    return "log.jsonl"


def _json(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capfd.readouterr()
    assert run(["compare", *arguments, "--json"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.nightly
def test_every_system_has_its_figures_and_the_report_stands_alone(capfd: pytest.CaptureFixture[str], log: str) -> None:
    found = _json(capfd, "simulated", log, "--intervals", "--seeds", "2")
    assert set(found["systems"]) == {
        "headrace", "popularity", "item_knn", "river_logistic", "river_fm", "river_biased_mf", "vw", "frozen",
        "retrained",
    }  # fmt: skip
    for name, figures in found["systems"].items():
        assert set(figures) >= KEYS
        assert all(0 <= figures[key] <= 1 for key in ("auc", "ndcg_at_10", "hr_at_10"))
        assert (figures["ne"] is None) == (figures["calibration"] is None) == (name in ("item_knn", "river_biased_mf"))
    assert [r["seed"] for r in found["runs"]] == [0, 1]
    assert set(found["intervals"]) == {"never", "5 h", "1 h", "30 min", "1 min", "1 s"}
    report = Path(found["report"]).read_text("utf-8")
    assert json.loads(Path(found["data"]).read_text("utf-8"))["systems"] == found["systems"]
    for text in (
        "Headrace less the others",
        "200 others",
        "Freshness against quality",
        "log.jsonl",
    ):
        assert text in report
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", report), "nothing is fetched"
    assert report.count("Plotly.newPlot") >= 4


def test_a_report_says_where_headrace_does_not_win(capfd: pytest.CaptureFixture[str], log: str) -> None:
    found = _json(capfd, "events", log, "--limit", "200", "--systems", "headrace,vw,popularity", "--out", "here")
    assert list(found["systems"]) == ["headrace", "popularity", "vw"]
    assert found["report"] == str(Path("here") / "compare.html")
    low, _ = found["runs"][0]["differences"]["vw"]["auc"]
    said = [line for line in found["shortfalls"] if " vw in AUC " in line]
    assert bool(said) == (low <= 0)
    assert found["about"]["limit"] == 200
    report = Path("here/compare.html").read_text("utf-8")
    assert all(line.split("(")[0] in report for line in found["shortfalls"])


def test_a_short_log_has_figures_where_there_are_any(capfd: pytest.CaptureFixture[str], log: str) -> None:
    found = _json(capfd, "events", log, "--limit", "20", "--systems", "headrace,popularity")
    figures = found["systems"]["headrace"]
    assert figures["auc"] is not None
    assert figures["ndcg_at_10"] is figures["hr_at_10"] is figures["known_items"]["auc"] is None
    assert "NaN" not in Path(found["data"]).read_text("utf-8")


@pytest.mark.nightly
def test_one_seed_gives_one_result(capfd: pytest.CaptureFixture[str], log: str) -> None:
    def figures(*more: str) -> dict:
        found = _json(capfd, "events", log, "--limit", "500", "--systems", "headrace,river_fm", *more)
        return {name: {k: v for k, v in f.items() if k != "seconds"} for name, f in found["systems"].items()}

    one = figures()
    assert figures("--jobs", "1") == one
    assert figures("--seed", "7") != one


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "which log?"),
        (["events", "log.jsonl", "--systems", "headrace,vv"], "no system is named vv"),
        (["evens", "log.jsonl"], "no reader is named 'evens'"),
        (["events", "log.jsonl", "--seeds", "0"], "--seeds"),
    ],
)
def test_wrong_usage_is_one_line(capfd: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    capfd.readouterr()
    assert run(["compare", *arguments]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_tables_that_are_too_small_are_said_in_one_line(capfd: pytest.CaptureFixture[str], log: str) -> None:
    Path("headrace.toml").write_text("model = { features.dim = 8, features.users = 3, features.items = 4000 }\n")
    capfd.readouterr()
    assert run(["compare", "events", log, "--systems", "headrace"]) == 2
    assert "raise model.features.users (3)" in capfd.readouterr().err


def test_two_settings_files_side_by_side(capfd: pytest.CaptureFixture[str], log: str) -> None:
    Path("a.toml").write_text(MODEL)
    Path("b.toml").write_text(MODEL.replace("batch_size = 128", "batch_size = 64") + "topics = { partitions = 2 }\n")
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    at = next(line["ts"] for line in lines[len(lines) // 2 :] if "ts" in line)
    capfd.readouterr()
    window = ("--until", str(at), "--from", str(at - 20_000))
    assert run(["compare", "simulated", log, "--settings", "a.toml", "b.toml", *window, "--jobs", "1", "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert list(found["systems"]) == ["a", "b"]
    assert found["differences"] == {"model.batch_size": {"a": 128, "b": 64}}
    assert "a comparison has one topics.partitions: that of a" in err
    report = Path(found["report"]).read_text("utf-8")
    assert report.index("What differs") < report.index("model.batch_size") < report.index("Which is better")
    assert all(line.split("(")[0] in report for line in found["verdicts"])
    assert len(found["verdicts"]) == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--settings", "a.toml"], "name two files or more"),
        (["--settings", "a.toml", "none.toml"], "none.toml: no such settings file"),
        (["--settings", "a.toml", "wrong.toml"], "wrong.toml: model.batch_sise is not a setting"),
        (["--settings", "a.toml", "odd.toml"], "odd.toml: settings in [join]: `wait_ms` (9) must not be longer"),
        (["--settings", "a.toml", "a.toml", "--systems", "frozen"], "leave out frozen"),
        (["--settings", "a.toml", "a.toml", "--intervals"], "--settings stands in place of --config"),
        (["--from", "2026-01-02", "--until", "2026-01-01"], "--from must be before --until"),
        (["--from", "yesterday"], "--from yesterday: not a time"),
    ],
)
def test_wrong_settings_files_are_refused_before_anything_runs(
    capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    Path("a.toml").write_text(MODEL)
    Path("wrong.toml").write_text("model = { batch_sise = 3 }\n")
    Path("odd.toml").write_text("join = { wait_ms = 9, open_ms = 3 }\n")
    capfd.readouterr()
    assert run(["compare", "events", "log.jsonl", *arguments]) == 2
    error = capfd.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_file_that_does_not_say_how_the_log_is_read_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a.toml").write_text(MODEL)
    Path("b.toml").write_text(MODEL + '[log.columns]\nuser = "u"\nitem = "i"\ntime = "t"\n')
    capfd.readouterr()
    assert run(["compare", "generic", "log.csv", "--settings", "a.toml", "b.toml"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("headrace: a.toml: [log.columns] does not say which column is user, item, time: ")
    assert "`headrace init FILE`" in error
    assert run(["compare", "generic", "log.csv", "--settings", "b.toml", "a.toml"]) == 1
    assert "log.csv: No such file" in capfd.readouterr().err


def test_settings_files_are_named_so_that_they_can_be_told_apart() -> None:
    from deploy.comparing import unique_names

    assert unique_names([Path("x/a.toml"), Path("y/a.toml"), Path("y/b.toml")]) == ["x/a", "y/a", "b"]
    assert unique_names([Path("a.toml"), Path("a.toml")]) == ["a", "a (2)"]
    assert unique_names([Path("x/vw.toml"), Path("b.toml")], taken=("vw",)) == ["x/vw", "b"]
