"""`headrace bench growth`: knees are found and noise is not, the page says what the figures say, the model adds up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.bench import growth, growth_join, growth_report
from deploy.bench.capacity import USED, Constants, Load, breaks, constants_of, needs
from deploy.bench.common import BenchError
from deploy.bench.growth import AXES, judged
from deploy.bench.plots import MARK, OURS
from deploy.cli import run
from tests.deploy.drawings import Plot

DOCS = Path(__file__).parents[2] / "docs"
CONSTANTS = Constants(
    join_us=10, rows_an_event=0.9, train_us=60, rank_0_us=20, touched_a_row=0.5, commit_us=3, apply_us=1,
    event_bytes=40, block_bytes=80, version_bytes=400, broker_in_us=8_000, broker_us=1_000, join_bytes=740,
    store_bytes=500, replica_bytes=550,
)  # fmt: skip


def _points(costs: dict[int, float]) -> dict[str, dict[str, Any]]:
    return {f"{x}": {"cpu_us": cost, "rss_mb": 100.0} for x, cost in costs.items()}


def test_what_stays_flat_or_in_proportion_has_no_knee() -> None:
    flat = judged(_points({10: 5.0, 100: 5.5, 1_000: 4.8}), 0)
    assert flat["knee"] is None
    assert flat["slope"] == pytest.approx(math.log(4.8 / 5) / math.log(100))
    assert judged(_points({10: 30.0, 100: 120.0, 1_000: 1_200.0}), 1)["knee"] is None
    assert judged(_points({10: 5.0}), 0) == {"slopes": [], "slope": None, "knee": None}


def test_a_knee_is_where_the_cost_leaves_the_line() -> None:
    quadratic = judged(_points({10: 10.0, 100: 100.0, 1_000: 10_000.0}), 1)
    assert quadratic["knee"] == 1_000
    assert quadratic["slopes"] == pytest.approx([1.0, 2.0])
    assert judged(_points({10: 5.0, 100: 6.5, 1_000: 6.6}), 0)["knee"] == 100, "steep, and more than noise"
    assert judged(_points({10: 5.0, 10**6: 7.0, 10**12: 10.1}), 0)["knee"] == 10**12, "slowly, to twice as much"


def test_an_axis_that_is_not_there_or_begins_too_high_is_wrong_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "growth", "--axis", "moons"]) == 2
    assert "choose among" in capfd.readouterr().err
    assert run(["bench", "growth", "--axis", "users", "--largest", "5"]) == 2
    assert "larger --largest" in capfd.readouterr().err


def test_the_help_names_all_axes() -> None:
    from typing import get_type_hints

    from deploy.commands import bench_growth

    said = get_type_hints(bench_growth.growth, include_extras=True)["axis"].__metadata__[0].help
    assert said.removeprefix("One of: ").partition(".")[0].split(", ") == list(AXES)


def test_a_plot_is_small_and_the_same_each_time_and_has_its_knee_where_it_is() -> None:
    points = _points({20: 5.0, 200: 6.5, 2_000: 50.0})
    found = {"points": points, **judged(points, 0)}
    drawn = growth_report.plot(AXES["history"], found)
    assert drawn == growth_report.plot(AXES["history"], found)
    assert len(drawn) < 20_000
    plot, words = Plot(drawn), Plot(drawn).words
    assert plot.title == AXES["history"].title
    assert {AXES["history"].x, f"µs per {AXES['history'].per}", "knee: 200"} <= words.keys()
    at, decade = [words[x][0] for x in ("20", "200", "2k")], words["10"][1] - words["1"][1]
    (knee,) = plot.paths(MARK)
    assert knee[:, 0] == pytest.approx(at[1])
    x, y = np.array(plot.marks(OURS)[: len(at)]).T  # the one after them is the legend's
    assert x == pytest.approx(np.array(at))
    assert (y - y[0]) / decade == pytest.approx(np.array([0, math.log10(1.3), 1]))


def test_a_plot_of_what_stays_flat_has_no_knee() -> None:
    points = _points({10: 5.0, 100: 5.0})
    plot = Plot(growth_report.plot(AXES["history"], {"points": points, **judged(points, 0)}))
    assert not [word for word in plot.words if "knee" in word]
    assert plot.paths(MARK) == []


def test_the_page_says_what_the_figures_say() -> None:
    """No figure in a table is typed by hand."""
    result = json.loads((DOCS / "plots" / growth_report.FILE).read_text())
    page = (DOCS / "scale.md").read_text()
    assert growth_report.filled(page, result) == page
    broken = page.replace("| ids |", "| ids, by hand |", 1)
    assert broken != page
    assert growth_report.filled(broken, result) == page
    for name, found in result["axes"].items():
        assert (DOCS / "plots" / f"growth-{name}.svg").read_text() == growth_report.plot(AXES[name], found)
        assert f"plots/growth-{name}.svg" in page


def test_axes_of_before_stay_unless_they_are_of_another_machine(tmp_path: Path) -> None:
    def found(machine: str, **axes: float) -> dict[str, Any]:
        points = {name: _points({10: cost}) for name, cost in axes.items()}
        return {"machine": machine, "axes": {n: {"points": p, **judged(p, 0)} for n, p in points.items()}}

    def written(result: dict[str, Any]) -> dict[str, float]:
        growth_report.write(result, tmp_path)
        told = json.loads((tmp_path / "plots" / growth_report.FILE).read_text())
        return {name: one["points"]["10"]["cpu_us"] for name, one in told["axes"].items()}

    (tmp_path / "scale.md").write_text("<!-- growth:begin -->\n<!-- growth:end -->\n")
    assert written(found("a", history=1.0, ranks=2.0)) == {"history": 1.0, "ranks": 2.0}
    assert written(found("a", history=3.0, users=4.0)) == {"users": 4.0, "history": 3.0, "ranks": 2.0}
    assert "| ranks |" in (tmp_path / "scale.md").read_text()
    assert written(found("b", ranks=5.0)) == {"ranks": 5.0}


def test_the_store_s_write_counts_once() -> None:
    """A commit of the trainer is of a small store: of the store alone only what its size adds comes to it."""
    measured = json.loads((DOCS / "plots" / "growth.json").read_text("utf-8"))
    ids, memory = (list(measured["axes"][axis]["points"].values()) for axis in ("ids", "memory"))
    for point in ids:
        point["commit_us_a_row"] = 7.0
    assert constants_of(measured).commit_us == pytest.approx(memory[-1]["commit_us_a_touched_row"])
    ids[-1]["commit_us_a_row"] = 9.0
    assert constants_of(measured).commit_us == pytest.approx(memory[-1]["commit_us_a_touched_row"] + 2)


def test_twice_the_load_needs_twice_as_much() -> None:
    load = Load(events_per_s=1e4, ids=1e7)
    once, twice = (needs(CONSTANTS, Load(f * 1e4, f * 1e7)) for f in (1, 2))
    for name, need in once.items():
        if name != "partitions":
            assert twice[name] == pytest.approx(2 * need), name
    assert needs(CONSTANTS, Load(1e6))["partitions"] == math.ceil(1e6 * 10e-6 / USED)
    assert once["join_cores"] == pytest.approx(1e4 * 10e-6 / USED)
    assert once["train_memory_gb"] == pytest.approx(1e7 * load.hot_share * 580 / 1e9 / USED)
    more = needs(CONSTANTS, replace(load, replicas=2 * load.replicas))
    assert more["kafka_in_mb_per_s"] == once["kafka_in_mb_per_s"]
    given = more["kafka_out_mb_per_s"] - once["kafka_out_mb_per_s"]
    assert more["kafka_cores"] - once["kafka_cores"] == pytest.approx(given * 1_000e-6 / USED)
    taken = once["kafka_cores"] - once["kafka_out_mb_per_s"] * 1_000e-6 / USED
    assert taken == pytest.approx(once["kafka_in_mb_per_s"] * 8_000e-6 / USED)
    assert more["kafka_out_mb_per_s"] - once["kafka_out_mb_per_s"] == pytest.approx(
        load.replicas * once["replica_in_mb_per_s"]
    )


def test_what_breaks_first_is_what_reaches_the_smallest_part_of_the_load() -> None:
    """At its limit each of them needs one core, or all of a machine's memory; the first is the worst of them."""
    found = breaks(CONSTANTS, Load())
    parts = [limit / (1e9 if "(ids)" in what else 1e6) for what, limit in found]
    assert parts == sorted(parts)
    at = dict(found)
    in_step = at["several ranks go in step, rank 0 with them (events/s)"]
    alone = needs(CONSTANTS, Load(in_step, at["a replica holds all rows (ids)"]))
    assert alone["one_rank_0_cores"] == pytest.approx(1)
    assert alone["replica_memory_gb"] == pytest.approx(Load().machine_gb)
    writer = needs(CONSTANTS, Load(at["the trainer's store has one writer (events/s)"]))
    assert writer["one_store_writer_cores"] == pytest.approx(1)


