"""The oracle: what must have been trained, recomputed from the topic `events` by code that shares nothing with us.

It follows "Join semantics" of docs/architecture.md with plain dictionaries, slowly and in one piece, and reads
Kafka with another client than the workers do. The trainer keeps, per partition, how many rows it trained and the sum
of their ids modulo 2^64; `compare` says what is missing and what is too much.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import xxhash
from kafka import KafkaConsumer, TopicPartition

SCENARIOS = {"live", "video", "search", "shelf"}
KINDS = {"impression", "click", "cart", "favourite", "watch", "purchase", "refund", "tick"}
MAX_BYTES, MAX_TIME, MAX_DURATION, MAX_COUNT = 1_000_000, 1 << 43, 1 << 40, 1 << 31
SHOWN, LATE_CLICK, WATCH, PURCHASE = 0, 1, 2, 3
WRAP = 1 << 64


@dataclass(frozen=True)
class Rules:
    """The settings that the join semantics hang on, in milliseconds."""

    disorder_ms: int
    wait_ms: int
    open_ms: int
    watch_wait_ms: int
    purchase_window_ms: int
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


def is_id(value: object) -> bool:
    if isinstance(value, str):
        return 1 <= len(value) <= 256
    return is_word(value)


def is_word(value: Any) -> bool:
    """An integer that fits 64 bits, signed or not."""
    return is_int(value, -(1 << 63), WRAP - 1)


def is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_chance(value: Any) -> bool:
    return is_number(value) and 0 < value <= 1


def is_one_of(value: object, names: set[str]) -> bool:
    return isinstance(value, str) and value in names


def parse(value: bytes | None) -> dict | None:
    """The event in a record's value, or None where it must be rejected."""
    if value is None or len(value) > MAX_BYTES:
        return None
    try:
        event = json.loads(value.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(event, ensure_ascii=False).encode("utf-8")  # an escaped half of a surrogate pair is not text
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not is_one_of(event.get("kind"), KINDS):
        return None
    if not is_id(event.get("event_id")) or not is_int(event.get("ts"), 0, MAX_TIME):
        return None
    return event if event["kind"] == "tick" or _is_user_event(event) else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_user_event(event: dict) -> bool:
    kind, request = event["kind"], event.get("request_id")
    if not is_id(event.get("user")) or not is_one_of(event.get("scenario", "shelf"), SCENARIOS):
        return False
    if request is not None and not is_id(request):
        return False
    if kind == "impression":
        return request is not None and _is_impression(event)
    if not is_id(event.get("item")):
        return False
    if kind == "watch":
        return all(is_int(event.get(name), 0, MAX_DURATION) for name in ("play_ms", "duration_ms"))
    if kind in ("purchase", "refund") and not is_int(event.get("quantity", 1), 1, MAX_COUNT):
        return False
    if kind == "purchase":
        price, currency = event.get("price"), event.get("currency")
        return (price is None or (is_number(price) and price >= 0)) and isinstance(currency, (str, type(None)))
    return True


def _is_impression(event: dict) -> bool:
    items = event.get("items")
    if not isinstance(items, list) or not 1 <= len(items) <= 1000 or not all(map(is_id, items)):
        return False
    positions, chances = event.get("positions"), event.get("propensities")
    version, digest, context = (event.get(k) for k in ("model_version", "feature_hash", "context"))
    return (
        _are(positions, len(items), is_word)
        and _are(chances, len(items), is_chance)
        and isinstance(version, (str, type(None)))
        and (digest is None or is_word(digest))
        and isinstance(context, (dict, type(None)))
    )


def _are(values: object, length: int, check: Callable[[object], bool]) -> bool:
    """None, or a list of `length` values that all pass."""
    return values is None or (isinstance(values, list) and len(values) == length and all(map(check, values)))


class PartitionOracle:
    """Follows one partition's records in offset order."""

    def __init__(self, rules: Rules) -> None:
        self.rules, self.expected = rules, Expected()
        self.watermark: int | None = None
        self.held: list[tuple[int, str, int, dict]] = []  # (ts, event_id, order of arrival, event)
        self.timers: list[tuple[int, int, str, dict]] = []  # (time, arrival, "wait" | "watch" | "end", example)
        self.arrivals = 0
        self.seen: dict[str, int] = {}  # event_id → ts of its first record
        self.open: dict[tuple, dict] = {}  # (user, request, item) → the example
        self.by_item: dict[tuple, list[dict]] = {}  # (user, item) → its open examples
        self.clicks: dict[tuple, dict] = {}  # (user, item) → the last click's window

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
            return
        name, now = str(event["event_id"]), self.watermark
        if name in self.seen and (now is None or now <= self.seen[name] + self.rules.open_ms):
            balance["duplicates"] += units
            return
        self.seen[name] = event["ts"]
        if now is not None and event["ts"] < now:
            balance["late"] += units
            if event["kind"] != "impression":
                self._act(event, late=True)
            return
        balance["open"] += units
        self.arrivals += 1
        heapq.heappush(self.held, (event["ts"], name, self.arrivals, event))
        self._rise(event["ts"])

    def _rise(self, ts: int) -> None:
        """Raise the watermark, then handle what is below it: events in order, timers in between."""
        mark = ts - self.rules.disorder_ms
        if self.watermark is not None and mark <= self.watermark:
            return
        self.watermark = mark
        while self.held and self.held[0][0] < mark:
            ts, _, _, event = heapq.heappop(self.held)
            self._fire(ts)
            if event["kind"] == "impression":
                self._show(event)
            else:
                self.expected.balance["open"] -= 1
                self._act(event, late=False)
        self._fire(mark)

    def _fire(self, before: int) -> None:
        while self.timers and self.timers[0][0] < before:
            _, _, what, entry = heapq.heappop(self.timers)
            if what == "watch":
                self._emit(entry["key"], WATCH)
            elif what == "wait" and not entry["shown"]:
                self._close(entry)
            elif what == "end":
                del self.open[entry["place"]]
                self.by_item[entry["pair"]].remove(entry)
                if not self.by_item[entry["pair"]]:
                    del self.by_item[entry["pair"]]

    def _timer(self, time: int, what: str, entry: dict) -> None:
        self.arrivals += 1
        heapq.heappush(self.timers, (time, self.arrivals, what, entry))

    def _show(self, event: dict) -> None:
        user, request, ts = str(event["user"]), str(event["request_id"]), event["ts"]
        for raw in event["items"]:
            item = str(raw)
            place, pair = (user, request, item), (user, item)
            if place in self.open:
                self.expected.balance["duplicates"] += 1
                self.expected.balance["open"] -= 1
                continue
            entry = {"key": f"{request}\x00{item}", "place": place, "pair": pair, "ts": ts}
            entry |= {"event_id": str(event["event_id"]), "shown": False, "clicked": False, "watched": False}
            self.open[place] = entry
            self.by_item.setdefault(pair, []).append(entry)
            self._timer(ts + self.rules.wait_ms, "wait", entry)
            self._timer(ts + self.rules.open_ms, "end", entry)

    def _close(self, entry: dict) -> None:
        entry["shown"] = True
        self.expected.balance["open"] -= 1
        self.expected.balance["joined"] += 1
        self._emit(entry["key"], SHOWN)

    def _find(self, event: dict) -> dict | None:
        user, item, ts = str(event["user"]), str(event["item"]), event["ts"]
        if event.get("request_id") is not None:
            entry = self.open.get((user, str(event["request_id"]), item))
            if entry is not None and entry["ts"] <= ts <= entry["ts"] + self.rules.open_ms:
                return entry
        shown = self.by_item.get((user, item), ())
        fits = [e for e in shown if e["ts"] <= ts <= e["ts"] + self.rules.open_ms]
        return max(fits, key=lambda e: (e["ts"], e["event_id"]), default=None)

    def _act(self, event: dict, late: bool) -> None:
        """`joined` where the action found its example, else `history_only`; a late one counts as late only."""
        match event["kind"]:
            case "click":
                found = self._click(event, late)
            case "watch":
                found = self._watch(event)
            case "purchase":
                found = self._buy(event, late)
            case _:
                found = False
        if not late:
            self.expected.balance["joined" if found else "history_only"] += 1

    def _click(self, event: dict, late: bool) -> bool:
        entry = self._find(event)
        if entry is None:
            if late or not self.rules.implicit:
                return False
            key = f"event:{event['event_id']}\x00{event['item']}"
            self._emit(key, SHOWN)
        else:
            key = entry["key"]
            if not entry["shown"]:
                self._close(entry)
            elif not entry["clicked"]:
                self._emit(key, LATE_CLICK)
            entry["clicked"] = True
        self._hold_click(event, key, late)
        return True

    def _held_click(self, event: dict, late: bool) -> dict | None:
        """The click window of (user, item), unless its end has passed."""
        held = self.clicks.get((str(event["user"]), str(event["item"])))
        now = self.watermark if late else event["ts"]
        return held if held is not None and now <= held["ts"] + self.rules.purchase_window_ms else None

    def _hold_click(self, event: dict, key: str, late: bool) -> None:
        pair, ts = (str(event["user"]), str(event["item"])), event["ts"]
        held = self._held_click(event, late)
        if held is not None and held["key"] == key:
            held["ts"] = max(held["ts"], ts)
        elif held is None or ts >= held["ts"]:
            self.clicks[pair] = {"key": key, "ts": ts, "bought": False}

    def _watch(self, event: dict) -> bool:
        entry = self._find(event)
        if entry is None:
            return False
        if not entry["watched"]:
            entry["watched"] = True
            end = entry["ts"] + self.rules.open_ms
            self._timer(min(event["ts"] + self.rules.watch_wait_ms, end), "watch", entry)
        return True

    def _buy(self, event: dict, late: bool) -> bool:
        held = self._held_click(event, late)
        if held is None or event["ts"] < held["ts"]:
            return False
        if not held["bought"]:
            held["bought"] = True
            self._emit(held["key"], PURCHASE)
        return True

    def _emit(self, key: str, part: int) -> None:
        row = xxhash.xxh3_64_intdigest(f"{key}\x00{part}".encode("utf-8", "surrogatepass")) or 1
        self.expected.rows += 1
        self.expected.sum = (self.expected.sum + row) % WRAP


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
    bootstrap: str, topic: str, until: dict[int, int] | None = None
) -> Iterator[tuple[int, int, bytes | None, int | None]]:
    """The records of `topic` as (partition, offset, value, stamped ms), from its beginning to its present end, or to
    the offsets `until` (exclusive) where that is sooner."""
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap, enable_auto_commit=False, isolation_level="read_committed",
        auto_offset_reset="earliest", max_poll_records=10_000, fetch_max_bytes=64 << 20,
        max_partition_fetch_bytes=16 << 20,
    )  # fmt: skip
    try:
        places = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic) or ())]
        consumer.assign(places)
        consumer.seek_to_beginning(*places)
        present = consumer.end_offsets(places)
        ends = {place: min(end, (until or {}).get(place.partition, end)) for place, end in present.items()}
        while unread := [place for place in places if consumer.position(place) < ends[place]]:
            consumer.pause(*(set(places) - set(unread)))
            for place, records in consumer.poll(timeout_ms=1000).items():
                for record in records:
                    if record.offset < ends[place]:
                        yield place.partition, record.offset, record.value, record.timestamp
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
