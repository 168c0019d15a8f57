"""A serving copy is the model of its last sync, and one of a moment is what training from scratch up to it gives."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_store.errors import UsageError
from online_model.settings import FeatureSettings, TrainerSettings
from replay.comparison.intervals import INTERVALS, measure_intervals
from replay.comparison.ours import Leader, Model, frozen, retrained
from tests.replay.comparison_logs import MODEL, stream

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("impressions", [True, False])
def test_a_copy_is_bit_for_bit_what_training_from_scratch_gives(impressions: bool) -> None:
    batches = stream(impressions).batches
    points = 4
    ends = [round(len(batches) * (n + 1) / points) for n in range(points)]
    system, compared = retrained(Leader(MODEL), len(batches), points), 0
    for number, batch in enumerate(batches):
        system.catalogue(batch.catalogue)
        served = system.score(batch.scored.candidates)
        known = max([0, *(end for end in ends if end <= number)])
        if number in (known, known + 1):
            scratch = Model(MODEL)
            for before in batches[:known]:
                scratch.trainer.catalogue(before.catalogue)
                scratch.learn(before.rows)
            np.testing.assert_array_equal(served, scratch.score(batch.scored.candidates))
            compared += 1
        system.learn(batch)
    assert compared == 2 * points


def test_a_sync_copies_what_has_changed_and_nothing_else_changes_a_copy() -> None:
    batches, leader = stream(impressions=True).batches[:20], Leader(MODEL)
    copy, other = leader.copy(), leader.copy()
    c = batches[-1].scored.candidates
    for batch in batches[:10]:
        leader.catalogue(batch.number, batch.catalogue)
        leader.learn(batch)
    assert (copy.score(c) == other.score(c)).all()
    copy.sync()
    assert (copy.score(c) == leader.model.score(c)).all()
    first = copy.rows
    for batch in batches[10:12]:
        leader.catalogue(batch.number, batch.catalogue)
        leader.learn(batch)
    before = copy.score(c)
    assert (leader.model.score(c) != before).any()
    copy.sync()
    other.sync()
    assert (copy.score(c) == leader.model.score(c)).all()
    assert (other.score(c) == leader.model.score(c)).all()
    assert 0 < copy.rows - first < first
    assert other.rows < copy.rows, "a row that changed twice between two syncs is copied once"


@pytest.mark.nightly
def test_the_frozen_one_serves_what_it_knew_after_the_warm_up() -> None:
    batches = stream(impressions=True).batches
    system = frozen(Leader(MODEL), len(batches))
    online = Leader(MODEL)
    last, equal = batches[-1].scored.candidates, []
    for batch in batches:
        online.catalogue(batch.number, batch.catalogue)
        system.catalogue(batch.catalogue)
        online.learn(batch)
        system.learn(batch)
        equal.append(bool((system.score(last) == online.model.score(last)).all()))
    warm = round(0.2 * len(batches))
    assert equal == [True] * warm + [False] * (len(batches) - warm)
    assert system.copy.syncs == warm


def test_a_fresher_copy_is_synced_more_often_and_one_that_always_is_is_the_leader() -> None:
    found = measure_intervals(stream(impressions=True), MODEL)
    syncs = [figures["syncs"] for figures in found.values()]
    assert list(found) == list(INTERVALS)
    assert syncs[0] == 0
    assert syncs == sorted(syncs)
    assert syncs[-1] == len(stream(impressions=True).batches) // 2
    assert found["1 s"]["auc"] > found["never"]["auc"]
    assert len({figures["count"] for figures in found.values()}) == 1


def test_a_table_that_is_too_small_is_said_in_one_line() -> None:
    small = TrainerSettings(batch_size=128, features=FeatureSettings(dim=8, users=20, items=50, categories=20))
    leader, batch = Leader(small), stream(impressions=True).batches[0]
    with pytest.raises(UsageError, match=r"raise model.features.users \(20\), items \(50\)"):
        leader.learn(batch)
