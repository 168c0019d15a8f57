"""Files: a log says the same in every kind of file, packed or not, here or elsewhere; and never fills the memory."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_store.errors import LogError
from replay.readers import READERS, ColumnMapping, Record, detect, files, open_log
from streams.events import Click, Item

Table = list[dict[str, object]]

WHEN = datetime(2019, 11, 24, 0, 3, 13, 442536, tzinfo=UTC)


def table(*names: str) -> Callable[..., Table]:
    return lambda *rows: [dict(zip(names, row, strict=True)) for row in rows]


# Made-up rows of each format: its columns' own names, and values as typed files have them.
TABLES: dict[str, Table] = {
    "taobao": table("user_id", "item_id", "category_id", "behavior", "timestamp")(
        (1, 10, 100, "pv", 1511658000), (2, 10, 100, "buy", 1511658001), (1, 11, 101, "fav", 1511658002)
    ),
    "kuairand": table("user_id", "video_id", "time_ms", "is_click", "play_time_ms", "duration_ms")(
        (1, 2, 1649581149287, 1, 46186, 45916), (1, 3, 1649581149299, 0, 0, 0)
    ),
    "movielens": table("userId", "movieId", "rating", "timestamp")((1, 2, 3.5, 881250949), (1, 3, 4.0, 881250949)),
    "yoochoose": table("SessionId", "ItemId", "Time")((3, 214716935, 1396437466.94), (3, 214832672, 1396438212.318)),
    "openbandit": table(
        "timestamp", "item_id", "position", "click", "propensity_score", *[f"user_feature_{i}" for i in range(4)]
    )((WHEN, 14, 3, 0, 0.025, "a", "b", "c", "d"), (WHEN + timedelta(minutes=1), 15, 1, 1, 0.5, "a", "b", "c", "e")),
    "onlineretail": table(
        "InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country"
    )(
        ("536365", "85123A", 'HEART, "WHITE" 6"\tHIGH\nTWO LINES', 6, WHEN, 2.55, 17850, "United Kingdom"),
        ("536366", "71053", '"', 6, WHEN, 3.0, None, "France"),
        ("C536379", "85123A", "HEART", -1, WHEN, 2.55, 17850, "United Kingdom"),
    ),
    "gamerch": table(
        "visitId", "time", "productSKU", "v2ProductName", "v2ProductCategory", "productPrice", "currencyCode",
        "productQuantity", "eCommerceAction_type",
    )(
        (1473757371, 122213, "SKU1", "Bottle, 22 oz", "Home/Drinkware/", 2990000, "USD", None, 0),
        (1473757371, 122214, "SKU1", "Bottle, 22 oz", "Home/Drinkware/", 2990000, "USD", 2, 6),
    ),
    "generic": table("who", "what", "when", "how long", "note")(
        ("ann", "tea", WHEN, 1500, "a\nb"), ("007", "milk", WHEN, None, 'say ""')
    ),
}  # fmt: skip
MAPPING = ColumnMapping(
    user="who", item="what", time="when", time_unit="iso", default_kind="impression", play="how long"
)
QUOTED = {"onlineretail", "gamerch", "generic"}  # the others have no values that need it


def plain(value: object) -> object:
    """As text files have it."""
    if isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat()
    return "" if value is None else int(value) if isinstance(value, float) and value.is_integer() else value


def delimited(rows: Table, delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows({name: plain(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode()


def json_lines(rows: Table) -> bytes:
    times = {name for name, value in rows[0].items() if isinstance(value, datetime)}
    return b"".join(
        json.dumps({name: plain(v) if name in times else v for name, v in row.items()}).encode() + b"\n" for row in rows
    )


def parquet(rows: Table, **options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, **options)
    return out.getvalue()


def with_arrow(codec: str, data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, codec) as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress,
    ".zst": partial(with_arrow, "zstd"), ".lz4": partial(with_arrow, "lz4"),
}  # fmt: skip


def read(name: str, path: str | Path) -> list[Record]:
    log = open_log(name, path, columns=MAPPING if name == "generic" else None)
    records = list(log)
    assert log.rows == log.good > 0
    return records


# --- kinds of files, and packings


def test_every_table_format_is_tried_in_every_kind_of_file() -> None:
    assert set(TABLES) == set(READERS) - {"events", "recording"}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_the_same_in_every_kind_of_file(name: str, tmp_path: Path) -> None:
    rows = TABLES[name]
    contents = {
        "x.csv": delimited(rows, ","), "x.jsonl": json_lines(rows), "x.parquet": parquet(rows),
        "small.parquet": parquet(rows, row_group_size=1, compression="zstd"),
    }  # fmt: skip
    if name != "openbandit" and name != "taobao":
        contents["x.tsv"] = delimited(rows, "\t")
    if name not in QUOTED:
        assert b'"' not in contents["x.csv"]
    expected = None
    for file, content in contents.items():
        path = tmp_path / file
        path.write_bytes(content)
        found = read(name, path)
        expected = expected or found
        assert found == expected, file
        assert name == "generic" or detect(path) == name, file


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_is_known_by_content_with_or_without_its_name(packing: str, named: bool, tmp_path: Path) -> None:
    rows = TABLES["onlineretail"]
    for kind, content in (("csv", delimited(rows, ",")), ("jsonl", json_lines(rows))):
        path = tmp_path / (f"x.{kind}{packing}" if named else f"y{kind}")
        path.write_bytes(PACKINGS[packing](content))
        assert len(read("onlineretail", path)) == 8
        assert detect(path) == "onlineretail"


@pytest.mark.parametrize("packing", [p for p in PACKINGS if p])
def test_packed_files_of_several_parts_and_broken_ones(packing: str, tmp_path: Path) -> None:
    rng = random.Random(5)
    text = "".join(f"{rng.getrandbits(50)},{n},100,pv,1511658000\n" for n in range(40_000)).encode()
    pack = PACKINGS[packing]
    whole = pack(text)
    path = tmp_path / f"x.csv{packing}"

    def error() -> str:
        with pytest.raises(LogError) as caught:
            list(open_log("taobao", path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path.write_bytes(pack(text[:-30]) + pack(text[-30:]))
    log = open_log("taobao", path)
    assert sum(isinstance(record, Click) for record in log) == log.rows == 40_000
    for size in (len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:size])
        assert "cut short" in error()
    path.write_bytes(text)
    assert "corrupt after line 0" in error(), "its name says that it is packed"
    path.write_bytes(whole[:-1000] + rng.randbytes(1000))
    assert any(said in error() for said in ("corrupt", "cut short", "not UTF-8", "rows are wrong"))


def test_files_that_are_something_else_say_what(tmp_path: Path) -> None:
    def error(content: bytes) -> str:
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(LogError) as caught:
            list(open_log("movielens", path))
        return str(caught.value)

    rows = TABLES["movielens"]
    assert "zip archive" in error(b"PK\x03\x04" + bytes(100))
    assert "JSON array" in error(json.dumps(rows).encode())
    assert "unpack it first" in error(gzip.compress(parquet(rows)))
    assert "corrupt" in error(parquet(rows)[:-10])
    assert "corrupt" in error(b"PAR1" + bytes(50) + b"PAR1")
    assert "does not name rating" in error(parquet([{k: v for k, v in row.items() if k != "rating"} for row in rows]))
    assert "no row" in error(parquet(rows, write_statistics=False)[:0] or delimited(rows, ",").splitlines()[0])


def test_json_rows_that_are_no_rows_are_counted(tmp_path: Path) -> None:
    good = json_lines(TABLES["movielens"][:1])
    path = tmp_path / "x.jsonl"
    path.write_bytes(good * 500 + b"[1]\n{\n" + b'{"userId": 1, "movieId": 2, "rating": 3}\n' + b"\n" + good)
    log = open_log("movielens", path)
    assert len(list(log)) == 501
    assert log.rejected == {"json": 2, "columns": 1}


# --- quotes

# No cell of spaces only: those are no request.
CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda text: not text or text.strip())


@given(notes=st.lists(CELLS, min_size=1, max_size=6), delimiter=st.sampled_from(",;\t|"))
def test_what_csv_can_write_is_read(
    notes: list[str], delimiter: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("quotes") / "x.csv"
    path.write_bytes(delimited([{"note": n, "u": i, "i": 2, "t": 3} for i, n in enumerate(notes)], delimiter))
    log = open_log("generic", path, columns=ColumnMapping(user="u", item="i", time="t", request="note"))
    found = [(event.user, event.request_id) for event in log if isinstance(event, Click)]
    assert found == [(str(i), note.strip() or None) for i, note in enumerate(notes)]


def test_a_quote_that_is_not_closed_costs_its_line_only(tmp_path: Path) -> None:
    head = "InvoiceNo,Description,Quantity,StockCode,InvoiceDate,UnitPrice,CustomerID\n"
    rows = [f'536365,"HEART {n}, WHITE",6,{n}A,2010-12-01 08:26:00,2.55,17850.0\n' for n in range(3000)]
    for at in (5, 2990, 2999):
        broken = rows.copy()
        broken[at] = broken[at].replace('WHITE"', "WHITE")
        path = tmp_path / "x.csv"
        path.write_text(head + "".join(broken))
        log = open_log("onlineretail", path)
        titles = [record.title for record in log if isinstance(record, Item)]
        assert titles == [f"HEART {n}, WHITE" for n in range(3000) if n != at]
        assert (log.rows, log.rejected) == (3000, {"quotes" if at != 2999 else "columns": 1})


# --- elsewhere


def test_a_log_in_any_file_system_that_fsspec_knows(tmp_path: Path) -> None:
    rows = TABLES["kuairand"]
    system = fsspec.filesystem("memory")
    for name, content in (("x.csv.zst", with_arrow("zstd", delimited(rows, ","))), ("x.parquet", parquet(rows))):
        (tmp_path / name).write_bytes(content)
        system.pipe_file(f"/logs/{name}", content)
        expected = read("kuairand", tmp_path / name)
        assert len(expected) == 5
        assert read("kuairand", f"memory://logs/{name}") == read("kuairand", f"file://{tmp_path}/{name}") == expected
        assert detect(f"memory://logs/{name}") == "kuairand"
    system.pipe_file("/logs/empty", b"")
    for url, said in (
        ("memory://logs/nowhere", "check the address"),
        ("memory://logs/empty", "empty"),
        ("memory://logs", "not a file"),
        ("nothing://x", "check the address"),
    ):
        with pytest.raises(LogError, match=said) as caught:
            open_log("kuairand", url)
        assert url in str(caught.value)
        assert "\n" not in str(caught.value)


class Server(SimpleHTTPRequestHandler):
    """Sends whole files; with `parts` also what a Range asks for."""

    parts = False

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        span = self.headers.get("Range")
        if not (self.parts and span):
            return super().do_GET()
        first, last = map(int, span.removeprefix("bytes=").split("-"))
        content = Path(self.translate_path(self.path)).read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(params=[False, True], ids=["whole", "parts"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, bool]]:
    """The address of a web server over `tmp_path`, and whether it sends parts of files, too."""
    handler = type("Handler", (Server,), {"parts": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", request.param
        server.shutdown()
        thread.join()


def test_a_log_on_a_web_server(web: tuple[str, bool], tmp_path: Path) -> None:
    address, parts = web
    rows = TABLES["taobao"] * 3000
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(delimited(rows, ",")))
    noise = random.Random(1)
    (tmp_path / "x.parquet").write_bytes(parquet([{**row, "note": noise.randbytes(100)} for row in rows]))
    (tmp_path / "big.csv").write_bytes(delimited(rows, ",") + b"1,10,100,pv,1511658000\n" * 400_000)
    assert read("taobao", f"{address}/x.csv.gz") == read("taobao", tmp_path / "x.csv.gz")
    assert detect(f"{address}/x.csv.gz") == "taobao"
    assert sum(1 for _ in open_log("taobao", f"{address}/big.csv").records()) == 2 * 409_000
    with pytest.raises(LogError, match="check the address"):
        open_log("taobao", f"{address}/nowhere.csv")
    if parts:
        assert read("taobao", f"{address}/x.parquet") == read("taobao", tmp_path / "x.parquet")
    else:
        with pytest.raises(LogError, match="download it first"):
            list(open_log("taobao", f"{address}/x.parquet"))


def test_what_a_file_is_can_be_told_when_it_comes_byte_by_byte() -> None:
    class Dribble(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 1, 1))

    with io.BufferedReader(files._Download(Dribble(b"0123456789"))) as file:
        assert file.peek(8)[:8] == b"01234567"
        assert file.read() == b"0123456789"


def test_a_download_that_breaks_off_is_said_in_one_line(tmp_path: Path) -> None:
    class Hanging(Server):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"1,10,100,pv,1511658000\n" * 100)
            self.close_connection = True

    (tmp_path / "x.csv").write_bytes(bytes(1_000_000))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hanging, directory=str(tmp_path))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(LogError, match=r"x\.csv: .*after line \d+") as caught:
                list(open_log("taobao", f"http://127.0.0.1:{server.server_port}/x.csv"))
            assert "\n" not in str(caught.value)
        finally:
            server.shutdown()
            thread.join()


# --- memory

PROGRAM = """
import re, sys
from pathlib import Path
from replay.readers import ColumnMapping, open_log
def most():  # ru_maxrss would begin with what the process that started this one has
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
columns = ColumnMapping(user="u", item="i", time="t", request="note")
for _ in open_log("generic", sys.argv[1], columns=columns).records():
    pass
