"""Ids are admitted by what was seen of them, within the error that is stated, and alike after a restart."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_store.admission import Admission, CountSketch
from embedding_store.specs import RowRules

HOUR = 3_600_000


def _array(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64)


@given(st.lists(st.lists(st.integers(-40, 40), min_size=1, max_size=30), max_size=20))
def test_a_count_is_never_too_low(batches: list[list[int]]) -> None:
    """Even where 80 ids share 64 cells."""
    sketch, true = CountSketch(64, HOUR, seed=3), collections.Counter[int]()
    for batch in batches:
        true.update(batch)
        ids, times = np.unique(_array(batch), return_counts=True)
        assert (sketch.add(ids, times) >= np.minimum([true[i] for i in ids.tolist()], 255)).all()


def test_counts_are_too_high_as_seldom_as_stated() -> None:
    cells = 1 << 14
    sketch = CountSketch(cells, HOUR, seed=0)
    ids = np.random.default_rng(0).integers(1, 1 << 62, cells)
    half = cells // 2
    sketch.add(ids[:half], np.ones(half, np.int64))
    seen = sketch.add(ids[half:], np.ones(half, np.int64))
    assert 0.01 < (seen > 1).mean() < 0.035, "as stated: 2.4 % when half as many ids as cells are in it"
    assert (seen > 1 + np.e * half / cells).mean() < np.exp(-4)


def test_counts_halve_with_event_time_and_stop_at_a_byte() -> None:
    sketch = CountSketch(1 << 10, HOUR, seed=0)
    assert sketch.add(_array([5]), _array([300])).tolist() == [255]
    sketch.advance(HOUR - 1)
    assert sketch.add(_array([5]), _array([0])).tolist() == [255]
    sketch.advance(3 * HOUR)
    sketch.advance(3 * HOUR)
    assert sketch.add(_array([5]), _array([0])).tolist() == [255 >> 3]
    sketch.advance(1000 * HOUR)
    assert sketch.add(_array([5]), _array([1])).tolist() == [1]


def test_a_half_life_that_has_become_longer_does_not_stop_the_halving() -> None:
    before, after = CountSketch(1 << 10, HOUR, seed=0), CountSketch(1 << 10, 10 * HOUR, seed=0)
    before.advance(500 * HOUR)
    before.add(_array([5]), _array([200]))
    after.load(before.changed().items())
    for hour, left in ((500, 200), (509, 200), (510, 100), (520, 50)):
        after.advance(hour * HOUR)
        assert after.add(_array([5]), _array([0])).tolist() == [left]


def test_what_changed_is_all_that_a_restart_needs() -> None:
    rng = np.random.default_rng(1)
    whole, blobs = CountSketch(1 << 10, HOUR, seed=0), dict[int, bytes]()
    for hour in range(5):
        whole.advance(hour * HOUR)
        whole.add(np.unique(rng.integers(1, 500, 40)), _array([3]))
        changed = whole.changed()
        assert len(changed) <= 1 + 4 * 64
        blobs |= changed
        whole.clean()
        assert whole.changed() == {}
    again = CountSketch(1 << 10, HOUR, seed=0)
    again.load(blobs.items())
    for sketch in (whole, again):
        sketch.advance(6 * HOUR)
    ids = np.arange(1, 500)
    np.testing.assert_array_equal(whole.add(ids, 0 * ids), again.add(ids, 0 * ids))


def test_by_chance_an_example_decides_once_and_for_all() -> None:
    ids = np.repeat(np.arange(1, 20_001), 2)
    examples = np.arange(1, len(ids) + 1)
    admission = Admission(RowRules(admit_share=0.1, admit_seed=7))
    admitted = admission.admitted(ids, examples)
    assert 0.18 < len(admitted) / 20_000 < 0.20, "two draws an id: 1 - 0.9²"
    halves = [Admission(RowRules(admit_share=0.1, admit_seed=7)).admitted(ids[k::2], examples[k::2]) for k in (1, 0)]
    np.testing.assert_array_equal(np.union1d(*halves), admitted, "whatever the batches")
    assert not np.array_equal(Admission(RowRules(admit_share=0.1, admit_seed=8)).admitted(ids, examples), admitted)
    alone = admission.admitted(ids, None)
    np.testing.assert_array_equal(admission.admitted(ids[::2], None), alone, "no example: one draw for an id")


def test_a_sampled_negative_is_no_sighting() -> None:
    for rules in (RowRules(admit_after=2), RowRules(admit_share=0.999999)):
        admission = Admission(rules)
        assert admission.admitted(_array([4, 4, 4]), _array([0, 0, 0])).tolist() == []
    assert Admission(RowRules(admit_after=2)).admitted(_array([4, 9, 4]), _array([1, 2, 3])).tolist() == [4]


def test_two_rules_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        RowRules(admit_after=2, admit_share=0.5)
