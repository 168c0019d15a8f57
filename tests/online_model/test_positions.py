"""Effectively once: which blocks are taken, which rows come next, and where a restart goes on."""

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_store.errors import PositionError, UsageError
from online_model.examples import Block, Examples
from online_model.positions import RowQueue
from tests.online_model.logs import make_blocks, make_rows


def block(first, to, partition=0):
    return Block(partition=partition, from_offset=first, to_offset=to, handled=to, watermark=0)


def test_a_block_is_taken_once_and_only_where_it_follows():
    queue = RowQueue()
    assert queue.offer(block(5, 10), 3)
    assert not queue.offer(block(5, 10), 3)
    queue.finished()
    assert not queue.offer(block(5, 10), 3)
    with pytest.raises(PositionError, match="offset 10 is next"):
        queue.offer(block(11, 12), 4)
    with pytest.raises(PositionError, match="offset 10 is next"):
        queue.offer(block(7, 12), 4)
    with pytest.raises(PositionError, match="empty"):
        queue.offer(block(10, 10), 4)
    assert queue.offer(block(10, 12), 4)
    assert queue.offer(block(0, 4, partition=1), 0)
    queue.finished()
    assert (queue.positions[0].first, queue.positions[0].next, queue.positions[0].source_offset) == (5, 12, 5)


def test_rows_come_as_they_came_and_positions_move_when_a_block_is_done():
    rows = make_rows(25)
    blocks = make_blocks(rows, 10)
    queue = RowQueue()
    for at, b in enumerate(blocks):
        assert queue.offer(b, 100 + at)
    assert queue.rows == 25
    got = [queue.take(15, drain=False)]
    assert queue.finished() == blocks[:1]
    position = queue.positions[0]
    assert (position.next, position.handled, position.source_offset, position.taken) == (10, 9, 101, 5)
    assert (position.counts, position.watermark) == (blocks[0].counts, blocks[0].watermark)
    got.append(queue.take(15, drain=False))
    assert queue.take(15, drain=False) is None
    assert queue.finished() == blocks[1:]
    assert (position.next, position.taken, position.rows) == (30, 0, 25)
    assert position.sum == sum(int(i) % (1 << 64) for i in rows.row_id) % (1 << 64)
    assert np.concatenate([g.row_id for g in got]).tolist() == rows.row_id.tolist()


def run(queue, offers, size, ops=10**9, drain=True):
    """Offers blocks and takes batches in turn; the row ids of each batch, at most `ops` of them."""
    out = []
    for number, b in offers:
        queue.offer(b, number)
        queue.finished()
        while len(out) < ops and (rows := queue.take(size, drain=False)) is not None:
            out.append(rows.row_id.tolist())
            queue.finished()
        if len(out) >= ops:
            return out
    while drain and (rows := queue.take(size, drain=True)) is not None:
        out.append(rows.row_id.tolist())
        queue.finished()
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 20), st.integers(0, 20), st.booleans())
def test_a_restart_in_the_middle_of_a_block_trains_each_row_once(seed, block_size, size, cut, deterministic):
    offers = two_partitions(seed, block_size)
    partitions = 2 if deterministic else 0
    expected = run(RowQueue(partitions), offers, size)
    first, second = RowQueue(partitions), RowQueue(partitions)
    before = run(first, offers, size, ops=cut, drain=False)
    second.load(orjson.loads(orjson.dumps(first.state())))
    after = run(second, offers, size)
    flat = [i for batch in before + after for i in batch]
    assert sorted(flat) == sorted(i for batch in expected for i in batch)
    if deterministic:
        assert before + after == expected, "the same batches, not only the same rows"
    assert second.rows == 0
    whole = RowQueue(partitions)
    run(whole, offers, size)
    assert second.state() == whole.state()


