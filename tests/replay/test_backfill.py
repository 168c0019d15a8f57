"""A backfill holds what the joiner makes of the log, whatever was killed while it was made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest

from embedding_store.errors import CorruptRecord, LogError, PositionError, UsageError
from online_model.examples import COLUMNS, Block, Examples, ExamplesDigest
from replay import backfill as backfilling
from replay.backfill import Task, backfill, figures, join_locally, join_partition
from replay.joining import JoinedLog
from replay.readers import in_time_order, open_log
from replay.recording import EVENTS, ITEMS, Recorded, Recording
from streams.backfill import Backfill
from streams.join_snapshots import LaneSnapshots
from streams.join_store import JoinStore
from streams.joiner import Joiner, JoinSettings, Record
from streams.topics import TopicSettings
from tests.replay.laid_out import JOIN, PARTITIONS, backfilled, contents, recorded, simulated, task_of


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated(tmp_path_factory.mktemp("log") / "log.jsonl")


@pytest.fixture(scope="module")
def recording(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return recorded(log, tmp_path_factory.mktemp("recording") / "recording")


@pytest.fixture(scope="module")
def whole(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backfill that nothing disturbed, in small blocks."""
    out = tmp_path_factory.mktemp("whole") / "backfill"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backfilling, "SLICE", 100)
        backfilled(recording, out)
    return out


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backfilling, "SLICE", 100)


def _records(recording: Recording, partition: int) -> list[Recorded]:
    return list(recording.records(EVENTS, partition))


def _blocks(out: Path, positions: dict[int, int] | None = None, items: int = 0) -> list[Block]:
    pieces = Backfill(str(out)).pieces(positions or {}, items)
    return [piece.block for piece in pieces if piece.block is not None]


def test_the_examples_are_those_of_a_direct_replay(log: Path, whole: Path) -> None:
    direct, digest = JoinedLog(JOIN, PARTITIONS), ExamplesDigest()
    for _, blocks in direct.slices(in_time_order(open_log("events", log))):
        for block in blocks:
            digest.add(block.examples)
    for block in direct.close():
        digest.add(block.examples)
    made = Backfill(str(whole)).manifest
    assert made.examples_digest == digest.hexdigest()
    assert digest.rows > 1_000
    found, counts = figures(made), direct.counts()
    assert found["balance"] == {name: getattr(counts, name) for name in found["balance"]}
    assert found["partitions"] == {0: 0, 1: 0, 2: 0}, "they come before the topic's first record"


def test_its_blocks_are_the_joiners(recording: Recording, whole: Path) -> None:
    found = _blocks(whole)
    assert [b.watermark for b in found] == sorted(b.watermark for b in found), "by event time across partitions"
    for partition in range(PARTITIONS):
        records = _records(recording, partition)
        shift = -len(records)
        joiner = Joiner(JOIN, partition, shift)
        mine = iter([block for block in found if block.partition == partition])
        for start in range(0, len(records), 100):
            some = [Record(r.offset + shift, r.stamp, r.value) for r in records[start : start + 100]]
            want, got = joiner.process(some).block, next(mine)
            for name in COLUMNS:
                np.testing.assert_array_equal(getattr(got.examples, name), getattr(want.examples, name), err_msg=name)
            np.testing.assert_array_equal(got.users, want.users)
            np.testing.assert_array_equal(got.histories, want.histories)
            for name in ("from_offset", "to_offset", "handled", "watermark", "counts", "set_aside"):
                assert getattr(got, name) == getattr(want, name), name
        assert next(mine, None) is None


def test_a_join_worker_goes_on_from_its_states(recording: Recording, tmp_path: Path) -> None:
    """Half of the log by the backfill, half by a joiner on the state in it: as one joiner over all of it."""
    records = _records(recording, 1)
    half = len(records) // 2
    task = Task(str(tmp_path / "out"), task_of(recording, "").origin, {1: backfilling.Range(0, half)})
    join_partition(task, 1, [(r.offset, r.stamp, r.value) for r in records[:half]])
    settings = backfilling.snapshot_settings(task.out, task.origin, tmp_path)
    fetched = LaneSnapshots(settings, 1, tmp_path / "1").fetch(half - 1, half)
    assert fetched is not None
    rest = [Record(r.offset, r.stamp, r.value) for r in records[half:]]
    with JoinStore(fetched, JOIN) as store:
        assert store.next_offset == half
        after = Joiner(JOIN, 1, half, store.state()).process(rest).block
    one = Joiner(JOIN, 1)
    one.process([Record(r.offset, r.stamp, r.value) for r in records[:half]])
    want = one.process(rest).block
    assert len(want.examples) > 100
    assert after.counts == want.counts
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(after.examples, name), getattr(want.examples, name), err_msg=name)


def test_killed_in_a_partition_and_run_again_it_is_the_same(recording: Recording, whole: Path, tmp_path: Path) -> None:
    out, begun = tmp_path / "out", []

    def killed(task: Task, recording: Recording, partitions: list[int]) -> None:
        join_locally(task, recording, partitions[:1])
        records = ((r.offset, r.stamp, r.value) for r in _records(recording, partitions[1])[:700])
        join_partition(task, partitions[1], _ending(records))

    def again(task: Task, recording: Recording, partitions: list[int]) -> None:
        begun.extend(partitions)
        join_locally(task, recording, partitions)

    with pytest.raises(KeyboardInterrupt):
        backfilled(recording, out, killed)
    assert not (out / "backfill.json").exists(), "half a backfill is none"
    with pytest.raises(UsageError, match="no backfill is there"):
        Backfill(str(out))
    (out / "examples/partition=0/part-00009.parquet").write_bytes(b"of a run with other settings")
    backfilled(recording, out, again)
    assert begun == [1, 2], "the first is done"
    assert contents(out) == contents(whole)
    backfilled(recording, out, again)
    assert begun == [1, 2], "all are"
    assert contents(out) == contents(whole)


