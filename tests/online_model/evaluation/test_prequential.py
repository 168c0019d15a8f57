"""What of a batch is booked where."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_model import ranker
from online_model.evaluation import Evaluation
from online_model.examples import Examples, Part, Source
from online_model.ranker import CLICK, PURCHASE, WATCH, WAYS
from tests.online_model.evaluation.test_scores import data
from tests.online_model.logs import later, make_rows

HEADS = len(ranker.HEADS)


def target_of(rows):
    target = np.full((len(rows), HEADS), np.nan, np.float32)
    watched = rows.part == Part.WATCH
    target[watched, WATCH] = rows.play_ms[watched] >= 0.5 * rows.duration_ms[watched]
    return target


def batch(seed, n=200):
    """(rows, target, implicit, p, watch_ms) as the trainer has them: two negatives to each implicit row."""
    rng = np.random.default_rng(seed)
    shown, implicit = make_rows(n, seed), make_rows(20, seed + 1_000, source=Source.IMPLICIT)
    clicked = np.flatnonzero(shown.click == 1)
    watched = later(shown, clicked[::2], Part.WATCH, duration_ms=9_000)
    watched.play_ms = rng.integers(0, 9_000, len(watched))
    rows = Examples.concat([
        shown, implicit, watched, later(shown, clicked[::3], Part.PURCHASE, purchase=1),
        later(shown, np.flatnonzero(shown.click == 0)[::9], Part.LATE_CLICK, click=1, purchase=0),
    ])  # fmt: skip
    at = np.flatnonzero((rows.part == Part.SHOWN) & (rows.source == Source.IMPLICIT))
    p = rng.uniform(0.01, 0.6, (len(rows) + 2 * len(at), HEADS)).astype(np.float32)
    watch_ms = rng.uniform(0, 9_000, len(p)).astype(np.float32)
    watch_ms[: len(rows) : 2] = np.nan  # the model has none yet
    return rows, target_of(rows), at, p, watch_ms


def test_each_example_is_scored_once_where_it_was_first_seen():
    evaluation = Evaluation(10_000)
    rows, target, implicit, p, watch_ms = batch(0)
    evaluation.measure(rows, target, implicit, p, watch_ms)
    n, told = len(rows), evaluation.metrics()
    shown = (rows.part == Part.SHOWN) & (rows.source == Source.IMPRESSION)
    late, bought = rows.part == Part.LATE_CLICK, rows.part == Part.PURCHASE
    assert told["click"]["count"] == shown.sum()
    assert told["click"]["positives"] == (rows.click[shown] == 1).sum() + late.sum()
    predicted = p[:n][shown, CLICK].sum()
    assert told["click"]["calibration"] == pytest.approx(predicted / told["click"]["positives"], rel=1e-5)
    clicked = rows.click == 1
    assert (told["purchase"]["count"], told["purchase"]["positives"]) == (clicked.sum(), bought.sum())
    purchases = p[:n][clicked, PURCHASE].sum()
    assert told["purchase"]["calibration"] == pytest.approx(purchases / bought.sum(), rel=1e-5)
    watched = rows.part == Part.WATCH
    assert told["watch"]["count"] == watched.sum()
    assert told["click_sampled"]["count"] == 3 * len(implicit)
    timed = watched & ~np.isnan(watch_ms[:n])
    assert told["watch"]["time"]["count"] == timed.sum()
    errors = np.abs(watch_ms[:n] - rows.play_ms)[timed]
    assert told["watch"]["time"]["mae_ms"] == pytest.approx(errors.mean(), rel=1e-5)


def test_scenarios_add_up_to_all():
    evaluation = Evaluation(10_000)
    for seed in range(3):
        evaluation.measure(*batch(seed))
    told = evaluation.metrics()
    for figures in (*told.values(), told["watch"]["time"]):
        for total, parts in (
            (figures, list(figures["scenarios"].values())),
            (figures["recent"], [f["recent"] for f in figures["scenarios"].values()]),
        ):
            assert total["count"] == sum(part["count"] for part in parts) > 0
            assert total.get("positives", 0) == sum(part.get("positives", 0) for part in parts)


def test_a_ranker_without_watch_time_claims_none():
    evaluation = Evaluation(100)
    evaluation.measure(*batch(0)[:4])
    assert evaluation.metrics()["watch"]["time"]["count"] == 0


def test_drift_sees_the_labels_of_the_moment_in_the_order_of_the_rows():
    evaluation = Evaluation(100)
    for seed in range(200):
        evaluation.measure(*batch(seed, n=64))
    told = evaluation.metrics()
    assert "drift" not in told["purchase"], "its labels are not there yet when it is scored"
    for task in ("click", "click_sampled"):
        assert told[task]["drift"]["examples"] > 10_000
        assert told[task]["drift"]["found"] == 0
    rows, target, implicit, p, watch_ms = batch(0, n=64)
    for _ in range(100):
        evaluation.measure(rows, target, implicit, np.clip(1.6 * p, 0, 0.99), watch_ms)
    assert evaluation.metrics()["click"]["drift"]["rose"] >= 1


def test_restored_all_of_it_goes_on_bit_for_bit():
    whole, first, second = (Evaluation(300) for _ in range(3))
    for seed in range(6):
        whole.measure(*batch(seed))
    for seed in range(3):
        first.measure(*batch(seed))
    second.load(first.state())
    for seed in range(3, 6):
        second.measure(*batch(seed))
    assert second.metrics() == whole.metrics()
    assert {n: a.tobytes() for n, a in second.state().items()} == {n: a.tobytes() for n, a in whole.state().items()}


def test_a_ranking_that_is_switched_on_begins_then_and_is_restored():
    before, after, again = Evaluation(50), Evaluation(50, among=11), Evaluation(50, among=11)
    before.measure(*batch(0))
    after.load(before.state())
    assert after.metrics()["click"]["next_item"]["count"] == 0
    after.ranking.add([np.array([1.0, 4.0])] * len(WAYS))
    again.load(after.state())
    assert again.metrics() == after.metrics()
    assert again.metrics()["click"]["next_item"]["mrr"] == 0.625
    assert "next_item" not in before.metrics()["click"]


def test_sampled_negatives_claim_no_rate():
    key, p, y = data(500)
    evaluation = Evaluation(100)
    evaluation.tasks["click_sampled"].add(key, p, y)
    sampled = evaluation.metrics()["click_sampled"]
    assert sampled["sampled"] is True
    assert sampled["auc"] > 0.5
    assert (sampled["ne"], sampled["calibration"], sampled["recent"]["calibration"]) == (None, None, None)
    assert evaluation.metrics()["click"]["count"] == 0


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1), st.booleans()), max_size=60), st.integers(0, 60))
def test_restored_it_goes_on_bit_for_bit(scores, cut):
    def feed(evaluation, part):
        for key, p, flip in part:
            evaluation.tasks["purchase"].add(np.array([key]), np.array([p]), np.array([0]))
            if flip:
                evaluation.tasks["purchase"].flip(np.array([key // 2]))

    whole, first, second = Evaluation(16), Evaluation(16), Evaluation(16)
    feed(whole, scores)
    feed(first, scores[:cut])
    second.load(first.state())
    feed(second, scores[cut:])
    assert second.metrics() == whole.metrics()
    assert {n: a.tobytes() for n, a in second.state().items()} == {n: a.tobytes() for n, a in whole.state().items()}