@pytest.mark.parametrize(("was", "is_now"), [(0, 2), (2, 0)])
def test_within_a_block_only_a_run_of_the_same_kind_goes_on(was, is_now):
    offers, first = two_partitions(1, 9), RowQueue(was)
    run(first, offers, 4, ops=1, drain=False)
    assert any(at.taken for at in first.positions.values())
    with pytest.raises(UsageError, match=f"deterministic = {'true' if was else 'false'}"):
        RowQueue(is_now).load(orjson.loads(orjson.dumps(first.state())))
    whole = RowQueue(was)
    run(whole, offers, 4)
    RowQueue(is_now).load(orjson.loads(orjson.dumps(whole.state())))


def two_partitions(seed, block_size):
    """(source offset, block) of two partitions in an arrival order drawn from the seed."""
    rng = np.random.default_rng(seed)
    queues = [
        list(enumerate(make_blocks(make_rows(30, seed=seed + p), block_size, partition=p))) for p in (0, 1)
    ]
    out = []
    while any(queues):
        queue = queues[int(rng.integers(2))]
        if queue:
            out.append(queue.pop(0))
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 9), st.integers(1, 20))
def test_a_deterministic_run_knows_neither_arrival_nor_blocks(arrival, block_size, other_size, size):
    rows = [make_rows(30, seed=p) for p in (0, 1)]
    rng = np.random.default_rng(arrival)

    def offers(cut):
        queues = [list(enumerate(make_blocks(r, cut, partition=p))) for p, r in enumerate(rows)]
        out = []
        while any(queues):
            queue = queues[int(rng.integers(2))]
            if queue:
                out.append(queue.pop(0))
        return out

    assert run(RowQueue(2), offers(block_size), size) == run(RowQueue(2), offers(other_size), size)


def test_a_deterministic_run_waits_for_the_slowest_partition():
    queue = RowQueue(2)
    blocks = make_blocks(make_rows(20), 20)
    queue.offer(blocks[0], 0)
    assert queue.take(4, drain=False) is None, "nothing is known of partition 1"
    queue.offer(Block(partition=1, from_offset=0, to_offset=1, handled=1, watermark=0), 0)
    queue.finished()
    assert queue.take(4, drain=False) is None
    middle = int(np.sort(blocks[0].examples.closed)[10])
    queue.offer(Block(partition=1, from_offset=1, to_offset=2, handled=2, watermark=middle), 1)
    taken = []
    while (rows := queue.take(4, drain=False)) is not None:
        taken.append(rows)
    assert [len(r) for r in taken] == [4, 4]
    assert max(int(r.closed.max()) for r in taken) < middle


def test_late_rows_that_tie_with_a_watermark_are_not_split_by_it():
    """A late row may close at the very watermark of its block, rows of later blocks too."""
    rows = make_rows(12)
    rows.closed[:] = [0, 0, 0, 5, 5, 5, 5, 5, 5, 9, 9, 9]

    def cut(*ends):
        starts = (0, *ends)
        return [
            Block(partition=0, from_offset=a, to_offset=b, handled=b, watermark=w, examples=rows.take(slice(a, b)))
            for (a, b), w in zip(zip(starts, (*ends, 12), strict=True), (5, 5, 9, 10)[-len(ends) - 1 :], strict=True)
        ]

    expected = run(RowQueue(1), list(enumerate(cut(5, 9))), 2)
    assert run(RowQueue(1), list(enumerate(cut(3, 5, 9))), 2) == expected
    for stop in range(6):
        first, second = RowQueue(1), RowQueue(1)
        before = run(first, list(enumerate(cut(3, 5, 9))), 2, ops=stop, drain=False)
        second.load(first.state())
        assert before + run(second, list(enumerate(cut(3, 5, 9))), 2) == expected


def test_blocks_without_rows_are_done_in_their_turn():
    queue = RowQueue()
    rows = make_rows(3)
    queue.offer(make_blocks(rows, 3)[0], 0)
    queue.offer(block(10, 11), 1)
    assert queue.finished() == []
    queue.take(3, drain=False)
    assert [b.to_offset for b in queue.finished()] == [10, 11]
    assert queue.take(3, drain=False) is None
    assert len(Examples.empty()) == 0
