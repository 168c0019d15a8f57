"""`headrace bench all` and `check`: what is written, what stays, when they fail, and that Ctrl-C leaves nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import psutil
import pytest
import typer

from deploy.bench import check as checks
from deploy.bench import common, every, suite
from deploy.bench.every import Report, with_block
from deploy.bench.plots import MARK, OURS, THEIRS, figures_svg, ratios_svg, said
from deploy.bench.suite import BENCHES, Bench, Figure, Limit, rows_of
from deploy.cli import run
from deploy.commands import bench as command
from embedding_store.errors import HeadraceError
from tests.deploy.drawings import Plot

TINY = ["--rows", "1000", "--dim", "64"]
INT8 = "publish: bytes of a row, int8 to fp32"
PUBLISHED = Bench("publish", "publish", suite.PUBLISH.figures, quick=tuple(TINY), check=tuple(TINY))
BROKEN = Bench("join", "join", suite.JOIN.figures, quick=("--events", "0"))


def test_every_benchmark_is_among_them() -> None:
    """A new one needs an entry in deploy/bench/suite.py, or its figures are in no page (growth has one of its own)."""
    commands = set(typer.main.get_command(command.app).commands)  # type: ignore[attr-defined]
    assert {bench.command for bench in BENCHES.values()} == commands - {"all", "check", "growth"}


def test_names_of_checked_ratios_tell_them_apart() -> None:
    for bench in BENCHES.values():
        names = [(figure.what, figure.reference) for figure in bench.figures]
        assert len(set(names)) == len(names), bench.name


def test_a_result_becomes_figures_beside_their_references() -> None:
    figures = (
        Figure("a/s", "a", "b", "b", wanted=Limit(3)),
        Figure("a/s", "a", "median", "b", "ratio", wanted=Limit(3, most=True)),
        Figure("{} ms", "many"),
        Figure("alone", "in.side", wanted=Limit(1)),
        Figure("knee", "a", "none", "null"),
        Figure("not there", "nowhere"),
    )
    result = {"a": 4.0, "b": 2.0, "ratio": 2.5, "many": {"x": 1, "y": 2}, "in": {"side": 7}, "null": None}
    rows = rows_of(Bench("n", "n", figures), result)
    assert [(row.what, row.value, row.reference_value, row.ratio) for row in rows] == [
        ("a/s", 4.0, 2.0, 2.0), ("a/s", 4.0, 2.0, 2.5), ("x ms", 1, None, None), ("y ms", 2, None, None),
        ("alone", 7, None, None), ("knee", 4.0, None, None),
    ]  # fmt: skip
    held = [row.wanted.holds(row.seen) for row in rows if row.wanted is not None]
    assert held == [False, True, True]


def test_only_blocks_are_written_and_what_people_wrote_stays() -> None:
    page = "# B\nwords\n<!-- figures join -->\nold\n<!-- end -->\nmore | words\n<!-- figures train -->\n<!-- end -->\n"
    once = with_block(page, "join", "| new \\1 |\n")
    assert once == page.replace("old\n", "| new \\1 |\n")
    assert with_block(once, "join", "| new \\1 |\n") == once
    appended = with_block(once, "growth", "more\n")
    assert appended.startswith(once.rstrip())
    assert with_block(appended, "growth", "again\n") == appended.replace("more\n<!-- end", "again\n<!-- end")


RESULT = {
    "events_per_s": 3.0, "reference_per_s": 6.0, "ratio": 0.5, "rss_growth_mb": 10, "rss_growth_mb_10x_open": 11,
}  # fmt: skip
ROWS = rows_of(suite.JOIN, RESULT)


def test_a_plot_has_each_figure_beside_its_reference_in_bars_as_long_as_they_are_large() -> None:
    plot = Plot(figures_svg("a < b", [*ROWS, *rows_of(suite.TRAIN, {"share": {"forward": 0.5, "map": 0.125}})]))
    assert plot.title == "a < b"
    left = [
        "events/s", "– plain dictionaries, no store, no features",
        "memory with ten times the open windows, MB", "– with one time",
        "share of forward in a step", "share of map in a step",
    ]  # fmt: skip
    right = ["3", "6", "11", "10", "0.50", "0.12"]
    assert plot.words.keys() == {"a < b", *left, *right}
    for words in (left, right):
        assert words == sorted(words, key=lambda word: plot.words[word][1]), "one below the other"
    ours, theirs = ([np.ptp(bar[:, 0]) for bar in plot.paths(color)] for color in (OURS, THEIRS))
    assert np.array(ours) / max(ours) == pytest.approx([0.5, 1, 1, 0.25])
    assert np.array(theirs) / max(ours) == pytest.approx([1, 10 / 11])
    for label, value, bar in (("events/s", "3", 0), ("share of map in a step", "0.12", 3)):
        top, bottom = plot.paths(OURS)[bar][:, 1].min(), plot.paths(OURS)[bar][:, 1].max()
        assert top < plot.words[label][1] < bottom
        assert top < plot.words[value][1] < bottom


def test_ratios_are_on_one_scale_from_1_on_with_a_mark_at_what_is_wanted() -> None:
    plot = Plot(ratios_svg("all", [("join", row) for row in ROWS]))
    assert plot.title == "all"
    assert {
        "join: events/s to plain dictionaries, no store, no features", "0.50 ×",
        "join: memory with ten times the open windows, MB to with one time", "1.10 ×",
    } <= plot.words.keys()  # fmt: skip
    worse, better = ((bar[:, 0].min(), bar[:, 0].max()) for bar in plot.paths(OURS))
    one, ten = plot.words["1 ×"][0], plot.words["10 ×"][0]
    assert [*worse, *better] == pytest.approx([one + (ten - one) * math.log10(r) for r in (0.5, 1, 1, 1.1)])
    (mark,) = plot.marks(MARK)
    assert mark[0] == pytest.approx(one + (ten - one) * math.log10(1.2)), "at most 1.2; 60,000 is no ratio"


def test_a_plot_is_the_same_whatever_is_set_on_a_machine_and_changes_no_setting() -> None:
    def drawn() -> list[str]:
        return [figures_svg("a", ROWS), ratios_svg("b", [("join", row) for row in ROWS]), figures_svg("c", [])]

    def settings() -> dict[str, Any]:
        return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}

    usual = drawn()
    assert all(len(plot) < 20_000 for plot in usual)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "svg.fonttype": "path"}):
        before = settings()
        assert drawn() == usual
        assert settings() == before


def test_a_figure_has_three_digits_that_count() -> None:
    assert (said(1234567.8), said(0.0000123), said(12.34), said(3), said(True)) == (
        "1,234,568", "1.2e-05", "12.3", "3", "true",
    )  # fmt: skip


def test_one_that_fails_keeps_its_old_block_and_the_others_have_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Real processes: a benchmark that runs, and one whose arguments are refused."""
    monkeypatch.setattr(every, "BENCHES", {"join": BROKEN, "publish": PUBLISHED})
    page = tmp_path / "benchmarks.md"
    page.write_text("# Ours\n\n<!-- figures join -->\nof last year\n<!-- end -->\nsaid by people\n")
    assert run(["bench", "all", "--quick", "--out", str(tmp_path), "--json"]) == 1
    said = capfd.readouterr()
    found = json.loads(said.out.splitlines()[-1])
    assert list(found["benchmarks"]) == ["publish"]
    assert list(found["failed"]) == ["join"]
    assert "1 of 2 benchmarks failed" in said.err
    assert "join (" in said.err
    assert "--events" in said.err
    text = page.read_text()
    assert "of last year" in text
    assert "said by people" in text
    entry = found["benchmarks"]["publish"]
    assert entry["result"]["ratio_to_fp32"]["int8"] == pytest.approx(0.31, abs=0.02)
    for stamp in (entry["commit"] or "no checkout", entry["machine"], entry["date"], entry["versions"]["torch"]):
        assert stamp in text
    assert "| bytes of a row, int8 |" in text
    assert "![publish](plots/publish.svg)" in text
    kept = json.loads((tmp_path / "benchmarks.json").read_text())
    assert kept["publish"]["result"] == entry["result"]
    assert (tmp_path / "plots" / "publish.svg").stat().st_size > 1_000
    assert (tmp_path / "plots" / "ratios.svg").exists()


