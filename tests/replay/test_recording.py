"""A recording is what was in the topics, whole, wherever it lies, and says so by the names of its files alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.dataset
import pytest

from embedding_store.errors import LogError, PositionError, UsageError
from replay.inspection import inspect
from replay.readers import detect, in_time_order, open_log
from replay.recording import EVENTS, ITEMS, Recorded, RecordedTopic, Recording, RecordingWriter, is_recording
from replay.simulator import Simulation, SimulatorSettings
from streams.events import Item, Tick, decode
from tests.replay.recordings import Log

HOUR = 3_600_000
TOPICS = {EVENTS: RecordedTopic("x.events", (0, 5)), ITEMS: RecordedTopic("x.items", (0,))}


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "recording")
        return
    yield f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def rows(*offsets: int, hour: int = 0) -> list[Recorded]:
    return [Recorded(n, hour * HOUR + n, f"key {n}".encode(), f"value {n}".encode()) for n in offsets]


def test_records_come_back_as_they_were(place: str) -> None:
    writer = RecordingWriter(place, TOPICS)
    odd = [Recorded(9, 9, None, None), Recorded(11, 2, b"", b"\xff\x00")]  # a tombstone, a hole, a stamp that goes back
    writer.write(EVENTS, 1, 5, 9, rows(5, 6, 8))
    writer.write(EVENTS, 1, 9, 14, odd)
    again = RecordingWriter(place, TOPICS)
    again.write(EVENTS, 1, 14, 15, rows(14, hour=7))
    recording = Recording(place)
    assert is_recording(place)
    assert recording.partitions == 2
    assert recording.next_offsets(EVENTS) == {0: 0, 1: 15}
    assert recording.next_places() == {("x.events", 0): 0, ("x.events", 1): 15, ("x.items", 0): 0}
    whole = [*rows(5, 6, 8), *odd, *rows(14, hour=7)]
    assert list(recording.records(EVENTS, 1)) == whole
    assert list(recording.records(EVENTS, 1, from_offset=8)) == whole[2:]
    assert list(recording.records(EVENTS, 1, hours=["1970-01-01T07"])) == whole[-1:]
    assert list(recording.records(EVENTS, 0)) == []
    assert [(f.from_offset, f.to_offset, f.hour[-2:]) for f in recording.files(EVENTS)] == [
        (5, 9, "00"), (9, 14, "00"), (14, 15, "07")
    ]  # fmt: skip


def test_any_reader_of_parquet_sees_a_table_by_hour(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path, TOPICS)
    writer.write(EVENTS, 0, 0, 2, rows(0, 1))
    writer.gap(EVENTS, 0, 2, 4)
    writer.write(EVENTS, 0, 4, 5, rows(4, hour=3))
    table = pyarrow.dataset.dataset(tmp_path / "topic=events", partitioning="hive").to_table()
    assert table.column("offset").to_pylist() == [0, 1, 4]
    assert table.column("hour").to_pylist() == ["1970-01-01T00"] * 2 + ["1970-01-01T03"]
    assert {f.name: str(f.type) for f in table.schema} == {
        "partition": "int32", "offset": "int64", "stamp": "int64", "key": "binary", "value": "binary", "hour": "string",
    }  # fmt: skip


def test_a_gap_that_is_stated_is_passed_over_and_any_other_is_an_error(place: str) -> None:
    writer = RecordingWriter(place, TOPICS)
    writer.gap(EVENTS, 0, 0, 3)
    writer.write(EVENTS, 0, 3, 5, rows(3, 4))
    writer.write(EVENTS, 0, 5, 7, rows(5, 6))
    writer.write(EVENTS, 0, 7, 8, rows(7))
    recording = Recording(place)
    assert [r.offset for r in recording.records(EVENTS, 0)] == [3, 4, 5, 6, 7]
    assert [(gap.from_offset, gap.to_offset) for gap in recording.gaps(EVENTS)] == [(0, 3)]
    system, _ = fsspec.core.url_to_fs(place)
    middle = next(file.path for file in recording.files(EVENTS) if file.from_offset == 5)
    data = system.cat_file(middle)
    system.rm_file(middle)
    with pytest.raises(LogError, match="offsets 5 to 7 are missing"):
        Recording(place)
    system.pipe_file(middle.replace("005-", "004-"), data)
    with pytest.raises(LogError, match="offsets 4 to 5 are there twice"):
        Recording(place)


def test_what_does_not_go_on_from_the_last_file_is_refused(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path, TOPICS)
    writer.write(EVENTS, 0, 0, 2, rows(0, 1))
    for start, end, some in (
        (1, 3, rows(1, 2)), (3, 5, rows(3, 4)), (2, 2, []), (2, 4, rows(1, 2)), (2, 4, rows(4)), (2, 5, rows(3, 2)),
        (2, 4, [*rows(2), *rows(3, hour=1)]), (2, 4, []),
    ):  # fmt: skip
        with pytest.raises(PositionError):
            writer.write(EVENTS, 0, start, end, some)
    assert writer.next_offset(EVENTS, 0) == Recording(tmp_path).next_offsets(EVENTS)[0] == 2


def test_half_a_file_is_no_file(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path, TOPICS)
    writer.write(EVENTS, 0, 0, 2, rows(0, 1))
    hour = tmp_path / "topic=events" / "hour=1970-01-01T00"
    half = hour / ".0000-000000000000002-000000000000004.parquet.partial"
    half.write_bytes(b"PAR1 and no end")
    assert Recording(tmp_path).next_offsets(EVENTS)[0] == 2
    assert len(list(Recording(tmp_path).records(EVENTS, 0))) == 2
    RecordingWriter(tmp_path, TOPICS)
    assert not half.exists()


def test_damage_and_other_topics_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no recording is there"):
        Recording(tmp_path)
    writer = RecordingWriter(tmp_path, TOPICS)
    writer.write(EVENTS, 0, 0, 2, rows(0, 1))
    with pytest.raises(UsageError, match=r"is a recording of x\.events of 2 partitions"):
        RecordingWriter(tmp_path, {**TOPICS, EVENTS: RecordedTopic("x.events", (0, 0, 0))})
    file = Path(Recording(tmp_path).files(EVENTS)[0].path)
    file.rename(file.with_name("0001-000000000000005-000000000000007.parquet"))
    with pytest.raises(LogError, match="offsets are not those of its name"):
        list(Recording(tmp_path).records(EVENTS, 1))
    file.with_name("0001-000000000000005-000000000000007.parquet").write_bytes(b"PAR1")
    with pytest.raises(LogError, match="parquet: "):
        list(Recording(tmp_path).records(EVENTS, 1))
    (tmp_path / "recording.json").write_text('{"format": 9, "topics": {}}')
    with pytest.raises(LogError, match="format 9"):
        Recording(tmp_path)


def test_a_recording_is_a_log_for_every_command_that_reads_one(tmp_path: Path) -> None:
    made = list(Simulation(SimulatorSettings(users=50, items=30, requests_per_s=5), events=600))
    path = Log(made).record(tmp_path / "recording")
    assert detect(path) == "recording"
    log = open_log("recording", path)
    assert log.has_impressions
    read = list(in_time_order(log))
    events = [r for r in made if not isinstance(r, (Item, Tick))]
    assert sorted((r for r in read if not isinstance(r, Item)), key=str) == sorted(events, key=str)
    assert {str(r) for r in read if isinstance(r, Item)} == {str(r) for r in made if isinstance(r, Item)}
    assert [r.ts for r in read if not isinstance(r, Item)] == sorted(e.ts for e in events)
    found = inspect(log)
    assert found.events > 600
    assert log.rows == log.good
    assert log.identity() == open_log("recording", path).identity()


def test_what_is_wrong_in_a_recording_is_counted_and_tombstones_are_set_aside(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path, TOPICS)
    click = b'{"kind":"click","event_id":"e","ts":5,"user":1,"item":2}'
    tick = b'{"kind":"tick","event_id":"t","ts":9}'
    writer.write(EVENTS, 0, 0, 4, [Recorded(n, n, None, value) for n, value in enumerate((click, b"{", tick, None))])
    writer.write(ITEMS, 0, 0, 2, [Recorded(0, 0, b"2", None), Recorded(1, 1, b"2", b'{"kind":"item","item":2}')])
    log = open_log("recording", tmp_path, max_rejected_share=0.5)
    assert list(log.records()) == [Item(item=2), decode(click)]
    assert log.rejected == {"tombstone": 1, "not_json": 2}
    assert (log.rows, log.good, log.wrong) == (6, 3, 2)
