"""The oracle: what must have been trained, recomputed from the topic `events` by code that shares nothing with us.

It follows "Join semantics" of docs/architecture.md with plain dictionaries, slowly and in one piece, and reads
Kafka with another client than the workers do. The trainer keeps, per partition, how many rows it trained and the sum
of their ids modulo 2^64; `compare` says what is missing and what is too much.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import xxhash
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaTimeoutError

from replay.oracle_events import parse

SHOWN, LATE_CLICK, WATCH, PURCHASE, NOT_BOUGHT, FORGET = range(6)
WRAP = 1 << 64
SILENT_S = 120.0  # so long Kafka may send nothing, though there is something
TIMERS = ("wait", "watch", "purchase wait", "end")  # in this order at one time


@dataclass(frozen=True)
class Rules:
    """The settings that the join semantics hang on; times in milliseconds."""

    disorder_ms: int
    wait_ms: int
    click_window_ms: int
    open_ms: int
    watch_wait_ms: int
    purchase_window_ms: int
    purchase_wait_ms: int
    unclicked_of: int
    future_ms: int
    implicit: bool

    @classmethod
    def of(cls, settings: object) -> Rules:
        """The rules in settings whose fields have the same names."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})


@dataclass
class Expected:
    """What one partition's log comes to: the balance in events, and the rows that must be trained."""

    rows: int = 0
    sum: int = 0
    balance: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("events_in", "rejected", "duplicates", "late", "joined", "history_only", "open", "set_aside"), 0
        )
    )


