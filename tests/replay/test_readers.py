"""Logs: every row becomes events or is counted as rejected, and a file that is not the log says so in one line."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from embedding_store.errors import LogError, UsageError
from replay.readers import READERS, BadRow, ColumnMapping, Record, SetAside, TableReader, in_time_order, open_log
from streams.events import Click, Impression, Item, Purchase, Watch, decode, decode_item, encode
from tests.public_logs import KUAIRAND, TAOBAO_BY_TIME, TAOBAO_BY_USER

Finder = Callable[[str], Path]
GOOD = "1,10,100,pv,1511658000\n"
KUAIRAND_HEADER = "user_id\tvideo_id\ttime_ms\tis_click\tplay_time_ms\tduration_ms\n"


def kinds(records: Iterable[Record]) -> Counter[str]:
    return Counter(type(record).__name__ for record in records)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def error_of(name: str, path: Path) -> str:
    """The one line that reading the whole log ends with."""
    with pytest.raises(LogError) as caught:
        for _ in open_log(name, path):
            pass
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --- the public logs


def test_taobao_by_time_comes_out_row_for_row(public_log: Finder) -> None:
    log = open_log("taobao", public_log(TAOBAO_BY_TIME))
    records = list(log)
    assert kinds(records) == {"Click": 85_773, "Cart": 5_292, "Favourite": 2_959, "Purchase": 2_144, "Item": 75_384}
    assert (log.rows, log.rejected.total()) == (96_168, 0)
    events = [record for record in records if not isinstance(record, Item)]
    assert len({event.event_id for event in events}) == log.rows
    assert (events[0].ts, events[-1].ts) == (1_511_658_000_000, 1_511_664_909_000)
    assert records == list(log), "reading it again must give the same ids"
    assert records == list(in_time_order(log)), "it is in time order already"
    for record in records[:2000]:
        assert (decode_item if isinstance(record, Item) else decode)(encode(record)) == record


def test_a_log_sorted_by_user_is_put_in_time_order(public_log: Finder) -> None:
    log = open_log("taobao", public_log(TAOBAO_BY_USER))
    records = list(in_time_order(log))
    assert log.rows == 100_001
    assert kinds(records) == {"Click": 89_710, "Cart": 5_446, "Favourite": 2_744, "Purchase": 2_101, "Item": 64_468}
    times = [record.ts for record in records if not isinstance(record, Item)]
    assert times == sorted(times)
    told: set[str | int] = set()
    for record in records:
        if isinstance(record, Item):
            told.add(record.item)
        else:
            assert record.item in told, "an item must be known before its first event"


def test_kuairand_rows_become_impression_click_and_watch(public_log: Finder) -> None:
    log = open_log("kuairand", public_log(KUAIRAND))
    events = [record for record in in_time_order(log) if not isinstance(record, Item)]
    assert (log.rows, log.rejected.total()) == (41_828, 0)
    assert kinds(events) == {"Impression": 41_828, "Click": 27_484, "Watch": 41_828}
    impressions = [event for event in events if isinstance(event, Impression)]
    assert len(impressions) - len({event.event_id for event in impressions}) == 124, "views that are told twice"
    shown = {}
    for event in events:
        assert event.scenario == "video"
        if isinstance(event, Impression):
            shown.setdefault((event.request_id, event.items[0]), event.ts)
        else:
            assert isinstance(event, Click | Watch)
            after = event.ts - shown[event.request_id, event.item]
            assert 0 < after < 30 * 60_000, "every action follows its impression, while that is open"
    assert max(event.play_ms for event in events if isinstance(event, Watch)) == 612_577


# --- single rows


def test_taobao_behaviours_and_units(tmp_path: Path) -> None:
    log = open_log("taobao", write(tmp_path / "log.csv", "7,8,9,buy,1511658001\n"))
    assert list(log) == [
        Item(item=8, category=9),
        Purchase(event_id="taobao-1", ts=1_511_658_001_000, user=7, item=8),
    ]
    assert not log.has_impressions


def test_an_item_is_told_again_when_its_category_has_changed(tmp_path: Path) -> None:
    rows = "1,10,100,pv,5\n1,10,100,pv,6\n2,10,101,pv,7\n"
    records = list(open_log("taobao", write(tmp_path / "log.csv", rows)))
    assert [record.category for record in records if isinstance(record, Item)] == [100, 101]
    assert [type(record) for record in records] == [Item, Click, Click, Item, Click]


def test_the_first_telling_of_an_item_follows_the_time_and_not_the_file(tmp_path: Path) -> None:
    rows = "1,10,101,pv,9\n2,10,100,pv,1\n"
    records = list(in_time_order(open_log("taobao", write(tmp_path / "log.csv", rows))))
    assert [record.category for record in records if isinstance(record, Item)] == [100, 101]


def test_a_row_twice_has_the_same_ids_and_another_row_others(tmp_path: Path) -> None:
    rows = ["1\t2\t1000000\t1\t0\t500\n"] * 2 + ["1\t2\t1000000\t1\t10\t500\n"]
    events = list(open_log("kuairand", write(tmp_path / "log.tsv", KUAIRAND_HEADER + "".join(rows))))
    ids = [event.event_id for event in events if not isinstance(event, Item)]
    assert ids[:3] == ids[3:6]
    assert not set(ids[:3]) & set(ids[6:])
    assert len({event.request_id for event in events if isinstance(event, Impression)}) == 1, "one view, one request"
    assert [event.ts for event in events[:3]] == [1_000_000, 1_000_001, 1_000_002]  # type: ignore[union-attr]


def test_columns_are_found_by_name_and_commas_will_do(tmp_path: Path) -> None:
    text = "tab,duration_ms,is_click,time_ms,video_id,user_id,play_time_ms\n1,500,0,1000,2,1,77\n"
    impression, watch = open_log("kuairand", write(tmp_path / "log.csv", text))
    assert isinstance(impression, Impression)
    assert isinstance(watch, Watch)
    assert (impression.user, impression.items, watch.play_ms, watch.duration_ms) == (1, [2], 77, 500)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1,10,100,pv", "columns"),
        ("1,10,100,pv,1511658000,extra", "columns"),
        ("1,10,100,look,1511658000", "behaviour"),
        ("x,10,100,pv,1511658000", "id"),
        ("1,,100,pv,1511658000", "id"),
        ("1,10,99999999999999999999,pv,1511658000", "id"),
        ("1,10,100,pv,-5", "time"),
        ("1,10,100,pv,1511658000000000", "time"),
    ],
)
def test_bad_rows_are_counted_by_reason_and_the_rest_is_read(tmp_path: Path, row: str, reason: str) -> None:
    log = open_log("taobao", write(tmp_path / "log.csv", GOOD * 150 + row + "\n" + GOOD * 50))
    events = [record for record in log if not isinstance(record, Item)]
    assert log.rejected == {reason: 1}
    assert log.rows == 201 == len(events) + log.rejected.total()
    assert events[-1].event_id == "taobao-201"


# --- files that are not the log


def test_a_wrong_format_is_refused_early_with_the_first_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", GOOD * 90 + "2017-11-26;10;pv\n" * 2 + GOOD * 100_000)
    log = open_log("taobao", path)
    with pytest.raises(LogError, match=r"2 of the first 100 rows are wrong; the first is line 91, columns"):
        list(log)
    assert log.rows == 100, "it must not read on"


def test_one_percent_is_borne(tmp_path: Path) -> None:
    log = open_log("taobao", write(tmp_path / "log.csv", (GOOD * 99 + "bad\n") * 5))
    assert kinds(log)["Click"] == 495
    assert log.rejected == {"columns": 5}


def test_a_short_file_of_another_format_is_refused(tmp_path: Path) -> None:
    message = error_of("taobao", write(tmp_path / "log.csv", "a,b\nc,d\n"))
    assert "2 of the first 2 rows are wrong" in message
    assert "line 1, columns" in message


def test_a_header_without_the_columns_is_refused(tmp_path: Path) -> None:
    other = write(tmp_path / "x", "user_id\tvideo_id\ttime_ms\tduration_ms\n")
    assert "is_click, play_time_ms" in error_of("kuairand", other)
    assert "no row" in error_of("kuairand", write(tmp_path / "y", KUAIRAND_HEADER))


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    assert "check the path" in error_of("taobao", tmp_path / "nowhere.csv")
    assert "empty" in error_of("taobao", write(tmp_path / "empty.csv", ""))
    assert "no row" in error_of("taobao", write(tmp_path / "empty.gz", gzip.compress(b"")))
    assert "not a file" in error_of("taobao", tmp_path)
    with pytest.raises(UsageError, match="kuairand, movielens"):
        open_log("movies", tmp_path)


def test_broken_gzip(tmp_path: Path) -> None:
    packed = gzip.compress("".join(f"1,{n},100,pv,1511658000\n" for n in range(50_000)).encode())
    assert "cut short" in error_of("taobao", write(tmp_path / "cut.gz", packed[: len(packed) // 2]))
    middle = len(packed) // 2
    hurt = packed[:middle] + bytes(b ^ 0xFF for b in packed[middle : middle + 64]) + packed[middle + 64 :]
    write(tmp_path / "hurt.gz", hurt)
    with pytest.raises(LogError, match=r"corrupt after|not UTF-8|rows are wrong"):
        list(open_log("taobao", tmp_path / "hurt.gz"))
    wrong_sum = packed[:-8] + bytes(4) + packed[-4:]
    assert "corrupt after line" in error_of("taobao", write(tmp_path / "sum.gz", wrong_sum))
    assert "corrupt after line 0" in error_of("taobao", write(tmp_path / "text.gz", GOOD * 10))


def test_gzip_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    assert kinds(open_log("taobao", write(tmp_path / "log.csv", gzip.compress(GOOD.encode()))))["Click"] == 1


def test_garbage_is_refused_in_one_line(tmp_path: Path) -> None:
    rng = random.Random(1)
    assert "not UTF-8 text" in error_of("taobao", write(tmp_path / "noise", rng.randbytes(100_000)))
    assert "longer than" in error_of("taobao", write(tmp_path / "endless", "1," * 600_000))
    assert "rows are wrong" in error_of("taobao", write(tmp_path / "zeros", bytes(100) + b"\n"))
    for size in (1, 10, 1000):
        error_of("taobao", write(tmp_path / f"small{size}", rng.randbytes(size)))


# --- the base


def test_windows_line_ends_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    log = open_log("taobao", write(tmp_path / "log.csv", "\ufeff1,10,100,pv,5\r\n\r\n2,10,100,pv,6\r\n\n"))
    assert kinds(log) == {"Click": 2, "Item": 1}
    assert log.rows == 2


def test_a_reader_is_a_few_lines(tmp_path: Path) -> None:
    class Likes(TableReader):
        name, has_impressions, columns = "likes", False, ("who", "what")

        def convert(self, row: Sequence[str], number: int) -> Iterable[Record]:
            if not row[0]:
                raise BadRow("who", "nobody")
            return [Click(event_id=f"likes-{number}", ts=number, user=row[0], item=row[1])]

    log = Likes.open(write(tmp_path / "likes.csv", "ann,tea\n,tea\nbob,milk\n"))
    assert [record.item for record in log] == ["tea", "milk"]  # type: ignore[union-attr]
    assert log.rejected == {"who": 1}


def test_rows_that_tell_of_nothing_are_counted_and_not_held_against_the_file(tmp_path: Path) -> None:
    class Calls(TableReader):
        name, has_impressions, columns = "calls", False, ("who", "what")

        def convert(self, row: Sequence[str], number: int) -> Iterable[Record]:
            if row[1] == "-":
                raise SetAside("silence", "nothing was said")
            return [Click(event_id=f"calls-{number}", ts=number, user=row[0], item=row[1])]

    log = Calls.open(write(tmp_path / "calls.csv", "ann,-\n" * 200 + "ann,tea\n" * 3 + "x\n"))
    assert len(list(log)) == log.good == 3
    assert (log.rejected, log.wrong, log.rows) == ({"silence": 200, "columns": 1}, 1, 204)
    with pytest.raises(LogError, match="none of its 9 rows tells of an event"):
        list(Calls.open(write(tmp_path / "silence.csv", "ann,-\n" * 9)))


@pytest.mark.parametrize("name", sorted(READERS.keys() - {"recording"}))  # of a directory: test_recording.py
def test_every_reader_refuses_garbage_and_says_what_it_has(name: str, tmp_path: Path) -> None:
    assert READERS[name].about
    assert "\n" not in READERS[name].about
    columns = ColumnMapping(user="a", item="b", time="c") if name == "generic" else None
    for text in (b"\x00\x01\x02", b"one line of prose", b'{"json": true}\n' * 200, b"a,b\nc,d\n", b"\n\n"):
        log = open_log(name, write(tmp_path / "file", text), columns=columns)
        assert isinstance(log.has_impressions, bool)
        with pytest.raises(LogError) as caught:
            list(log)
        assert "\n" not in str(caught.value)
        assert log.rows == log.good + log.rejected.total()
