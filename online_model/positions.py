"""Which rows come next, and where the trainer is in each partition: the bookkeeping of effectively once.

A block is [from, to) of a partition of `events`; only the one with from = next is taken, so each is taken once. Rows
leave in one order: as they came (live), or, in a deterministic run, in order of (closing time, example id, part) across
all partitions, in batches of exactly the size asked for, so that neither arrival nor the blocks' boundaries matter.
A position may lie inside a block; `taken` (live) or `last` (deterministic) then says which of its rows are done.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from embedding_store.errors import PositionError, UsageError
from online_model.examples import Block, Counts, Examples

_WRAP = (1 << 64) - 1
Key = tuple[int, int, int]  # (closed, example_id, part): the order of a deterministic run


@dataclass
class Position:
    """Of one partition: what the model has learned of it."""

    next: int  # all blocks below this offset of `events` are learned
    first: int  # where the trainer began
    handled: int = 0  # all records below it have had their effect
    source_offset: int = 0  # where to go on reading in the partition of `examples`
    taken: int = 0  # rows learned of the blocks from `next` on
    rows: int = 0  # rows learned
    sum: int = 0  # of their row ids, modulo 2^64
    watermark: int = 0  # event time ms of the last block learned
    counts: Counts = field(default_factory=Counts)  # the joiner's balance in it
    set_aside: list[list[int]] = field(default_factory=list)  # [from, to) of `events` that were not joined; disjoint
    rolled_back: list[RolledBack] = field(default_factory=list)  # learned, and taken out of the model again

    @property
    def accounted(self) -> tuple[int, int]:
        """(count, sum of their ids modulo 2^64) of all rows that came, whether the model still has them or not."""
        back = self.rolled_back
        return self.rows + sum(r.rows for r in back), (self.sum + sum(r.sum for r in back)) & _WRAP


@dataclass
class RolledBack:
    """What a rollback took out of the model: rows of the blocks [from_offset, to_offset) of `events`, less the first
    `from_taken` of them, and the first `to_taken` of those that follow."""

    from_offset: int
    from_taken: int
    to_offset: int
    to_taken: int
    rows: int
    sum: int  # of their row ids, modulo 2^64


def position_of(state: dict) -> Position:
    """The inverse of `asdict`."""
    back = [RolledBack(**record) for record in state["rolled_back"]]
    return Position(**{**state, "counts": Counts(**state["counts"]), "rolled_back": back})


def rolled_back(kept: Position | None, live: Position) -> Position:
    """The position after a rollback from `live` to a model that was at `kept` (None: it knew nothing of the partition).

    Where the trainer is stays as it is. What the model has is what `kept` had; all other rows that came are booked.
    """
    before = kept or Position(live.first, live.first)
    (came, came_sum), (had, had_sum) = live.accounted, before.accounted
    records = list(before.rolled_back)
    if came != had or came_sum != had_sum:
        records.append(
            RolledBack(
                before.next, before.taken, live.next, live.taken, came - had, (came_sum - had_sum) & _WRAP
            )
        )  # fmt: skip
    return replace(live, rows=before.rows, sum=before.sum, rolled_back=records)


def add_range(ranges: list[list[int]], start: int, end: int) -> None:
    """Adds [start, end) behind the ranges, or to the last of them where it goes on from it."""
    if ranges and ranges[-1][1] == start:
        ranges[-1][1] = end
    else:
        ranges.append([start, end])


@dataclass
class _Pending:
    """A block that is offered and not wholly learned."""

    number: int
    block: Block
    source_offset: int
    done: int  # rows learned
    left: int  # rows not learned yet


@dataclass
class _Waiting:
    """Rows in a queue, each with the number of the block it came in."""

    rows: Examples
    number: np.ndarray  # int64 [n]

    def take(self, index: np.ndarray | slice) -> _Waiting:
        return _Waiting(self.rows.take(index), self.number[index])


class RowQueue:
    """Blocks in, batches of rows out.

    `partitions`: how many there are, for a deterministic run (it waits until each was heard of); 0: as they come.
    """

    def __init__(self, partitions: int = 0) -> None:
        self.positions: dict[int, Position] = {}
        self._partitions = partitions
        self._pending: dict[int, deque[_Pending]] = {}
        self._by_number: dict[int, _Pending] = {}
        self._number = 0
        self._held: list[_Waiting] = []  # deterministic: not below the smallest watermark yet
        self._ready: deque[_Waiting] = deque()
        self._last: Key | None = None
        self._skip: dict[int, int] = {}  # live, after a restart: rows of the next blocks that are learned already

    @property
    def rows(self) -> int:
        """Rows offered and not learned."""
        return sum(len(w.rows) for w in (*self._held, *self._ready))

    def offer(self, block: Block, source_offset: int) -> bool:
        """Takes a block, or says False: it was seen before. Raises PositionError where it does not follow."""
        if not self._follows(block, source_offset):
            return False
        rows = block.examples
        drop = self._learned_before(block.partition, rows)
        if drop.any():
            rows = rows.take(~drop)
        pending = _Pending(self._number, block, source_offset, done=int(drop.sum()), left=len(rows))
        self._pending.setdefault(block.partition, deque()).append(pending)
        self._by_number[pending.number] = pending
        if len(rows):
            waiting = _Waiting(rows, np.full(len(rows), self._number, np.int64))
            (self._held if self._partitions else self._ready).append(waiting)
        self._number += 1
        return True

    def take(self, size: int, drain: bool) -> Examples | None:
        """The next batch of at most `size` rows, or None. They count as learned from now on.

        Deterministic: of exactly `size` rows; with `drain` also what is left, whatever the watermarks: the log is at
        its end, and going on from there is another run than one that was not drained.
        """
        if self._partitions:
            self._release(drain)
            if not drain and sum(len(w.rows) for w in self._ready) < size:
                return None
        parts: list[_Waiting] = []
        room = size
        while room and self._ready:
            head = self._ready.popleft()
            if len(head.rows) > room:
                self._ready.appendleft(head.take(slice(room, None)))
                head = head.take(slice(0, room))
            parts.append(head)
            room -= len(head.rows)
        if not parts:
            return None
        rows = Examples.concat([p.rows for p in parts])
        self._book(rows, np.concatenate([p.number for p in parts]))
        return rows

    def users_finished_by(self, rows: int) -> int:
        """How many users at most have new histories in the blocks that the next `rows` rows can finish."""
        users = 0
        for queue in self._pending.values():
            left = rows
            for pending in queue:
                left -= pending.left
                if left < 0:
                    break
                users += len(pending.block.users)
        return users

    def finished(self) -> list[Block]:
        """The blocks that are wholly learned since the last call, in order; the positions move past them."""
        out = []
        for partition, queue in sorted(self._pending.items()):
            position = self.positions[partition]
            while queue and not queue[0].left:
                pending = queue.popleft()
                del self._by_number[pending.number]
                block = pending.block
                position.next, position.handled = block.to_offset, block.handled
                position.source_offset = pending.source_offset + 1
                position.watermark, position.counts = block.watermark, block.counts
                if block.set_aside:
                    add_range(position.set_aside, block.from_offset, block.to_offset)
                position.taken = sum(p.done for p in queue)
                out.append(block)
        return out

    def state(self) -> dict:
        """JSON-ready."""
        return {"last": self._last, "positions": {str(p): asdict(at) for p, at in sorted(self.positions.items())}}

    def load(self, state: dict) -> None:
        """What `state` gave; blocks are then expected from each position's `next` on.

        Raises UsageError where it stands within blocks, and a run of the other kind has learned a part of them: which
        of their rows these are, only that kind knows.
        """
        self._last = tuple(state["last"]) if state["last"] else None
        within = any(at["taken"] for at in state["positions"].values())
        if within and (self._last is not None) != (self._partitions > 0):
            was = str(self._last is not None).lower()
            raise UsageError(
                f"the store stands within blocks that were learned with deterministic = {was}, in another order: go on "
                "with that"
            )
        for partition, at in state["positions"].items():
            position = position_of(at)
            self.positions[int(partition)] = position
            self._skip[int(partition)] = position.taken

    def _follows(self, block: Block, source_offset: int) -> bool:
        if block.to_offset <= block.from_offset:
            raise PositionError(f"partition {block.partition}: block [{block.from_offset}, {block.to_offset}) is empty")
        position = self.positions.get(block.partition)
        if position is None:
            start = block.from_offset
            self.positions[block.partition] = Position(start, start, start, source_offset)
            return True
        queue = self._pending.get(block.partition)
        expected = queue[-1].block.to_offset if queue else position.next
        if block.to_offset <= expected:
            return False
        if block.from_offset != expected:
            raise PositionError(
                f"partition {block.partition}: offset {expected} is next, but the block is [{block.from_offset}, "
                f"{block.to_offset}): read the topic of examples again from {position.source_offset}, or, where Kafka "
                "has deleted that (raise its retention), begin with another topic prefix and data directory"
            )
        return True

    def _learned_before(self, partition: int, rows: Examples) -> np.ndarray:
        """Mask of the rows that were learned before a restart."""
        if not self._partitions:
            skip = min(self._skip.get(partition, 0), len(rows))
            self._skip[partition] = self._skip.get(partition, 0) - skip
            return np.arange(len(rows)) < skip
        if self._last is None:
            return np.zeros(len(rows), bool)
        closed, example, part = self._last
        below = (rows.example_id < example) | ((rows.example_id == example) & (rows.part <= part))
        return (rows.closed < closed) | ((rows.closed == closed) & below)

    def _release(self, drain: bool) -> None:
        """Moves what is complete, rows closed before the smallest watermark, to the ready ones in the run's order."""
        heard = [q[-1].block.watermark if q else self.positions[p].watermark for p, q in self._pending.items()]
        heard += [at.watermark for p, at in self.positions.items() if p not in self._pending]
        if not self._held or (len(heard) < self._partitions and not drain):
            return
        rows = Examples.concat([w.rows for w in self._held])
        number = np.concatenate([w.number for w in self._held])
        complete = np.ones(len(rows), bool) if drain else rows.closed < min(heard)
        if not complete.any():
            return
        at = np.flatnonzero(complete)
        at = at[np.lexsort((rows.part[at], rows.example_id[at], rows.closed[at]))]
        every = _Waiting(rows, number)
        self._ready.append(every.take(at))
        self._held = [] if complete.all() else [every.take(~complete)]

    def _book(self, rows: Examples, number: np.ndarray) -> None:
        for n in np.unique(number):
            pending = self._by_number[int(n)]
            mine = number == n
            count = int(mine.sum())
            position = self.positions[pending.block.partition]
            pending.left -= count
            pending.done += count
            position.taken += count
            position.rows += count
            position.sum = (position.sum + int(rows.row_id[mine].view(np.uint64).sum())) & _WRAP
        self._last = (int(rows.closed[-1]), int(rows.example_id[-1]), int(rows.part[-1])) if self._partitions else None
