"""The dense part: shapes, what a place means, what is served, and what the heads learn from."""

import numpy as np
import pytest
import torch

from embedding_store.errors import UsageError
from online_model.features import CLICK_PRIOR, CONTEXT, DENSE
from online_model.feedback import probabilities, strategy
from online_model.history import HISTORY
from online_model.losses import labels, loss_sum
from online_model.ranker import CLICK, HEADS, PURCHASE, SCENARIO_COUNT, Ranker
from online_model.settings import RankerSettings
from streams.events import SCENARIOS
from tests.online_model.logs import make_rows

D = 8
SERVED = strategy("calibrated")


def inputs(contexts=3, candidates=7, seed=0):
    """Random inputs of a forward pass but the positions."""
    g = torch.Generator().manual_seed(seed)
    return {
        "user": torch.randn(contexts, D, generator=g), "history_mean": torch.randn(contexts, D, generator=g),
        "context": torch.randn(contexts, CONTEXT, generator=g),
        "item": torch.randn(candidates, D, generator=g), "category": torch.randn(candidates, D, generator=g),
        "dense": torch.randn(candidates, DENSE, generator=g), "scenario": torch.arange(candidates) % 4,
        "ctx": torch.arange(candidates) % contexts,
    }  # fmt: skip


@pytest.fixture
def ranker():
    """One whose parameters are all random, as after some learning."""
    ranker = Ranker(D, RankerSettings(hidden=16, second=8))
    with torch.no_grad():
        for p in ranker.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 4)
        ranker.place.weight[0] = 0
    return ranker


def test_there_are_as_many_scenarios_as_events_know():
    assert len(SCENARIOS) == SCENARIO_COUNT


def test_a_shared_context_scores_as_one_of_its_own(ranker):
    x = inputs()
    shared = ranker(**x, position=None)
    assert shared.shape == (7, len(HEADS))
    own = {**x, **{name: x[name][x["ctx"]] for name in ("user", "history_mean", "context")}, "ctx": torch.arange(7)}
    assert torch.allclose(ranker(**own, position=None), shared, atol=1e-6)


def test_a_place_moves_the_click_only_and_is_relative_to_the_first(ranker):
    x = inputs()
    none = ranker(**x, position=None)
    for first in (0, -1):
        assert torch.equal(ranker(**x, position=torch.full((7,), first)), none)
    down = ranker(**x, position=torch.full((7,), 5))
    assert torch.equal(down[:, 1:], none[:, 1:])
    assert not torch.isclose(down[:, CLICK], none[:, CLICK]).any()
    assert torch.equal(ranker(**x, position=torch.full((7,), 30_000)), ranker(**x, position=torch.full((7,), 63)))


def test_the_first_place_learns_nothing(ranker):
    ranker(**inputs(), position=torch.tensor([0, -1, 1, 2, 0, 0, 3])).sum().backward()
    gradient = ranker.place.weight.grad[:, 0]
    assert (gradient[:4] != 0).tolist() == [False, True, True, True]


def test_query_gives_the_match_by_a_dot_product(ranker):
    x = inputs()
    with torch.no_grad():
        for p in ranker.parameters():
            p.zero_()
        ranker.from_history.weight.copy_(torch.randn(D, D))
        ranker.match[CLICK] = 1
    match = (ranker.query(x["user"], x["history_mean"])[x["ctx"]] * (x["item"] + x["category"])).sum(1)
    assert torch.allclose(ranker(**x, position=None)[:, CLICK], match, atol=1e-6)


def test_the_first_scores_are_the_click_rate():
    ranker = Ranker(D, RankerSettings())
    zeros = {k: v * 0 for k, v in inputs().items()}
    p = probabilities(ranker(**zeros, position=None), SERVED)[:, CLICK]
    assert p.tolist() == pytest.approx([CLICK_PRIOR] * 7, rel=0.15)


