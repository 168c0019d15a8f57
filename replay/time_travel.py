"""A recording replayed without Kafka: each partition's very records to its joiner, with their own offsets and ticks.

So the examples are those that the live joiner made of them, and a block's place is the live one's. The slices are cut
from the one order of `merging`; rows are learned in the order in which they come out of the joiners, in whole batches.
Both hang on the records alone: a replay that goes on with the live topics where its recording ends (`--continue`)
learns what one over the whole of them learns, bit for bit.

From a kept checkpoint the joiners begin at the beginning of the recording all the same (joining is cheap, and windows
reach back), and the trainer takes the blocks behind the checkpoint's positions: the joiner is made to cut there.

At the end nothing is closed: what is still open when the records end has not been learned by the live system either.
Not the same as live: how the live trainer cut its batches, and ranges that the live joiner set aside after the
checkpoint's positions: they are joined here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from msgspec import Struct

from embedding_store.errors import UsageError
from online_model.catalogue import CatalogueItem
from online_model.examples import Block, Counts
from online_model.trainer import Trainer
from replay.direct import DirectReplay, DirectSettings, Replayed
from replay.joining import SLICE, sum_of
from replay.merging import Merged
from replay.oracle import WRAP, Expected
from replay.recording import ITEMS, Recorded
from streams.catalogue import item_in
from streams.joiner import Joiner, JoinSettings
from streams.joiner import Record as LogRecord


class Start(Struct, frozen=True, forbid_unknown_fields=True):
    """Where a partition of a kept checkpoint is: its trainer's next offset, how many rows behind it are learned, and
    how many rows it has in all with the sum of their ids; the ranges that were set aside."""

    next: int
    taken: int = 0
    rows: int = 0
    sum: int = 0
    set_aside: tuple[tuple[int, int], ...] = ()


@dataclass
class _Lane:
    """One partition: its joiner, and what came in the slice. `edges`: offsets at which a block must end, ascending."""

    joiner: Joiner
    edges: list[int]
    aside: tuple[tuple[int, int], ...]
    records: list[Recorded] = field(default_factory=list)

    def parts(self) -> Iterator[tuple[list[Recorded], int | None, bool]]:
        """The slice's records in order as (records, the edge that ends them, whether they are set aside)."""
        records, self.records = self.records, []
        while records:
            if self.edges and records[-1].offset >= self.edges[0]:
                edge = self.edges.pop(0)
                count = next(n for n, record in enumerate(records) if record.offset >= edge)
                if edge > self.joiner.next_offset:
                    yield records[:count], edge, self._is_aside(edge - 1)
                records = records[count:]
            else:
                yield records, None, self._is_aside(records[-1].offset)
                return

    def _is_aside(self, offset: int) -> bool:
        return any(start <= offset < end for start, end in self.aside)


class RecordedLog:
    """The joiners of a recording's partitions, as JoinedLog is those of a log.

    `begin`: the offset at which each partition begins. `cuts`: offsets at which blocks must end, by partition.
    `aside`: ranges that are only counted. `heard` is told (partition, record, set aside) before it is joined.
    """

    def __init__(
        self,
        settings: JoinSettings,
        begin: Iterable[int],
        cuts: Mapping[int, Iterable[int]],
        aside: Mapping[int, tuple[tuple[int, int], ...]],
        heard: Callable[[int, Recorded, bool], None],
    ) -> None:
        self.whole_slices, self._heard = 0, heard
        self._lanes = []
        for partition, offset in enumerate(begin):
            ranges = aside.get(partition, ())
            edges = sorted({*cuts.get(partition, ()), *itertools.chain.from_iterable(ranges)})
            edges = [edge for edge in edges if edge > offset]
            self._lanes.append(_Lane(Joiner(settings, partition, offset), edges, ranges))

    @property
    def events(self) -> int:
        return sum(lane.joiner.counts.events_in for lane in self._lanes)

    @property
    def to_ms(self) -> int:
        return max(0, *(lane.joiner.watermark for lane in self._lanes))

    def slices(self, records: Iterable[Merged]) -> Iterator[tuple[list[CatalogueItem], Iterator[Block]]]:
        """(items, blocks) of each slice; ask for all of its blocks before the next one."""
        rest = iter(records)
        while part := list(itertools.islice(rest, SLICE)):
            items = []
            for topic, partition, record in part:
                if topic != ITEMS:
                    self._lanes[partition].records.append(record)
                elif (item := item_in(record.value, f"offset {record.offset} of the recorded catalogue")) is not None:
                    items.append(item)
            self.whole_slices += len(part) == SLICE
            yield items, self._blocks()

    def close(self) -> Iterator[Block]:
        return iter(())

    def counts(self) -> Counts:
        return sum_of(lane.joiner.counts for lane in self._lanes)

    def _blocks(self) -> Iterator[Block]:
        for partition, lane in enumerate(self._lanes):
            for records, edge, aside in lane.parts():
                for record in records:
                    self._heard(partition, record, aside)
                raw = (LogRecord(r.offset, r.stamp, r.value) for r in records)
                yield lane.joiner.process(raw, edge, set_aside=aside).block


