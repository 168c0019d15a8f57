"""Every system keeps the contract of replay/comparison/contract.py."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest

from online_model.batch import Candidates
from replay.comparison import metrics
from replay.comparison.contract import System
from replay.comparison.harness import SYSTEMS, Truth, make, run, run_all
from replay.comparison.stream import Batch, Stream
from tests.replay.comparison_logs import MODEL, stream

pytestmark = pytest.mark.usefixtures("one_thread")
SLOW = "vw"
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly) if name == SLOW else name for name in SYSTEMS]
)
BATCHES = 12


def _short(impressions: bool = False) -> Stream:
    whole = stream(impressions)
    return Stream(whole.batches[:BATCHES], whole.implicit, whole.events, 0, whole.items, whole.users)


def _system(name: str, some: Stream) -> System:
    return make([name], some, MODEL)[name]


def _unknown(candidates: Candidates) -> Candidates:
    """Users and items that nobody has ever seen."""
    changed = copy.deepcopy(candidates)
    changed.user ^= 1 << 40
    changed.item ^= 1 << 40
    return changed


def _scores(name: str, look: bool, impressions: bool = False) -> Iterator[np.ndarray]:
    """The scores of each batch; with `look` others are scored in between, many times."""
    some = _short(impressions)
    system = _system(name, some)
    for batch in some.batches:
        system.catalogue(batch.catalogue)
        if look:
            for other in some.batches[:3]:
                system.score(other.scored.candidates)
                system.score(_unknown(other.scored.candidates))
        first = system.score(batch.scored.candidates)
        np.testing.assert_array_equal(system.score(batch.scored.candidates), first)
        assert first.shape == batch.scored.label.shape
        yield first
        system.learn(batch)


@EVERY
def test_scoring_changes_nothing(name: str) -> None:
    for looked, plain in zip(_scores(name, look=True), _scores(name, look=False), strict=True):
        np.testing.assert_array_equal(looked, plain)


@EVERY
@pytest.mark.parametrize("impressions", [True, False])
def test_it_learns_and_its_scores_are_what_it_claims(name: str, impressions: bool) -> None:
    some = stream(impressions)
    scores = run({name: (system := _system(name, some))}, some)[0]
    truth = Truth.of(some)
    assert np.isfinite(scores.score).all()
    if system.probabilistic:
        assert ((scores.score >= 0) & (scores.score <= 1)).all()
    half = len(truth.label) // 2
    # The one has nothing but ids to go by, and these logs are short; to the other all that came since is new.
    if name != "river_biased_mf" and not (name == "frozen" and some.implicit):
        assert metrics.auc(scores.score[half:], truth.label[half:]) > 0.52


@EVERY
def test_what_it_is_given_stays_as_it_was(name: str) -> None:
    some = _short()
    given = copy.deepcopy(some)
    run({name: _system(name, some)}, some)
    for before, after in zip(given.batches, some.batches, strict=True):
        for part in ("scored", "lessons"):
            one, other = getattr(before, part), getattr(after, part)
            for field in ("label", "user", "ts", "example"):
                np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
            for field in vars(one.candidates):
                np.testing.assert_array_equal(getattr(one.candidates, field), getattr(other.candidates, field))
        for field in vars(before.rows):
            np.testing.assert_array_equal(getattr(before.rows, field), getattr(after.rows, field))


@pytest.mark.parametrize("name", ["popularity", "item_knn"])
def test_memory_is_bounded_where_it_is_claimed(name: str) -> None:
    some = _short()
    system = _system(name, some)
    before = system.nbytes  # type: ignore[attr-defined]
    run({name: system}, some)
    assert system.nbytes == before < 100_000_000  # type: ignore[attr-defined]


@pytest.mark.nightly
def test_two_processes_give_what_one_gives() -> None:
    some = _short()
    names = ("headrace", "popularity", "river_logistic", "frozen")
    one, two = run_all(names, some, MODEL, jobs=1), run_all(names, some, MODEL, jobs=2)
    assert [scores.name for scores in two] == list(names)
    for mine, other in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine.score, other.score)


def test_every_system_scores_a_batch_and_its_positions_before_any_learns_it() -> None:
    some, told = _short(impressions=True), []

    class Told:
        probabilistic = False

        def __init__(self, name: str) -> None:
            self._name = name

        def catalogue(self, items: object) -> None: ...

        def score(self, candidates: Candidates) -> np.ndarray:
            told.append(("score", self._name, id(candidates)))
            return np.zeros(len(candidates.item))

        def learn(self, batch: Batch) -> None:
            told.append(("learn", self._name, batch.number))

    names = ("one", "other")
    run({name: Told(name) for name in names}, some)
    wanted = []
    for batch in some.batches:
        every = [batch.scored, *([batch.ranked] if batch.ranked is not None else [])]
        wanted += [("score", name, id(part.candidates)) for name in names for part in every]
        wanted += [("learn", name, batch.number) for name in names]
    assert told == wanted
    assert any(batch.ranked is not None for batch in some.batches)


def test_a_score_that_is_no_number_is_refused() -> None:
    class Broken:
        probabilistic = False

        def catalogue(self, items: object) -> None: ...

        def score(self, candidates: Candidates) -> np.ndarray:
            return np.full(len(candidates.item), np.nan)

        def learn(self, batch: object) -> None: ...

    with pytest.raises(ValueError, match="Broken gave a score that is no number"):
        run({"broken": Broken()}, _short())
