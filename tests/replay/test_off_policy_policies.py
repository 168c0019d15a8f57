"""Target policies: their probabilities are those that a replica draws by, and they are fixed beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from online_model.serving.explore import Epsilon, Softmax
from replay.off_policy import policies
from replay.off_policy.decisions import Decisions
from replay.off_policy.estimate import columns_of
from replay.off_policy.policies import Choice, Scoring
from replay.off_policy.rewards import CrossFitted

ITEMS = 6


def pages(*shown: tuple[int, ...], reward: float = 0.0) -> Decisions:
    """Impressions of these items, the first place first; each place by chance among what is left."""
    item = np.array([item for page in shown for item in page])
    place = np.array([place for page in shown for place in range(len(page))])
    page = np.repeat(np.arange(len(shown)), [len(page) for page in shown])
    n = len(item)
    return Decisions(
        list("abcdef"), item, place, np.zeros(n, np.int64), 1 / (ITEMS - place), np.full(n, reward),
        ts=page * 1000, page=page, cluster=page, example=np.arange(n),
    )  # fmt: skip


def on(target: policies.Target, judged: Decisions) -> policies.Targeted:
    model = CrossFitted(columns_of(judged), judged.reward, judged.cluster, binary=True)
    return target.on(judged, model, lambda share: None)


def test_what_stands_in_the_places_before_cannot_come_again() -> None:
    judged = pages((0, 3, 2), (4,), (5, 1))
    before = [set(np.flatnonzero(row)) for row in judged.before(slice(0, 6))]
    assert before == [set(), {0}, {0, 3}, set(), set(), {5}]
    assert [set(np.flatnonzero(row)) for row in judged.before(slice(2, 6))] == before[2:], "however it is cut"


def test_uniform_on_a_log_of_random_pages_has_weights_of_one() -> None:
    judged = pages((0, 3, 2), (4, 1, 5), (5, 1))
    assert on(policies.uniform(judged), judged).chosen == pytest.approx(judged.propensity)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_softmax_is_the_replicas(temperature: float) -> None:
    scores = np.array([0.5, 0.01, 0.0, 0.2, 0.2, 0.9])
    taken = np.array([False, True, False, False, False, True])
    may = np.flatnonzero(~taken)
    found = Choice(temperature).probabilities(scores[None], taken[None])[0]
    draw, grid = Softmax(scores, temperature), (np.arange(2_000) + 0.5) / 2_000
    reference = {int(may[at]): p for at, p in (draw(may, u, 0.5) for u in grid)}
    assert found.sum() == pytest.approx(1)
    for item, p in reference.items():
        assert found[item] == pytest.approx(p)


def test_epsilon_is_the_replicas() -> None:
    scores = np.array([0.5, 0.01, 0.0, 0.2, 0.2, 0.9])
    taken = np.array([False, True, False, False, False, True])
    found = Choice(epsilon=0.2).probabilities(scores[None], taken[None])[0]
    reference = Epsilon(0.2)
    best_first = [0, 3, 4, 2]
    assert [found[item] for item in best_first] == pytest.approx([reference.propensity(at, 4) for at in range(4)])
    assert found[taken].tolist() == [0, 0]


def test_a_policy_on_many_decisions_is_the_same_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = np.random.default_rng(0)
    judged = pages(*(tuple(dice.permutation(ITEMS)[:3]) for _ in range(50)))
    scores = dice.random((len(judged), ITEMS))
    whole = on(Scoring(lambda rows: scores[rows], Choice()), judged)
    monkeypatch.setattr(policies, "CELLS", 40)
    cut = on(Scoring(lambda rows: scores[rows], Choice()), judged)
    assert (whole.chosen == cut.chosen).all()
    assert whole.expected == pytest.approx(cut.expected)
    assert whole.unseen == pytest.approx(cut.unseen)


def test_unseen_is_the_mass_on_what_was_never_shown() -> None:
    judged = pages((0,), (1,), (0,))
    assert on(policies.uniform(judged), judged).unseen == pytest.approx(4 / 6)


def test_popular_is_made_of_the_first_part_alone() -> None:
    first, judged = pages((0,), (1,), (0,), reward=1.0), pages((2,), (0,), reward=0.0)
    first.reward[1] = 0
    rates = (np.array([2, 0, 0, 0, 0, 0]) + 20 * 2 / 3) / (np.array([2, 1, 0, 0, 0, 0]) + 20)
    expected = rates / rates.sum()
    assert on(policies.popular(first, Choice()), judged).chosen == pytest.approx(expected[[2, 0]])


def test_served_is_what_the_other_log_shows_in_each_place() -> None:
    other = pages((1, 0), (1, 0), (2, 0), (1, 3))
    other.items[3] = "new"
    judged = pages((0,), (1,), (2,)).known(other.items)
    assert judged.items[-1] == "new"
    found = on(policies.served(other, judged, Choice()), judged)
    assert found.chosen == pytest.approx([0, 3 / 4, 1 / 4])


def test_the_log_s_own_policy_has_the_propensities_as_they_are() -> None:
    judged = pages((0, 1), (2, 3))
    found = on(policies.Logged(), judged)
    assert (found.chosen == judged.propensity).all()
    assert found.unseen == 0
