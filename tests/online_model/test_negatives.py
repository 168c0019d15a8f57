"""Recently active items, and what is drawn of them."""

from collections import deque

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from online_model.negatives import RecentItems


class PlainRecentItems:
    """The same in a deque."""

    def __init__(self, capacity):
        self.items = deque(maxlen=capacity)

    def push(self, items):
        seen = set(self.items)
        new = [i for n, i in enumerate(items) if i not in seen and i not in items[:n]]
        self.items.extend(new)


@given(st.integers(2, 6), st.lists(st.lists(st.integers(-5, 5), max_size=9), max_size=8))
def test_it_holds_what_the_plain_one_holds(capacity, pushes):
    ring, plain = RecentItems(capacity), PlainRecentItems(capacity)
    for items in pushes:
        ring.push(np.array(items, np.int64))
        plain.push(items)
        assert sorted(ring.items().tolist()) == sorted(plain.items)
        again = RecentItems(capacity)
        again.load(ring.state())
        assert again.items().tolist() == ring.items().tolist()
    other = RecentItems(3)
    other.load(ring.state())
    assert sorted(other.items().tolist()) == sorted(list(plain.items)[-3:])


def test_draws_are_a_function_of_seed_row_and_content():
    ring = RecentItems(100)
    ring.push(np.arange(1, 51))
    rows, positives = np.arange(1000) - 500, np.arange(1000) % 50 + 1
    drawn = ring.draw(rows, positives, 4, seed=1)
    assert drawn.shape == (1000, 4)
    assert (drawn == ring.draw(rows, positives, 4, seed=1)).all()
    assert (drawn[:10] == ring.draw(rows[:10], positives[:10], 4, seed=1)).all(), "a row's draw is its own"
    assert (drawn != ring.draw(rows, positives, 4, seed=2)).mean() > 0.9
    assert not (drawn == positives[:, None]).any()
    counts = np.bincount(drawn.ravel(), minlength=51)[1:]
    assert counts.min() > 40, "all items must have about the same chance (80)"


def test_too_few_items_give_no_negatives():
    ring = RecentItems(10)
    assert ring.draw(np.array([1]), np.array([7]), 4, 0).shape == (1, 0)
    ring.push(np.array([7]))
    assert ring.draw(np.array([1]), np.array([7]), 4, 0).shape == (1, 0)
    ring.push(np.array([8]))
    assert ring.draw(np.array([1]), np.array([7]), 4, 0).tolist() == [[8, 8, 8, 8]]
