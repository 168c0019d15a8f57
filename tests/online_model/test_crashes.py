"""Crashed at any boundary between two steps, also while it recovers, a run ends as the one that was not disturbed.

Real processes, a real SIGKILL at each fault point in turn. A point that is never reached fails its test.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from embedding_store.checkpoint import CheckpointStore
from embedding_store.columns import MOMENTUM
from embedding_store.delta import Assembler
from embedding_store.faults import POINTS, arm, fault
from embedding_store.kept import KeptCheckpoints
from embedding_store.snapshot import latest_snapshot, read_snapshot
from online_model.features import EXTRAS
from tests.end_to_end.test_fault_points import WORKER_POINTS
from tests.online_model import crashing
from tests.online_model.expected import Expected
from tests.online_model.test_widening import RESHAPE
from tests.streams.children import processes

BLOCKS = len(crashing.blocks())
RECOVERY = ["recover.opened", "recover.weights", "recover.rows", "recover.done"]
ROLLBACK = [point for point in POINTS if point.partition(".")[0] in ("rollback", "replace")]
LEARNING = [point for point in POINTS if point not in (*RECOVERY, *ROLLBACK, *RESHAPE, *WORKER_POINTS)]


def _end_of(target: object, *arguments: object) -> int | None:
    """The exit code of a process; −9: it was killed."""
    process = processes.Process(target=target, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join(120)
    return process.exitcode


def _learn(folder: Path, fault: str = "", until: int = BLOCKS, drain: bool = True) -> int | None:
    return _end_of(crashing.learn, str(folder), fault, until, drain)


def _go_back(folder: Path, fault: str = "") -> int | None:
    return _end_of(crashing.go_back, str(folder), fault)


def _result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    with path.open("w") as file:
        for block in crashing.blocks():
            rows = block.examples
            for closed, example, part, row in zip(
                rows.closed.tolist(), rows.example_id.tolist(), rows.part.tolist(), rows.row_id.tolist(), strict=True
            ):
                told = {"partition": block.partition, "closed": closed, "example_id": example, "part": part}
                file.write(json.dumps(told | {"row_id": row}) + "\n")
    return Expected(path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert _learn(folder) == 0
    return _result(folder)


def _check(folder: Path, expected: Expected) -> None:
    """What was published, what a replica would start from, what is kept, and what the marks say."""
    expected.check(folder / "marks.jsonl")
    with CheckpointStore(folder / "store", None) as store:
        head = store.head()
        assert head is not None
        rows = {t: {int(i): r for part in store.iter_rows(t) for i, r in _by_id(part.without(MOMENTUM))}
                for t in store.layouts}  # fmt: skip
        snapshot = read_snapshot(latest_snapshot(folder / "snapshots") or Path())
        assert (snapshot.epoch, snapshot.sequence) <= head.place
    assert _replayed(folder / "topic") == rows, "a replica of all versions has not what the store has"
    assert sorted(p.name for p in folder.iterdir()) == [
        "kept", "marks.jsonl", "result.json", "snapshots", "store", "topic",
    ], "something was left over"  # fmt: skip
    kept = KeptCheckpoints(str(folder / "kept"))
    found = list(kept.newest_first())
    assert found
    assert [kept.damages(manifest) for manifest in found] == [[]] * len(found)


def _by_id(rows: object) -> list:
    names = sorted(rows.columns)
    return [(int(i), tuple(rows.columns[n][k].tobytes() for n in names)) for k, i in enumerate(rows.ids)]


def _replayed(topic: Path) -> dict:
    """The rows of a replica, which is a dict, after all versions: each goes on from the one before, or is it again."""
    assembler, tables, at = Assembler(), {table: {} for table in EXTRAS}, None
    for part in crashing.read_topic(topic):
        version = assembler.add(part)
        if version is None or (at is not None and (version.epoch, version.sequence) <= at):
            continue
        assert version.base == at, "a version is missing"
        at = (version.epoch, version.sequence)
        for table, ids in version.gone.items():
            for i in ids.tolist():
                tables[table].pop(i, None)
        for table, rows in version.tables.items():
            tables[table].update(_by_id(rows))
    return tables


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=pytest.mark.nightly) if p.startswith("copy.") else p for p in LEARNING]
)
def test_crashed_at_each_point_and_again_while_it_recovers(
    point: str, tmp_path: Path, expected: Expected, undisturbed: dict
) -> None:
    assert _learn(tmp_path, f"{point}:2") == -signal.SIGKILL, f"{point} was never reached"
    again = RECOVERY[LEARNING.index(point) % len(RECOVERY)]
    assert _learn(tmp_path, again) == -signal.SIGKILL, f"{again} was never reached"
    assert _learn(tmp_path) == 0
    result = _result(tmp_path)
    assert result["digest"] == undisturbed["digest"]
    assert {int(p): at[1:] for p, at in result["positions"].items()} == expected.all()
    assert result["positions"] == undisturbed["positions"]
    assert result["replica"] == result["version"]
    _check(tmp_path, expected)


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run of half the log, taken back to its oldest kept checkpoint, then the rest: undisturbed."""
    folder = tmp_path_factory.mktemp("rolled_back")
    assert _learn(folder, until=BLOCKS // 2, drain=False) == 0
    assert _go_back(folder) == 0
    assert _learn(folder) == 0
    return _result(folder)


@pytest.mark.parametrize("point", ROLLBACK)
def test_a_rollback_that_was_cut_short_is_done_again(
    point: str, tmp_path: Path, expected: Expected, rolled_back: dict, undisturbed: dict
) -> None:
    assert _learn(tmp_path, until=BLOCKS // 2, drain=False) == 0
    assert _go_back(tmp_path, point) == -signal.SIGKILL, f"{point} was never reached"
    assert _go_back(tmp_path) == 0
    assert _learn(tmp_path) == 0
    result = _result(tmp_path)
    assert result["digest"] == rolled_back["digest"] != undisturbed["digest"]
    assert {int(p): at[1:] for p, at in result["positions"].items()} == expected.all()
    expected.check(tmp_path / "marks.jsonl")


@pytest.mark.parametrize("point", ROLLBACK)
def test_a_trainer_that_is_started_after_half_a_rollback_has_the_old_store_or_the_new_one(
    point: str, tmp_path: Path, expected: Expected, rolled_back: dict, undisturbed: dict
) -> None:
    assert _learn(tmp_path, until=BLOCKS // 2, drain=False) == 0
    assert _go_back(tmp_path, point) == -signal.SIGKILL
    assert _learn(tmp_path) == 0
    result = _result(tmp_path)
    done = point in ("replace.placed", "rollback.done")
    assert result["digest"] == (rolled_back if done else undisturbed)["digest"]
    assert {int(p): at[1:] for p, at in result["positions"].items()} == expected.all()


def test_every_point_is_crashed_at_by_some_test() -> None:
    assert {*LEARNING, *RECOVERY, *ROLLBACK, *RESHAPE, *WORKER_POINTS} == set(POINTS)
    assert len(LEARNING) >= len(RECOVERY), "each of the recovery's is reached by one of these"


def test_a_point_that_is_not_registered_is_refused_and_an_unarmed_one_does_nothing() -> None:
    for text in ("commit.nowhere", "commit.begun:0"):
        point, _, times = text.partition(":")
        with pytest.raises(ValueError, match="is no fault point"):
            arm(point, int(times or 1))
    for point in POINTS:
        fault(point)


def test_the_expectation_finds_what_is_lost_or_doubled(expected: Expected, tmp_path: Path) -> None:
    """The oracle itself: a mark that no run could make is found."""
    for wrong in ("lost", "doubled", "moved"):
        rows = {str(p): list(at) for p, at in expected.after(100).items()}
        rows["0"][0] += {"lost": -1, "doubled": 1, "moved": 0}[wrong]
        rows["0"][1] = (rows["0"][1] + np.uint64(7).item()) % 2**64
        marks = tmp_path / wrong
        marks.write_text(json.dumps({"mark": "pending", "sequence": 1, "rows": rows}) + "\n")
        with pytest.raises(AssertionError, match="not the first"):
            expected.check(marks)
    marks = tmp_path / "undone"
    lines = [{"mark": what, "sequence": 1, "rows": expected.after(count)}
             for what, count in (("pending", 100), ("done", 100), ("opened", 0))]  # fmt: skip
    marks.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(AssertionError, match="opened with 0 rows"):
        expected.check(marks)