def _ending(records):  # type: ignore[no-untyped-def]
    yield from records
    raise KeyboardInterrupt


def test_a_recording_that_has_grown_is_joined_to_its_new_end(
    log: Path, recording: Recording, tmp_path: Path
) -> None:
    task = task_of(recording, tmp_path / "out")
    ranges = {p: backfilling.Range(0, range_.end) for p, range_ in task.ranges.items()}
    shorter = Task(task.out, task.origin, ranges | {1: backfilling.Range(0, ranges[1].end // 2)})
    first = backfill(shorter, recording, join_locally)
    longer = backfill(Task(task.out, task.origin, ranges), recording, join_locally)
    assert longer.parts[1].rows > first.parts[1].rows
    assert longer.examples_digest == backfilled(recording, tmp_path / "other").examples_digest


def test_other_settings_want_another_directory(recording: Recording, whole: Path) -> None:
    other = JoinSettings(wait_ms=4_000)
    with pytest.raises(UsageError, match="choose another --out"):
        backfill(task_of(recording, whole, other), recording, join_locally)
    made = Backfill(str(whole))
    with pytest.raises(UsageError, match=r"made with \[join\] wait_ms = 3000, .*: set it so"):
        made.check(TopicSettings(partitions=PARTITIONS), other)
    with pytest.raises(UsageError, match=r"a backfill of events, not shop\.events"):
        made.check(TopicSettings(prefix="shop.", partitions=PARTITIONS))
    with pytest.raises(UsageError, match="has partition 2, events has 2"):
        made.check(TopicSettings(partitions=2))
    made.check(TopicSettings(partitions=PARTITIONS), JOIN)


def test_a_trainer_is_given_what_it_has_not_learned(recording: Recording, whole: Path) -> None:
    every = _blocks(whole)
    cut = every[len(every) // 2]
    positions = {cut.partition: cut.to_offset}
    left = [b for b in every if b.partition != cut.partition or b.from_offset >= cut.to_offset]
    rest = _blocks(whole, positions)
    assert [(b.partition, b.from_offset) for b in rest] == [(b.partition, b.from_offset) for b in left]
    for got, want in zip(rest, left, strict=True):
        np.testing.assert_array_equal(got.examples.row_id, want.examples.row_id)
    with pytest.raises(PositionError, match="begin with an empty --data-dir"):
        _blocks(whole, {cut.partition: cut.to_offset - 1})
    made = Backfill(str(whole))
    assert not made.is_behind({}, made.manifest.items)
    assert made.is_behind(dict.fromkeys(range(PARTITIONS), 0), made.manifest.items)
    assert not made.is_behind(dict.fromkeys(range(PARTITIONS), 0), made.manifest.items - 1)
    items = sum(piece.read for piece in made.pieces({}, 0))
    assert items == made.manifest.items == len(list(recording.records(ITEMS, 0))) > 100
    assert sum(piece.read for piece in made.pieces({}, 30)) == items - 30


def test_any_reader_of_parquet_takes_it(whole: Path) -> None:
    table = pyarrow.dataset.dataset(whole / "examples", partitioning="hive").to_table()
    assert set(COLUMNS) | {"partition", "from_offset", "to_offset"} == set(table.column_names)
    every = Examples.concat([block.examples for block in _blocks(whole)])
    assert sorted(table["row_id"].to_pylist()) == sorted(every.row_id.tolist())


def test_what_is_damaged_is_said(recording: Recording, tmp_path: Path) -> None:
    backfilled(recording, tmp_path)
    path = tmp_path / "examples/partition=1/part-00000.parquet"
    path.write_bytes(path.read_bytes()[:1_000])
    with pytest.raises(CorruptRecord, match="is damaged or missing: make the backfill again"):
        _blocks(tmp_path)


@pytest.mark.parametrize("offsets", [[0, 1, 1], [1, 0], [0, 200]])
def test_offsets_out_of_their_order_are_refused(recording: Recording, tmp_path: Path, offsets: list[int]) -> None:
    task = Task(str(tmp_path), task_of(recording, "").origin, {0: backfilling.Range(0, 100)})
    with pytest.raises(LogError, match="record it again"):
        join_partition(task, 0, [(offset, 0, b"") for offset in offsets])


def test_offsets_without_records_at_the_end_are_in_the_last_block(recording: Recording, tmp_path: Path) -> None:
    task = Task(str(tmp_path), task_of(recording, "").origin, {0: backfilling.Range(5, 40)})
    part = join_partition(task, 0, [(7, 0, b"no event")])
    assert (part.from_offset, part.next_offset, part.counts.rejected) == (5, 40, 1)


def test_it_lies_wherever_fsspec_goes(recording: Recording, whole: Path) -> None:
    made = backfilled(recording, "memory://backfill-of-a-test")
    assert made == Backfill(str(whole)).manifest
    assert len(list(Backfill("memory://backfill-of-a-test").pieces({}, 0))) > PARTITIONS


@pytest.mark.parametrize("name", ["../../else.parquet", "/etc/passwd", "..", "a/b.parquet", ""])
def test_it_names_files_of_its_own_folder_only(whole: Path, tmp_path: Path, name: str) -> None:
    manifest = json.loads((whole / "backfill.json").read_text())
    for damaged in ({"item_files": [name]}, {"parts": [manifest["parts"][0] | {"files": [name]}]}):
        (tmp_path / "backfill.json").write_text(json.dumps(manifest | damaged))
        with pytest.raises(UsageError, match="make the backfill again"):
            Backfill(str(tmp_path))
