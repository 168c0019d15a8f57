"""The log of a torture run: the same records in the same order for the same seed, however long they take to send.

Events of the standard mix, shuffled within the disorder that the joiner forgives; some are delivered twice, much later;
between them records that are no events, and records that forget a user. Ticks carry the time of every partition, the
last of them past everything that is open.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import orjson

from deploy.bench.mix import START_MS, standard_mix
from streams.events import Forget, Item, encode

PAGE = 5  # items of an impression
EVENTS_PER_S = 1_000  # of event time
TICK_MS = 500
TWICE, SPOILT = 0.02, 0.005  # shares of the records
LATEST_REPEAT = 400  # a repetition comes at most so many records later
FORGOTTEN = 100  # users
ITEMS, CATEGORIES, SELLERS = 500, 12, 40  # in the catalogue: the most popular ones


@dataclass
class Story:
    """A log: `steps` are (user, value) of records, or the time (ms) of a tick to every partition."""

    seed: int
    events: int
    disorder_ms: int
    closing_ms: int
    repeated: int = field(default=0, init=False)  # faults so far: records sent twice, records that are no events
    spoilt: int = field(default=0, init=False)

    def catalogue(self) -> list[Item]:
        """Records for the topic `items`."""
        return [
            Item(item=f"i{n}", title=f"item {n}", category=f"c{n % CATEGORIES}", seller=f"s{n % SELLERS}", price=n / 10)
            for n in range(1, ITEMS + 1)
        ]

    def steps(self) -> Iterator[tuple[str, bytes] | int]:
        """The log, once."""
        dice = random.Random(f"story {self.seed}")
        self.repeated = self.spoilt = 0
        again: list[tuple[int, str, bytes]] = []  # (after so many records, user, value)
        told = last = START_MS
        for arrives, number, user, value in self._shuffled(dice):
            if arrives >= told + TICK_MS:
                told = arrives
                yield told
            last = max(last, arrives)
            yield user, value
            if dice.random() < TWICE:
                again.append((number + dice.randint(1, LATEST_REPEAT), user, value))
            while again and min(again)[0] <= number:
                again.remove(repeated := min(again))
                self.repeated += 1
                yield repeated[1:]
            if dice.random() < SPOILT:
                self.spoilt += 1
                yield user, _spoilt(value, dice)
        yield last + self.closing_ms

    def _shuffled(self, dice: random.Random) -> list[tuple[int, int, str, bytes]]:
        """(when it arrives, number, user, value): each up to `disorder_ms` of event time after its own time.

        Some users are forgotten after their last event: what comes of it then does not hang on where blocks end.
        """
        span_ms = self.events * 1000 // EVENTS_PER_S
        last: dict[str, int] = {}
        events = []
        for value in standard_mix(self.events, PAGE, span_ms, self.seed):
            event = orjson.loads(value)
            last[event["user"]] = event["ts"]
            events.append((event["ts"], event["user"], value))
        gone = dice.sample(sorted(last), min(FORGOTTEN, len(last)))
        for user in gone:
            forget = Forget(event_id=f"forget-{user}", user=user, ts=last[user] + 1)
            events.append((forget.ts, user, encode(forget)))
        return sorted(
            (ts + dice.randrange(self.disorder_ms), number, user, value)
            for number, (ts, user, value) in enumerate(events)
        )


def _spoilt(value: bytes, dice: random.Random) -> bytes:
    """No event: cut off, or with a byte that JSON cannot have there."""
    if dice.random() < 0.5:
        return value[: dice.randrange(1, len(value))]
    return b"\xff" + value
