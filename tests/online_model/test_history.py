import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_model.examples import HISTORY
from online_model.history import EMPTY, UserHistory, as_array, history_hash

ITEMS = st.sampled_from([-(1 << 63), -1, 1, 2, 3, (1 << 63) - 1])


@given(st.lists(st.tuples(ITEMS, st.integers(0, 3), st.booleans()), max_size=120))
def test_history_equals_the_whole_list_of_entries(steps):
    """Time goes on by the second field; where the third is set an older event comes late. Restored at each step."""
    history, entries, now = UserHistory(), [], 0
    for item, ahead, late in steps:
        now += ahead
        assert as_array([history.as_of(now)])[0].tolist() == newest(e for e in entries if e[1] < now)
        ts = max(0, now - 2) if late else now
        entered = not entries or entries[-1][0] != item
        assert history.push(item, ts) == entered
        if entered:
            entries.append((item, ts))
        history = UserHistory.from_bytes(history.to_bytes())
        assert as_array([history.latest()])[0].tolist() == newest(entries)


def newest(entries) -> list[int]:
    ids = [item for item, _ in entries][::-1][:HISTORY]
    return ids + [0] * (HISTORY - len(ids))


def test_a_moment_before_the_newest_event_is_refused():
    history = UserHistory()
    history.push(5, 10)
    assert history.as_of(10) == EMPTY
    with pytest.raises(ValueError, match="as of 9"):
        history.as_of(9)


def test_hash_is_of_the_items_and_signed():
    history = UserHistory()
    for item in range(1, 50):
        history.push(item, item)
    array = as_array([history.latest()])[0]
    assert history_hash(array) == history_hash(history.latest()) != history_hash(EMPTY)
    assert history_hash(np.stack([array, array])[:, ::-1][0][::-1]) == history_hash(array)
    assert all(-(1 << 63) <= history_hash(bytes([i]) * 160) < 1 << 63 for i in range(64))
    assert {history_hash(bytes([i]) * 160) < 0 for i in range(64)} == {True, False}