class RecordedReplay(DirectReplay):
    """A direct replay of `Merged` records. `settings.partitions` is the recording's.

    `start`: where the checkpoint in the store is, by partition, if the replay goes on from one; its figures are then
    about what comes behind.
    """

    def __init__(
        self,
        settings: DirectSettings,
        begin: tuple[int, ...],
        progress: Callable[[Replayed], None] | None = None,
        start: Mapping[int, Start] | None = None,
    ) -> None:
        """Raises UsageError where the recording begins behind the checkpoint, and as DirectReplay does."""
        self._begin, self._start = begin, dict(start or {})
        self._before: dict[int, tuple[int, int]] = {}  # what the oracle had expected up to the start
        self._skipped: dict[int, tuple[int, int]] = {}  # rows behind the start that the checkpoint has learned
        super().__init__(settings, progress)
        at = {p: (at.next, *at.accounted) for p, at in self._trainer.positions.items()}
        if self._start and at == {p: (of.next, of.rows, of.sum) for p, of in self._start.items()}:
            # Nothing of this replay is in it: the mark is a worker's, which counts other things by it.
            self._trainer.mark = self.replayed.resumed_at = 0

    def _open(self, partitions: int | None = None) -> Trainer:
        # Rows come in an order that hangs on the records alone. The trainer's own one would wait for the watermark of
        # each partition, and an idle one has nothing that raises it.
        return super()._open(partitions=0)

    def _joined(self) -> RecordedLog:
        for partition, at in self._start.items():
            if partition < len(self._begin) and self._begin[partition] > at.next:
                self._trainer.store.close()
                raise UsageError(
                    f"the recording begins at offset {self._begin[partition]} of partition {partition}, behind "
                    f"{at.next} where the checkpoint goes on: take a later one, or an earlier recording"
                )
        cuts = {p: [at.next] for p, at in self._trainer.positions.items()}
        for partition, at in self._start.items():
            cuts.setdefault(partition, []).append(at.next)
        aside = {p: at.set_aside for p, at in self._start.items()}
        return RecordedLog(self.settings.join, self._begin, cuts, aside, self._hear)

    def _hear(self, partition: int, record: Recorded, aside: bool) -> None:
        oracle, start = self._oracles[partition], self._start.get(partition)
        if start is not None and record.offset >= start.next and partition not in self._before:
            self._before[partition] = oracle.expected.rows, oracle.expected.sum
        oracle.feed(record.value, record.stamp, aside)

    def _offer(self, blocks: Iterator[Block]) -> None:
        super()._offer(self._behind_start(blocks))

    def _behind_start(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """The blocks behind the checkpoint: the others are learned."""
        for block in blocks:
            start = self._start.get(block.partition)
            if start is not None:
                if block.to_offset <= start.next:
                    continue
                count, total = self._skipped.get(block.partition, (0, 0))
                known = block.examples.row_id[: max(0, start.taken - count)]
                self._skipped[block.partition] = count + len(known), (total + int(known.view("u8").sum())) % WRAP
            yield block

    def _learn(self, drain: bool) -> None:
        """In whole batches: where a slice ends must not matter more than it has to."""
        size = self.settings.model.batch_size
        while drain or self._trainer.pending >= size:
            if self._trainer.commit_due():
                self._commit()
            if not self._trainer.step(drain):
                return

    def _accounts(self) -> tuple[dict[int, Expected], dict[int, tuple[int, int]]]:
        """What was to be learned behind the start, and what was."""
        expected, trained = {}, {}
        for p, oracle in enumerate(self._oracles):
            whole = oracle.expected
            rows, total = self._before.get(p, (whole.rows, whole.sum) if p in self._start else (0, 0))
            expected[p] = Expected(whole.rows - rows, (whole.sum - total) % WRAP, whole.balance)
        for p, at in self._trainer.positions.items():
            start, (count, total) = self._start.get(p, Start(0)), self._skipped.get(p, (0, 0))
            rows, known = at.accounted
            trained[p] = rows - start.rows + count, (known - start.sum + total) % WRAP
        return expected, trained
