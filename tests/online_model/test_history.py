"""A user's state is a function of the actions before a moment, and of nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_model.history import (
    EMPTY,
    HISTORY,
    HISTORY_BYTES,
    HISTORY_DTYPE,
    Kind,
    UserHistory,
    as_array,
    history_hash,
    unpack,
)
from tests.online_model.plain_history import KINDS, plain_state

ITEMS = st.sampled_from([-(1 << 63), -1, 1, 2, 3, (1 << 63) - 1])
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
AHEAD = st.sampled_from([0, 0, 1, 500, MINUTE, 14 * MINUTE, 16 * MINUTE, HOUR, 5 * HOUR, DAY, 3 * DAY, 8 * DAY])
STEPS = st.tuples(ITEMS, AHEAD, st.sampled_from([*["click"] * 3, *KINDS]), st.none() | AHEAD)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=60), st.sampled_from([0, 1_767_225_600_000]))
def test_the_state_as_of_a_moment_is_that_of_all_the_actions_before_it(steps, now):
    """Time goes on by the second field; the last one, if any: by how much an action comes late. Restored each time."""
    history, actions = UserHistory(), []
    for item, ahead, kind, late in steps:
        now += ahead
        assert history.as_of(now) == plain_state([a for a in actions if a[1] < now]).tobytes()
        ts = max(0, now - (late or 0))
        history.push(item, ts, KINDS[kind])
        actions.append((item, ts, kind))
        history = UserHistory.from_bytes(history.to_bytes())
        assert history.latest() == plain_state(actions).tobytes()


def test_a_moment_before_the_newest_event_is_refused():
    history = UserHistory()
    history.push(5, 10, Kind.CLICK)
    assert history.as_of(10) == EMPTY
    with pytest.raises(ValueError, match="as of 9"):
        history.as_of(9)


def test_the_layout_is_packed_and_leaves_room_in_a_purchase_window():
    assert HISTORY == 20
    assert HISTORY_BYTES == len(EMPTY) == 360 <= 380
    assert [HISTORY_DTYPE.fields[name][1] for name in ("recent", "intent", "newest", "counts")] == [0, 182, 260, 264]


def test_the_same_again_is_counted_and_not_listed():
    history = UserHistory()
    for item, kind in ((7, Kind.CLICK), (7, Kind.CART), (7, Kind.CLICK), (7, Kind.WATCH), (7, Kind.WATCH)):
        history.push(item, 5_000, kind)
    (state,) = unpack(as_array([history.latest()]))
    assert state["recent"]["kind"][:3].tolist() == [Kind.WATCH, Kind.CLICK, 0]
    assert state["intent"].tolist()[:2] == [(7, 5, Kind.CART), (0, 0, 0)]
    assert state["counts"][:, 0].tolist() == [[2, 2, 1, 0]] * 3


def test_counters_stop_at_their_largest_value():
    history = UserHistory()
    for n in range(65_537):
        history.push(n, 5_000, Kind.WATCH)
        if n in (254, 255, 65_534, 65_536):
            (state,) = unpack(as_array([history.latest()]))
            assert state["counts"][:, 0, 1].tolist() == [min(n + 1, 65_535)] * 3


def test_times_past_the_last_second_are_as_if_they_were_then():
    history = UserHistory()
    history.push(1, (1 << 43), Kind.CLICK)  # the largest time of an event
    history.push(2, (1 << 43) - 5, Kind.CLICK)
    (state,) = unpack(as_array([history.latest()]))
    assert state["newest"] == state["recent"]["second"][1] == (1 << 32) - 1
    assert state["counts"][:, :, 0].sum(1).tolist() == [2, 2, 2]


def test_hash_is_of_the_bytes_and_signed():
    history = UserHistory()
    for item in range(1, 50):
        history.push(item, item, Kind.CLICK)
    array = as_array([history.latest()])[0]
    assert history_hash(array) == history_hash(history.latest()) != history_hash(EMPTY)
    assert history_hash(np.stack([array, array])[:, ::-1][0][::-1]) == history_hash(array)
    assert all(-(1 << 63) <= history_hash(bytes([i]) * HISTORY_BYTES) < 1 << 63 for i in range(64))
    assert {history_hash(bytes([i]) * HISTORY_BYTES) < 0 for i in range(64)} == {True, False}
