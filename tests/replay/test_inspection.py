"""What is in a log is counted as a plain count does; settings fit it; a table's columns are guessed by their names."""

from __future__ import annotations

import gzip
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_store.errors import LogError
from online_model.history import HISTORY
from online_model.settings import TrainerSettings
from replay.fitting import fitting_settings
from replay.inspection import IdCounter, Inspection, inspect, require_valid
from replay.readers import open_log
from replay.readers.guessing import guess_columns
from replay.readers.settings import ColumnMapping, LogSettings
from streams.events import Click, Impression, Item, Purchase, Tick
from streams.settings import LARGEST_BATCHES
from tests.public_logs import KUAIRAND, TAOBAO_BY_TIME, TAOBAO_BY_USER

Finder = Callable[[str], Path]


def found_in(*records: Any) -> Inspection:
    found = Inspection()
    for record in records:
        found.add(record)
    return found


def log_of(tmp_path: Path, rows: str, share: float = 1.0) -> Any:
    path = tmp_path / "log.csv"
    path.write_text(rows)
    return open_log("taobao", path, share)


# --- counting


@given(ids=st.lists(st.one_of(st.integers(-3, 30), st.text(max_size=2)), max_size=200), most=st.integers(1, 40))
def test_ids_are_counted_as_a_plain_count_does(ids: list[int | str], most: int) -> None:
    counter, plain = IdCounter(most), Counter(map(str, ids))
    for place, id_ in enumerate(ids):
        counter.add(id_)
        if place % 7 == 0:
            _ = counter.different  # looking changes nothing
    assert counter.exact == (len(plain) <= most)
    if counter.exact:
        assert (counter.different, counter.repeats) == (len(plain), len(ids) - len(plain))


def test_more_ids_than_are_kept_are_estimated() -> None:
    rng, counter = random.Random(3), IdCounter(most=4_000)
    ids = [f"user-{n}" for n in range(100_000)]
    again = rng.sample(ids, 30_000)
    for id_ in ids + again:
        counter.add(id_)
    assert not counter.exact
    assert counter.different == pytest.approx(100_000, rel=0.08)  # 4 standard errors
    assert counter.repeats == pytest.approx(30_000, rel=0.12)
    assert len(counter._hashes) <= 4_000


def test_kinds_times_order_and_duplicates() -> None:
    shown = Impression(event_id="a", ts=7_200_000, user=1, request_id=1, items=[5, 6, 7, "5"])
    found = found_in(
        Item(item=5, category=1), shown, Item(item=9), Click(event_id="b", ts=3_599_999, user="1", item=5),
        Click(event_id="b", ts=7_200_001, user=2, item=8), Tick(event_id="tick", ts=9_999_999),
        Click(event_id="c", ts=7_200_000, user=2, item=8),
    )  # fmt: skip
    assert found.kinds == {"impression": 1, "click": 3}
    assert (found.events, found.shown, found.catalogue) == (7, 4, 2)
    assert (found.from_ms, found.to_ms) == (3_599_999, 7_200_001)
    assert (found.ordered, found.disordered, found.disorder_ms) == (False, 2, 3_600_001)
    assert found.duplicates == 1
    assert (found.users.different, found.items.different, found.categories.different) == (2, 5, 1)
    assert found.click_rate == 3 / 4
    assert found.busiest_hour == (7_200_000, 6 / 3600)
    assert found.events_per_s == pytest.approx(7 / 3600.002)
    assert found_in(shown).ordered
    assert found_in().busiest_hour is None


def test_the_public_logs_hold_what_their_descriptions_say(public_log: Finder) -> None:
    log = open_log("taobao", public_log(TAOBAO_BY_TIME))
    found = inspect(log)
    assert (log.rows, found.users.different, found.items.different, found.categories.different) == (
        96_168, 58_732, 75_384, 3_757,
    )  # fmt: skip
    assert found.kinds == {"click": 85_773, "cart": 5_292, "favourite": 2_959, "purchase": 2_144}
    assert (found.ordered, found.duplicates, found.exact) == (True, 0, True)
    assert found.click_rate is None
    found = inspect(open_log("kuairand", public_log(KUAIRAND)))
    assert (found.users.different, found.items.different) == (664, 9_359)
    assert found.shown == 41_828
    assert found.duplicates >= 2 * 116, "116 rows stand there twice, each an impression and a watch at least"
    assert found.ordered is False


def test_too_many_wrong_rows_or_none_that_is_an_event_is_one_line(tmp_path: Path) -> None:
    log = log_of(tmp_path, "1,2,3,pv,4\n" * 9 + "1,2,3,pv,soon\n")
    found = inspect(log)
    require_valid(log, found, 0.1)
    with pytest.raises(LogError, match=r"1 of 10 rows are wrong \(1 time\), 10.00 % where 5 % may be; correct them"):
        require_valid(log, found, 0.05)
    with pytest.raises(LogError, match="no event in 10 rows"):
        require_valid(log, Inspection(), 1.0)


# --- settings that fit


def entries(log: LogSettings, found: Inspection) -> dict[str, Any]:
    return {
        f"{section}.{name}": value for section, many in fitting_settings(log, found).items() for name, value, _ in many
    }


