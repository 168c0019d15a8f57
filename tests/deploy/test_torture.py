"""The torture finds nothing in what is sound, and each of five planted bugs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.torture import WRONG
from deploy.torture.faults import ON_DISK, plan
from deploy.torture.run import Torture
from deploy.torture.story import Story

pytestmark = pytest.mark.broker
FOUND_BY = {
    "one_early": "duplicated", "one_late": "lost", "acknowledged_early": "missing_versions",
    "no_tombstones": "differing_rows", "half_a_version": "replica_torn_reads",
}  # fmt: skip


def test_what_is_done_follows_from_the_seed() -> None:
    workers = ["join-0", "train"]
    assert plan(20, 3, workers) == plan(20, 3, workers) != plan(20, 4, workers)
    first, again, other = (list(Story(seed, 3_000, 250, 90_000).steps()) for seed in (1, 1, 2))
    assert first == again != other
    assert isinstance(first[-1], int), "a last tick closes everything"


def test_nothing_is_lost_doubled_or_torn_and_the_checkpoint_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    found = Torture(kills=3, seed=11, home=tmp_path / "torture", say=print, events=8_000).run()
    assert {name: found[name] for name in WRONG} == dict.fromkeys(WRONG, 0)
    assert found["digest_equal"], found
    assert found["calm"] == {"lost": 0, "duplicated": 0}
    assert found["kills"] == 3
    assert found["answers"] > 100
    assert found["versions_checked"] > 3


@pytest.mark.nightly
@pytest.mark.parametrize("bug", FOUND_BY)
def test_a_planted_bug_is_found(bug: str, tmp_path: Path) -> None:
    found = _with(bug, tmp_path)
    assert found[FOUND_BY[bug]] > 0, found
    assert {name for name in WRONG if found[name]} <= {FOUND_BY[bug], "differing_rows", "replica_torn_reads"}, found


def _with(bug: str, folder: Path) -> dict[str, Any]:
    """A short run with the bug in all workers, of which the trainer is killed."""
    launcher = (sys.executable, "-m", "tests.deploy.planted", bug)
    kills = 0 if bug in ("no_tombstones", "half_a_version") else 3
    return Torture(
        kills, 5, folder / "torture", print, launcher, events=12_000, calm=False, workers=("train",), gap_s=(0.2, 2.0),
        patient=True,
    ).run()  # fmt: skip
