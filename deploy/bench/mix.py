"""Events of the standard mix: impression 80, click 15, watch 4, purchase 1 % of events; k items shown are k events."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator

import orjson

SHARES = {"impression": 0.80, "click": 0.15, "watch": 0.04, "purchase": 0.01}
START_MS = 1_760_000_000_000
USERS = 100_000
REMEMBERED_MS = 300_000  # actions are on what was shown up to so long before


def _ranks(dice: random.Random, exponent: float) -> Iterator[int]:
    """Ranks 1 … USERS, the n-th with a chance of n^-exponent."""
    weights = list(itertools.accumulate(n**-exponent for n in range(1, USERS + 1)))
    while True:
        yield from dice.choices(range(1, USERS + 1), cum_weights=weights, k=10_000)


def standard_mix(events: int, page: int, span_ms: int, seed: int = 1) -> Iterator[bytes]:
    """The records of `timed_mix` alone."""
    return (record for _, _, record in timed_mix(events, page, START_MS, span_ms, seed))


def timed_mix(
    events: int, page: int, start_ms: int, span_ms: int, seed: int = 1, name: str = ""
) -> Iterator[tuple[int, str, bytes]]:
    """(its time, its user, the record) of `events` events in all (to within one page), spread evenly over `span_ms` of
    event time from `start_ms` (ms UTC) on, in order.

    `page`: items of an impression. Of USERS users the n-th most active has a share of n^-0.7, the first one 0.9 %; of
    as many items the n-th of n^-1. An action is on an impression that was shown some seconds to `REMEMBERED_MS` before.
    `name`: what the ids of events and requests begin with.
    """
    dice = random.Random(seed)
    users, goods = (_ranks(dice, exponent) for exponent in (0.7, 1.0))
    kinds = list(SHARES)
    weights = [SHARES[kind] / (page if kind == "impression" else 1) for kind in kinds]
    shown: deque[tuple[int, str, str, list[str]]] = deque()
    done = number = 0
    while done < events:
        ts = start_ms + span_ms * done // events
        while shown and shown[0][0] < ts - REMEMBERED_MS:
            shown.popleft()
        number += 1
        kind = dice.choices(kinds, weights)[0] if shown else "impression"
        event: dict[str, object] = {"kind": kind, "event_id": f"{name}e{number}", "ts": ts, "scenario": "live"}
        if kind == "impression":
            user = f"u{next(users)}"
            items = [f"i{next(goods)}" for _ in range(page)]
            shown.append((ts, user, f"{name}r{number}", items))
            event |= {"user": user, "request_id": f"{name}r{number}", "items": items}
        else:
            back = int(len(shown) * min(dice.expovariate(8.0), 1.0))  # of REMEMBERED_MS an eighth, on the average
            _, user, request, items = shown[max(len(shown) - 1 - back, 0)]
            event |= {"user": user, "request_id": request, "item": dice.choice(items)}
            if kind == "watch":
                event |= {"play_ms": dice.randrange(30_000), "duration_ms": 30_000}
        done += page if kind == "impression" else 1
        yield ts, user, orjson.dumps(event)
