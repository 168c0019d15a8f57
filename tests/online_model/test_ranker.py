"""The dense part: shapes, what each part is, what a place means, what is served, and what the heads learn from."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from embedding_store.errors import UsageError
from online_model.examples import Part, Source
from online_model.features import CLICK_PRIOR, CONTEXT, NUMBERS
from online_model.feedback import probabilities, strategy
from online_model.history import HISTORY
from online_model.losses import labels, loss_sum, retrieval_loss
from online_model.neighbours import NEIGHBOURS
from online_model.ranker import (
    CLICK,
    HEADS,
    PURCHASE,
    RATED_OF,
    SCENARIO_COUNT,
    WATCH,
    WATCH_TIME,
    Contexts,
    Items,
    Ranker,
    _bent,
)
from online_model.settings import WIDTHS, RankerSettings
from online_model.watching import BINS, GROUPS
from streams.events import SCENARIOS
from tests.online_model.logs import make_rows

D = 8
SERVED, ENTIRE = strategy("calibrated"), strategy("calibrated", entire=True)
SMALL = RankerSettings(hidden=16, second=8, third=8, attention=True, gates=True, experts=3)
PARTS = [{}, {"attention": False}, {"gates": False}, {"experts": 1}, {"matches": False}, {"neighbours": False}]


def inputs(contexts=3, candidates=7, seed=0, position=None):
    """Random inputs of a forward pass; the third of the users has done nothing yet."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randint(1, 6, (contexts, HISTORY), generator=g)
    kinds[:, 5:9] = 0
    kinds[2:3] = 0
    there = kinds > 0
    return Contexts(
        user=torch.randn(contexts, D, generator=g),
        entries=torch.randn(contexts, HISTORY, D, generator=g) * there.unsqueeze(2), kinds=kinds,
        recency=torch.rand(contexts, HISTORY, generator=g) * there, query=torch.randn(contexts, D, generator=g),
        moment=torch.randn(contexts, CONTEXT, generator=g), scenario=torch.arange(contexts) % 4,
    ), Items(
        item=torch.randn(candidates, D, generator=g), content=torch.randn(candidates, D, generator=g),
        numbers=torch.randn(candidates, NUMBERS, generator=g), near=torch.randn(candidates, NEIGHBOURS, generator=g),
        position=position,
        ctx=torch.arange(candidates) % contexts,
    )  # fmt: skip


def each_by_itself(contexts: Contexts, items: Items) -> tuple[Contexts, Items]:
    """The same candidates, each in a context of its own."""
    own = Contexts(**{name: column[items.ctx] for name, column in vars(contexts).items()})
    return own, replace(items, ctx=torch.arange(len(items.ctx)))


def randomised(ranker: Ranker) -> Ranker:
    """All parameters random, as after some learning."""
    with torch.no_grad():
        for p in ranker.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 4)
        ranker.place.weight[0] = 0
    return ranker


@pytest.fixture
def ranker():
    return randomised(Ranker(D, SMALL))


def test_there_are_as_many_scenarios_as_events_know():
    assert len(SCENARIOS) == SCENARIO_COUNT


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_a_shared_context_scores_as_one_of_its_own(parts):
    ranker = randomised(Ranker(D, msgspec.structs.replace(SMALL, **parts), extra=2))
    x = inputs()
    shared = ranker(*x)
    assert shared.shape == (7, len(HEADS) + 2)
    assert torch.allclose(ranker(*each_by_itself(*x)), shared, atol=1e-5)
    one = inputs(contexts=1)
    assert torch.allclose(ranker(*each_by_itself(*one)), ranker(*one), atol=1e-5), "one user's are scored at once"


@pytest.mark.parametrize("part", [part for part in PARTS if part])
def test_a_part_that_is_left_out_takes_its_weights_along_and_matters(part):
    whole, without = Ranker(D, SMALL), Ranker(D, msgspec.structs.replace(SMALL, **part))
    if part not in ({"matches": False}, {"neighbours": False}):
        assert without.weights().keys() < whole.weights().keys() or part == {"experts": 1}
        assert sum(w.size for w in without.weights().values()) < sum(w.size for w in whole.weights().values())
    whole, without = randomised(whole), randomised(without)
    assert not torch.allclose(whole(*inputs()), without(*inputs()))