class PartitionOracle:
    """Follows one partition's records in offset order."""

    def __init__(self, rules: Rules) -> None:
        self.rules, self.expected = rules, Expected()
        self.watermark: int | None = None
        self.held: list[tuple[int, str, int, dict]] = []  # (ts, event_id, order of arrival, event)
        self.timers: list[tuple[int, int, int, dict]] = []  # (time, which of TIMERS, arrival, example or window)
        self.arrivals = 0
        self.seen: dict[str, int] = {}  # event_id → ts of its first record
        self.open: dict[tuple, dict] = {}  # (user, request, item) → the example
        self.by_item: dict[tuple, list[dict]] = {}  # (user, item) → its open examples
        self.clicks: dict[tuple, dict] = {}  # (user, item) → the last click's window
        self.forgotten: dict[str, int] = {}  # user → when

    def feed(self, value: bytes | None, stamped_ms: int | None, set_aside: bool = False) -> None:
        """Take the next record: its value and the time Kafka stamped on it, if known. One that was set aside is
        counted, and has no other effect."""
        balance = self.expected.balance
        event = parse(value)
        if event is None or (stamped_ms is not None and event["ts"] > stamped_ms + self.rules.future_ms):
            balance["events_in"] += 1
            balance["rejected"] += 1
            return
        if event["kind"] == "tick":
            if not set_aside:
                self._rise(event["ts"])
            return
        units = len(event["items"]) if event["kind"] == "impression" else 1
        balance["events_in"] += units
        if set_aside:
            balance["set_aside"] += units
            if event["kind"] == "forget" and not self._is_duplicate(str(event["event_id"])):
                self.seen[str(event["event_id"])] = event["ts"]
                self._forget(event, str(event["user"]), late=True)
            return
        name, now = str(event["event_id"]), self.watermark
        if self._is_duplicate(name):
            balance["duplicates"] += units
            return
        self.seen[name] = event["ts"]
        if now is not None and event["ts"] < now:
            balance["late"] += units
            if event["kind"] != "impression":
                self._handle(event, late=True)
            return
        balance["open"] += units
        self.arrivals += 1
        heapq.heappush(self.held, (event["ts"], name, self.arrivals, event))
        self._rise(event["ts"])

    def _is_duplicate(self, name: str) -> bool:
        now = self.watermark
        return name in self.seen and (now is None or now <= self.seen[name] + self.rules.open_ms)

    def _rise(self, ts: int) -> None:
        """Raise the watermark, then handle what is below it: events in order, timers in between."""
        mark = ts - self.rules.disorder_ms
        if self.watermark is not None and mark <= self.watermark:
            return
        self.watermark = mark
        while self.held and self.held[0][0] < mark:
            ts, _, _, event = heapq.heappop(self.held)
            self._fire(ts)
            if ts < self.forgotten.get(str(event["user"]), -1) and event["kind"] != "forget":  # in a range set aside
                units = len(event["items"]) if event["kind"] == "impression" else 1
                self.expected.balance["open"] -= units
                self.expected.balance["history_only"] += units
            elif event["kind"] == "impression":
                self._show(event)
            else:
                self.expected.balance["open"] -= 1
                self._handle(event, late=False)
        self._fire(mark)

    def _fire(self, before: int) -> None:
        while self.timers and self.timers[0][0] < before:
            _, which, _, entry = heapq.heappop(self.timers)
            what = TIMERS[which]
            if what == "watch" and not entry["gone"]:
                self._emit(entry["key"], WATCH)
            elif what == "wait" and not (entry["shown"] or entry["gone"]):
                self._close(entry, clicked=False)
            elif what == "purchase wait":
                if entry["due"]:
                    self._not_bought(entry)
            elif what == "end" and not entry["gone"]:
                self._remove(entry)

    def _remove(self, entry: dict) -> None:
        entry["gone"] = True
        del self.open[entry["place"]]
        self.by_item[entry["pair"]].remove(entry)
        if not self.by_item[entry["pair"]]:
            del self.by_item[entry["pair"]]

    def _timer(self, time: int, what: str, entry: dict) -> None:
        self.arrivals += 1
        heapq.heappush(self.timers, (time, TIMERS.index(what), self.arrivals, entry))

    def _show(self, event: dict) -> None:
        user, request, ts = str(event["user"]), str(event["request_id"]), event["ts"]
        for raw in event["items"]:
            item = str(raw)
            place, pair = (user, request, item), (user, item)
            if place in self.open:
                self.expected.balance["duplicates"] += 1
                self.expected.balance["open"] -= 1
                continue
            entry = {"key": (request, f"item\x00{item}"), "place": place, "pair": pair, "ts": ts}
            entry["event_id"] = str(event["event_id"])
            entry |= dict.fromkeys(("shown", "clicked", "watched", "gone"), False)
            self.open[place] = entry
            self.by_item.setdefault(pair, []).append(entry)
            self._timer(ts + self.rules.wait_ms, "wait", entry)
            self._timer(ts + self.rules.open_ms, "end", entry)

    def _close(self, entry: dict, clicked: bool) -> None:
        entry["shown"] = True
        self.expected.balance["open"] -= 1
        self.expected.balance["joined"] += 1
        self._emit(entry["key"], SHOWN, one_of=1 if clicked else self.rules.unclicked_of)

    def _handle(self, event: dict, late: bool) -> None:
        user = str(event["user"])
        if event["kind"] == "forget":
            self._forget(event, user, late)
        elif not (late and event["ts"] <= self.forgotten.get(user, -1) and self._is_fresh(self.forgotten[user])):
            self._act(event, late)

    def _is_fresh(self, ts: int) -> bool:
        """Whether time has not gone more than `open_ms` past it."""
        return self.watermark is None or self.watermark <= ts + self.rules.open_ms

    def _forget(self, event: dict, user: str, late: bool) -> None:
        for entry in [entry for place, entry in self.open.items() if place[0] == user]:
            if not entry["shown"]:
                self.expected.balance["open"] -= 1
                self.expected.balance["history_only"] += 1
            self._remove(entry)
        for pair in [pair for pair in self.clicks if pair[0] == user]:
            self.clicks.pop(pair)["due"] = None
        self.forgotten[user] = self._now(event, late)
        if not late:
            self.expected.balance["joined"] += 1
        self._emit((f"forget:{event['event_id']}", f"user\x00{event['user']}"), FORGET)

    def _now(self, event: dict, late: bool) -> int:
        return max(self.watermark or 0, event["ts"]) if late else event["ts"]

    def _find(self, event: dict, within_ms: int) -> dict | None:
        user, item, ts = str(event["user"]), str(event["item"]), event["ts"]
        if event.get("request_id") is not None:
            entry = self.open.get((user, str(event["request_id"]), item))
            if entry is not None and entry["ts"] <= ts <= entry["ts"] + within_ms:
                return entry
        shown = self.by_item.get((user, item), ())
        fits = [e for e in shown if e["ts"] <= ts <= e["ts"] + within_ms]
        return max(fits, key=lambda e: (e["ts"], e["event_id"]), default=None)

    def _act(self, event: dict, late: bool) -> None:
        """`joined` where the action found its example, else `history_only`; a late one counts as late only."""
        match event["kind"]:
            case "click":
                found = self._click(event, late)
            case "watch":
                found = self._watch(event, late)
            case "purchase":
                found = self._buy(event, late)
            case _:
                found = False
        if not late:
            self.expected.balance["joined" if found else "history_only"] += 1

    def _click(self, event: dict, late: bool) -> bool:
        entry, first = self._find(event, self.rules.click_window_ms), False
        if entry is None:
            if late or not self.rules.implicit:
                return False
            key, first = (f"event:{event['event_id']}", f"item\x00{event['item']}"), True
            self._emit(key, SHOWN)
        else:
            key, first = entry["key"], not entry["clicked"]
            if not entry["shown"]:
                self._close(entry, clicked=True)
            elif first:
                self._emit(key, LATE_CLICK)
            entry["clicked"] = True
        self._hold_click(event, key, late, first)
        return True

    def _held_click(self, event: dict, late: bool) -> dict | None:
        """The click window of (user, item), unless its end has passed."""
        held = self.clicks.get((str(event["user"]), str(event["item"])))
        now = self._now(event, late)
        return held if held is not None and now <= held["ts"] + self.rules.purchase_window_ms else None

    def _hold_click(self, event: dict, key: tuple[str, str], late: bool, first: bool) -> None:
        """`first`: on its example, which then waits for a purchase, where that is set."""
        pair, ts = (str(event["user"]), str(event["item"])), event["ts"]
        held = self._held_click(event, late)
        if held is not None and held["key"] == key:
            held["ts"] = max(held["ts"], ts)
            return
        waits = first and self.rules.purchase_wait_ms > 0
        window = {"key": key, "ts": ts, "bought": False, "due": ts + self.rules.purchase_wait_ms if waits else None}
        loser = window if held is not None and ts < held["ts"] else held
        if loser is not None and loser["due"]:
            self._not_bought(loser)
        if loser is window:
            return
        self.clicks[pair] = window
        if window["due"] is not None:
            if window["due"] < self._now(event, late):
                self._not_bought(window)
            else:
                self._timer(window["due"], "purchase wait", window)

    def _not_bought(self, window: dict) -> None:
        window["due"] = None
        self._emit(window["key"], NOT_BOUGHT)

    def _watch(self, event: dict, late: bool) -> bool:
        entry = self._find(event, self.rules.open_ms)
        if entry is None:
            return False
        if not entry["watched"]:
            entry["watched"] = True
            end = entry["ts"] + self.rules.open_ms
            due = min(event["ts"] + self.rules.watch_wait_ms, end)
            self._timer(max(due, self.watermark or 0) if late else due, "watch", entry)
        return True

    def _buy(self, event: dict, late: bool) -> bool:
        held = self._held_click(event, late)
        if held is None or event["ts"] < held["ts"]:
            return False
        if not held["bought"]:
            held["bought"], held["due"] = True, None
            self._emit(held["key"], PURCHASE)
        return True

    def _emit(self, key: tuple[str, str], part: int, one_of: int = 1) -> None:
        row = _mixed(_mixed(_hash(key[0]), _hash(key[1])), part)
        if row % one_of:
            return
        self.expected.rows += 1
        self.expected.sum = (self.expected.sum + row) % WRAP


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) or 1


