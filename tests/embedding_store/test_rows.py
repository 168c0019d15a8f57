"""The row map gives the answers of a dict, whatever the ids, in whatever order they come and go."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_store.probing import hash_id
from embedding_store.rows import RowMap
from tests.embedding_store.dict_rows import DictRowMap

# A few plain ids that meet often, extremes, and hostile ones: they share their low 40 bits.
IDS = st.one_of(
    st.integers(-4, 12),
    st.sampled_from([-(2**63), 2**63 - 1, 2**62]),
    st.integers(0, 30).map(lambda i: (i << 40) | 7),
)
BATCH = st.lists(IDS, max_size=12)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["admit", "admit", "find", "remove"]), BATCH),
        st.tuples(st.just("grow"), st.integers(1, 24)),
    ),
    max_size=40,
)


def _array(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int64)


def _same(fast: RowMap, plain: DictRowMap) -> None:
    assert len(fast) == len(plain)
    assert fast.free == plain.free
    rows = np.arange(fast.capacity + 1)
    np.testing.assert_array_equal(fast.ids_of(rows), plain.ids_of(rows))


@given(STEPS, st.integers(1, 12))
@settings(max_examples=400, deadline=None)
def test_answers_like_a_dict(steps: list, capacity: int) -> None:
    fast, plain = RowMap(capacity), DictRowMap(capacity)
    for name, argument in steps:
        if name == "grow":
            fast.grow(argument)
            plain.grow(argument)
        elif name == "admit":
            ids = _array(argument)
            for mine, theirs in zip(fast.admit(ids), plain.admit(ids), strict=True):
                np.testing.assert_array_equal(mine, theirs)
        else:
            ids = _array(argument)
            np.testing.assert_array_equal(getattr(fast, name)(ids), getattr(plain, name)(ids))
        _same(fast, plain)


def test_churn_of_many_ids_goes_on_like_a_dict() -> None:
    """More ids come and go than there are slots, so that runs of slots form, wrap round the end and close again."""
    rng = np.random.default_rng(1)
    fast, plain = RowMap(1000), DictRowMap(1000)
    ids = rng.integers(-(2**63), 2**63 - 1, 6000)
    for _ in range(200):
        gone, come = rng.choice(ids, 150), rng.choice(ids, 200)
        np.testing.assert_array_equal(fast.remove(gone), plain.remove(gone))
        for mine, theirs in zip(fast.admit(come), plain.admit(come), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(fast.find(ids), plain.find(ids))
    _same(fast, plain)


def _searched(rows: RowMap) -> int:
    """How many slots past its home the farthest id of the map lies."""
    slot = np.flatnonzero(rows._slots[::2])
    home = hash_id.py_func(rows._slots[2 * slot], rows._tables).view(np.int64) & rows._mask
    return int(((slot - home) & rows._mask).max())


@pytest.mark.parametrize("shift", [0, 16, 32, 44])
def test_ids_that_share_their_bits_are_as_fast_as_others(shift: int) -> None:
    """The number of slots that a search goes by, not the clock, says so: random ids take up to about 60."""
    rows = RowMap(50_000)
    rows.admit((np.arange(1, 50_001, dtype=np.int64) << shift) + 5)
    assert len(rows) == 50_000
    assert _searched(rows) < 200


def test_ids_made_to_collide_in_one_map_do_not_in_the_next() -> None:
    """Even who has seen the words of one map can do nothing to another one."""
    seen, ids = RowMap(2_000), np.random.default_rng(2).integers(1, 2**62, 6_000_000)
    home = hash_id.py_func(ids, seen._tables).view(np.int64) & seen._mask
    ids = np.unique(ids[home < 2])[:2_000]
    seen.admit(ids)
    other = RowMap(2_000)
    other.admit(ids)
    assert _searched(seen) > 1_500
    assert _searched(other) < 200


def test_arrays_of_any_kind_are_ids() -> None:
    rows = RowMap(4)
    ids = np.array([5, 0, 6, 0, 5])
    ids.flags.writeable = False
    assert rows.admit(ids)[0].tolist() == [1, 0, 2, 0, 1]
    assert rows.find(ids[::2]).tolist() == [1, 2, 1]
    assert rows.find(ids.astype(np.int32)).tolist() == [1, 0, 2, 0, 1]
    assert rows.find(ids[:0]).tolist() == []
    assert rows.remove(ids[::-2]).tolist() == [1, 2]


def test_a_full_map_turns_the_largest_new_ids_away() -> None:
    rows = RowMap(3)
    given_rows, new = rows.admit(_array([9, 7, 8, 6, 9]))
    np.testing.assert_array_equal(new, [6, 7, 8])
    np.testing.assert_array_equal(given_rows, [0, 2, 3, 1, 0])
    assert rows.free == 0
    np.testing.assert_array_equal(rows.admit(_array([6, 5]))[0], [1, 0])


def test_id_zero_never_has_a_row() -> None:
    rows = RowMap(4)
    assert rows.admit(_array([0, 0]))[0].tolist() == [0, 0]
    assert len(rows) == 0
    assert rows.remove(_array([0])).tolist() == []


def test_find_changes_nothing() -> None:
    rows = RowMap(4)
    rows.admit(_array([1, 2]))
    assert rows.find(_array([1, 3, 2])).tolist() == [1, 0, 2]
    assert len(rows) == 2
