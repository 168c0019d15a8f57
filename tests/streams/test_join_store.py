"""A joiner over its store goes on after any stop as if there had been none."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_store.errors import DiskFull, PositionError, StoreError, StoreLocked, UsageError
from embedding_store.rocks import Db, open_db
from online_model.examples import Examples
from streams import join_caches, join_store, open_impressions
from streams.blocks import decode_block, encode_block
from streams.events import Click, Impression, Tick, Watch, encode
from streams.join_store import JoinStore
from streams.joiner import Joined, Joiner, JoinSettings, Record
from tests.streams.logs import SETTINGS, logs
from tests.streams.reference_joiner import ReferenceJoiner
from tests.streams.test_joiner import batches, check_chain, rows_of

S = JoinSettings(disorder_ms=5, wait_ms=20, open_ms=100, watch_wait_ms=10, purchase_window_ms=50)


def opened(path: Path, join: JoinSettings = S, cached: int = join_store.CACHED) -> tuple[JoinStore, Joiner]:
    store = JoinStore(path, join, cached=cached)
    return store, Joiner(join, 0, store.next_offset or 0, store.state())


def step(store: JoinStore, joiner: Joiner, records: list[Record], memory: int = 1_000_000) -> Joined:
    joined = joiner.process(records)
    store.commit(joined, [encode_block(joined.block), *joined.dead])
    joiner.trim(memory)
    return joined


def records_of(*events, first: int = 0) -> list[Record]:
    return [Record(first + i, None, encode(event)) for i, event in enumerate(events)]


def click(number: int, ts: int, user: int | str = "u") -> Click:
    return Click(event_id=f"c{number}", ts=ts, user=user, item="i")


@settings(max_examples=40, deadline=None)
@given(
    SETTINGS, logs(60), st.lists(st.integers(0, 1000), max_size=8), st.lists(st.booleans(), min_size=9, max_size=9),
    st.sampled_from([0, 0, 3, 1_000]), st.sampled_from([0, 2, 16]),
)  # fmt: skip
def test_neither_restarts_nor_what_is_put_aside_change_anything(join, log, cuts, restarts, memory, scanned):
    reference = ReferenceJoiner(join)
    for record in log:
        reference.feed(record)
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(join_caches, "LOOK_AHEAD_MS", 2)
        patch.setattr(open_impressions, "PAGE", 4)
        patch.setattr(open_impressions, "SCANNED", scanned)
        store, joiner = opened(Path(path), join, 1)
        blocks = []
        for batch, restart in zip(batches(log, cuts), restarts, strict=False):
            joined = step(store, joiner, batch, memory)
            blocks.append(joined.block)
            assert joiner.open.examples <= memory
            if restart:
                store.close()
                store, joiner = opened(Path(path), join, 1)
                assert store.outbox() == [encode_block(joined.block), *joined.dead]
        store.close()
    check_chain(blocks)
    assert rows_of(Examples.concat([b.examples for b in blocks])) == Counter(reference.rows)
    assert blocks[-1].counts == reference.counts
    assert blocks[-1].handled == min([h[2] for h in reference.held], default=blocks[-1].to_offset)


def test_timers_that_are_due_at_the_watermark_survive(tmp_path):
    store, joiner = opened(tmp_path)
    shown = Impression(event_id="s", ts=100, user="u", request_id="r", items=["i"])
    watch = Watch(event_id="w", ts=110, user="u", item="i", play_ms=7, duration_ms=9)
    joined = step(store, joiner, records_of(shown, watch, Tick(event_id="t", ts=125)))
    assert (joined.block.watermark, joined.block.counts.rows) == (120, 0)  # both the wait and the watch end at 120
    store.close()
    store, joiner = opened(tmp_path)
    rows = step(store, joiner, records_of(Tick(event_id="t", ts=126), first=3)).block.examples
    assert (rows.part.tolist(), rows.closed.tolist(), rows.play_ms.tolist()) == ([0, 2], [120, 120], [-1, 7])
    store.close()


def test_other_settings_are_refused(tmp_path):
    opened(tmp_path)[0].close()
    with pytest.raises(UsageError, match=r"was made with \[join\] wait_ms = 20, implicit = False: set it so, or"):
        JoinStore(tmp_path, msgspec.structs.replace(S, wait_ms=21, implicit=True))
    opened(tmp_path)[0].close()  # the refusal let go of it


def test_a_store_has_one_owner(tmp_path):
    store, _ = opened(tmp_path)
    with pytest.raises(StoreLocked):
        JoinStore(tmp_path, S)
    store.close()
    store.close()
    opened(tmp_path)[0].close()


def test_a_new_store_has_no_offset_and_nothing_to_send(tmp_path):
    store, _ = opened(tmp_path)
    assert store.next_offset is None
    assert store.outbox() == []
    joiner = Joiner(S, 0, 1_000, store.state())  # the log begins where retention left it
    step(store, joiner, [])
    assert store.next_offset == 1_000
    store.close()


def test_a_batch_that_does_not_follow_is_refused(tmp_path):
    store, joiner = opened(tmp_path)
    first = step(store, joiner, records_of(click(0, 100)))
    with pytest.raises(PositionError, match="is at offset 1 where a batch from 0 is"):
        store.commit(first, [])
    store.close()


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    store, joiner = opened(tmp_path)
    step(store, joiner, records_of(Impression(event_id="s", ts=100, user="u", request_id="r", items=["i"])))
    joined = joiner.process(records_of(click(0, 110), Tick(event_id="t", ts=200), first=1))

    with monkeypatch.context() as patch:
        patch.setattr(Db, "write", _full)
        with pytest.raises(DiskFull):
            store.commit(joined, [b"x"])
    assert (store.next_offset, len(store.outbox())) == (1, 1)
    store.commit(joined, [b"x"])
    store.close()
    store, _ = opened(tmp_path)
    assert (store.next_offset, store.outbox()) == (3, [b"x"])
    assert store.state().counts == joined.block.counts
    store.close()


def _content(path: Path) -> list:
    """All that a store says, read with nothing of JoinStore."""
    with open_db(path, join_store.FAMILIES, read_only=True) as db:
        return [list(db.items(family)) for family in join_store.FAMILIES]


@pytest.mark.parametrize("closed", [False, True])
def test_a_list_of_files_that_ends_too_early_is_refused_and_never_taken_for_less(tmp_path: Path, closed: bool) -> None:
    """RocksDB takes what is left of it: families without their older files, under commits of its log."""
    store, joiner = opened(tmp_path / "s")
    contents = {}
    for n in range(6):
        shown = [Impression(event_id=f"s{n}-{u}", ts=n, user=u, request_id=f"r{n}", items=["i"]) for u in range(n, 9)]
        step(store, joiner, records_of(*shown, Tick(event_id="t", ts=n + 6), first=store.next_offset or 0))
        if n == 3:
            store.checkpoint(tmp_path / "copy")  # all is flushed
        contents[store.next_offset] = _content(tmp_path / "s")
    if closed:
        store.close()
    shutil.copytree(tmp_path / "s", tmp_path / "hurt")
    store.close()
    manifest = next((tmp_path / "hurt").glob("MANIFEST-*")).name
    raw, refused = (tmp_path / "hurt" / manifest).read_bytes(), 0
    for end in range(0, len(raw), 48):
        shutil.copytree(tmp_path / "hurt", tmp_path / f"{end}")
        (tmp_path / f"{end}" / manifest).write_bytes(raw[:end])
        try:
            with JoinStore(tmp_path / f"{end}", S) as cut:
                found = cut.next_offset
            assert found is None or _content(tmp_path / f"{end}") == contents[found], f"cut at {end} of {len(raw)}"
        except StoreError as error:
            refused += 1
            assert str(tmp_path / f"{end}") in str(error)  # noqa: PT017
        shutil.rmtree(tmp_path / f"{end}")
    assert refused > 5


def test_only_what_changed_is_written(tmp_path, monkeypatch):
    store, joiner = opened(tmp_path)
    shown = [
        Impression(event_id=f"s{n}", ts=100, user=n, request_id=f"r{n}", items=["i", "j"], positions=[1, 2])
        for n in range(300)
    ]
    step(store, joiner, records_of(*shown, Tick(event_id="t", ts=110)))
    written, write = [], Db.write

    def counted(self, batch, sync):
        written.append(batch.raw.len())
        write(self, batch, sync)

    monkeypatch.setattr(Db, "write", counted)
    step(store, joiner, records_of(click(1, 110, user=7), first=301))
    step(store, joiner, records_of(Tick(event_id="t", ts=116), first=302))
    # Always head and outbox, and where each other family is; ids seen, the held click; then it is released: window, its
    # chunk, history, impression.
    always = 2 + len(join_store.FAMILIES) - 1
    assert written == [always + 2, always + 5]
    store.close()


def test_what_has_ended_leaves_the_disk(tmp_path):
    store, joiner = opened(tmp_path)
    long = "i" * 250
    for n in range(200):
        ts, user = n * 10, "u" * 250 + str(n % 30)
        shown = Impression(event_id=f"s{n}", ts=ts, user=user, request_id=f"{n:0250}", items=[long], propensities=[0.5])
        clicked = Click(event_id=f"c{n}", ts=ts + 1, user=user, item=long)
        step(store, joiner, records_of(shown, clicked, first=2 * n))
    families = ("held", "shown", "seen", "windows", "clicks")
    left = {name: len(list(store._db.items(name, join_caches.FIRST))) for name in families}
    assert left == {"held": 2, "shown": 10, "seen": 11, "windows": 5, "clicks": 5}
    assert all(len(key) + len(value) <= 512 for key, value in store._db.items("windows", join_caches.FIRST))
    store.close()


def test_windows_that_end_with_their_purchase_wait_leave_the_disk(tmp_path):
    """What the timer changes in the very batch in which a window ends must not keep it."""
    join = msgspec.structs.replace(S, purchase_wait_ms=S.purchase_window_ms)
    store, joiner = opened(tmp_path, join)
    for n in range(100):
        shown = Impression(event_id=f"s{n}", ts=n * 10, user=n, request_id=f"r{n}", items=["i"])
        clicked = Click(event_id=f"c{n}", ts=n * 10 + 1, user=n, item="i")
        step(store, joiner, records_of(shown, clicked, first=2 * n))
    left = {name: len(list(store._db.items(name, join_caches.FIRST))) for name in ("windows", "clicks", "unbought")}
    assert max(left.values()) <= 7, left
    assert len(store._windows._young.keys() | store._windows._old.keys()) <= 7, "and the memory"
    store.close()


def test_a_commit_that_failed_ends_the_windows_that_had_ended(tmp_path, monkeypatch):
    """Their notes too: one that stayed would take a later window of the same user and item with it."""
    store, joiner = opened(tmp_path)
    shown = Impression(event_id="s", ts=100, user="u", request_id="r", items=["i"])
    step(store, joiner, records_of(shown, click(0, 101)))
    step(store, joiner, records_of(Tick(event_id="t", ts=120), first=2))
    joined = joiner.process(records_of(Tick(event_id="t", ts=180), first=3))
    with monkeypatch.context() as patch:
        patch.setattr(Db, "write", _full)
        with pytest.raises(DiskFull):
            store.commit(joined, [b"x"])
    store.commit(joined, [b"x"])
    assert [list(store._db.items(name, join_caches.FIRST)) for name in ("windows", "clicks")] == [[], []]
    store.close()


def _full(self, batch, sync=True):
    raise DiskFull("no space left")


CHILD = """
import sys
from pathlib import Path
from tests.streams.test_join_store import S, opened, publish, records_of, step, story
from streams.blocks import decode_block, encode_block

