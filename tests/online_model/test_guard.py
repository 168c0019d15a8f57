"""The guard: what it lets pass and what it holds, and that replicas are never left with half of it."""

from __future__ import annotations

import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from online_model.checkpoints import roll_back
from online_model.evaluation import TaskScores
from online_model.guard import ENOUGH, ROLLBACKS, GuardState, decide, fault_of
from online_model.guard_settings import GuardSettings
from tests.online_model.guarded import (
    BLOCKS,
    BOUNDS,
    GOING_BACK,
    GUARDED,
    N,
    World,
    die_turning,
    holds,
    image,
    made_log,
    until_held,
    until_proven,
)
from tests.online_model.test_trainer import SMALL
from tests.streams.children import processes

pytestmark = pytest.mark.usefixtures("one_thread")


# --- what it decides ----------------------------------------------------------------------------------------------


def scores(*parts: tuple[int, float, float]) -> dict[str, TaskScores]:
    """Clicks: of each part (how many, the probability that was said, the rate that came)."""
    task = TaskScores(10_000)
    for count, p, rate in parts:
        task.add(np.zeros(count, int), np.full(count, p), np.arange(count) < rate * count)
    return {"click": task, "watch": TaskScores(10_000), "purchase": TaskScores(10_000)}


@pytest.mark.parametrize(
    ("said", "came", "wrong"),
    [
        (0.1, 0.1, ""), (0.2, 0.1, ""), (0.05, 0.1, ""), (0.26, 0.1, "260 positives predicted, 100 came: 2.6"),
        (0.03, 0.1, "30 positives predicted, 100 came: 0.3"), (0.5, 0.21, "normalised entropy"),
        (0.1, 0.0, "100 positives predicted, 0 came"), (0.015, 0.0, None), (0.0, 0.015, None),
        (0.001, 0.03, "1 positives predicted, 30 came"),
    ],
)  # fmt: skip
def test_bounds_are_of_entropy_and_calibration_and_too_few_positives_say_nothing(said, came, wrong):
    bounds = GuardSettings(max_ne=1.3, min_calibration=0.4, max_calibration=2.5)
    fault = fault_of(scores((1_000, said, came))["click"].recent(), bounds)
    assert fault == wrong if not wrong else fault.startswith(wrong)
    assert ENOUGH == 20


