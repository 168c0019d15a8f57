"""`headrace bench end_to_end`: what plain Faust and the bare loop do is the same work, and the balance comes out."""

from __future__ import annotations

import json

import numpy as np
import orjson
import pytest

from deploy.bench.alone import join_alone, together, train_alone
from deploy.bench.common import BenchError
from deploy.bench.mix import START_MS, timed_mix
from deploy.bench.plain_faust import PlainJoin, PlainTrain, batch_of
from deploy.bench.plain_ranker import PlainRanker
from deploy.bench.plain_ranker import batch_of as batch_of_rows
from deploy.cli import run
from online_model.examples import Block, Part
from online_model.history import EMPTY
from online_model.settings import FeatureSettings, RankerSettings, TrainerSettings
from online_model.trainer import open_trainer
from streams.events import Tick, encode
from streams.joiner import JoinSettings

EVENTS, PAGE = 6_000, 10
SPAN_MS = 60_000
JOIN = JoinSettings()
# What `PlainRanker` has: no neighbours, no purchase over all impressions, no clipping.
MODEL = TrainerSettings(
    clip=0.0, exploding=0.0, feedback="none",
    features=FeatureSettings(dim=8, users=4_000, items=8_000),
    ranker=RankerSettings(hidden=16, second=16, third=8, neighbours=False, entire_space=False, watch_quantiles=False),
)  # fmt: skip


@pytest.fixture(scope="module")
def records() -> list[bytes]:
    return [record for _, _, record in timed_mix(EVENTS, PAGE, START_MS, SPAN_MS)]


@pytest.fixture(scope="module")
def block(records: list[bytes]) -> Block:
    """What the joiner makes of it, as one partition."""
    last = encode(Tick(event_id="last", ts=START_MS + SPAN_MS + JOIN.closing_ms))
    blocks, (clock, cpu) = join_alone(JOIN, [[*records, last]])
    assert clock > 0
    assert cpu > 0
    (whole, *others) = blocks
    assert not others, "a slice of the worker's holds all of it"
    return whole


def test_the_plain_ranker_learns_what_the_trainer_does(block: Block, one_thread: None) -> None:
    """Else the reference is of another model."""
    rows = block.examples
    rows = rows.take(np.flatnonzero(rows.part == Part.SHOWN)[:1_500])  # later ones have numbers of when they came
    trainer, plain = open_trainer(MODEL, None, lambda: 0), PlainRanker(MODEL)
    for start in range(0, len(rows), 50):
        part = rows.take(slice(start, start + 50))
        trainer._learn(part)
        batch = batch_of_rows(part)
        plain.learn(plain.ready(*batch))
        plain.count(*batch)
    ours, theirs = trainer._ranker.weights(), plain.ranker.weights()
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        np.testing.assert_allclose(theirs[name], weights, atol=2e-3, err_msg=name)
    assert len(plain._rows["item"]) > 500
    for table in ("user", "item"):
        ids = np.array(list(plain._rows[table])[1:])
        at = trainer.tables.rows(table, ids, admit=False)
        own = plain.tables.weights[table].detach().numpy()[plain.rows(table, ids)]
        learned = trainer.tables.read_rows(table, at)["weights"]
        np.testing.assert_allclose(own, learned, atol=2e-3, err_msg=table)
        assert np.abs(learned).max() > 0.02


def test_the_plain_join_makes_the_rows_of_the_joiner(records: list[bytes], block: Block) -> None:
    join, examples = PlainJoin(JOIN.wait_ms), []
    for record in records:
        examples += join.handle(orjson.loads(record))
    *rest, end = join.handle({"kind": "tick", "ts": START_MS + SPAN_MS + JOIN.closing_ms, "event_id": "last"})
    assert end == {"end": "last"}
    pages = [one for one in [*examples, *rest] if "open" in one]
    ours = block.examples
    shown = ours.part == Part.SHOWN
    assert sum(len(one["items"]) for one in pages) == shown.sum()
    assert sum(sum(one["clicks"]) for one in pages) == (ours.click[shown] == 1).sum() > 0
    late = [one for one in examples if "open" not in one and "clicks" in one]
    assert len(late) >= (ours.part == Part.LATE_CLICK).sum() > 0, "a second click on an item is one more"
    # Features: the states that rows carry, of the first time that each is shown.
    states = {bytes.fromhex(one["state"]) for one in pages}
    assert states == {state.tobytes() for state in ours.history[shown]}