def _mixed(a: int, b: int) -> int:
    """splitmix64 of a pair, as "Row ids" has it."""
    z = (a * 0x9E3779B97F4A7C15 + b) % WRAP
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z = (z ^ z >> shift) * factor % WRAP
    return z or 1


def expect(
    records: Iterable[tuple[int, int, bytes | None, int | None]],
    rules: Rules,
    set_aside: Mapping[int, Sequence[Sequence[int]]] | None = None,
) -> dict[int, Expected]:
    """{partition: Expected} of (partition, offset, value, stamped ms) records, in offset order within a partition.

    `set_aside`: partition → the offsets [from, to) that were not joined.
    """
    oracles: dict[int, PartitionOracle] = {}
    for partition, offset, value, stamped in records:
        if partition not in oracles:
            oracles[partition] = PartitionOracle(rules)
        aside = any(start <= offset < end for start, end in (set_aside or {}).get(partition, ()))
        oracles[partition].feed(value, stamped, aside)
    return {p: oracle.expected for p, oracle in oracles.items()}


def read_topic(
    bootstrap: str | Mapping[str, Any], topic: str, until: dict[int, int] | None = None
) -> Iterator[tuple[int, int, bytes | None, int | None]]:
    """The records of `topic` as (partition, offset, value, stamped ms), from its beginning to its present end, or to
    the offsets `until` (exclusive) where that is sooner. `bootstrap`: HOST:PORT, or all that says where Kafka is and
    how a client of kafka-python reaches it. Raises KafkaError, where nothing comes for SILENT_S too."""
    where = {"bootstrap_servers": bootstrap} if isinstance(bootstrap, str) else bootstrap
    consumer = KafkaConsumer(
        **where, enable_auto_commit=False, isolation_level="read_committed",
        auto_offset_reset="earliest", max_poll_records=10_000, fetch_max_bytes=64 << 20,
        max_partition_fetch_bytes=16 << 20,
    )  # fmt: skip
    try:
        places = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic) or ())]
        consumer.assign(places)
        consumer.seek_to_beginning(*places)
        present = consumer.end_offsets(places)
        ends = {place: min(end, (until or {}).get(place.partition, end)) for place, end in present.items()}
        heard = time.monotonic()
        while unread := [place for place in places if consumer.position(place) < ends[place]]:
            consumer.pause(*(set(places) - set(unread)))
            found = consumer.poll(timeout_ms=1000)
            for place, records in found.items():
                for record in records:
                    if record.offset < ends[place]:
                        yield place.partition, record.offset, record.value, record.timestamp
            if found:
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENT_S:  # to poll a broker that is away has no records
                raise KafkaTimeoutError(f"nothing of {topic} has come for {SILENT_S:.0f} s")
    finally:
        consumer.close()


@dataclass(frozen=True)
class Verdict:
    """`lost` and `duplicated` count rows; `differing` names the partitions where the sum of ids differs."""

    lost: int
    duplicated: int
    expected_rows: int
    balance: dict[str, int]
    differing: list[int]


def compare(expected: dict[int, Expected], trained: dict[int, tuple[int, int]]) -> Verdict:
    """Hold {partition: (rows trained, sum of their ids)} against the expectation.

    Equal counts with differing sums are at least one row lost and another one trained in its place.
    """
    lost = duplicated = 0
    differing = []
    for partition in sorted(set(expected) | set(trained)):
        want = expected.get(partition, Expected())
        rows, total = trained.get(partition, (0, 0))
        if total % WRAP != want.sum or rows != want.rows:
            differing.append(partition)
            swapped = int(rows == want.rows)
            lost += max(want.rows - rows, swapped)
            duplicated += max(rows - want.rows, swapped)
    balance = {name: sum(e.balance[name] for e in expected.values()) for name in Expected().balance}
    return Verdict(lost, duplicated, sum(e.rows for e in expected.values()), balance, differing)
