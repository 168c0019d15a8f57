"""The axes of `headrace bench growth` that grow what the joiner keeps; a process a point, the store as workers have it.

The log is slices of SLICE records of the standard mix: neither how they are made nor what fills the store before is
timed. Timed, per event, are decode, join, features, `encode_block`, `JoinStore.commit` and `trim`. All slices of the
measured part are made before it: what RocksDB's threads do then is done while somebody looks.

- users:    `x` users are in the store, each with a full history; the n-th has a share of the events of n^-0.7.
- windows:  impressions stay open until `x` examples are open at any time; so many were opened before. Actions are on
  what is open, and nearly all of them come after the wait, whatever `x` is: else more would be joined the longer the
  window is.
- history:  each of PLENTY // 10 users has done `x` things. Then the same rows go to a trainer (steps of BATCH, no
  store): a step's time is per row.
- busiest:  one user has `x` impressions open, nothing of it in memory. A visit is one click of that user that names no
  request, so that all of them must be looked at. An event is a visit.
- partitions: `x` joiners with stores of their own in one process share the records: what a partition costs by itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from deploy.bench.common import BenchError, finish, rss_mb
from deploy.bench.mix import SHARES, START_MS

if TYPE_CHECKING:
    from streams.joiner import Joined, JoinSettings

SLICE = 2_000  # records, as the worker joins them
PAGE, ITEMS, PER_S = 10, 100_000, 1_000  # items of an impression; of all; events of a second of event time
REMEMBERED = 20_000  # impressions that actions are on, the newer the likelier
PLENTY = 100_000  # users, where something else grows
WARM_UP, MEASURED = 10, 30  # slices
WAIT_MS = 100  # of `windows`
VISITS = 20
PARTITION_SLICES = 60  # of all partitions together, SLICE records each
BATCH, STEPS, WARM_STEPS = 1_024, 40, 10


class Log:
    """Slices of the standard mix, for as long as they are asked for."""

    def __init__(self, users: int, remembered: int = REMEMBERED) -> None:
        """remembered: impressions that actions are on."""
        self._users, self._dice = users, np.random.default_rng(1)
        self._shown = np.zeros((remembered, 2 + PAGE), np.int32)  # user, number, items; the n-th at n mod remembered
        self._made = self._impressions = self.events = 0

    def slice(self) -> list[bytes]:
        """The next SLICE records."""
        dice = self._dice
        kinds = list(SHARES)
        weights = np.array([SHARES[k] / (PAGE if k == "impression" else 1) for k in kinds])
        drawn = dice.choice(len(kinds), SLICE, p=weights / weights.sum())
        users = (self._users * dice.random(SLICE) ** (1 / 0.3)).astype(int)  # the n-th with n^-0.7
        items = (ITEMS ** dice.random((SLICE, PAGE))).astype(int)  # … n^-1
        backs = np.minimum(dice.exponential(0.125, SLICE), 1)
        numbers = zip(drawn.tolist(), users.tolist(), items.tolist(), backs.tolist(), strict=True)
        return [orjson.dumps(self._event(kinds[kind], *rest)) for kind, *rest in numbers]

    def _event(self, kind: str, user: int, items: list[int], back: float) -> dict[str, object]:
        self._made += 1
        ts = START_MS + 1000 * self.events // PER_S
        event: dict[str, object] = {"kind": kind, "event_id": f"e{self._made}", "ts": ts, "scenario": "live"}
        if kind == "impression" or not self._impressions:
            page = [f"i{item}" for item in items]
            event |= {"kind": "impression", "user": f"u{user}", "request_id": f"r{self._made}", "items": page}
            self._shown[self._impressions % len(self._shown)] = (user, self._made, *items)
            self._impressions += 1
            self.events += PAGE
            return event
        known = min(self._impressions, len(self._shown))
        place = self._impressions - 1 - int(back * (known - 1))
        user, request, *shown = self._shown[place % len(self._shown)].tolist()
        event |= {"user": f"u{user}", "request_id": f"r{request}", "item": f"i{shown[items[0] % PAGE]}"}
        if kind == "watch":
            event |= {"play_ms": 1_000 * (items[1] % 30), "duration_ms": 30_000}
        self.events += 1
        return event


class Joining:
    """A joiner with its store, as the worker drives them, and what it took."""

    def __init__(self, folder: Path, settings: JoinSettings, partition: int = 0) -> None:
        from streams.join_store import JoinStore
        from streams.joiner import Joiner
        from streams.settings import JoinWorkerSettings

        self._in_memory = JoinWorkerSettings(bootstrap="", data_dir=Path()).in_memory
        self._store = JoinStore(folder, settings, cached=self._in_memory)
        self._joiner = Joiner(settings, partition, 0, self._store.state())
        self._offset = 0
        self.reset()

    def reset(self) -> None:
        """The clock starts."""
        self.cpu = self.clock = 0.0
        self._before = self._joiner.counts.events_in
        self.bytes = self.rows = 0

    @property
    def events(self) -> int:
        """Since the clock started."""
        return self._joiner.counts.events_in - self._before

    def join(self, values: list[bytes]) -> Joined:
        """One slice."""
        from streams.blocks import encode_block
        from streams.joiner import Record

        records = [Record(self._offset + i, None, value) for i, value in enumerate(values)]
        self._offset += len(values)
        cpu, clock = time.process_time(), time.perf_counter()
        joined = self._joiner.process(records)
        block = encode_block(joined.block)
        self._store.commit(joined, [block, *joined.dead])
        self._joiner.trim(self._in_memory)
        self.cpu += time.process_time() - cpu
        self.clock += time.perf_counter() - clock
        self.bytes += len(block)
        self.rows += len(joined.block.examples)
        return joined

    def put_aside(self) -> None:
        """Nothing that is open stays in memory."""
        self._joiner.trim(0)

    def close(self) -> None:
        """Raises BenchError where something of the log was refused: what was timed is less than what was meant."""
        self._store.close()
        if refused := self._joiner.counts.rejected:
            raise BenchError(f"the joiner refused {refused} events of the benchmark's own log: report it")

    def figures(self) -> dict[str, Any]:
        return {"cpu_us": self.cpu / self.events * 1e6, "clock_us": self.clock / self.events * 1e6, "rss_mb": rss_mb()}


def _settings(open_ms: int = 300_000, wait_ms: int = 5_000) -> JoinSettings:
    from streams.joiner import JoinSettings

    return JoinSettings(open_ms=open_ms, wait_ms=min(wait_ms, open_ms))


def _filled(folder: Path, users: int, actions: int) -> Path:
    """A store in which users 0 … users − 1 have done so many things."""
    from deploy.bench.growth_store import rest
    from embedding_store.ids import feature_id, feature_ids
    from embedding_store.rocks import keys_of, open_db
    from online_model.history import Kind, UserHistory
    from streams.join_caches import REQUEST_BYTES
    from streams.join_store import FAMILIES, HISTORIES, MEMORY_BYTES, SHOWN

    history = UserHistory()
    for n in range(actions):
        history.push(
            feature_id("item", f"i{n}"), START_MS - 60_000 * (actions - n), Kind.CART if n % 4 == 3 else Kind.CLICK
        )
    path, value = folder / "store", history.to_bytes()
    db = open_db(path, FAMILIES, memory=MEMORY_BYTES, by_prefix={SHOWN: REQUEST_BYTES})
    for start in range(0, users, 100_000):
        ids = np.sort(feature_ids("user", [f"u{n}" for n in range(start, min(start + 100_000, users))]))
        batch = db.batch()
        batch.put_all(HISTORIES, keys_of(ids), [value] * len(ids))
        db.write(batch, sync=False)
    rest(db, HISTORIES)
    db.close()
    return path


def users_point(folder: str, x: int, seconds: float = 0.0) -> dict[str, Any]:
    """µs an event with `x` users in the store. `seconds`: by so much more than usual it may take."""
    path, log = _filled(Path(folder), x, 30), Log(x)
    joining = Joining(path, _settings())
    for _ in range(WARM_UP):
        joining.join(log.slice())
    slices = [log.slice() for _ in range(MEASURED)]
    joining.reset()
    for values in slices:
        joining.join(values)
    joining.close()
    disk = sum(file.stat().st_size for file in path.iterdir())
    return {**joining.figures(), "disk_mb": disk / 1e6, "block_bytes_a_row": joining.bytes / joining.rows,
            "rows_an_event": joining.rows / joining.events}  # fmt: skip


def windows_point(folder: str, x: int, seconds: float = 0.0) -> dict[str, Any]:
    """µs an event with `x` examples open."""
    open_ms = round(x / SHARES["impression"] / PER_S * 1000)
    joining = Joining(Path(folder) / "store", _settings(open_ms, WAIT_MS))
    log = Log(PLENTY, remembered=max(1, x // PAGE))
    for _ in range(WARM_UP):
        joining.join(log.slice())
    while log.events * SHARES["impression"] < 1.1 * x:
        joining.join(log.slice())
    slices = [log.slice() for _ in range(MEASURED)]
    joining.reset()
    for values in slices:
        joining.join(values)
    joining.close()
    return joining.figures()


def history_point(folder: str, x: int, seconds: float = 0.0) -> dict[str, Any]:
    """µs an event, and µs a row of a training step, where users have done `x` things."""
    users = PLENTY // 10
    joining, log = Joining(_filled(Path(folder), users, x), _settings()), Log(users)
    for _ in range(WARM_UP // 2):
        joining.join(log.slice())
    slices = [log.slice() for _ in range(MEASURED // 2)]
    joining.reset()
    blocks = [joining.join(values).block for values in slices]
    joining.close()
    train, train_clock = _trained(blocks)
    return {**joining.figures(), "train_us_a_row": train, "train_clock_us_a_row": train_clock}


def _trained(blocks: list[Any]) -> tuple[float, float]:
    """Processor time and clock, µs a row, of steps on their rows: no store, no commits."""
    import torch

    from online_model.settings import TrainerSettings
    from online_model.trainer import open_trainer

    torch.set_num_threads(1)
    trainer = open_trainer(TrainerSettings(batch_size=BATCH), None, lambda: 0)
    cpu = clock = 0.0
    rows = steps = 0
    for number, block in enumerate(blocks):
        trainer.offer(block, number)
        while trainer.pending >= BATCH:
            began, began_clock = time.process_time(), time.perf_counter()
            learned = trainer.step()
            steps += 1
            if steps > WARM_STEPS:
                cpu += time.process_time() - began
                clock += time.perf_counter() - began_clock
                rows += learned
            if steps == STEPS + WARM_STEPS:
                return cpu / rows * 1e6, clock / rows * 1e6
    return cpu / rows * 1e6, clock / rows * 1e6


def busiest_point(folder: str, x: int, seconds: float = 0.0) -> dict[str, Any]:
    """µs a visit of a user with `x` impressions open."""
    joining = Joining(Path(folder) / "store", _settings(open_ms=86_400_000, wait_ms=1_000))
    dice, at = np.random.default_rng(1), START_MS
    shown = []
    for number in range(x):
        page = [f"i{item}" for item in (ITEMS ** dice.random(PAGE)).astype(int)]
        shown.append({"kind": "impression", "event_id": f"s{number}", "ts": at + 10 * number, "scenario": "live",
                      "user": "u1", "request_id": f"r{number}", "items": page})  # fmt: skip
    for start in range(0, x, SLICE):
        joining.join([orjson.dumps(event) for event in shown[start : start + SLICE]])
    at += 10 * x + 10_000
    joining.join([tick(at)])
    cpu = clock = 0.0
    for visit in range(VISITS):
        joining.put_aside()
        joining.reset()
        item = shown[int(dice.integers(x))]["items"][0]  # type: ignore[index]
        click = {"kind": "click", "event_id": f"c{visit}", "ts": at + 1_000 * visit, "scenario": "live", "user": "u1",
                 "item": item}  # fmt: skip
        joining.join([orjson.dumps(click), tick(at + 1_000 * visit + 500)])
        cpu, clock = cpu + joining.cpu, clock + joining.clock
    joining.close()
    return {"cpu_us": cpu / VISITS * 1e6, "clock_us": clock / VISITS * 1e6, "rss_mb": rss_mb()}


def tick(ts: int) -> bytes:
    """The record that carries time on."""
    from streams.events import Tick, encode

    return encode(Tick(event_id=f"t{ts}", ts=ts))


def partitions_point(folder: str, x: int, seconds: float = 0.0) -> dict[str, Any]:
    """µs an event where `x` partitions share what one worker joins."""
    log = Log(PLENTY)
    lanes = [Joining(Path(folder) / f"{n}", _settings(), n) for n in range(x)]
    for _ in range(2):  # the second time counts
        slices = [_by_lane(log.slice(), x) for _ in range(PARTITION_SLICES)]
        for lane in lanes:
            lane.reset()
        for by_lane in slices:
            for lane, values in zip(lanes, by_lane, strict=True):
                lane.join(values)
    for lane in lanes:
        lane.close()
    events = sum(lane.events for lane in lanes)
    cpu, clock = sum(lane.cpu for lane in lanes), sum(lane.clock for lane in lanes)
    return {"cpu_us": cpu / events * 1e6, "clock_us": clock / events * 1e6, "rss_mb": rss_mb()}


def _by_lane(values: list[bytes], lanes: int) -> list[list[bytes]]:
    """Records by their users, as a producer's partitioner does it."""
    by_lane: list[list[bytes]] = [[] for _ in range(lanes)]
    for value in values:
        by_lane[int(orjson.loads(value)["user"][1:]) % lanes].append(value)
    return by_lane


if __name__ == "__main__":
    from streams.app import settle

    settle()  # as a worker does
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "users": users_point, "windows": windows_point, "history": history_point, "busiest": busiest_point,
        "partitions": partitions_point,
    }  # fmt: skip
    finish(parts[sys.argv[1]](**json.loads(sys.argv[2])))
