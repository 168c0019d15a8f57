import contextlib
import itertools
import json
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_store.errors import CorruptRecord
from online_model.examples import COLUMNS, Block, Counts
from streams import block_sizes, blocks
from streams.block_sizes import pack
from streams.blocks import decode_block, encode_block, handled_in
from streams.events import Click, encode
from streams.joiner import Joiner, JoinSettings, Record
from tests.streams.logs import SETTINGS, logs


def assert_same(a: Block, b: Block) -> None:
    for name in ("partition", "from_offset", "to_offset", "handled", "watermark", "counts"):
        assert getattr(a, name) == getattr(b, name)
    for name, (dtype, _) in COLUMNS.items():
        x, y = getattr(a.examples, name), getattr(b.examples, name)
        assert x.dtype == y.dtype == dtype
        assert x.shape == y.shape
        assert x.tolist() == y.tolist() or np.array_equal(x, y, equal_nan=True)
    np.testing.assert_array_equal(a.users, b.users)
    np.testing.assert_array_equal(a.histories, b.histories)
    assert (b.histories.dtype, b.users.dtype) == (np.uint8, np.int64)


@settings(max_examples=50, deadline=None)
@given(SETTINGS, logs())
def test_blocks_come_back_as_they_went(join, log):
    block = Joiner(join, 5).process(log).block
    assert_same(block, decode_block(encode_block(block)))


def test_an_empty_block_comes_back():
    block = Block(1, 2, 3, 3, -(1 << 63), Counts(events_in=5))
    assert_same(block, decode_block(encode_block(block)))


def test_any_arrow_reader_opens_a_block():
    raw = encode_block(Block(1, 2, 3, 3, 77))
    source = pa.BufferReader(pa.CompressedInputStream(pa.BufferReader(raw), "zstd").read())
    rows = pa.ipc.open_stream(source)
    assert json.loads(rows.schema.metadata[b"headrace.block"])["watermark"] == 77
    assert rows.read_all().column_names == list(COLUMNS)
    assert pa.ipc.open_stream(source).read_all().column_names == ["user", "history"]


def some_block() -> Block:
    joiner = Joiner(JoinSettings(implicit=True, disorder_ms=0), 5)
    clicks = [Click(event_id=n, ts=n, user=n % 7, item=f"i{n}") for n in range(20)]
    return joiner.process([Record(n, None, encode(click)) for n, click in enumerate(clicks)]).block


def test_each_truncation_is_corrupt():
    raw = encode_block(some_block())
    for length in range(len(raw)):
        with pytest.raises(CorruptRecord):
            decode_block(raw[:length])


def test_each_bent_byte_is_corrupt_or_in_a_number():
    good = encode_block(some_block())
    corrupt = 0
    for at, mask in itertools.product(range(len(good)), (0x01, 0x80)):
        raw = bytearray(good)
        raw[at] ^= mask
        try:
            block = decode_block(bytes(raw))
        except CorruptRecord:
            corrupt += 1
        else:
            assert len({len(getattr(block.examples, name)) for name in COLUMNS}) == 1
    assert corrupt > 1_000


@pytest.mark.parametrize("raw", [b"", b"x", b"{}", bytes(50), b"\x28\xb5\x2f\xfd", b"\n" * 1_000])
def test_what_is_no_block_is_named_so_in_one_line(raw):
    with pytest.raises(CorruptRecord, match=r"^not a block of examples \(.*\): look at what writes to this topic$"):
        decode_block(raw)


def test_another_format_is_refused(monkeypatch):
    monkeypatch.setattr(blocks, "FORMAT", 5)
    newer = encode_block(Block(1, 2, 3, 3, 77))
    monkeypatch.undo()
    older = pa.CompressedInputStream(pa.BufferReader(newer), "zstd").read()  # was not packed as a whole
    for raw, which in ((newer, "5"), (older, "3 or before")):
        for read in (decode_block, handled_in):
            with pytest.raises(CorruptRecord, match=f"a block of format {which} where 4 is read: run join and train"):
                read(raw)


def test_another_table_is_not_a_block():
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("a", pa.int64())])) as writer:
        writer.write_table(pa.table({"a": [1]}))
    with pytest.raises(CorruptRecord, match="no block header"):
        decode_block(pack(sink.getvalue()))


def streams(rows: int, packed: bool) -> pa.Buffer:
    """Two streams of so many zeros, the buffers in them packed or as they are."""
    column, sink = pa.array(np.zeros(rows, np.int64)), pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd" if packed else None)
    for schema in (pa.schema([("zeros", pa.int64())]), pa.schema([("user", pa.int64())])):
        with pa.ipc.new_stream(sink, schema, options=options) as writer:
            writer.write_batch(pa.record_batch([column], schema=schema))
    return sink.getvalue()


def test_a_small_block_that_unpacks_to_gigabytes_is_refused_before_it_does(monkeypatch):
    small, large = pack(streams(100_000, packed=False)), pack(streams(20_000_000, packed=False))
    assert len(large) < 40_000
    with pytest.raises(CorruptRecord, match="no block header"):  # it was unpacked
        decode_block(small)
    for read in (decode_block, handled_in):
        with pytest.raises(CorruptRecord, match=r"320,000,[0-9]{3} bytes, more than 268,435,456"):
            read(large)
    said = struct.pack("<I", len(streams(100_000, packed=False)))
    for says, why in ((1 << 31, "unpacks to"), (1 << 20, "not a block")):
        bent = small.replace(said, struct.pack("<I", says), 1)
        assert bent != small
        with pytest.raises(CorruptRecord, match=why):
            decode_block(bent)
    whole = encode_block(some_block())
    monkeypatch.setattr(block_sizes, "MAX_UNPACKED_BYTES", 1_000)
    with pytest.raises(CorruptRecord, match="unpacks to"):
        decode_block(whole)


def test_buffers_that_are_packed_once_more_are_refused_before_they_are_unpacked():
    bomb = pack(streams(20_000_000, packed=True))
    assert len(bomb) < 20_000
    before = pa.total_allocated_bytes()
    with pytest.raises(CorruptRecord, match="its buffers are packed"):
        decode_block(bomb)
    assert pa.total_allocated_bytes() - before < 1_000_000


def test_a_frame_may_say_its_size_in_each_of_the_ways_there_are():
    for rows in (0, 1, 100, 10_000):
        plain = streams(rows, packed=False)
        assert block_sizes.unpack(pack(plain)).equals(plain)
    tiny = pack(pa.py_buffer(b"abc"))
    assert block_sizes.unpack(tiny).to_pybytes() == b"abc"


SOME = encode_block(some_block())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_bytes_are_bent_a_block_is_whole_or_corrupt(data):
    raw = bytearray(SOME)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 8))
        value = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\xff" * 4]))
        raw[at : at + len(value)] = value
    with contextlib.suppress(CorruptRecord):
        decode_block(bytes(raw))