path, out = Path(sys.argv[1]), Path(sys.argv[2])
log = story()
store, joiner = opened(path)
if store.outbox():
    publish(out, store.outbox()[0])  # it may not have been sent
while joiner.next_offset < len(log):
    joined = step(store, joiner, log[joiner.next_offset : joiner.next_offset + 5])
    publish(out, encode_block(joined.block))
"""


def story() -> list[Record]:
    """The same log in each process."""
    draw = random.Random(5)
    events: list = []
    for n in range(3_000):
        ts, user = n + draw.randrange(-7, 1) + 10, draw.randrange(20)
        if n % 2:
            events.append(click(n, ts, user))
        else:
            events.append(Impression(event_id=f"s{n}", ts=ts, user=user, request_id=f"r{n}", items=["i", "j"]))
    return records_of(*events)


def publish(out: Path, block: bytes) -> None:
    """A topic for the test: a file per block, whole or not there."""
    beside = out / "beside"
    beside.write_bytes(block)
    beside.rename(out / f"{decode_block(block).from_offset:06}")


def test_kill_9_at_any_moment_loses_and_doubles_nothing(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    draw, kills = random.Random(), 0
    while True:
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "store"), str(out)], cwd=os.getcwd())
        start, before = time.monotonic(), len(list(out.iterdir()))
        while child.poll() is None and len(list(out.iterdir())) <= before and time.monotonic() < start + 60:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.1)
        if child.poll() is None and kills < 8:
            child.send_signal(signal.SIGKILL)
            kills += 1
        if child.wait(60) == 0:
            break
    assert kills >= 3
    blocks = [decode_block(path.read_bytes()) for path in sorted(out.glob("0*"))]
    check_chain(blocks)
    reference = ReferenceJoiner(S)
    for record in story():
        reference.feed(record)
    assert blocks[-1].to_offset == 3_000
    assert blocks[-1].counts == reference.counts
    assert rows_of(Examples.concat([b.examples for b in blocks])) == Counter(reference.rows)


def test_clicks_anywhere_on_a_long_page_are_kept(tmp_path):
    """Pages have up to 1,000 items: as bits of a number that would be more than a number on disk has."""
    clicked = (0, 63, 64, 65, 999)
    page = Impression(event_id="s", ts=0, user=1, request_id="r", items=[f"i{n}" for n in range(1_000)])
    clicks = [Click(event_id=f"c{n}", ts=1, user=1, item=f"i{n}", request_id="r") for n in clicked]
    store, joiner = opened(tmp_path)
    first = step(store, joiner, records_of(page, *clicks, Tick(event_id="t", ts=10))).block.examples
    store.close()
    store, joiner = opened(tmp_path)
    rest = step(store, joiner, records_of(Tick(event_id="u", ts=200), first=7)).block.examples
    assert sorted(first.item_raw) == sorted(f'"i{n}"' for n in clicked)
    assert sorted(rest.item_raw) == sorted(f'"i{n}"' for n in range(1_000) if n not in clicked)
    store.close()