def test_the_made_log_is_of_the_standard_mix() -> None:
    log, kinds = growth_join.Log(1_000), {"impression": 0, "click": 0}
    for raw in (json.loads(raw) for _ in range(5) for raw in log.slice()):
        if raw["kind"] in kinds:
            kinds[raw["kind"]] += len(raw.get("items", [0]))
    assert kinds["impression"] / log.events == pytest.approx(0.8, abs=0.02)
    assert kinds["click"] / log.events == pytest.approx(0.15, abs=0.02)


def test_actions_are_on_what_is_remembered_and_no_older() -> None:
    log, shown = growth_join.Log(1_000, remembered=50), list[str]()
    for event in (json.loads(raw) for _ in range(3) for raw in log.slice()):
        if event["kind"] == "impression":
            shown.append(event["request_id"])
        else:
            assert event["request_id"] in shown[-50:]
    assert len(shown) > 1_000


def test_a_log_that_is_refused_gives_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks without an id were refused once, and nothing of a visit was joined in it."""
    joining = growth_join.Joining(tmp_path / "store", growth_join._settings())
    joining.join([b'{"kind": "tick", "ts": 1}'])
    with pytest.raises(BenchError, match="refused 1 "):
        joining.close()
    monkeypatch.setattr(growth_join, "VISITS", 2)
    assert growth_join.busiest_point(str(tmp_path / "busiest"), 3)["cpu_us"] > 0


@pytest.mark.nightly
def test_points_are_measured_and_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scale.md").write_text("<!-- growth:begin -->\n<!-- growth:end -->\n")
    axes = ["--axis", "candidates", "--axis", "busiest", "--axis", "replicas", "--axis", "partitions"]
    assert run(["bench", "growth", *axes, "--largest", "10", "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["axes"].keys() == {"candidates", "busiest", "replicas", "partitions"}
    for found in result["axes"].values():
        assert all(point["cpu_us"] > 0 and point["rss_mb"] > 0 for point in found["points"].values())
    assert "| replicas |" in (tmp_path / "scale.md").read_text()
    assert {path.name for path in (tmp_path / "plots").iterdir()} >= {"growth.json", "growth-busiest.svg"}


@pytest.mark.nightly
@pytest.mark.parametrize("part", ["users", "windows", "history"])
def test_the_joiner_s_axes_join(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("WARM_UP", 2), ("MEASURED", 6), ("STEPS", 1), ("WARM_STEPS", 1)):
        monkeypatch.setattr(growth_join, name, few)
    point = getattr(growth_join, f"{part}_point")(str(tmp_path), 30)
    assert point["cpu_us"] > 0
    assert all(np.isfinite(value) for value in point.values())


def test_points_above_the_largest_are_left_out() -> None:
    assert growth.points_of(AXES["ids"], 1_000_000) == [100_000, 300_000, 1_000_000]
