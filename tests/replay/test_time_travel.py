"""A recording replayed: the live joiner's examples, one result however often it was stopped, and yesterday's model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from embedding_store.errors import UsageError
from online_model.examples import Block, ExamplesDigest
from online_model.trainer import open_trainer
from replay import direct, time_travel
from replay.direct import DirectSettings
from replay.merging import Merge
from replay.oracle import WRAP, PartitionOracle, Rules
from replay.recording import EVENTS, Recording
from replay.simulator import Simulation, SimulatorSettings
from replay.time_travel import RecordedReplay, Start
from streams.events import Click, decode
from streams.joiner import Joiner
from streams.joiner import Record as LogRecord
from tests.replay import replay_child
from tests.replay.recordings import Log

SAME = ("checkpoint_digest", "examples_digest", "examples", "trained_examples", "balance", "prequential")


@pytest.fixture(scope="module")
def log() -> Log:
    """Some 3,500 events in four partitions, and an item in every third record."""
    world = SimulatorSettings(users=200, items=150, item_life_s=30, requests_per_s=10)
    return Log(Simulation(world, events=3_500))


@pytest.fixture(scope="module")
def path(log: Log, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return log.record(tmp_path_factory.mktemp("recording"))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(time_travel, "SLICE", 300)


def settings(store: Path) -> DirectSettings:
    return replay_child.settings(store)


def replay(path: Path, store: Path, start: dict[int, Start] | None = None, **more: Any) -> dict[str, Any]:
    recording = Recording(path)
    run = RecordedReplay(settings(store), recording.begin(EVENTS), more.pop("progress", None), start)
    return run.run(Merge(recording, **more))


@pytest.fixture(scope="module")
def whole(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_travel, "SLICE", 300)
        return replay(path, tmp_path_factory.mktemp("whole") / "store")


def blocks(log: Log, partition: int, size: int = 10**9) -> Iterator[Block]:
    """A partition as the live joiner takes it, in slices of so many records."""
    joiner = Joiner(replay_child.JOIN, partition)
    rows = log.rows[EVENTS, partition]
    for at in range(0, len(rows), size):
        yield joiner.process([LogRecord(r.offset, r.stamp, r.value) for r in rows[at : at + size]]).block


def test_the_examples_are_those_of_the_live_joiner(log: Log, whole: dict[str, Any]) -> None:
    live = ExamplesDigest()
    for partition in range(log.partitions):
        for block in blocks(log, partition):
            live.add(block.examples)
    assert whole["examples_digest"] == live.hexdigest()
    assert whole["trained_examples"] == whole["examples"] > 2_000
    assert whole["lost"] == whole["duplicated"] == 0
    assert whole["balance"] == whole["oracle_balance"]
    assert whole["balance"]["open"] > 0, "nothing is closed at the end that is open in the live system"


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.nightly), 5])
def test_killed_and_resumed_it_gives_the_same_checkpoint(
    path: Path, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(direct, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(direct, "COMMIT_SHARE", 1.0)

    def progress(so_far: direct.Replayed) -> None:
        if so_far.slices == at:
            raise Killed

    with pytest.raises(Killed):
        replay(path, tmp_path / "store", progress=progress)
    found = replay(path, tmp_path / "store")
    assert found["resumed_at"] >= at - 1
    assert {name: found[name] for name in SAME} == {name: whole[name] for name in SAME}
    assert found["lost"] == found["duplicated"] == 0


def test_files_and_commits_change_nothing(log: Log, whole: dict[str, Any], tmp_path: Path) -> None:
    other = log.record(log.record(tmp_path / "other", 0.3, rows_per_file=37), rows_per_file=1_000)
    found = replay(other, tmp_path / "store")
    assert {name: found[name] for name in SAME} == {name: whole[name] for name in SAME}


def test_stopped_in_the_middle_it_learns_the_rest_when_resumed(
    path: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    """A stop drains what was joined, so later batches are other ones: no row is lost or learned twice."""
    asked = iter(range(10**9))
    part = replay(path, tmp_path / "store", stop=lambda: next(asked) > 700)
    assert 0 < part["examples"] < whole["examples"]
    assert part["lost"] == part["duplicated"] == 0
    found = replay(path, tmp_path / "store")
    assert found["lost"] == found["duplicated"] == 0
    for name in ("examples_digest", "examples", "trained_examples", "balance"):
        assert found[name] == whole[name]


# --- from a kept checkpoint -----------------------------------------------------------------------------------------


def yesterday(log: Log, store: Path, size: int, steps: int) -> dict[int, Start]:
    """A live trainer's store after so many batches: it had blocks of other sizes, and stands inside of some. Before
    them it had learned a backfill with a large catalogue, whose records its `mark` counts."""
    model = settings(store).model
    trainer = open_trainer(model, store, lambda: 0)
    try:
        for number, some in enumerate(zip_longest(*(blocks(log, p, size) for p in range(log.partitions)))):
            for block in filter(None, some):
                trainer.offer(block, number)
        for _ in range(steps):
            assert trainer.step(rows=111) == 111
        trainer.mark = 10**9
        trainer.commit()
        return {p: Start(at.next, at.taken, *at.accounted) for p, at in trainer.positions.items()}
    finally:
        trainer.store.close()


@pytest.mark.parametrize(("size", "steps"), [(20, 14), pytest.param(33, 9, marks=pytest.mark.nightly)])
def test_from_a_checkpoint_it_learns_what_comes_behind_and_nothing_twice(
    log: Log, path: Path, tmp_path: Path, whole: dict[str, Any], size: int, steps: int
) -> None:
    start = yesterday(log, tmp_path / "live", size, steps)
    assert all(at.next > 0 for at in start.values())
    assert any(at.taken for at in start.values()), "the checkpoint is inside of a block"
    shutil.copytree(tmp_path / "live", tmp_path / "store")
    found = replay(path, tmp_path / "store", start)
    assert found["resumed_at"] == 0, "or the catalogue would be left out"
    behind = whole["examples"] - steps * 111
    inside = sum(at.taken for at in start.values())
    assert found["examples"] == found["trained_examples"] == behind + inside
    assert found["lost"] == found["duplicated"] == 0
    with_all = open_trainer(settings(tmp_path).model, tmp_path / "store", lambda: 0)
    try:  # not only what comes behind: with what the checkpoint had, each row once
        for partition in range(log.partitions):
            oracle = PartitionOracle(Rules.of(replay_child.JOIN))
            for row in log.rows[EVENTS, partition]:
                oracle.feed(row.value, row.stamp)
            expected = oracle.expected.rows, oracle.expected.sum % WRAP
            assert with_all.positions[partition].accounted == expected
    finally:
        with_all.store.close()


def test_a_recording_that_begins_behind_the_checkpoint_is_refused(log: Log, path: Path, tmp_path: Path) -> None:
    yesterday(log, tmp_path / "store", 20, 10)
    with pytest.raises(UsageError, match="begins at offset 0 of partition 2, behind -1"):
        replay(path, tmp_path / "store", {2: Start(-1)})


def test_what_the_live_joiner_had_set_aside_before_the_checkpoint_is_not_joined(
    log: Log, path: Path, tmp_path: Path
) -> None:
    """Records 40 to 80 of partition 1 were; the blocks behind it are those of the live joiner, which knows nothing of
    them."""
    rows = [LogRecord(r.offset, r.stamp, r.value) for r in log.rows[EVENTS, 1]]
    live = Joiner(replay_child.JOIN, 1)
    live.process(rows[:40])
    live.process(rows[40:80], set_aside=True)
    live.process(rows[80:100])
    expected = ExamplesDigest()
    expected.add(live.process(rows[100:]).block.examples)
    start = {p: Start(len(log.rows[EVENTS, p])) for p in (0, 2, 3)} | {1: Start(100, set_aside=((40, 80),))}
    found = replay(path, tmp_path / "store", start)
    assert found["examples_digest"] == expected.hexdigest()
    assert found["lost"] == found["duplicated"] == 0
    assert found["balance"] == found["oracle_balance"]
    assert found["balance"]["set_aside"] > 0
    assert any(isinstance(event, Click) for event in map(_decoded, rows[40:80]))


def _decoded(row: LogRecord) -> Any:
    return decode(row.value)
