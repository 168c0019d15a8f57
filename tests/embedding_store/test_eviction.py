"""The rows that leave memory are those that the policy names."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_store.eviction import lowest, policy
from embedding_store.specs import RowRules

ROWS = np.array([1, 2, 3])


@pytest.mark.parametrize(
    ("evict", "order"),
    [("lru", [1, 2, 3]), ("lfu", [3, 2, 1]), ("score", [1, 3, 2])],
)
def test_each_policy_has_its_order(evict: str, order: list[int]) -> None:
    """1 was used most, but long ago; 2 less, and later; 3 once, at last."""
    usage = policy(RowRules(evict=evict, evict_half_life=10), 3)
    usage.enter(ROWS, 1)
    for tick in range(2, 8):
        usage.use(np.array([1, 1]), tick)
    for tick in range(60, 63):
        usage.use(np.array([2]), tick)
    usage.use(np.array([3]), 64)
    assert ROWS[np.argsort(usage.rank(ROWS, 65))].tolist() == order


@pytest.mark.parametrize("evict", ["lfu", "score"])
def test_a_row_that_another_id_gets_begins_anew(evict: str) -> None:
    usage = policy(RowRules(evict=evict, evict_half_life=10), 3)
    usage.enter(ROWS, 1)
    for tick in range(2, 9):
        usage.use(ROWS, tick)
    usage.enter(np.array([2]), 9)
    assert usage.rank(ROWS, 9).argmin() == 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_the_lowest_are_those_of_a_stable_sort(rank: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(rank)))
    expected = np.sort(np.argsort(rank, kind="stable")[:count])
    np.testing.assert_array_equal(lowest(np.array(rank), count), expected)