def test_the_sizes_are_as_said():
    count = {size: sum(p.numel() for p in Ranker(32, RankerSettings(size=size)).parameters()) for size in WIDTHS}
    assert RankerSettings().widths == (256, 256, 128)
    assert 800_000 < count["base"] < 1_200_000
    assert RankerSettings(hidden=4).widths == (4, 256, 128)


def test_attention_is_a_softmax_over_the_entries_and_nothing(ranker):
    contexts, items = inputs()
    got = ranker._attended(contexts, items.item + items.content, items.ctx)
    for n, c in enumerate(items.ctx.tolist()):
        vector, logits, entries = items.item[n] + items.content[n], [torch.zeros(())], [torch.zeros(D)]
        for entry, kind, recency in zip(contexts.entries[c], contexts.kinds[c], contexts.recency[c], strict=True):
            if kind:
                bias = ranker.attend_kind[kind] + recency * ranker.attend_recency[0]
                logits.append(ranker.attend.weight @ vector @ entry + bias)
                entries.append(entry)
        expected = torch.softmax(torch.stack(logits), 0) @ torch.stack(entries)
        assert torch.allclose(got[n], expected, atol=1e-5)
    assert not got[items.ctx == 2].any(), "who has done nothing attends to nothing"


def test_tasks_mix_the_experts_each_for_itself(ranker):
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    logits = ranker._tasks(x)
    experts = _bent(ranker.experts(x)).view(5, SMALL.experts, 8)
    for head in range(len(HEADS)):
        weights = torch.softmax(ranker.mixture(x).view(5, SMALL.experts, len(HEADS))[:, :, head], 1)
        mixed = (weights.unsqueeze(2) * experts).sum(1)
        assert torch.allclose(logits[:, head], mixed @ ranker.heads[head], atol=1e-5)


def test_gates_are_open_at_first_and_hang_on_the_scenario_but_never_move_the_user():
    ranker = Ranker(D, SMALL)
    contexts, _ = inputs()
    assert torch.equal(ranker._gates(contexts), torch.ones(3, 16))
    contexts.user.requires_grad_()
    gates = randomised(ranker)._gates(contexts)
    other = ranker._gates(replace(contexts, scenario=(contexts.scenario + 1) % 4))
    assert not torch.isclose(gates, other).all(1).any()
    gates.sum().backward()
    assert contexts.user.grad is None


def test_a_place_moves_the_click_only_and_is_relative_to_the_first(ranker):
    none = ranker(*inputs())
    for first in (0, -1):
        assert torch.equal(ranker(*inputs(position=torch.full((7,), first))), none)
    down = ranker(*inputs(position=torch.full((7,), 5)))
    assert torch.equal(down[:, 1:], none[:, 1:])
    assert not torch.isclose(down[:, CLICK], none[:, CLICK]).any()
    far = [ranker(*inputs(position=torch.full((7,), place))) for place in (63, 30_000)]
    assert torch.equal(*far)


def test_the_first_place_learns_nothing(ranker):
    ranker(*inputs(position=torch.tensor([0, -1, 1, 2, 0, 0, 3]))).sum().backward()
    gradient = ranker.place.weight.grad[:, 0]
    assert (gradient[:4] != 0).tolist() == [False, True, True, True]


def test_at_first_the_towers_say_what_the_match_does():
    ranker = Ranker(D, SMALL)
    contexts, _ = inputs()
    query = ranker.query(contexts, ranker.history_mean(contexts))
    a, b = ranker.towers(contexts)
    assert torch.equal(a, query)
    assert torch.equal(b, query)


def test_the_first_scores_are_the_click_rate():
    contexts, items = inputs()
    zeros = Contexts(**{k: v * 0 for k, v in vars(contexts).items()})
    nothing = replace(items, item=items.item * 0, content=items.content * 0, numbers=items.numbers * 0)
    p = probabilities(Ranker(D, RankerSettings())(zeros, nothing), SERVED)[:, CLICK]
    assert p.tolist() == pytest.approx([CLICK_PRIOR] * 7, rel=0.15)


