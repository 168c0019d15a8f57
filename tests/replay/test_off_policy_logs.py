"""Estimates from logs: what was shown and earned is read as it was, and the real bandits' own click rate is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedding_store.errors import UsageError
from online_model.examples import Examples
from online_model.settings import FeatureSettings, TrainerSettings
from replay.off_policy import ours
from replay.off_policy.decisions import Decisions, read
from replay.off_policy.estimate import EstimateSettings, estimate
from replay.off_policy.policies import Choice
from replay.readers import open_log
from replay.simulator.run import Simulation
from replay.simulator.settings import SimulatorSettings
from streams.events import Click, Event, Impression, Purchase, Watch, encode
from streams.joiner import JoinSettings

Finder = Callable[[str], Path]
RANDOM, BANDIT = "open-bandit/random_men.csv.gz", "open-bandit/bts_men.csv.gz"
SMALL = FeatureSettings(dim=8, users=2000, items=4000, categories=200)


def written(path: Path, events: list[Event]) -> Path:
    path.write_bytes(b"".join(encode(event) + b"\n" for event in events))
    return path


def shown(n: int, ts: int, items: list[str], propensities: list[float] | None, **more: Any) -> Impression:
    return Impression(
        event_id=f"i{n}", ts=ts, user=f"u{n % 2}", request_id=f"r{n}", items=items, propensities=propensities, **more
    )  # fmt: skip


def decisions(path: Path, reward: Any = "click") -> Decisions:
    return read(open_log("events", path), JoinSettings(), reward)[0]


EVENTS: list[Event] = [
    shown(0, 1_000, ["a", "b"], [0.5, 0.25], positions=[1, 0]),
    Click(event_id="c0", ts=2_000, user="u0", request_id="r0", item="a"),
    Watch(event_id="w0", ts=3_000, user="u0", request_id="r0", item="a", play_ms=1_500, duration_ms=9_000),
    Watch(event_id="w1", ts=4_000, user="u0", request_id="r0", item="a", play_ms=4_000, duration_ms=9_000),
    shown(1, 10_000, ["c"], None, scenario="video"),
    shown(1, 10_500, ["c"], None, scenario="video"),  # the same request and item once more
    Click(event_id="c1", ts=60_000, user="u1", request_id="r1", item="c"),  # later than the wait
    shown(2, 70_000, ["b"], [1.0]),
    Purchase(event_id="p1", ts=3_600_000, user="u1", item="c"),
]


def test_what_was_shown_and_what_it_earned(tmp_path: Path) -> None:
    path = written(tmp_path / "log.jsonl", EVENTS)
    clicks = decisions(path)
    assert [clicks.items[i] for i in clicks.item] == ["b", "a", "c", "b"], "the first place first"
    assert clicks.place.tolist() == [0, 1, 0, 0]
    assert clicks.propensity.tolist() == [0.25, 0.5, pytest.approx(np.nan, nan_ok=True), 1.0]
    assert clicks.reward.tolist() == [0, 1, 1, 0]
    assert clicks.ts.tolist() == [1_000, 1_000, 10_000, 70_000]
    assert [len(set(clicks.cluster[[0, 1, 3]])), len(set(clicks.cluster))] == [1, 2], "users"
    assert decisions(path, "watch").reward.tolist() == [0, 4.0, 0, 0]
    assert decisions(path, "purchase").reward.tolist() == [0, 0, 1, 0]


def test_without_propensities_it_says_so(tmp_path: Path) -> None:
    events: list[Event] = []
    for n in range(200):
        events += [shown(n, 1_000 * n, ["a"], None)]
        events += [Click(event_id=f"c{n}", ts=1_000 * n + 1, user=f"u{n % 2}", request_id=f"r{n}", item="a")] * (
            n % 3 == 0
        )
    log = open_log("events", written(tmp_path / "log.jsonl", events))
    found = estimate(log, EstimateSettings("uniform", JoinSettings(), TrainerSettings()))
    assert found["estimates"]["ips"]["value"] is None
    assert "none of 200 decisions has a propensity" in found["estimates"]["dr"]["why"]
    assert found["estimates"]["dm"]["value"] == pytest.approx(1 / 3, abs=0.05)
    assert found["support"] is None


def test_some_without_propensities_are_left_out_and_many_are_not(tmp_path: Path) -> None:
    def of(without: int) -> dict[str, Any]:
        events: list[Event] = [shown(n, 1_000 * n, ["a"], None if n < without else [1.0]) for n in range(300)]
        log = open_log("events", written(tmp_path / f"{without}.jsonl", events))
        return estimate(log, EstimateSettings("logged", JoinSettings(), TrainerSettings()))

    few, many = of(3), of(30)
    assert few["about"]["without_propensity"] == 3
    assert few["logged"]["n"] == 297
    assert "no propensity" not in few["estimates"]["dr"]["why"]
    assert "30 of 300 decisions have no propensity" in many["estimates"]["dr"]["why"]


def test_a_log_without_impressions_is_refused(public_log: Finder) -> None:
    log = open_log("taobao", public_log("taobao-userbehavior/time_ordered_96k.csv.gz"))
    with pytest.raises(UsageError, match="what was shown"):
        estimate(log, EstimateSettings("uniform", JoinSettings(), TrainerSettings()))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random pages of a shop in which nothing comes and goes."""
    settings = SimulatorSettings(seed=5, users=300, items=40, requests_per_s=20.0, item_life_s=1e6, restock_s=0.1)
    return written(tmp_path_factory.mktemp("shop") / "log.jsonl", list(Simulation(settings, events=15_000)))  # type: ignore[arg-type]


