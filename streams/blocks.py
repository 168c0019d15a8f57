"""Blocks as bytes (topic `examples`): a zstd frame of two Arrow IPC streams, one after the other.

The first has the rows as columns and, in its schema's metadata, the header as JSON; the second the histories. They are
packed as a whole: the rows of an impression share their history and much else, and a block may be of few rows, where
packing each buffer by itself, as Arrow can, took four times as long and a half more bytes.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from embedding_store.errors import CorruptRecord
from online_model.examples import COLUMNS, Block, Counts, Examples
from online_model.history import HISTORY_BYTES
from streams.block_sizes import pack, require_plain, unpack

FORMAT = 4  # of what is written; others are refused

_HEADER = b"headrace.block"
_CONTINUATION = b"\xff\xff\xff\xff"  # an Arrow stream begins so: up to format 3 blocks were such, not packed as a whole
_STATE = pa.binary(HISTORY_BYTES)


def _type(dtype: type, shape: tuple[int, ...]) -> pa.DataType:
    if dtype is object:
        return pa.string()
    return pa.binary(np.dtype((dtype, shape)).itemsize) if shape else pa.from_numpy_dtype(dtype)


# Of the rows of examples, also where they lie in Parquet (streams/backfill.py).
ROWS = pa.schema([pa.field(name, _type(*column), nullable=False) for name, column in COLUMNS.items()])
_HISTORIES = pa.schema([pa.field("user", pa.int64(), nullable=False), pa.field("history", _STATE, nullable=False)])


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    partition: int
    from_offset: int
    to_offset: int
    handled: int
    watermark: int
    counts: Counts
    set_aside: bool = False


def encode_block(block: Block) -> bytes:
    """The block's bytes."""
    header = _Header(
        FORMAT, block.partition, block.from_offset, block.to_offset, block.handled, block.watermark, block.counts,
        block.set_aside,
    )  # fmt: skip
    schema = ROWS.with_metadata({_HEADER: msgspec.json.encode(header)})
    sink = pa.BufferOutputStream()
    _write(sink, schema, [getattr(block.examples, name) for name in COLUMNS])
    _write(sink, _HISTORIES, [block.users, block.histories])
    return pack(sink.getvalue())


def batch_of_rows(examples: Examples) -> pa.RecordBatch:
    """The rows as columns of ROWS."""
    columns = [getattr(examples, name) for name in COLUMNS]
    return pa.record_batch([_array(c, f.type) for c, f in zip(columns, ROWS, strict=True)], schema=ROWS)


def rows_of_batch(batch: pa.RecordBatch) -> Examples:
    """The inverse of `batch_of_rows`: of a batch that has the columns of ROWS."""
    return Examples(*[_column(batch, name) for name in COLUMNS])


def decode_block(raw: bytes) -> Block:
    """The block in a record's value, its columns read-only. CorruptRecord on what `encode_block` has not made."""
    try:
        streams = _unpacked(raw)
        require_plain(streams)
        source = pa.BufferReader(streams)
        rows = pa.ipc.open_stream(source)
        metadata = (rows.schema.metadata or {}).get(_HEADER)
        if metadata is None:
            raise CorruptRecord(_message("it has no block header"))
        header = _header(metadata)
        if not rows.schema.equals(ROWS):
            raise CorruptRecord(_message("it has other columns"))
        examples = Examples(*_read(rows, list(COLUMNS)))
        users, histories = _read(pa.ipc.open_stream(source), ["user", "history"])
    # A bent name is no UTF-8: ValueError. A bent place lies outside: struct.error.
    except (pa.ArrowException, ValueError, OSError, KeyError, struct.error) as error:
        raise CorruptRecord(_message(" ".join(str(error).split()))) from error
    return Block(
        header.partition, header.from_offset, header.to_offset, header.handled, header.watermark,
        header.counts, examples, users, histories, header.set_aside,
    )  # fmt: skip


def handled_in(raw: bytes) -> int:
    """Of the block in a record's value only how far it has come: all records of `events` below this offset have had
    their effect. Its rows are not looked at. CorruptRecord on what `encode_block` has not made."""
    try:
        metadata = (pa.ipc.open_stream(pa.BufferReader(_unpacked(raw))).schema.metadata or {}).get(_HEADER)
    except (pa.ArrowException, ValueError, OSError, struct.error) as error:
        raise CorruptRecord(_message(" ".join(str(error).split()))) from error
    if metadata is None:
        raise CorruptRecord(_message("it has no block header"))
    return _header(metadata).handled


def _unpacked(raw: bytes) -> pa.Buffer:
    if raw.startswith(_CONTINUATION):
        raise CorruptRecord(_other_format("3 or before"))
    return unpack(raw)


def _header(metadata: bytes) -> _Header:
    try:
        header = msgspec.json.decode(metadata, type=_Header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptRecord(_message(f"its header: {error}")) from error
    if header.format != FORMAT:
        raise CorruptRecord(_other_format(str(header.format)))
    return header


def _other_format(which: str) -> str:
    return f"a block of format {which} where {FORMAT} is read: run join and train workers of one version"


def _message(what: str) -> str:
    return f"not a block of examples ({what}): look at what writes to this topic"


def _write(sink: pa.BufferOutputStream, schema: pa.Schema, columns: list[np.ndarray]) -> None:
    arrays = [_array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))


def _array(column: np.ndarray, type_: pa.DataType) -> pa.Array:
    if column.ndim == 2:
        data = pa.py_buffer(np.ascontiguousarray(column))
        return pa.FixedSizeBinaryArray.from_buffers(type_, len(column), [None, data])
    return pa.array(column, type_)


def _read(reader: Any, names: list[str]) -> list[np.ndarray]:
    batches = list(reader)
    if len(batches) != 1:
        raise CorruptRecord(_message(f"it has {len(batches)} batches"))
    batch = batches[0]
    batch.validate(full=True)
    if any(column.null_count for column in batch.columns):
        raise CorruptRecord(_message("it has gaps"))
    return [_column(batch, name) for name in names]


def _column(batch: pa.RecordBatch, name: str) -> np.ndarray:
    column = batch.column(name)
    if not isinstance(column, pa.FixedSizeBinaryArray):
        return column.to_numpy(zero_copy_only=False)
    dtype, (width,) = COLUMNS[name]
    data: np.ndarray = np.frombuffer(column.buffers()[1], dtype)
    return data[column.offset * width : (column.offset + len(column)) * width].reshape(-1, width)