def test_the_rates_of_the_first_rows_are_what_scores_start_from_and_then_they_stay():
    ranker, nan = Ranker(D, RankerSettings()), float("nan")
    target = torch.tensor([[1, nan], [1, 1], [0, nan], [nan, 0], [1, 1]], dtype=torch.float32)
    ranker.count_rates(target, torch.tensor([1.0, 2.0, 5.0, 1.0, 1.0]))
    assert ranker.rates().tolist() == pytest.approx([(4 + 1) / (9 + 20), (3 + 10) / (4 + 20)])
    contexts, items = inputs()
    before = ranker(contexts, items)
    ranker.count_rates(target[:1], torch.tensor([RATED_OF]))
    moved = ranker(contexts, items) - before
    assert moved[:, CLICK].tolist() == pytest.approx([np.log(3_005 / 24) - np.log(5 / 24)] * 7, abs=1e-4)
    assert torch.equal(moved[:, CLICK + 1 :], torch.zeros_like(moved[:, CLICK + 1 :]))
    kept = ranker.rates()[CLICK]
    ranker.count_rates(target, torch.ones(5))
    assert ranker.rates()[CLICK] == kept


def test_users_items_and_content_have_a_weight_of_their_own_in_the_click():
    ranker = Ranker(D, SMALL)
    with torch.no_grad():
        for weights in (ranker.heads, ranker.match):
            weights.zero_()
    contexts, items = inputs()
    logits = ranker(contexts, items)
    user, item, content = contexts.user.clone(), items.item.clone(), items.content.clone()
    user[:, 0], item[:, 0], content[:, 0] = user[:, 0] + 1, item[:, 0] + 2, content[:, 0] + 4
    more = ranker(replace(contexts, user=user), replace(items, item=item, content=content)) - logits
    assert more[:, CLICK].tolist() == pytest.approx([0.7 + 2 * 0.3 + 4 * 0.3] * 7, abs=1e-5)
    assert not more[:, CLICK + 1 :].any()


def test_new_inputs_weigh_nothing_at_first_and_learn_from_the_first_step():
    ranker = Ranker(D, msgspec.structs.replace(SMALL, gates=False))
    contexts, items = inputs()
    other = ranker(replace(contexts, moment=contexts.moment + 3), items)
    assert torch.equal(other, ranker(contexts, items))
    other.sum().backward()
    assert (ranker.from_moment.weight.grad != 0).any()


def test_entries_of_a_history_weigh_the_same_at_first_and_what_is_not_there_nothing(ranker):
    contexts, _ = inputs()
    contexts.kinds[:] = 0
    contexts.kinds[1, :4], contexts.kinds[2, [0, 14]] = torch.tensor([1, 2, 1, 1]), torch.tensor([1, 5])
    contexts.entries[:] = torch.randn(contexts.entries.shape, generator=torch.Generator().manual_seed(4))
    first = Ranker(D, RankerSettings()).history_mean(contexts)
    assert torch.allclose(first[1], contexts.entries[1, :4].mean(0), atol=1e-6)
    learned = ranker.history_mean(contexts)
    assert not learned[0].any()
    odds = ranker.past_kind[5] - ranker.past_kind[1]
    odds = torch.exp(odds + ranker.past_recency * (contexts.recency[2, 14] - contexts.recency[2, 0]))
    expected = (contexts.entries[2, 0] + odds * contexts.entries[2, 14]) / (1 + odds)
    assert torch.allclose(learned[2], expected, atol=1e-5)


def test_the_purchase_served_is_corrected_for_fake_negatives():
    biased = torch.tensor([0.1, 0.5, 0.9])
    logits = torch.zeros(3, 4)
    logits[:, PURCHASE] = torch.logit(biased)
    assert probabilities(logits, SERVED)[:, PURCHASE].tolist() == pytest.approx([0.1 / 0.9, 1.0, 1.0], rel=1e-5)
    assert torch.isfinite(probabilities(torch.full((1, 4), 1e30), SERVED)).all()


