"""The records of all partitions in one order: by the broker's stamps, the catalogue first at one time.

The order hangs on the records alone, and not on how they were read: by (stamp, items before events, partition, offset),
where a stamp counts as the largest of its partition so far. It is the same whether a record comes from a recording or
from the live topics, so a replay that goes on with these gives what one over all of it gives.

Of live topics a record is let go when nothing can come any more that belongs before it: each other partition has its
next record, or was read to its end SETTLE_S after this record was there. Assumed: brokers stamp by clocks (topics of
LogAppendTime) that agree within that time.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple, TypeAlias

from replay.live_topics import LiveTopics, Place
from replay.recording import EVENTS, Recorded, Recording

SETTLE_S = 1.0
POLL_S = 0.2
WAITING_RECORDS = 20_000  # of a live partition in memory; the others stay in Kafka


class Merged(NamedTuple):
    """A record with its place. `topic`: EVENTS or ITEMS."""

    topic: str
    partition: int
    record: Recorded


class _Lane:
    """One partition: what is recorded of it, then what is live, if that is wanted."""

    def __init__(self, topic: str, partition: int, recorded: Iterator[Recorded], place: Place | None) -> None:
        self.topic, self.partition, self.place = topic, partition, place
        self.live: deque[tuple[Recorded, float]] = deque()  # with the time when it was there
        self.end: int | None = None  # where its live part ends, if it does
        self.over, self.live_records = False, 0
        self.empty_at = float("-inf")  # all that was in it at this time has been read
        self._opened = time.monotonic()
        self._recorded: Iterator[Recorded] | None = recorded
        self._stamp = 0

    @property
    def is_live(self) -> bool:
        """Whether all that is recorded of it was taken."""
        return self._recorded is None

    def next(self) -> _Head | None:
        """The next record, as far as it is here."""
        if self._recorded is not None:
            record = next(self._recorded, None)
            if record is not None:
                return self._head(record, self._opened)
            self._recorded, self.over = None, self.place is None
        if not self.live:
            return None
        record, at = self.live.popleft()
        self.live_records += 1
        if self.end is not None and record.offset >= self.end:
            self.live.clear()
            self.over = True
            self.live_records -= 1
            return None
        return self._head(record, at)

    def _head(self, record: Recorded, at: float) -> _Head:
        self._stamp = max(self._stamp, record.stamp)
        return (self._stamp, self.topic == EVENTS, self.partition), at, record, self


_Head: TypeAlias = tuple[tuple[int, bool, int], float, Recorded, _Lane]  # order, since when it is here, record, lane


class Merge:
    """The records of `recording`, and with `live` then those of the topics that it was recorded from.

    `live`: connects to {place: offset}, when it is first needed. `to_end`: up to where the topics end by then.
    `until_ms`: up to the first record with this stamp or a later one. `stop`: it ends as soon as this says so.
    """

    def __init__(
        self,
        recording: Recording,
        live: Callable[[dict[Place, int]], LiveTopics] | None = None,
        to_end: bool = False,
        until_ms: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.stopped = False  # by `stop`
        self._recording, self._connect, self._to_end, self._stop = recording, live, to_end, stop
        self._until_ms = math.inf if until_ms is None else until_ms
        self._lanes = [
            _Lane(topic, p, recording.records(topic, p), (told.name, p) if live else None)
            for topic, told in sorted(recording.about.topics.items())
            for p in range(len(told.begin))
        ]
        self._ends: dict[Place, int] | None = None
        self._asked = float("-inf")

    def __iter__(self) -> Iterator[Merged]:
        """Raises LogError, BrokerError; OffsetsGone where Kafka has not got what comes behind the recording."""
        heap: list[_Head] = []
        waiting = self._lanes
        with ExitStack() as stack:
            live: LiveTopics | None = None
            while not (stopped := self._stop()):
                waiting = [lane for lane in waiting if not _fill(heap, lane) and not lane.over]
                if not waiting and not heap:
                    break
                since = heap[0][1] if heap else self._until()
                if all(lane.empty_at >= since + SETTLE_S for lane in waiting):
                    if not heap or heap[0][0][0] >= self._until_ms:
                        break
                    _, _, record, lane = heapq.heappop(heap)
                    waiting.append(lane)
                    yield Merged(lane.topic, lane.partition, record)
                    continue
                if live is None:
                    assert self._connect is not None, "lanes that are not live are over when they have nothing more"
                    live = stack.enter_context(self._connect(self._recording.next_places()))
                    self._begin(live)
                self._read(live)
            self.stopped = stopped

    @property
    def live_records(self) -> int:
        """How many live ones were taken."""
        return sum(lane.live_records for lane in self._lanes)

    def _until(self) -> float:
        """When `until_ms` is reached, by the monotonic clock."""
        return time.monotonic() + self._until_ms / 1000 - time.time()

    def _begin(self, live: LiveTopics) -> None:
        ends = live.committed_ends() if self._to_end else {}
        for lane in self._lanes:
            assert lane.place is not None
            lane.end = ends.get(lane.place)

    def _read(self, live: LiveTopics) -> None:
        """What has come since, and which lanes have nothing more."""
        now = time.monotonic()
        ends = None
        if now - self._asked >= POLL_S:
            ends, self._asked = live.ends(), now
        lanes = {lane.place: lane for lane in self._lanes if lane.place is not None}
        live.pause([place for place, lane in lanes.items() if len(lane.live) >= WAITING_RECORDS])
        for place, records in live.poll(POLL_S):
            at = time.monotonic()
            lanes[place].live.extend((record, at) for record in records)
        for place, lane in lanes.items():
            if lane.live or lane.over:
                continue
            position = live.position(place)
            lane.over = lane.is_live and lane.end is not None and position >= lane.end
            if ends is not None and position >= ends[place]:
                lane.empty_at = now


def _fill(heap: list[_Head], lane: _Lane) -> bool:
    head = lane.next()
    if head is not None:
        heapq.heappush(heap, head)
    return head is not None
