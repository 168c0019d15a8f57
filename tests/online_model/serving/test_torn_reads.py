"""Readers see whole versions only: some of the reads of `python -m tests.figures replica.torn`, which are a million."""

from __future__ import annotations

import numpy as np
import pytest

from tests.online_model.serving.torn import LEVELS, alone, torn_reads, uniform
from tests.online_model.serving.world import dense, rank

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_mixture_would_be_seen() -> None:
    weights = dense()
    versions = [uniform(n, weights) for n in range(1, LEVELS + 1, 40)]
    scores = np.array([rank(alone(v), "u", "live", [0]).items[0].score for v in (*versions, uniform(2, weights))])
    gaps = np.abs(np.diff(np.sort(scores))) / np.sort(scores)[1:]
    assert gaps.min() > 1e-4, "ten times what a read may be off"
    mixed = uniform(1, weights)
    for table in mixed.tables:
        mixed.tables[table] = uniform(2, weights).tables[table]
        assert abs(rank(alone(mixed), "u", "live", [0]).items[0].score / scores[0] - 1) > 1e-4, table
        mixed = uniform(1, weights)


def test_no_read_is_of_two_versions() -> None:
    seen = torn_reads(1_500)
    assert seen.mixed == 0
    assert seen.versions >= 75
    assert seen.swaps >= 1
