"""A log through the joiners of its partitions, in one process, slice by slice: what replay and comparison share.

Nothing here learns. Each slice of so many records gives the catalogue that came in it, then each partition's block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from aiokafka.partitioner import murmur2

from online_model.catalogue import CatalogueItem
from online_model.examples import Block, Counts
from replay.faults import Garbage
from replay.readers import Record
from streams.catalogue import catalogue_item
from streams.events import Event, Item, Tick, encode, units
from streams.joiner import Joiner, JoinSettings
from streams.joiner import Record as LogRecord

SLICE = 2_000  # records of the log


@dataclass
class _Lane:
    """One partition: its joiner, and what came in the slice."""

    joiner: Joiner
    offset: int = 0
    records: list[LogRecord] = field(default_factory=list)

    def put(self, value: bytes) -> None:
        self.records.append(LogRecord(self.offset, None, value))
        self.offset += 1


class JoinedLog:
    """The joiners of all partitions, and how far they have come. `events` counts an impression of k items as k."""

    def __init__(
        self,
        settings: JoinSettings,
        partitions: int,
        lag_ms: int = 0,
        heard: Callable[[int, bytes], None] = lambda partition, value: None,
    ) -> None:
        """`lag_ms`: records may come so much later than their place. `heard` is told of each partition's records."""
        self.settings, self.events, self.to_ms, self.whole_slices = settings, 0, 0, 0
        self._lag_ms, self._heard = lag_ms, heard
        self._lanes = [_Lane(Joiner(settings, p)) for p in range(partitions)]

    def slices(self, records: Iterable[Record | Garbage]) -> Iterator[tuple[list[CatalogueItem], Iterator[Block]]]:
        """(items of the catalogue, blocks) of each slice of `records`, which come by time but for faults on purpose.

        The blocks are joined as they are asked for, one of each partition; ask for all of them before the next slice.
        """
        rest = iter(records)
        while part := list(itertools.islice(rest, SLICE)):
            items: list[CatalogueItem] = []
            for record in part:
                if isinstance(record, Item):
                    items.append(catalogue_item(record, encode(record)))
                else:
                    self._put(record)
            self._tick(max(0, self.to_ms - self._lag_ms))
            self.whole_slices += 1
            yield items, self._blocks()

    def close(self) -> Iterator[Block]:
        """The last blocks: every partition hears that all windows but those of purchases are over."""
        self._tick(self.to_ms + self.settings.closing_ms)
        return self._blocks()

    def counts(self) -> Counts:
        """The joiners' balance, in sum."""
        return sum_of(lane.joiner.counts for lane in self._lanes)

    def _put(self, event: Event | Garbage) -> None:
        if isinstance(event, Tick):
            return  # a recorded log has its own; time is told here
        lane = self._lanes[partition_of(event.user, len(self._lanes))]
        if isinstance(event, Garbage):
            self.events += 1
            lane.put(event.value)
            return
        self.events += units(event)
        self.to_ms = max(self.to_ms, event.ts)
        lane.put(encode(event))

    def _tick(self, ts: int) -> None:
        """Every partition hears that event time has come to `ts`."""
        for partition, lane in enumerate(self._lanes):
            lane.put(encode(Tick(event_id=f"tick-{partition}-{ts}", ts=ts)))

    def _blocks(self) -> Iterator[Block]:
        for partition, lane in enumerate(self._lanes):
            records, lane.records = lane.records, []
            for record in records:
                self._heard(partition, record.value or b"")
            yield lane.joiner.process(records).block


def sum_of(balances: Iterable[Counts]) -> Counts:
    """The balance of all partitions."""
    total = Counts()
    for counts in balances:
        for name, value in vars(counts).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def partition_of(user: str | int, partitions: int) -> int:
    """Where Kafka's default partitioner puts a user's events: murmur2 of the key."""
    return (murmur2(str(user).encode("utf-8", "surrogatepass")) & 0x7FFFFFFF) % partitions
