"""Whose pages are made by what: scores by scenario, arms by user, all of it changed while a replica serves."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from online_model.features import CARD
from online_model.serving.holder import Holder
from online_model.serving.policy import PolicyInForce
from online_model.serving.settings import Arm, Exploration, Limits, Policy, ReplicaSettings, Reranking, Scoring
from tests.online_model.serving.world import cards, delta, rank, recommend, replica, world

GREEDY = Exploration(epsilon=0, seed=1)


def in_force(**settings) -> PolicyInForce:
    return PolicyInForce(ReplicaSettings(**settings))


def test_each_scenario_has_its_own_scores():
    policy = Policy(
        live=Scoring(click=0, watch=3, purchase=0), search=Scoring(click=2, watch=0, purchase=0), exploration=GREEDY
    )
    made = replica(world(), policy=policy)
    for r in rank(made, "u1", "live", range(20)).items:
        assert r.score == pytest.approx(3 * r.click * r.watch, rel=1e-5)
    for r in rank(made, "u1", "search", range(20)).items:
        assert r.score == pytest.approx(2 * r.click, rel=1e-5)
    for r in recommend(made, "u1", "shelf", 20).items:
        assert r.score == pytest.approx(r.click * (1 + 0.5 * r.watch + 2 * r.purchase), rel=1e-5)


def test_what_a_purchase_brings_counts_by_its_power_and_no_price_is_a_price_of_one():
    made = replica(world(), policy=Policy(shelf=Scoring(click=0, watch=0, purchase=2, price_power=0.5)))
    made.apply(delta(2, blobs={CARD: cards(range(5), price=[100.0, 4.0, 0.0, 0.25, None])}))
    expected = {0: 10, 1: 2, 2: 0, 3: 0.5, 4: 1, 9: 1, "unknown": 1}
    for r in rank(made, "u1", "shelf", expected).items:
        assert r.score == pytest.approx(2 * r.click * r.purchase * expected[r.item], rel=1e-5)
    made.apply(delta(3, blobs={CARD: cards([0], price=9)}))
    (r,) = rank(made, "u1", "shelf", [0]).items
    assert r.score == pytest.approx(2 * r.click * r.purchase * 3, rel=1e-5)


def test_pages_keep_to_the_rules_of_the_cards():
    made = replica(world(12), policy=Policy(exploration=GREEDY, reranking=Reranking(category_gap=2, seller_cap=3)))
    of = [i % 4 for i in range(12)]
    made.apply(delta(2, blobs={CARD: cards(range(12), category=of, seller=["s", "t", "u"] * 4)}))
    page = [s.item for s in recommend(made, "u1", "shelf", 9).items]
    assert len(page) == 9
    for place, item in enumerate(page):
        assert of[item] not in [of[before] for before in page[max(0, place - 2) : place]]
    assert max(np.bincount([item % 3 for item in page])) <= 3
    plain = replica(world(12), policy=Policy(exploration=GREEDY))
    assert page != [s.item for s in recommend(plain, "u1", "shelf", 9).items]


@pytest.mark.parametrize("policy", ["softmax", "thompson"])
def test_a_page_is_drawn_by_the_policy_of_the_settings(policy):
    made = replica(world(), policy=Policy(exploration=Exploration(policy=policy, temperature=0.5, seed=1)))
    pages = [[s.item for s in recommend(made, "u1", "shelf", 5).items] for _ in range(50)]
    assert len(set(map(tuple, pages))) > 10
    answer = recommend(made, "u1", "shelf", 5)
    assert all(0 < s.propensity < 1 for s in answer.items)
    best = [r.item for r in rank(made, "u1", "shelf", range(40)).items]
    ranks = [best.index(item) for page in pages for item in page]
    assert np.mean(ranks) < 15, "the better come more often"


def test_thompson_doubts_what_was_shown_little_more():
    first = world()
    rows = first.tables["item"]
    rows.columns["impressions"][:] = np.where(np.arange(40) < 20, 100_000, 0)
    rows.columns["clicks"][:] = np.where(np.arange(40) < 20, 20_000, 0)
    made = replica(first)
    ids = rows.ids
    p = np.full((40, 4), 0.2, np.float32)
    sd = made._scorer.spread(p, ids, Scoring(), 0.5)
    gain, slope = 1 + 0.5 * 0.2 + 2 * 0.2, 0.2 * 0.8
    new = slope * np.array([gain, 0.2 * 0.5, 0.2 * 2.0]) * 0.5
    assert sd[20:] == pytest.approx(np.sqrt((new**2).sum()), rel=1e-5)
    known = slope * np.array([gain, 0.2 * 0.5, 0.2 * 2.0]) / np.sqrt(4 + slope * np.array([1e5, 2e4, 2e4]))
    assert sd[:20] == pytest.approx(np.sqrt((known**2).sum()), rel=1e-5)


ARMS = [Arm(name="a", share=0.2, scoring=Scoring(click=5)), Arm(name="b", share=0.3, reranking=Reranking(seller_cap=1))]


def test_users_are_dealt_out_by_the_shares_and_stay_where_they_are():
    force = in_force(experiment="first", arms=ARMS)
    arms = [force.of(f"u{i}").arm for i in range(20_000)]
    shares = {arm: arms.count(arm) / 20_000 for arm in ("a", "b", "")}
    assert shares == pytest.approx({"a": 0.2, "b": 0.3, "": 0.5}, abs=0.015)
    assert [in_force(experiment="first", arms=ARMS).of(f"u{i}").arm for i in range(500)] == arms[:500]
    other = [in_force(experiment="second", arms=ARMS).of(f"u{i}").arm for i in range(2_000)]
    both = sum(a == b == "a" for a, b in zip(arms, other, strict=False)) / 2_000
    assert both == pytest.approx(0.2 * 0.2, abs=0.02), "another experiment deals anew"
    assert force.of(7).arm == force.of("7").arm, "7 and '7' are one user"


def test_an_arm_is_as_the_policy_in_what_it_does_not_say():
    shared = Policy(video=Scoring(click=2), exploration=GREEDY)
    force = in_force(experiment="x", arms=ARMS, policy=shared)
    by_arm = {(chosen := force.of(f"u{i}")).arm: chosen for i in range(100)}
    assert {by_arm["a"].scoring(scenario).click for scenario in ("live", "video", "search", "shelf")} == {5}
    assert by_arm["b"].scoring("video").click == 2
    assert (by_arm["a"].reranking, by_arm["b"].reranking) == (Reranking(), Reranking(seller_cap=1))
    assert {chosen.exploration for chosen in by_arm.values()} == {GREEDY}


def test_answers_name_the_arm_and_are_made_by_it():
    made = replica(world(), policy=Policy(exploration=GREEDY), experiment="x", arms=ARMS)
    for i in range(40):
        user = f"someone {i}"
        ranking, page = rank(made, user, "shelf", range(5)), recommend(made, user, "shelf", 5)
        assert ranking.arm == page.arm == made.policy.of(user).arm
        for r in [*ranking.items, *page.items]:
            click = 5 if ranking.arm == "a" else 1
            assert r.score == pytest.approx(r.click * (click + 0.5 * r.watch + 2 * r.purchase), rel=1e-5)
    assert rank(replica(world()), "u1", "shelf", [1]).arm == ""


@pytest.mark.parametrize(
    ("arms", "why"),
    [
        ([("a", 0.7), ("b", 0.4)], "the shares of the arms are 1.1 together"),
        ([("a", 0.1)] * 2, "two arms have one name"),
    ],
)
def test_arms_that_cannot_be_are_refused_in_one_line(arms, why):
    raw = {"arms": [{"name": name, "share": share} for name, share in arms]}
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert(raw, ReplicaSettings)
    tenths = [Arm(name=str(i), share=0.1) for i in range(10)]
    assert ReplicaSettings(arms=tenths).arms == tenths, "ten tenths are one, whatever floats make of it"


def test_what_is_changed_holds_from_the_next_request_on_and_in_replicas_that_come_later():
    holder = Holder(replica(world(), policy=Policy(exploration=GREEDY)))
    before = rank(holder.replica, "u1", "shelf", [1]).items[0]
    fingerprint = holder.replica.info().policy
    new = ReplicaSettings(policy=Policy(shelf=Scoring(click=7, watch=0, purchase=0)), limits=Limits(waiting=3))
    holder.policy.change(new)
    assert rank(holder.replica, "u1", "shelf", [1]).items[0].score == pytest.approx(7 * before.click, rel=1e-5)
    assert holder.replica.info().policy != fingerprint
    assert holder.policy.limits.waiting == 3
    holder.swap(replica(world()))
    assert rank(holder.replica, "u1", "shelf", [1]).items[0].score == pytest.approx(7 * before.click, rel=1e-5)
    assert holder.replica.info().policy == holder.policy.fingerprint == PolicyInForce(new).fingerprint
