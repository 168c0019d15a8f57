"""Logs in time order: as `sorted` would put them, in bounded memory, with nothing left behind."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_store.errors import LogError
from replay.readers import Record, in_time_order, open_log, sorting
from replay.readers.base import LogReader
from streams.events import Click, Impression, Item
from tests.public_logs import TAOBAO_BY_TIME, TAOBAO_BY_USER

Finder = Callable[[str], Path]
ROOT = Path(__file__).parents[2]


class Listed(LogReader):
    """A log that is a list in memory; `reads` counts how often it was read."""

    name, has_impressions = "listed", False
    content: Sequence[Record] = ()
    reads = 0

    def source(self) -> Iterator[tuple[int, Sequence[str]]]:
        self.reads += 1
        return ((number, (str(number),)) for number in range(1, len(self.content) + 1))

    def convert(self, row: Sequence[str], number: int) -> Iterable[Record]:
        return [self.content[number - 1]]


def listed(content: Sequence[Record]) -> Listed:
    log = Listed(Path("listed"))
    log.content = content
    return log


def click(ts: int, number: int = 0) -> Click:
    return Click(event_id=number, ts=ts, user=1, item=1)


def sorted_plainly(content: Sequence[Record]) -> list[Record]:
    """The same by `sorted`: every event with the items before it; items that say nothing new are left out."""
    groups: list[list[Record]] = [[]]
    for record in content:
        groups[-1].append(record)
        if not isinstance(record, Item):
            groups.append([])
    *whole, rest = groups
    whole.sort(key=lambda group: group[-1].ts)  # type: ignore[union-attr]
    told: dict[str | int, Item] = {}
    result: list[Record] = []
    for record in (record for group in [*whole, rest] for record in group):
        if isinstance(record, Item):
            if told.get(record.item) == record:
                continue
            told[record.item] = record
        result.append(record)
    return result


def temporary_files() -> list[str]:
    """The open files of this process that have no name."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue  # that of the listing itself
    return [name for name in found if name.endswith("(deleted)")]


records = st.one_of(
    st.builds(click, st.integers(0, 8)),
    st.builds(Item, item=st.integers(0, 3), category=st.one_of(st.none(), st.text(min_size=1, max_size=3))),
    st.builds(
        Impression, event_id=st.text(min_size=1, max_size=3), ts=st.integers(0, 8), user=st.just("ann"),
        request_id=st.just(-5), items=st.just([1, "b"]), positions=st.just([0, 1]), context=st.just({"a": [1.5, None]}),
        feature_hash=st.just(-(1 << 63)), propensities=st.just([0.25, 1.0]),
    ),
)  # fmt: skip


@given(content=st.lists(records, min_size=1, max_size=40), hold=st.integers(1, 50))
def test_it_is_what_sorted_gives(content: list[Record], hold: int) -> None:
    numbered = [click(r.ts, n) if isinstance(r, Click) else r for n, r in enumerate(content)]
    assert list(in_time_order(listed(numbered), hold)) == sorted_plainly(numbered)


@pytest.mark.parametrize("name", [TAOBAO_BY_TIME, TAOBAO_BY_USER])
def test_a_public_log_is_the_same_sorted_on_disk_as_in_memory(public_log: Finder, name: str, tmp_path: Path) -> None:
    log = open_log("taobao", public_log(name))
    in_memory = list(in_time_order(log))
    assert list(in_time_order(log, hold=7_000, directory=tmp_path)) == in_memory
    assert not list(tmp_path.iterdir())