def test_examples_of_json_are_batches_of_rows() -> None:
    page = {"user": "u1", "ts": START_MS, "items": ["a", "b"], "clicks": [0, 1], "open": False, "state": EMPTY.hex()}
    join = PlainJoin(1_000)
    shown = {"kind": "impression", "user": "u1", "ts": START_MS, "items": ["a", "b", "a"], "request_id": "r"}
    assert join.handle(shown) == []
    click = {"kind": "click", "user": "u1", "ts": START_MS + 10, "item": "b", "request_id": "r"}
    assert join.handle(click) == []
    watch = {"kind": "watch", "user": "u1", "ts": START_MS + 2_000, "item": "b", "request_id": "r", "play_ms": 600,
             "duration_ms": 1_000}  # fmt: skip
    first, second = join.handle(watch)
    assert first == page
    assert second["long_view"] is True
    candidates, target, is_page = batch_of([first, second])
    assert candidates.ctx.tolist() == [0, 0, 1]
    assert is_page.tolist() == [True, True, False]
    np.testing.assert_array_equal(target[:, 0], [0, 1, np.nan])
    np.testing.assert_array_equal(target[:, 1], [np.nan, np.nan, 1])


def test_plain_parameters_are_what_was_touched_since(one_thread: None) -> None:
    train = PlainTrain()
    example = {"user": "u", "ts": START_MS, "items": ["a", "b"], "clicks": [0, 1], "open": False, "state": EMPTY.hex()}
    train.learn([example])
    whole, dense = train.parameters(), train.parameters()
    assert train.rows == 2
    assert len(whole) - len(dense) == 3 * (8 + 32 * 4), "a user and two items: their numbers and rows"


def test_two_parts_share_two_cores() -> None:
    assert together(2, 1e-5, 1e-5) == pytest.approx(100_000)
    assert together(2, 1e-5, 4e-5) == pytest.approx(25_000), "the slower one has one core only"
    assert together(2, 3e-5, 3e-5) == pytest.approx(2 / 6e-5)


def test_the_bare_step_learns_all_rows(block: Block, one_thread: None) -> None:
    learned, (clock, cpu) = train_alone(MODEL, [block], [], warm_up=1)
    assert learned == len(block.examples)
    assert clock > 0
    assert cpu > 0
    with pytest.raises(BenchError, match="no more than the warm-up"):
        train_alone(MODEL, [block], [], warm_up=1_000)


@pytest.mark.nightly
@pytest.mark.broker
def test_end_to_end_reports_its_keys_and_loses_nothing(broker: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--events", "10000", "--faust-events", "1000", "--bootstrap", broker, "--json"]
    assert run(["bench", "end_to_end", *arguments]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["handled"] == result["sent"] > 10_000
    assert result["lost"] == result["duplicated"] == 0
    assert result["ratio_to_faust"] == pytest.approx(result["events_per_s"] / result["faust_per_event_per_s"])
    assert result["ratio_to_reference"] == pytest.approx(result["events_per_s"] / result["reference_per_s"])
    assert {"join", "train", "serve", "producer"} <= result["cpu_s"]["headrace"].keys()
    assert {"look_up", "forward", "backward", "commit", "rest"} <= result["trainer_us"].keys()
    assert min(result["trainer_us"].values()) > 0
    clock_us = 1e6 * result["seconds"]["headrace"] / result["events"]
    assert sum(result["trainer_us"].values()) == pytest.approx(clock_us, rel=0.01)
    assert {"join", "train", "producer"} <= result["cpu_s"]["faust_per_event"].keys()
    assert result["faust_rows"] > 1_000
    assert result["faust_batches_per_s"] > 0


def test_lost_examples_are_a_failure(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.bench import end_to_end

    monkeypatch.setattr(end_to_end, "bench_end_to_end", lambda *_: {"lost": 1, "duplicated": 0})
    assert run(["bench", "end_to_end", "--bootstrap", "127.0.0.1:9", "--json"]) == 1
    assert "1 lost" in capfd.readouterr().err