def test_a_cold_start_is_published_and_what_falls_after_it_was_good_is_held():
    state = GuardState()
    for parts in ([(N, 0.5, 0.02)], [(N, 0.5, 0.02), (N // 2, 0.1, 0.1)]):
        state = decide(state, BOUNDS, 500, scores(*parts))
        assert not state.held
        assert not state.proven
    good = [(N, 0.5, 0.02), (N, 0.1, 0.1)]
    state = decide(state, BOUNDS, 500, scores(*good))
    assert state.proven
    worse = decide(state, BOUNDS, 500, scores(*good, (N, 0.5, 0.1)))
    assert worse.held
    assert "predicted" in worse.why["click"]
    assert not worse.due, "no rollback unless asked for"


def test_a_hold_ends_by_so_many_good_scores_since_it_began():
    parts = [(N, 0.1, 0.1), (N, 0.5, 0.1)]
    held = decide(GuardState(proven=True), BOUNDS, 500, scores(*parts))
    assert held.held
    for more in (1, N // 2, N - 1):
        assert decide(held, BOUNDS, 500, scores(*parts, (more, 0.1, 0.1))) == held
    assert decide(held, BOUNDS, 500, scores(*parts, (N, 0.5, 0.1))).held
    assert not decide(held, BOUNDS, 500, scores(*parts, (N, 0.1, 0.1))).held


def test_it_waits_for_the_task_that_was_wrong():
    bounds = msgspec.structs.replace(BOUNDS, tasks=["click", "purchase"])
    held = GuardState(held=True, proven=True, why={"purchase": "…"}, since={"purchase": 0, "click": 0})
    assert decide(held, bounds, 500, scores((N, 0.1, 0.1))).held
    assert not decide(held, BOUNDS, 500, scores((N, 0.1, 0.1))).held, "nobody looks at purchases any more"
    assert not decide(held, msgspec.structs.replace(BOUNDS, tasks=[]), 500, scores()).held, "switched off"


def test_after_so_many_rollbacks_in_a_row_it_only_holds():
    bounds = GOING_BACK.guard
    for rollbacks in range(ROLLBACKS + 1):
        state = GuardState(proven=True, rollbacks=rollbacks)
        assert decide(state, bounds, 500, scores((N, 0.5, 0.1))).due is (rollbacks < ROLLBACKS)
    good = decide(state, bounds, 500, scores((N, 0.1, 0.1)))
    assert good.rollbacks == 0, "the next time they begin anew"


def test_another_window_forgets_the_scores_and_they_are_counted_anew():
    held = GuardState(held=True, proven=True, why={"click": "…"}, since={"click": 9_000})
    assert not decide(held, BOUNDS, 500, scores((N, 0.1, 0.1))).held


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"guard\.examples is 600, of 500 scores in window"):
        msgspec.structs.replace(SMALL, guard=GuardSettings(examples=600))
    with pytest.raises(ValueError, match="min_calibration must be below"):
        GuardSettings(min_calibration=2, max_calibration=1)


# --- trainer, store and replicas ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log():
    return made_log()


@pytest.fixture
def world(tmp_path, log):
    world = World(tmp_path / "w", log)
    yield world
    world.trainer.store.close()


def test_what_is_held_back_reaches_no_replica_and_the_outbox_stays_empty(world):
    until_proven(world)
    last = until_held(world)
    for _ in range(3):
        sequence = world.trainer.sequence
        world.round(good=False)
        assert world.trainer.sequence == sequence + 1, "it goes on learning and committing"
        assert world.trainer.positions[0].next == 10 * world.at
        assert world.trainer.store.outbox() == []
    assert holds(world.follow(world.replica), last)
    assert holds(world.started(), last), "a replica that starts now starts from the last good version"
    world.topic.clear()
    assert holds(world.started(), last), "also when the topic has forgotten the versions that lead to it"


def test_what_was_learned_while_held_reaches_replicas_when_it_ends(world):
    until_proven(world)
    last = until_held(world)
    old = world.follow(world.replica)
    while world.trainer.guard.held:
        assert world.at < BLOCKS, "never released"
        world.round(good=True)
    assert world.trainer.epoch == last[0][0] + 1
    assert world.topic[-1].base == (1, world.trainer.sequence - 1), "no replica goes on from what it never had"
    for replica in (old, world.started()):
        assert holds(world.follow(replica), image(world))
    place = None
    while place != world.topic[-1].base:  # it may be held once more, while it unlearns the bad labels
        assert world.at < BLOCKS, "never version by version"
        place = (world.trainer.epoch, world.trainer.sequence)
        world.round(good=True)
    assert holds(world.follow(world.started()), image(world)), "and then version by version"


def test_held_killed_restarted_it_is_still_held(world):
    until_proven(world)
    last = until_held(world)
    before = world.trainer.guard
    world.crash()
    assert world.trainer.guard == before
    assert holds(world.started(), last)
    world.round(good=False)
    world.crash()
    world.round(good=False)
    assert world.trainer.guard.held
    assert holds(world.follow(world.replica), last)


@pytest.mark.parametrize("point", ["commit.encoded", "commit.written", "commit.done", "snapshot.copied"])
@pytest.mark.parametrize("release", [False, True])
def test_killed_in_the_commit_that_holds_or_releases(tmp_path, log, release, point):
    """Started again it holds or releases all the same, and replicas have all of a version or nothing."""
    whole = World(tmp_path / "whole", log)
    until_proven(whole)
    if release:
        until_held(whole)
    while whole.trainer.guard.held is release:
        whole.round(good=release)
    child = processes.Process(target=die_turning, args=(str(tmp_path / "killed"), release, point))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    killed = World(tmp_path / "killed", log)
    while killed.at < whole.at:
        killed.round(good=release)
    for world in (whole, killed):
        assert world.trainer.guard.held is not release
        assert (world.place, world.trainer.digest()) == (whole.place, whole.trainer.digest())
        for replica in (world.follow(world.replica), world.started()):
            assert replica.version == whole.started().version
            assert not release or holds(replica, image(world))
    for world in (whole, killed):
        world.trainer.store.close()


def test_a_rollback_goes_back_publishes_and_books_what_it_set_aside(tmp_path, log):
    world = World(tmp_path / "w", log, GOING_BACK)
    until_proven(world)
    world.keep()
    kept, (count, _) = image(world), world.trainer.positions[0].accounted
    until_held(world)
    assert world.trainer.rollback_due
    learned = world.trainer.positions[0].accounted
    world.crash()
    assert (world.trainer.guard.held, world.trainer.guard.rollbacks, world.trainer.rollback_due) == (False, 1, False)
    assert not world.trainer.guard.trusted, "on trial: no checkpoint to go back to"
    assert world.place == (2, world.topic[-1].sequence)
    position = world.trainer.positions[0]
    assert position.next == 10 * world.at, "the positions stay"
    assert position.accounted == learned
    assert sum(r.rows for r in position.rolled_back) == learned[0] - count
    for replica in (world.follow(world.replica), world.started()):
        assert holds(replica, (world.place, *kept[1:]))
    for _ in range(2):
        world.round(good=True)
    assert world.trainer.guard.trusted
    assert holds(world.follow(world.started()), image(world))
    world.trainer.store.close()


def kept_after_good_rounds(world, count):
    """The places of as many kept checkpoints."""
    places = []
    for _ in range(count):
        world.round(good=True)
        world.keep()
        places.append(world.place)
    return places


def test_no_rollback_loop(tmp_path, log):
    """Poison that does not end: back to one kept checkpoint after the other, then it is held."""
    world = World(tmp_path / "w", log, GOING_BACK)
    until_proven(world)
    places = kept_after_good_rounds(world, 3)
    went_to = []
    while world.at < BLOCKS and not (world.trainer.guard.held and not world.trainer.rollback_due):
        world.round(good=False)
        if world.trainer.rollback_due:
            world.crash()
            went_to.append(world.topic[-1].base)
    assert went_to == places[::-1]
    assert (world.trainer.guard.held, world.trainer.guard.rollbacks) == (True, ROLLBACKS)
    world.crash()
    assert world.trainer.guard.held
    world.trainer.store.close()


def test_a_rollback_without_a_kept_checkpoint_gives_up_and_holds(tmp_path, log, caplog):
    world = World(tmp_path / "w", log, GOING_BACK)
    until_proven(world)
    last = until_held(world)
    world.crash()
    assert "the guard cannot roll back: nothing is kept in" in caplog.text
    assert (world.trainer.guard.held, world.trainer.rollback_due) == (True, False)
    world.round(good=False)
    world.crash()
    assert not world.trainer.rollback_due
    assert holds(world.follow(world.replica), last)
    world.trainer.store.close()


@pytest.mark.parametrize("whole", [1, 0])
def test_a_damaged_checkpoint_is_none_to_go_back_to(tmp_path, log, caplog, whole):
    world = World(tmp_path / "w", log, GOING_BACK)
    until_proven(world)
    places = kept_after_good_rounds(world, 2)
    until_held(world)
    for manifest in list(world.kept.newest_first())[: 2 - whole]:
        table = next(Path(world.kept.url).glob(f"*{manifest.number}/*.sst"))
        raw = table.read_bytes()
        table.unlink()  # not in place: it is the store's own file too
        table.write_bytes(raw[:-1])
    world.crash()
    if whole:
        assert world.topic[-1].base == places[0]
    else:
        assert "none of the checkpoints" in caplog.text
        assert (world.trainer.guard.held, world.trainer.rollback_due) == (True, False)
    assert not list((tmp_path / "w").glob("*.fetched"))
    world.trainer.store.close()


def test_a_held_checkpoint_is_none_to_go_back_to(tmp_path, log):
    world = World(tmp_path / "w", log, GOING_BACK)
    until_proven(world)
    world.keep()
    good = world.place
    until_held(world)
    world.keep()  # the worker does not, but for a race between its threads
    world.crash()
    assert world.topic[-1].base == good
    world.trainer.store.close()


def test_a_rollback_by_hand_ends_a_hold_and_the_guard_begins_anew(world):
    until_proven(world)
    world.keep()
    until_held(world)
    world.trainer.store.close()
    roll_back(world.store, world.kept, None)
    world.open()
    assert not world.trainer.guard.held
    world.round(good=True)
    assert holds(world.follow(world.replica), image(world))


def test_what_the_log_says(world, caplog):
    until_proven(world)
    until_held(world)
    assert "are not published, replicas stay at 1." in caplog.text
    assert "`headrace checkpoint rollback` goes back" in caplog.text
    while world.trainer.guard.held:
        world.round(good=True)
    assert f"published from version 2.{world.trainer.sequence} on" in caplog.text
    assert world.topic[-1].info["guard"] == {"held": False, "why": {}, "rollbacks": 0}


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    model=st.sampled_from([GUARDED, GOING_BACK]),
    plan=st.lists(st.sampled_from(["good", "good", "poison", "poison", "crash", "keep", "start"]), max_size=25),
)
def test_whatever_happens_replicas_are_at_a_published_version(tmp_path_factory, log, model, plan):
    """Any sequence of good and poisoned blocks, crashes, kept checkpoints and replicas that start: each replica is, in
    all it holds, the store of the newest version that the guard let pass."""
    world = World(tmp_path_factory.mktemp("world"), log, model)
    until_proven(world)
    last, replicas = image(world), [world.started()]
    for did in plan:
        if did in ("good", "poison") and world.at < BLOCKS:
            world.round(good=did == "good")
        elif did == "crash" or world.trainer.rollback_due:
            world.crash()
        elif did == "keep" and world.trainer.guard.trusted:
            world.keep()
        elif did == "start":
            replicas.append(world.started())
        if not world.trainer.guard.held:
            last = image(world)
        replicas = [world.follow(replica) for replica in replicas]
        assert all(holds(replica, last) for replica in replicas)
        assert len(world.trainer.store.outbox()) == 0
    world.trainer.store.close()