def test_a_log_in_order_needs_no_file(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    log = listed([click(n // 3, n) for n in range(1000)])
    assert list(in_time_order(log, 10, nowhere)) == log.content
    assert log.reads == 2
    log = listed([click(0, n) for n in range(10)])
    assert list(in_time_order(log, 11, nowhere)) == log.content
    assert log.reads == 1, "one that fits into memory is read once"
    with pytest.raises(LogError, match=r"cannot be sorted in .*nowhere \(No such file"):
        list(in_time_order(listed([click(-n % 50, n) for n in range(50)]), 10, nowhere))


@pytest.mark.parametrize("place", [0, 9, 10, 11, 500, 999])
def test_one_early_record_anywhere_is_found(place: int) -> None:
    content = [click(100 + n, n) for n in range(1000)]
    content[place] = click(50, place)
    log = listed(content)
    assert list(in_time_order(log, 10)) == sorted(content, key=lambda r: r.ts)


def test_a_log_that_changes_while_it_is_read_is_refused() -> None:
    log = listed([click(n, n) for n in range(100)])
    ordered = in_time_order(log, 10)
    next(ordered)
    log.content = [click(100 - n, n) for n in range(100)]
    with pytest.raises(LogError, match="changed while it was read"):
        list(ordered)


def test_nothing_is_left_after_an_error_or_a_close(tmp_path: Path) -> None:
    log = listed([click(-n % 500, n) for n in range(500)])
    ordered = in_time_order(log, 10, tmp_path)
    next(ordered)
    before = [name for name in temporary_files() if str(tmp_path) in name]
    assert len(before) == 1, "the runs are in one file without a name"
    ordered.close()  # type: ignore[attr-defined]
    assert not [name for name in temporary_files() if str(tmp_path) in name]

    class Interrupted(Exception):
        pass

    def interrupt() -> None:
        if log.rows > 2_000:
            raise Interrupted

    log.content = [click(-n % 5_000, n) for n in range(5_000)]
    with pytest.raises(Interrupted):
        list(in_time_order(log, 10, tmp_path, interrupt))
    assert not [name for name in temporary_files() if str(tmp_path) in name]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    log = listed([click(-n % 5_000, n) for n in range(5_000)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # the write fails as on a full disk
    try:
        with pytest.raises(LogError, match=r"listed: cannot be sorted in .*; make room, or name another") as caught:
            list(in_time_order(log, 100, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)


def test_a_whole_catalogue_is_not_held_for_the_event_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "WAITING_ITEMS", 5)
    items: list[Record] = [Item(item=n) for n in range(12)]
    late = [click(9, 1), *items, click(7, 2)]
    assert list(in_time_order(listed(late), 4)) == [*items[:10], *items[10:], click(7, 2), click(9, 1)]
    assert list(in_time_order(listed([*items, click(7)]), 4, Path("/nowhere"))) == [*items, click(7)], "in order"
    few = [click(9, 1), *items[:4], click(7, 2), click(8, 3)]
    assert list(in_time_order(listed(few), 3)) == [*items[:4], click(7, 2), click(8, 3), click(9, 1)]
    taken: list[Record] = []
    next(sorting._timed(taken.append(item) or item for item in items))  # type: ignore[func-returns-value]
    assert len(taken) == 5, "it comes out before the event behind it is read"


PROGRAM = r"""
import re, sys
from pathlib import Path
from replay.readers import in_time_order, open_log
log = open_log("taobao", sys.argv[1])
count = last = 0
for record in in_time_order(log, 20_000):
    if hasattr(record, "ts"):
        assert record.ts >= last
        last, count = record.ts, count + 1
# Not ru_maxrss: a child starts with its parent's.
print(count, re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    rng = random.Random(5)
    peak = {}
    for rows in (50_000, 500_000):  # each gives an item and an event: a million records of the longer one
        path = tmp_path / "log.csv"
        with path.open("w") as file:
            file.writelines(f"{n % 997},{n % 499},7,pv,{rng.randrange(10**9)}\n" for n in range(rows))
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path)], cwd=ROOT, check=True, capture_output=True, text=True
        )
        count, peak[rows] = map(int, ran.stdout.split())
        assert count == rows
    assert peak[500_000] < peak[50_000] + 4_000, f"kB at most: {peak}"


def test_kill_9_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("".join(f"1,1,1,pv,{10_000 - n}\n" for n in range(10_000)))
    program = PROGRAM.replace("count = last = 0", "count = last = 0; import os, signal").replace(
        "    if hasattr", "    os.kill(os.getpid(), signal.SIGKILL)\n    if hasattr"
    ).replace("20_000", "100")
    (tmp_path / "sort").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "sort")}
    ran = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, env=environment, capture_output=True)
    assert ran.returncode == -9
    assert not list((tmp_path / "sort").iterdir())