def test_weights_go_there_and_back_and_the_seed_makes_them(ranker):
    other = Ranker(D, msgspec.structs.replace(SMALL, seed=1))
    assert (other.weights()["from_item.weight"] != ranker.weights()["from_item.weight"]).any()
    other.load_weights(ranker.weights())
    assert torch.equal(other(*inputs()), ranker(*inputs()))
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
    nan, plays = np.nan, np.zeros((GROUPS, BINS), np.float32)
    expected = [[1, nan, 0], [0, nan, nan], [nan, nan, 1], [nan, 1, nan], [nan, 0, nan], [nan, nan, nan]]
    got = labels(rows, SERVED, plays)
    assert np.array_equal(got[:, [CLICK, WATCH, PURCHASE]], np.array(expected, np.float32), equal_nan=True)
    assert np.isnan(got[:, WATCH_TIME]).tolist() == [True] * 3 + [False] * 3
    assert np.isnan(labels(rows, SERVED)[:, WATCH_TIME]).all()


def test_over_all_impressions_each_has_a_negative_at_first_sight_and_none_twice():
    rows = make_rows(4)
    rows.part[:] = [Part.SHOWN, Part.SHOWN, Part.LATE_CLICK, Part.PURCHASE]
    rows.click[:], rows.purchase[:] = [1, 0, 1, -1], [0, -1, 0, 1]
    assert np.array_equal(labels(rows, ENTIRE)[:, PURCHASE], [0, 0, np.nan, 1], equal_nan=True)
    rows.source[:] = Source.IMPLICIT
    assert np.array_equal(labels(rows, ENTIRE)[:, PURCHASE], [0, np.nan, 0, 1], equal_nan=True)


@pytest.mark.parametrize("feedback", ["none", "calibrated", "weighted"])
def test_over_all_impressions_the_expected_gradient_is_zero_at_the_truth_and_nowhere_else(feedback):
    """Of an impression with a purchase's probability q there are 1 negative and q more positives (none: 1 row)."""
    how = strategy(feedback, entire=True)
    for truth in (0.01, 0.2, 0.7):
        signs = []
        for f in (0.5 * truth, truth, min(0.99, 1.3 * truth)):
            log_p = torch.tensor([f]).log().requires_grad_()
            rows = {0.0: 1 - truth, 1.0: truth} if feedback == "none" else {0.0: 1.0, 1.0: truth}
            loss = torch.zeros(())
            for label, often in rows.items():
                target = torch.tensor([[label]])
                weight = how.weights(target, log_p.detach().exp()[:, None])
                loss = loss + often * loss_sum(how.over_impressions(log_p)[:, None], target, weight)
            loss.backward()
            signs.append(float(log_p.grad))
        assert signs[0] < -1e-4
        assert abs(signs[1]) < 1e-5
        assert signs[2] > 1e-4


def test_retrieval_tells_the_positive_from_other_items_less_what_sampling_adds():
    logits = torch.tensor([[2.0, 1.0, 0.5, 3.0], [0.0, 1.0, 4.0, 1.0]])
    items, sampled = torch.tensor([7, 8, 7, 9]), torch.tensor([-1.0, -2.0, -1.0, -3.0])
    loss = retrieval_loss(logits, torch.tensor([0, 3]), sampled, items, torch.tensor([1.0, 2.0]))
    first = np.exp([2.0 + 1, 1.0 + 2, 3.0 + 3])  # column 2 is the same item
    second = np.exp([0.0 + 1, 1.0 + 2, 4.0 + 1, 1.0 + 3])
    expected = -np.log(first[0] / first.sum()) - 2 * np.log(second[3] / second.sum())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_a_sum_over_what_is_said():
    logits = torch.tensor([[0.3, 9.0, -1.0], [2.0, 5.0, 5.0]], requires_grad=True)
    target = torch.tensor([[1.0, torch.nan, 0.0], [torch.nan, torch.nan, torch.nan]])
    loss = loss_sum(logits, target, torch.ones_like(logits))
    assert loss.item() == pytest.approx(float(np.log1p(np.exp(-0.3)) + np.log1p(np.exp(-1.0))))
    loss.backward()
    assert (logits.grad != 0).tolist() == [[True, False, True], [False, False, False]]