def test_an_entry_of_before_stays_in_the_page(tmp_path: Path) -> None:
    entry = {**every.about(), "command": "headrace bench x", "date": "now", "seconds": 1.0, "load_before": 0.1}
    Report(tmp_path).add("scale", {**entry, "result": {"ranks": {"1": 2.0, "2": 3.0}, "loss_difference": 1e-9}})
    Report(tmp_path).add("join", {**entry, "result": {"events_per_s": 4.0, "reference_per_s": 2.0, "ratio": 2.0}})
    kept = json.loads((tmp_path / "benchmarks.json").read_text())
    assert list(kept) == ["join", "scale"], "in the order of the benchmarks"
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| scale | rows/s on two ranks to on one | 1.50 × |" in text
    assert "| join | events/s | 4 | **at least 60,000: falls short** |" in text


def test_names_that_are_not_there_are_wrong_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "all", "--only", "nothing"]) == 2
    assert run(["bench", "all", "--quick", "--only", "serve-soak"]) == 2
    assert "there are intake, join" in capfd.readouterr().err


def test_ctrl_c_ends_it_with_all_that_it_started(tmp_path: Path) -> None:
    """While a part of `join` computes: one line, 130, no process and no folder left."""
    words = [sys.executable, "-m", "deploy.cli", "bench", "all", "--only", "join", "--out", str(tmp_path / "out")]
    folder = tmp_path / "tmp"
    folder.mkdir()
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"TMPDIR": str(folder)}
    ) as process:
        ours = psutil.Process(process.pid)
        end = time.monotonic() + 120
        while not any(folder.glob("headrace-bench-*/events.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)  # it is in another process
        started = ours.children(recursive=True)
        assert started
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.splitlines() == ["headrace: stopped"]
    assert psutil.wait_procs(started, timeout=10)[1] == []
    assert list(folder.iterdir()) == []


def _planted(slower: float) -> Callable[[Bench], dict[str, Any]]:
    """A joiner that takes `slower` times as long; the reference is as it was."""
    return lambda bench: {
        "ratio": 0.8 / slower, "ratio_cpu": 0.8 / slower, "events_per_s": 8.0 / slower, "reference_per_s": 10.0,
        "events_per_cpu_s": 8.0 / slower, "reference_per_cpu_s": 10.0, "rss_growth_mb": 1.0,
        "rss_growth_mb_10x_open": 1.0,
    }  # fmt: skip


def _kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ratios of a joiner as it was."""
    monkeypatch.setattr(checks, "CHECKED", (suite.JOIN,))
    checks.keep(tmp_path / "kept.json", (suite.JOIN,), _planted(1.0))
    return tmp_path / "kept.json"


@pytest.mark.parametrize(("slower", "worse"), [(1.0, 0), (1.2, 0), (1.5, 1), (2.5, 2), (0.5, 0)])
def test_the_gate_closes_for_a_slower_joiner(
    slower: float, worse: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processor time by a quarter, the clock by a half; what is within that passes, and what is faster too."""
    kept = checks.kept_in(_kept(tmp_path, monkeypatch))
    ran: list[int] = []
    ratios = checks.check(kept, (suite.JOIN,), _planted(slower), lambda bench, run: ran.append(run))
    assert sum(ratio.worse for ratio in ratios) == worse
    assert ran == (list(range(1, checks.RUNS + 1)) if worse else [1]), "only what seems worse is measured again"


def test_the_best_of_the_runs_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = checks.kept_in(_kept(tmp_path, monkeypatch))
    runs = iter((_planted(9.0), _planted(1.1), _planted(5.0)))
    ratios = checks.check(kept, (suite.JOIN,), lambda bench: next(runs)(bench))
    assert not any(ratio.worse for ratio in ratios)
    assert {ratio.runs for ratio in ratios} == {2}


def test_where_less_is_better_more_is_worse() -> None:
    bytes_of = {"bytes_per_row": {"fp32": 264.0, "fp16": 136.0, "int8": 80.0}, "bare_bytes_per_row": 264.0}
    result = {**bytes_of, "rows_per_s": 1.0, "bare_rows_per_s": 1.0, "rows_per_cpu_s": 1.0, "bare_rows_per_cpu_s": 1.0}
    kept = {name: row.compared for name, row in checks.ratios(suite.PUBLISH, result)}
    fatter = {**result, "bytes_per_row": {**bytes_of["bytes_per_row"], "int8": 82.0}}  # type: ignore[dict-item]
    (worse,) = [ratio for ratio in checks.check(kept, (suite.PUBLISH,), lambda bench: fatter) if ratio.worse]
    assert worse.line() == f"{INT8}: 0.311, best of {checks.RUNS}; kept 0.303, so at most 0.306"


def test_a_ratio_that_is_measured_no_more_is_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = checks.kept_in(_kept(tmp_path, monkeypatch))
    (gone, *_) = kept
    without = {name: value for name, value in _planted(1.0)(suite.JOIN).items() if name != "events_per_s"}
    found = {ratio.name: ratio for ratio in checks.check(kept, (suite.JOIN,), lambda bench: without)}
    assert found[gone].worse
    assert found[gone].line() == f"{gone}: not measured; kept {kept[gone]:.3g}"
    assert sum(ratio.worse for ratio in found.values()) == 1


def test_the_command_says_which_ratios_are_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real benchmark, whose kept ratios are made a hundred times as good; then of a file that lacks one."""
    monkeypatch.setattr(checks, "CHECKED", (PUBLISHED,))
    monkeypatch.setattr(checks, "RUNS", 1)
    file = tmp_path / "kept.json"
    assert run(["bench", "check", "--keep", "--kept", str(file)]) == 0
    kept = json.loads(file.read_text())
    name = "publish: rows by second of processor time to safetensors alone"
    kept["ratios"][name] *= 100
    file.write_text(json.dumps(kept))
    capfd.readouterr()
    assert run(["bench", "check", "--kept", str(file), "--json"]) == 1
    said = capfd.readouterr()
    found = json.loads(said.out.splitlines()[-1])
    assert found["ok"] is False
    assert found["ratios"][name]["worse"] is True
    assert [line for line in said.err.splitlines() if line.startswith(f"{name}: ")]
    assert "worse than the kept ones" in said.err.splitlines()[-1]
    del kept["ratios"][name]
    file.write_text(json.dumps(kept))
    assert run(["bench", "check", "--kept", str(file)]) == 1
    assert "none is kept" in capfd.readouterr().err


def test_without_kept_ratios_it_says_how_to_keep_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "check", "--kept", str(tmp_path / "none.json")]) == 1
    assert "--keep" in capfd.readouterr().err


@pytest.mark.parametrize("inside", ["[]", "{}", "null", '{"join": 1}', "{"])
def test_a_file_of_something_else_is_said(inside: str, tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.json"
    file.write_text(inside)
    with pytest.raises(HeadraceError, match="--keep"):
        checks.kept_in(file)
    if inside == "{}":
        assert Report(tmp_path).entries == {}
        return
    with pytest.raises(HeadraceError, match="put it right"):
        Report(tmp_path)


def test_the_kept_ratios_of_this_version_are_those_that_are_checked() -> None:
    """Else `make bench-check` fails on every machine."""
    kept = json.loads(checks.KEPT.read_text())
    names = {
        f"{bench.name}: {figure.what} to {figure.reference}"
        for bench in checks.CHECKED
        for figure in bench.figures
        if figure.tolerance is not None
    }
    assert set(kept["ratios"]) == names
    assert all(value > 0 for value in kept["ratios"].values())


def test_a_benchmark_that_fails_says_its_own_last_line() -> None:
    with pytest.raises(common.BenchError, match="--rows"):
        common.run_bench(["publish", "--rows", "1"])
