"""Formats: each public log comes out row for row, and each way a format is written gives the same events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_store.errors import LogError, UsageError
from replay.readers import ColumnMapping, LogReader, LogSettings, Record, detect, open_log
from replay.readers.values import millis
from replay.sinks import JsonlSink
from streams.events import Cart, Click, Impression, Item, Purchase, Refund, Tick, Watch, decode, decode_item, encode
from tests.public_logs import KUAIRAND, TAOBAO_BY_TIME, TAOBAO_BY_USER

Finder = Callable[[str], Path]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def records_of(log: LogReader) -> list[Record]:
    """All records; each is one that the system would take, and no row is lost."""
    records = list(log)
    assert log.rows == log.good + log.rejected.total()
    for record in records:
        assert (decode_item if isinstance(record, Item) else decode)(encode(record)) == record
    return records


def read(name: str, path: Path, columns: ColumnMapping | None = None) -> list[Record]:
    return records_of(open_log(name, path, columns=columns))


# --- the public logs

# format, rows as the README beside the file says, rows set aside by reason, records by kind, ids that come again
PUBLIC = {
    TAOBAO_BY_TIME: (
        "taobao", 96_168, {}, {"Item": 75_384, "Click": 85_773, "Cart": 5_292, "Favourite": 2_959, "Purchase": 2_144}, 0
    ),
    TAOBAO_BY_USER: (
        "taobao", 100_001, {},
        {"Item": 64_468, "Click": 89_710, "Cart": 5_446, "Favourite": 2_744, "Purchase": 2_101}, 0,
    ),
    KUAIRAND: ("kuairand", 41_828, {}, {"Impression": 41_828, "Click": 27_484, "Watch": 41_828}, 290),
    "ml-100k/ml-100k.inter.gz": ("movielens", 100_000, {}, {"Impression": 100_000, "Click": 34_174 + 21_201}, 0),
    "yoochoose/yoochoose-clicks-100k_train_full.tsv.gz": ("yoochoose", 70_278, {}, {"Click": 70_278}, 1),
    "open-bandit/random_men.csv.gz": ("openbandit", 10_000, {}, {"Impression": 10_000, "Click": 46}, 0),
    "open-bandit/bts_men.csv.gz": ("openbandit", 10_000, {}, {"Impression": 10_000, "Click": 69}, 0),
    "online-retail/online_retail.csv.gz": (
        "onlineretail", 541_909, {"service": 2_902, "adjustment": 2_477},
        {"Item": 5_463, "Click": 527_826, "Purchase": 527_826, "Refund": 8_704}, 10_478,
    ),
    "ga-merch-store/all_sessions.csv.gz": (
        "gamerch", 15_134, {"checkout": 31, "removed": 1},
        {"Item": 8_780, "Impression": 14_785 + 134 + 137, "Click": 134 + 137, "Cart": 37, "Purchase": 9}, 0,
    ),
}  # fmt: skip
LARGE = "online-retail"


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=pytest.mark.nightly) if place.startswith(LARGE) else place for place in PUBLIC]
)
def test_a_public_log_comes_out_row_for_row(place: str, public_log: Finder) -> None:
    name, rows, set_aside, kinds, again = PUBLIC[place]
    path = public_log(place)
    assert detect(path) == name
    log = open_log(name, path)
    found: Counter[str] = Counter()
    ids: set[str | int] = set()
    repeated = 0
    for n, record in enumerate(log):
        found[type(record).__name__] += 1
        if not isinstance(record, Item):
            repeated += record.event_id in ids
            ids.add(record.event_id)
        if n % 7 == 0 or n < 2000:
            assert (decode_item if isinstance(record, Item) else decode)(encode(record)) == record
    assert (log.rows, log.good + log.rejected.total()) == (rows, rows)
    assert (log.rejected, log.wrong) == (set_aside, 0)
    assert (found, repeated) == (kinds, again)


@pytest.mark.nightly
def test_online_retail_refunds_what_was_cancelled_and_loses_no_customer(public_log: Finder) -> None:
    log = open_log("onlineretail", public_log("online-retail/online_retail.csv.gz"))
    users = {event.user for event in log if not isinstance(event, Item | Tick)}
    assert len({user for user in users if isinstance(user, int)}) == 4_372 - 9, "nine of them bought no goods"
    assert all(isinstance(user, int) or user.startswith("invoice-") for user in users)


def test_every_click_follows_its_impression_in_the_logs_that_have_them(public_log: Finder) -> None:
    for name, place in (
        ("movielens", "ml-100k/ml-100k.inter.gz"),
        ("openbandit", "open-bandit/bts_men.csv.gz"),
        ("gamerch", "ga-merch-store/all_sessions.csv.gz"),
    ):
        shown = {}
        for event in open_log(name, public_log(place)):
            if isinstance(event, Impression):
                shown[event.request_id, event.items[0]] = event.ts
            elif isinstance(event, Click):
                assert event.ts == shown[event.request_id, event.item] + 1


def test_open_bandit_pages_and_propensities(public_log: Finder) -> None:
    events = [event for event in open_log("openbandit", public_log("open-bandit/random_men.csv.gz"))]
    impressions = [event for event in events if isinstance(event, Impression)]
    assert {p for event in impressions for p in event.propensities or ()} == {1 / 34}
    assert {p for event in impressions for p in event.positions or ()} == {0, 1, 2}
    assert len({event.user for event in impressions}) == 230
    pages = Counter(event.request_id for event in impressions)
    assert Counter(pages.values()) == {1: 9_978, 2: 11}, "rows of one group and microsecond are one page"


# --- movielens


def test_a_rating_is_an_impression_and_a_click_if_it_is_a_like(tmp_path: Path) -> None:
    rows = [(1, 2, "3.5", 10), (1, 3, "4", 10), (2, 2, "5.0", 11)]
    text = {
        "u.data": "".join("\t".join(map(str, row)) + "\n" for row in rows),
        "ratings.dat": "".join("::".join(map(str, row)) + "\n" for row in rows),
        "ratings.csv": "userId,movieId,rating,timestamp\n" + "".join(",".join(map(str, row)) + "\n" for row in rows),
        "x.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join("\t".join(map(str, row)) + "\n" for row in rows),
    }
    found = []
    for name, content in text.items():
        path = write(tmp_path / name, content)
        assert detect(path) == "movielens", name
        found.append(read("movielens", path))
    assert all(records == found[0] for records in found)
    first, second, like, _, _ = found[0]
    assert isinstance(first, Impression)
    assert isinstance(second, Impression)
    assert (first.items, first.ts, first.user) == ([2], 10_000, 1)
    assert first.request_id == second.request_id, "ratings of one second are one request"
    assert isinstance(like, Click)
    assert (like.item, like.ts, like.request_id) == (3, 10_001, second.request_id)


@pytest.mark.parametrize("row", ["1 2 6 10", "1 2 nan 10", "1 2  10", "a 2 3 10", "1 2 3 1e99", "1 2 3", "1 2 3 -1"])
def test_bad_ratings(tmp_path: Path, row: str) -> None:
    text = "1 2 3 10\n" * 100 + row + "\n"
    log = open_log("movielens", write(tmp_path / "u.data", text.replace(" ", "\t")))
    assert len(records_of(log)) == 100
    assert log.wrong == 1


# --- yoochoose


def test_yoochoose_clicks_and_buys_in_each_dialect(tmp_path: Path) -> None:
    clicks = write(tmp_path / "clicks.dat", "1,2014-04-07T10:51:09.277Z,214,0\n1,2014-04-07T10:54:09.868Z,215,S\n"
                   "2,2014-04-07T10:57:00.306Z,216,7\n")  # fmt: skip
    table = write(tmp_path / "x.tsv", "SessionId\tItemId\tTime\n1\t214\t1396867869.277\n1\t215\t1396868049.868\n"
                  "2\t216\t1396868220.306\n")  # fmt: skip
    assert detect(clicks) == detect(table) == "yoochoose"
    told = [(e.user, e.item, e.ts) for e in read("yoochoose", clicks) if isinstance(e, Click)]
    assert told == [(1, 214, 1396867869277), (1, 215, 1396868049868), (2, 216, 1396868220306)]
    assert told == [(e.user, e.item, e.ts) for e in read("yoochoose", table) if isinstance(e, Click)]
    assert [i for i in read("yoochoose", clicks) if isinstance(i, Item)] == [Item(item=216, category="7")]
    rows = "42,2014-04-06T18:44:58.314Z,214,12462,1\n42,2014-04-06T18:44:58.325Z,215,0,0\n"
    buys = write(tmp_path / "buys.dat", rows)
    assert detect(buys) == "yoochoose"
    bought = [(e.item, e.price, e.quantity) for e in read("yoochoose", buys) if isinstance(e, Purchase)]
    assert bought == [(214, 12462.0, 1), (215, None, 1)], "0 says that it is missing"


# --- open bandit

BANDIT = ",timestamp,item_id,position,click,propensity_score," + ",".join(f"user_feature_{i}" for i in range(4))


def test_bandit_rows(tmp_path: Path) -> None:
    when = "2019-11-24 00:03:13.442536+00:00"
    rows = [f"0,{when},14,3,0,0.25,a,b,c,d", f"1,{when},15,1,1,0.5,a,b,c,d", f"2,{when},15,1,1,0.5,a,b,c,e"]
    rows += ["3,2019-11-24 00:03:13.442999+00:00,14,3,0,0.25,a,b,c,d"]
    events = read("openbandit", write(tmp_path / "log.csv", "\n".join([BANDIT, *rows, ""])))
    shown = [event for event in events if isinstance(event, Impression)]
    assert [(e.items, e.positions, e.propensities) for e in shown[:2]] == [([14], [2], [0.25]), ([15], [0], [0.5])]
    assert shown[0].ts == shown[3].ts == 1574553793442
    assert shown[0].request_id == shown[1].request_id
    assert shown[0].user == shown[1].user != shown[2].user
    assert len({shown[i].request_id for i in (0, 2, 3)}) == 3, "other people, or another microsecond"
    assert len({event.event_id for event in events if not isinstance(event, Item)}) == len(events)


@pytest.mark.parametrize("row", ["x,1,1,0,0.5", "2019-11-24,1,0,0,0.5", "2019-11-24,1,1,0,0", "2019-11-24,1,1,0,1.5",
                                 "2019-11-24,1,1,2,0.5", "2019-11-24,,1,1,0.5"])  # fmt: skip
def test_bad_bandit_rows(tmp_path: Path, row: str) -> None:
    good = "0,2019-11-24 00:03:13.442536+00:00,14,3,0,0.25,a,b,c,d\n"
    log = open_log("openbandit", write(tmp_path / "log.csv", f"{BANDIT}\n{good * 100}1,{row},a,b,c,d\n"))
    records_of(log)
    assert (log.good, log.wrong) == (100, 1)


# --- online retail

RETAIL = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"


def test_invoice_lines(tmp_path: Path) -> None:
    text = RETAIL + (
        '536365,85123A,"HEART, ""WHITE"" 6"" HIGH",6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom\n'
        "536370,85123A,,2,2010-12-01 08:27:00,2.55,,France\n"
        "C536379,85123A,HEART,-1,2010-12-01 09:41:00,2.55,17850.0,United Kingdom\n"
        "536380,85123A,damaged,-9,2010-12-01 09:42:00,0.0,,United Kingdom\n"
        "536381,POST,POSTAGE,1,2010-12-01 09:43:00,18.0,17850.0,France\n"
        "A563186,B,Adjust bad debt,1,2011-08-12 14:51:00,-11062.06,,United Kingdom\n"
    )
    log = open_log("onlineretail", write(tmp_path / "log.csv", text))
    records = records_of(log)
    item, click, bought, guest, bought_too, renamed, refund = records
    assert item == Item(item="85123A", title='HEART, "WHITE" 6" HIGH')
    assert isinstance(click, Click)
    assert isinstance(bought, Purchase)
    assert (bought.user, bought.quantity, bought.price, bought.currency) == (17850, 6, 2.55, "GBP")
    assert (click.user, click.item, click.ts, bought.ts) == (17850, "85123A", 1291191960000, 1291191960001)
    assert isinstance(guest, Click)
    assert isinstance(bought_too, Purchase)
    assert guest.user == bought_too.user == "invoice-536370"
    assert renamed == Item(item="85123A", title="HEART")
    assert isinstance(refund, Refund)
    assert (refund.user, refund.quantity) == (17850, 1)
    assert log.rejected == {"adjustment": 2, "service": 1}


def test_other_copies_of_online_retail(tmp_path: Path) -> None:
    second = "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country\n"
    row = "489434,85048,CANDLE,12,{},6.95,13085,United Kingdom\n"
    iso = read("onlineretail", write(tmp_path / "a.csv", RETAIL + row.format("2009-12-01 07:45:00")))
    assert iso[1].ts == 1259653500000  # type: ignore[union-attr]
    spreadsheet = read("onlineretail", write(tmp_path / "b.csv", second + row.format("12/1/2009 7:45")))
    assert [event.ts for event in spreadsheet[1:]] == [event.ts for event in iso[1:]]  # type: ignore[union-attr]
    latin = tmp_path / "latin.csv"
    latin.write_bytes((RETAIL + row.format("12/1/2009 7:45").replace("CANDLE", "£1 CANDLE")).encode("latin-1"))
    assert [type(record) for record in read("onlineretail", latin)] == [Item, Click, Purchase]


# --- the merchandise store


def test_hits_of_visits(tmp_path: Path) -> None:
    head = "visitId,time,productSKU,v2ProductName,v2ProductCategory,productPrice,currencyCode,productQuantity,"
    rows = [
        '122213,SKU1,"Bottle, 22 oz",Home/Drinkware/,2990000,USD,,0', "122213,SKU2,Cap,(not set),0,,,1",
        "130000,SKU2,Cap,${escCatTitle},0,,,2", "140000,SKU2,Cap,Home/,5000000,USD,3,3",
        "150000,SKU2,Cap,Home/,5000000,USD,3,6", "150001,SKU2,Cap,Home/,5000000,USD,3,5",
    ]  # fmt: skip
    rows = [f"1473757371,{row}" for row in rows]
    log = open_log("gamerch", write(tmp_path / "log.csv", "\n".join([head + "eCommerceAction_type", *rows, ""])))
    records = records_of(log)
    assert records[0] == Item(item="SKU1", title="Bottle, 22 oz", category="Home/Drinkware/", price=2.99)
    assert records[2] == Item(item="SKU2", title="Cap")
    events = [record for record in records if not isinstance(record, Item)]
    assert [type(event) for event in events] == [Impression, Impression, Click, Impression, Click, Cart, Purchase]
    assert [event.ts for event in events[:3]] == [1473757493213, 1473757493213, 1473757493214]
    assert events[0].request_id == events[1].request_id == events[2].request_id != events[3].request_id  # type: ignore[union-attr]
    bought = events[-1]
    assert isinstance(bought, Purchase)
    assert (bought.quantity, bought.price, bought.currency, bought.user) == (3, 5.0, "USD", 1473757371)
    assert log.rejected == {"checkout": 1}


# --- our own records

IDS = st.integers(0, 10**18) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)
TIMES = st.integers(0, 1 << 43)
RECORDS = st.one_of(
    st.builds(Click, event_id=IDS, ts=TIMES, user=IDS, item=IDS, request_id=st.none() | IDS),
    st.builds(Watch, event_id=IDS, ts=TIMES, user=IDS, item=IDS, play_ms=st.integers(0, 9), duration_ms=st.just(0)),
    st.builds(Purchase, event_id=IDS, ts=TIMES, user=IDS, item=IDS, price=st.none() | st.floats(0, 1e9)),
    st.builds(Impression, event_id=IDS, ts=TIMES, user=IDS, request_id=IDS, items=st.lists(IDS, min_size=1, max_size=3),
              context=st.none() | st.just({"lang": "de"})),
    st.builds(Item, item=IDS, title=st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
)  # fmt: skip


@given(sent=st.lists(RECORDS, min_size=1, max_size=9), packed=st.booleans())
def test_what_a_sink_has_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, sent: list[Record], packed: bool
) -> None:
    path = tmp_path_factory.mktemp("log") / ("log.jsonl.gz" if packed else "log.jsonl")
    with JsonlSink(path) as sink:
        for record in sent:
            sink.send(record)
    log = open_log("events", path)
    assert list(log.records()) == sent
    assert (log.rows, log.good, log.rejected) == (len(sent), len(sent), {})
    assert detect(path) == "events"


def test_bad_records_are_counted_by_the_reasons_of_the_joiner(tmp_path: Path) -> None:
    good = '{"kind":"click","event_id":1,"ts":5,"user":1,"item":2}\n'
    bad = '{"kind":"click","event_id":1,"ts":-5,"user":1,"item":2}\nprose\n{"kind":"item","item":""}\n'
    log = open_log("events", write(tmp_path / "log.jsonl", good * 400 + bad))
    assert len(records_of(log)) == 400
    assert log.rejected == {"out_of_range": 2, "not_json": 1}


# --- any table


def columns(**fields: object) -> ColumnMapping:
    return msgspec.convert({"user": "u", "item": "i", "time": "t", **fields}, ColumnMapping)


def test_a_mapping_of_every_column(tmp_path: Path) -> None:
    text = (
        "id;u;i;t;what;page;cat;cost;n;place;p\n"
        "e1;ann;tea;1700000000;look;r1;hot;2.5;;1;0.5\ne2;ann;tea;1700000001;buy;;hot;2.5;3;;\n"
        "e3;ann;tea;1700000002;back;;;;-3;;\ne4;ann;tea;1700000003;noise;;;;;;\n"
    )
    kinds = {"look": "impression", "buy": "purchase", "back": "refund", "noise": "ignore"}
    mapping = columns(
        kind="what", kinds=kinds, event_id="id",
        request="page", category="cat", price="cost", quantity="n", position="place", position_from=1, propensity="p",
        currency="EUR", scenario="search",
    )  # fmt: skip
    log = open_log("generic", write(tmp_path / "log.csv", text), columns=mapping)
    assert log.has_impressions
    assert records_of(log) == [
        Item(item="tea", category="hot", price=2.5),
        Impression(event_id="e1-i", ts=1700000000000, user="ann", items=["tea"], request_id="r1", positions=[0],
                   propensities=[0.5], scenario="search"),
        Purchase(event_id="e2", ts=1700000001000, user="ann", item="tea", quantity=3, price=2.5, currency="EUR",
                 scenario="search"),
        Refund(event_id="e3", ts=1700000002000, user="ann", item="tea", quantity=3, scenario="search"),
    ]  # fmt: skip
    assert log.rejected == {"ignored": 1}


def test_the_generic_reader_reads_kuairand_as_its_own_reader_does(public_log: Finder) -> None:
    mapping = columns(user="user_id", item="video_id", time="time_ms", time_unit="ms", clicked="is_click",
                      play="play_time_ms", duration="duration_ms", scenario="video")  # fmt: skip
    path = public_log(KUAIRAND)

    def told(log: LogReader) -> list[tuple]:
        found: list[tuple] = []
        for event in log:
            match event:
                case Impression():
                    found.append((event.ts, str(event.user), str(event.items[0]), "shown"))
                case Click() | Watch():
                    play = (event.play_ms, event.duration_ms) if isinstance(event, Watch) else ()
                    found.append((event.ts, str(event.user), str(event.item), *play))
        return found

    assert told(open_log("generic", path, columns=mapping)) == told(open_log("kuairand", path))


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("s", "1700000000.25"), ("ms", "1700000000250"), ("us", "1700000000250999"), ("ns", "1700000000250999999"),
        ("iso", "2023-11-14T22:13:20.250Z"), ("iso", "2023-11-14 23:13:20.250+01:00"), ("s", "2023-11-14 22:13:20.25"),
    ],
)  # fmt: skip
def test_units_of_time(tmp_path: Path, unit: str, text: str) -> None:
    (click,) = read("generic", write(tmp_path / "log.csv", f"u,i,t\n1,2,{text}\n"), columns(time_unit=unit))
    assert isinstance(click, Click)
    assert (click.ts, click.user, click.item) == (1700000000250, "1", "2")


@given(ms=st.integers(0, 1 << 43))
def test_times_keep_their_milliseconds_in_every_unit(ms: int) -> None:
    assert millis(f"{ms // 1000}.{ms % 1000:03}", "s") == ms
    assert millis(str(ms), "ms") == millis(f"{ms}999", "us") == millis(f"{ms}999999", "ns") == ms


def test_tables_without_a_header(tmp_path: Path) -> None:
    mapping = columns(user="3", item="1", time="2", has_header=False)
    first, second = read("generic", write(tmp_path / "log.txt", "tea|5|ann|x\nmilk|6|bob|y\n"), mapping)
    assert (first.user, first.item, first.ts) == ("ann", "tea", 5000)  # type: ignore[union-attr]
    assert (second.user, second.item, second.ts) == ("bob", "milk", 6000)  # type: ignore[union-attr]
    with pytest.raises(LogError, match="does not name"):
        list(open_log("generic", write(tmp_path / "short.txt", "tea|5\n"), columns=mapping))


def test_likes_watches_and_pages(tmp_path: Path) -> None:
    mapping = columns(rating="r", like_from=3)
    ratings = read("generic", write(tmp_path / "r.csv", "u,i,t,r\n1,2,3,5\n1,4,3,2\n"), mapping)
    assert [type(event) for event in ratings] == [Impression, Click, Impression]
    assert ratings[0].request_id == ratings[2].request_id, "one user, one time: one page"  # type: ignore[union-attr]
    mapping = columns(default_kind="watch", play="p", duration="d", play_unit="s")
    (watch,) = read("generic", write(tmp_path / "w.csv", "u,i,t,p,d\n1,2,3,1.5,\n"), mapping)
    assert isinstance(watch, Watch)
    assert (watch.ts, watch.play_ms, watch.duration_ms) == (3000, 1500, 0)
    assert not open_log("generic", tmp_path / "w.csv", columns=mapping).has_impressions


def test_a_row_that_stands_twice_is_two_events_and_another_file_gives_other_ids(tmp_path: Path) -> None:
    a = read("generic", write(tmp_path / "a.csv", "u,i,t\n1,2,3\n1,2,3\n"), columns())
    b = read("generic", write(tmp_path / "b.csv", "u,i,t\n1,2,4\n"), columns())
    assert len({event.event_id for event in (*a, *b)}) == 3  # type: ignore[union-attr]
    assert a == read("generic", tmp_path / "a.csv", columns())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"user": ""}, "user"),
        ({"kind": "k"}, "kinds"),
        ({"kinds": {"a": "click"}}, "kind"),
        ({"rating": "r", "clicked": "c"}, "exclude"),
        ({"default_kind": "watch"}, "play"),
        ({"has_header": False}, "1, 2, 3"),
    ],
)
def test_a_mapping_that_does_not_say_enough_is_refused(tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_log("generic", write(tmp_path / "log.csv", "u,i,t\n1,2,3\n"), columns=columns(**fields))


def test_a_mapping_is_for_the_generic_format_only(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", "1,10,100,pv,5\n")
    with pytest.raises(UsageError, match=r"\[log.columns\]"):
        open_log("taobao", path, columns=columns())
    assert open_log("taobao", path, columns=LogSettings().columns).path == str(path)


def test_the_settings_come_from_toml() -> None:
    text = '[log]\nformat = "generic"\n[log.columns]\nuser = "u"\nkind = "k"\nkinds = {view = "click"}'
    settings = msgspec.convert(msgspec.toml.decode(text)["log"], LogSettings)
    assert settings.columns == ColumnMapping(user="u", kind="k", kinds={"view": "click"})
    for wrong in ('kinds = {view = "gaze"}', 'usr = "x"', 'time_unit = "h"'):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(msgspec.toml.decode(wrong), ColumnMapping)


# --- which format is it?


def test_what_no_reader_knows_is_not_guessed(tmp_path: Path) -> None:
    for text in ("u,i,t\n1,2,3\n" * 5, "prose\n", '{"a": 1}\n', "1,2,3,4\n" * 300):
        assert detect(write(tmp_path / "log", text)) is None
    with pytest.raises(LogError, match="check the path"):
        detect(tmp_path / "nowhere")


def test_a_torn_line_does_not_hide_a_format(tmp_path: Path) -> None:
    good = "1,10,100,pv,1511658000\n"
    assert detect(write(tmp_path / "log.csv", "0,1,pv\n" + good * 30)) == "taobao"
    named = "user_id,item_id,category_id,behavior,timestamp\n"
    assert detect(write(tmp_path / "named.csv", named + good)) == "taobao"
    assert len(read("taobao", tmp_path / "named.csv")) == 2, "names above the columns are no row"