start = most()
log = open_log("generic", sys.argv[2], columns=columns)
for _ in log.records():
    pass
print(log.rows, most() - start)
"""
MOST_MB = 16  # more for four times the rows: the events would be 100, the texts of the rows 60, Arrow's columns 18


@pytest.mark.parametrize("kind", ["csv", "jsonl", "csv.zst", "parquet"])
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    sizes = {"small": 100_000, "large": 400_000}
    for name, rows in sizes.items():
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":  # one row group: the worst case
            ids = pa.array(range(rows))
            columns = {"u": ids, "i": ids, "t": ids, "note": pa.array([f"note {n:030}" for n in range(rows)])}
            pq.write_table(pa.table(columns), path, row_group_size=rows, compression="none")
        elif kind == "jsonl":
            path.write_text("".join(f'{{"u":{n},"i":{n},"t":{n},"note":"note {n:030}"}}\n' for n in range(rows)))
        else:
            data = ("u,i,t,note\n" + "".join(f"{n},{n},{n},note {n:030}\n" for n in range(rows))).encode()
            path.write_bytes(with_arrow("zstd", data) if kind.endswith("zst") else data)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / f"small.{kind}"), str(tmp_path / f"large.{kind}")],
        capture_output=True, text=True, check=True, timeout=150,
    )  # fmt: skip
    rows, grown_kb = map(int, done.stdout.split())
    assert rows == sizes["large"]
    assert grown_kb < MOST_MB * 1024, f"{grown_kb:,} KB for {rows:,} rows"
