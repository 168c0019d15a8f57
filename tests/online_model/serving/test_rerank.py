"""Rules of a page: what they forbid, and what gives way where nothing else is left."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from online_model.serving.explore import Epsilon, fill
from online_model.serving.rerank import Rules
from online_model.serving.settings import Reranking


def plain_page(k: int, gap: int, cap: int, category: list[int], seller: list[int]) -> list[int]:
    """The best first, one place after the other, out of lists."""
    page: list[int] = []
    while len(page) < min(k, len(category)):
        left = [c for c in range(len(category)) if c not in page]
        near = [category[c] for c in page[max(0, len(page) - gap) :]]
        sold = [seller[c] for c in page]
        gap_ok = [c for c in left if not category[c] or category[c] not in near]
        cap_ok = [c for c in left if not seller[c] or not cap or sold.count(seller[c]) < cap]
        page.append(([c for c in gap_ok if c in cap_ok] or cap_ok or gap_ok or left)[0])
    return page


candidates = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=25)


@given(candidates, st.integers(1, 30), st.integers(0, 4), st.integers(0, 3))
def test_a_page_is_what_the_rules_make_of_it_one_place_after_the_other(made, k, gap, cap):
    category, seller = ([one[i] for one in made] for i in range(2))
    rules = Rules(Reranking(category_gap=gap, seller_cap=cap), np.array(category), np.array(seller))
    page = fill(k, len(made), rules, Epsilon(0.0), np.random.default_rng(0))
    assert page.shown == plain_page(k, gap, cap, category, seller)
    assert set(page.propensities) == {1.0}


@given(candidates, st.integers(0, 4), st.integers(0, 3), st.integers(0, 99))
def test_whoever_explores_keeps_to_the_rules_as_far_as_there_are_candidates(made, gap, cap, seed):
    category, seller = (np.array([one[i] for one in made]) for i in range(2))
    rules = Rules(Reranking(category_gap=gap, seller_cap=cap), category, seller)
    shown = fill(10, len(made), rules, Epsilon(0.8), np.random.default_rng(seed)).shown
    for place, candidate in enumerate(shown):
        left = [c for c in range(len(made)) if c not in shown[:place]]
        near, sold = category[shown[max(0, place - gap) : place]], seller[shown[:place]].tolist()

        def keeps(c: int, near: np.ndarray = near, sold: list = sold) -> bool:
            capped = cap and seller[c] and sold.count(seller[c]) >= cap
            return not capped and not (gap and category[c] and category[c] in near)

        assert keeps(candidate) or not any(map(keeps, left))