def test_settings_have_room_for_what_is_in_the_log(public_log: Finder) -> None:
    path = public_log(TAOBAO_BY_USER)
    fit = entries(LogSettings(format="taobao", path=str(path)), inspect(open_log("taobao", path)))
    assert fit["log.format"] == "taobao"
    assert fit["join.implicit"] is True
    assert fit["join.ticks"] == "log"
    assert fit["model.batch_size"] == 128, "the largest power of two that gives 89,710 clicks 500 steps"
    assert fit["model.features.users"] >= 2 * 983
    assert fit["model.features.items"] >= 2 * 64_467
    assert fit["model.features.categories"] >= 2 * 3_128
    assert "join.wait_ms" not in fit, "of impressions only"


def test_a_train_worker_that_is_behind_can_take_its_largest_batch(public_log: Finder) -> None:
    path = public_log(KUAIRAND)
    fit = entries(LogSettings(format="kuairand", path=str(path)), inspect(open_log("kuairand", path)))
    most = LARGEST_BATCHES * fit["model.batch_size"]
    new = {"users": most, "items": most * (1 + TrainerSettings().negatives + HISTORY), "categories": most}
    for table, rows in new.items():
        assert fit[f"model.features.{table}"] >= rows, "or Trainer.commit_due(most) holds it back at every step"


def test_tiny_and_huge_logs_stay_inside_the_bounds() -> None:
    log = LogSettings(format="events", path="x")
    one = entries(log, found_in(Click(event_id=1, ts=5, user=1, item=1)))
    assert (one["topics.partitions"], one["model.batch_size"], one["model.recent_items"]) == (1, 64, 2)
    many = found_in(*(Click(event_id=n, ts=n, user=n, item=n) for n in range(3_000)))
    assert many.users.different == 3_000
    many.users.level, many.kinds["click"] = 14, 10**9  # as if 49 million users had been counted
    huge = entries(log, many)
    assert (huge["model.features.users"], huge["model.batch_size"]) == (1 << 22, 128)
    shown = entries(log, found_in(
        Impression(event_id=1, ts=1, user=1, request_id=1, items=[1]), Purchase(event_id=2, ts=2, user=1, item=1)
    ))  # fmt: skip
    assert shown["join.implicit"] is False
    assert shown["join.purchase_window_ms"] == 259_200_000
    assert "model.recent_items" not in shown


# --- guessing columns

ROWS = "ann,tea,view,1700000000\nbob,milk,addtocart,1700000001\nann,tea,transaction,1700000002\n"


def test_the_names_and_the_values_tell_what_a_column_is(tmp_path: Path) -> None:
    rows = ROWS.replace("\n", ",fine,eve\n")
    (tmp_path / "log.csv").write_text("visitorid,itemid,event,timestamp,weather,VisitorId\n" + rows)
    assert guess_columns(str(tmp_path / "log.csv")) == ColumnMapping(
        user="visitorid", item="itemid", time="timestamp", time_unit="s", kind="event",
        kinds={"addtocart": "cart", "transaction": "purchase", "view": "click"},
    )  # fmt: skip


def test_every_kind_of_file_is_looked_into(tmp_path: Path) -> None:
    expected = ColumnMapping(user="User ID", item="product_id", time="date", time_unit="iso", rating="stars")
    names = ("User ID", "product_id", "date", "stars")
    rows = [("ann", "tea", "2024-05-01T10:00:00", 5.0), ("bob", "milk", "2024-05-01T10:00:01", 1.0)]
    lines = ["\t".join(names), *("\t".join(map(str, row)) for row in rows)]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "c.csv").write_text("\n".join(lines).replace("\t", ";"))
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), tmp_path / "d.parquet")
    (tmp_path / "e.jsonl").write_text(
        "".join(f'{{"User ID": "{u}", "product_id": "{i}", "date": "{d}", "stars": {s}}}\n' for u, i, d, s in rows)
    )
    for path in sorted(tmp_path.iterdir()):
        assert guess_columns(str(path)) == expected, path.name
        found = inspect(open_log("generic", path, columns=guess_columns(str(path))))
        assert found.kinds == {"impression": 2, "click": 1}, path.name


@pytest.mark.parametrize(
    ("text", "unit"),
    [("1700000000", "s"), ("1700000000000", "ms"), ("1700000000000000", "us"), ("1.7e18", "ns"), ("1.5e9", "s"),
     ("soon\nu,i,2024-05-01 10:00:00", "iso")],
)  # fmt: skip
def test_the_unit_of_a_time_is_seen_from_its_size(tmp_path: Path, text: str, unit: str) -> None:
    (tmp_path / "log.csv").write_text(f"user,item,time\nu,i,{text}\n")
    assert guess_columns(str(tmp_path / "log.csv")).time_unit == unit


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("who,what,when\na,b,c\n", r"of its columns \(who, what, when\) none seems to tell the user and the item and"),
        ("user,item,when\na,b,c\n", "none seems to tell the time; name them in"),
        ("user,item,time\na,b,soon\n", "no value of its column time is a time"),
        ("\x00\x01\x02", "none seems to tell the user"),
        ("{broken", "none seems to tell the user"),
        ("", "the file is empty"),
    ],
)
def test_what_cannot_be_guessed_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(LogError, match=said) as caught:
        guess_columns(str(tmp_path / "log.csv"))
    assert str(caught.value).isprintable()


def test_a_column_of_strange_words_does_not_tell_kinds(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,time,type\na,b,1700000000,klingon\n")
    assert guess_columns(str(tmp_path / "log.csv")).kind == ""
    (tmp_path / "log.csv").write_text("user,item,time,type\na,b,1700000000,klingon\na,b,1700000000,PV\n")
    assert guess_columns(str(tmp_path / "log.csv")).kinds == {"PV": "click", "klingon": "ignore"}