def test_uniform_on_random_pages_is_the_log_itself(world: Path) -> None:
    """What the random policy logs is what the estimator takes for granted: each weight is 1."""
    log = open_log("events", world)
    found = estimate(log, EstimateSettings("uniform", JoinSettings(), TrainerSettings()))
    assert found["support"]["largest_weight"] == pytest.approx(1)
    for name in ("ips", "snips", "dr"):
        one = found["estimates"][name]
        assert one["low"] <= found["logged"]["value"] <= one["high"]
    assert found["estimates"]["ips"]["value"] == pytest.approx(found["logged"]["value"])
    assert found["about"]["clustered_by"] == "user"


def test_headrace_is_trained_on_the_first_part_and_then_fixed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[int] = []

    class Watched(ours.Model):
        def learn(self, rows: Examples) -> None:
            learned.append(int(rows.closed.max()))
            super().learn(rows)

    monkeypatch.setattr(ours, "Model", Watched)
    model = TrainerSettings(batch_size=128, features=SMALL)
    log = open_log("events", world)
    settings = EstimateSettings("headrace", JoinSettings(), model, choice=Choice(temperature=1.0))
    found = estimate(log, settings)
    every = decisions(world)
    assert learned, "some batches are complete before the first decision judged …"
    assert max(learned) < every.ts[len(every) // 2], "… and none else is learned"
    assert found["about"]["judged"] < 0.6 * found["about"]["decisions"]
    assert abs(found["support"]["mean_weight"] - 1) < 0.1
    best = found["estimates"]["dr"]
    assert best["estimable"], best["why"]
    assert best["low"] < best["value"] < best["high"]
    assert found == estimate(log, settings), "the same each time"


# --- Open Bandit: the random log says what the bandit's own click rate is


def test_the_bandits_click_rate_is_found_in_the_random_log(public_log: Finder) -> None:
    """The bandit's log is the truth: 69 clicks of 10,000."""
    truth = estimate(
        open_log("openbandit", public_log(BANDIT)), EstimateSettings("logged", JoinSettings(), TrainerSettings())
    )  # fmt: skip
    assert truth["logged"]["rewards"] == 69
    log, served = open_log("openbandit", public_log(RANDOM)), open_log("openbandit", public_log(BANDIT))
    found = estimate(log, EstimateSettings("served", JoinSettings(), TrainerSettings(), served=served))
    for name in ("ips", "snips", "dr"):
        one = found["estimates"][name]
        assert one["why"] == ""
        assert one["low"] < 0.0069 < one["high"]
    assert found["about"]["clustered_by"] == "request"


def test_what_ten_clicks_cannot_say_is_not_said(public_log: Finder) -> None:
    log = open_log("openbandit", public_log(RANDOM))
    settings = EstimateSettings("popular", JoinSettings(), TrainerSettings(), choice=Choice(epsilon=0.1))
    best = estimate(log, settings)["estimates"]["dr"]
    assert not best["estimable"]
    assert best["low"] is best["high"] is None
