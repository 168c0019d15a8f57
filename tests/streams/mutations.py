"""Records broken in six ways, from a seed. Whether one is still an event is for an independent judge to say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from streams.joiner import JoinSettings

# Whatever time a mutation makes, what is accepted of it makes no good record late.
MUTATED = JoinSettings(disorder_ms=10_000, wait_ms=1_000, watch_wait_ms=1_000, open_ms=60_000, future_ms=3_000)
HUGE = [1 << 31, 1 << 43, (1 << 43) + 1, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63) - 1, 10**30, 1e308, -1, 0]
HUGE_TEXT = [b"1e400", b"-1e400", b"1e-400", b"NaN", b"-Infinity", b"9" * 5_000, b"1.0", b"-0", b"01", b"0x10"]
NOT_UTF8 = [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\x80"]
OTHER = [None, True, False, 1.5, "", "x", [], {}, [[]], {"a": 1}, "\ud800", "1", [None], -7]


def flip_bytes(raw: bytes, dice: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(dice.choice([1, 1, 2, 8])):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def truncate(raw: bytes, dice: random.Random) -> bytes:
    cut = dice.randrange(len(raw))
    return raw[:cut] if dice.random() < 0.8 else raw[cut:]


def swap_type(raw: bytes, dice: random.Random) -> bytes:
    fields = json.loads(raw)
    name = dice.choice([*fields, "request_id", "scenario", "quantity", "price", "context", "positions", "v"])
    if dice.random() < 0.2:
        fields.pop(name, None)
    elif isinstance(fields.get(name), list) and fields[name] and dice.random() < 0.5:
        fields[name][dice.randrange(len(fields[name]))] = dice.choice(OTHER)
    else:
        fields[name] = dice.choice(OTHER)
    return json.dumps(fields).encode()


def put_huge_number(raw: bytes, dice: random.Random) -> bytes:
    fields = json.loads(raw)
    name = dice.choice([*fields, "price", "quantity", "feature_hash", "more", "v"])
    in_list = isinstance(fields.get(name), list) and fields[name]
    mark = "\x00here"
    if in_list:
        fields[name][dice.randrange(len(fields[name]))] = mark
    else:
        fields[name] = {"x": mark} if name == "context" else mark
    number = dice.choice([*HUGE_TEXT, *[json.dumps(huge).encode() for huge in HUGE]])
    return json.dumps(fields).encode().replace(json.dumps(mark).encode(), number)


def nest(raw: bytes, dice: random.Random) -> bytes:
    """In a field that is not known, in the context, or in place of what is there."""
    depth = 20_000 if dice.random() < 0.01 else dice.choice([3, 100, 254, 255, 256, 257, 300, 1_100])
    opening, closing = dice.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'["]",', b"]")])
    deep = opening * depth + b"1" + closing * (depth if dice.random() < 0.9 else depth - 1)
    fields = json.loads(raw)
    fields[dice.choice(["more", "more", "context", *fields])] = "\x00here"
    return json.dumps(fields).encode().replace(json.dumps("\x00here").encode(), deep)


def put_invalid_utf8(raw: bytes, dice: random.Random) -> bytes:
    """Anywhere; or in a field that is not known, where a decoder might not look."""
    bad = dice.choice(NOT_UTF8)
    if dice.random() < 0.5:
        return raw[:-1] + b',"more":"' + bad + b'"}'
    at = dice.randrange(len(raw) + 1)
    return raw[:at] + bad + raw[at:]


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    flip_bytes, truncate, swap_type, put_huge_number, nest, put_invalid_utf8,
]  # fmt: skip


def mutated(good: list[bytes], number: int, seed: int) -> list[bytes]:
    """So many records, each one of `good` (JSON objects) after one mutation, each kind of it as often."""
    dice = random.Random(seed)
    return [MUTATIONS[n % len(MUTATIONS)](dice.choice(good), dice) for n in range(number)]


def sessions(name: str, number: int, now: int) -> list[bytes]:
    """So many good records a ms apart, with ids that begin with `name`: page views, and what was done there."""
    dice = random.Random(11)
    records: list[dict] = []
    while len(records) < number:
        n = len(records)
        about = {"user": f"{name}-u{n % 199}", "request_id": f"{name}-r{n}"}
        items = dice.sample(range(500), 4)
        shown = {"kind": "impression", "items": items, "positions": [0, 1, 2, 3], "context": {"q": n}}
        did = [{"kind": "click"}, {"kind": "watch", "play_ms": 5, "duration_ms": 9},
               {"kind": "purchase", "price": 9.5, "currency": "EUR"}, {"kind": "favourite"}]  # fmt: skip
        page = [shown, *[action | {"item": items[0]} for action in did]]
        records += [about | each | {"event_id": f"{name}-e{n}.{i}", "ts": now + n + i} for i, each in enumerate(page)]
    return [json.dumps(record).encode() for record in records[:number]]


def bad_between_good(bad: int, now: int = 1_700_000_000_000) -> list[tuple[bool, int, bytes]]:
    """A log of so many mutated records with a good one after every fourth: (whether it is good, time stamped, value).
    Nothing that a mutation makes is a duplicate of a good record or makes one late; a tick ends the log."""
    spoilt = mutated(sessions("bad", 5_000, now), bad, seed=5)
    log = []
    for n, good in enumerate(sessions("good", bad // 4, now)):
        log += [(False, now + n, value) for value in spoilt[4 * n : 4 * n + 4]]
        log.append((True, now + n, good))
    end = now + bad // 4 + MUTATED.closing_ms
    log.append((True, end, json.dumps({"kind": "tick", "event_id": "end", "ts": end}).encode()))
    return log