def test_new_inputs_weigh_nothing_at_first_and_learn_from_the_first_step():
    ranker = Ranker(D, RankerSettings())
    x = inputs()
    other = ranker(**{**x, "context": x["context"] + 3}, position=None)
    assert torch.equal(other, ranker(**x, position=None))
    other.sum().backward()
    assert (ranker.from_moment.weight.grad != 0).any()


def test_entries_of_a_history_weigh_the_same_at_first_and_what_is_not_there_nothing(ranker):
    kinds = torch.zeros((3, HISTORY), dtype=torch.int64)
    kinds[1, :4], kinds[2, [0, 14]] = torch.tensor([1, 2, 1, 1]), torch.tensor([1, 5])
    recency = torch.rand((3, HISTORY), generator=torch.Generator().manual_seed(1))
    first = Ranker(D, RankerSettings()).history_weights(kinds, recency)
    assert torch.allclose(first, (kinds > 0) / (kinds > 0).sum(1, keepdim=True).clamp(min=1))
    learned = ranker.history_weights(kinds, recency)
    assert learned.sum(1).tolist() == pytest.approx([0, 1, 1])
    assert not learned[kinds == 0].any()
    odds = ranker.past_kind[5] - ranker.past_kind[1] + ranker.past_recency * (recency[2, 14] - recency[2, 0])
    assert (learned[2, 14] / learned[2, 0]).item() == pytest.approx(torch.exp(odds).item(), rel=1e-4)


def test_the_purchase_served_is_corrected_for_fake_negatives():
    biased = torch.tensor([0.1, 0.5, 0.9])
    logits = torch.zeros(3, 3)
    logits[:, PURCHASE] = torch.logit(biased)
    assert probabilities(logits, SERVED)[:, PURCHASE].tolist() == pytest.approx([0.1 / 0.9, 1.0, 1.0], rel=1e-5)
    assert torch.isfinite(probabilities(torch.full((1, 3), 1e30), SERVED)).all()


def test_weights_go_there_and_back_and_the_seed_makes_them(ranker):
    other = Ranker(D, RankerSettings(hidden=16, second=8, seed=1))
    assert (other.weights()["from_item.weight"] != ranker.weights()["from_item.weight"]).any()
    other.load_weights(ranker.weights())
    assert torch.equal(other(**inputs(), position=None), ranker(**inputs(), position=None))
    again = [Ranker(D, RankerSettings()).weights() for _ in range(2)]
    assert all((again[0][n] == again[1][n]).all() for n in again[0])
    with pytest.raises(UsageError, match="settings"):
        Ranker(D, RankerSettings(hidden=32)).load_weights(ranker.weights())
    with pytest.raises(UsageError, match="settings"):
        ranker.load_weights({})


def test_labels_say_only_what_the_row_says():
    rows = make_rows(6)
    rows.click[:] = [1, 0, -1, -1, -1, -1]
    rows.purchase[:] = [0, -1, 1, -1, -1, -1]
    rows.play_ms[:] = [-1, -1, -1, 5, 4, 9]
    rows.duration_ms[:] = [-1, -1, -1, 10, 10, 0]
    nan = np.nan
    expected = [[1, nan, 0], [0, nan, nan], [nan, nan, 1], [nan, 1, nan], [nan, 0, nan], [nan, nan, nan]]
    assert np.array_equal(labels(rows, SERVED), np.array(expected, np.float32), equal_nan=True)


def test_the_loss_is_a_sum_over_what_is_said():
    logits = torch.tensor([[0.3, 9.0, -1.0], [2.0, 5.0, 5.0]], requires_grad=True)
    target = torch.tensor([[1.0, torch.nan, 0.0], [torch.nan, torch.nan, torch.nan]])
    loss = loss_sum(logits, target, torch.ones_like(logits))
    assert loss.item() == pytest.approx(float(np.log1p(np.exp(-0.3)) + np.log1p(np.exp(-1.0))))
    loss.backward()
    assert (logits.grad != 0).tolist() == [[True, False, True], [False, False, False]]
