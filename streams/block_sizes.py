"""How large a block becomes when it is unpacked, known before it is: some kilobytes of zstd may hold gigabytes.

Arrow's reader has no limit. A packed buffer begins with its size when unpacked (8 bytes, little endian; -1: it is not
packed), and zstd writes no more than that; where the buffers lie is in the metadata, a FlatBuffer
(https://arrow.apache.org/docs/format/Columnar.html, "Encapsulated message format", "Compression"; Message.fbs).
"""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa

from embedding_store.errors import CorruptRecord

MAX_UNPACKED_BYTES = 1 << 28  # of a block; the largest that join workers make have some megabytes

_HEADER, _BUFFERS = 2, 2  # places of Message.header and RecordBatch.buffers in their tables
_MIN_PACKED = 8  # a shorter buffer has no size before it: it is empty


def check_sizes(raw: bytes) -> None:
    """Raises CorruptRecord for a block that says it is larger than MAX_UNPACKED_BYTES, and what pyarrow raises,
    ValueError and struct.error for what is no block."""
    source, size = pa.BufferReader(raw), 0
    for _ in range(2):  # rows, histories
        for message in pa.ipc.MessageReader.open_stream(source):
            if message.type == "record batch":
                size += _unpacked(memoryview(message.metadata), message.body)
            elif message.type != "schema":
                raise ValueError(f"a message of type {message.type}")
    if size > MAX_UNPACKED_BYTES:
        said = f"unpacks to {size:,} bytes, more than {MAX_UNPACKED_BYTES:,}"
        raise CorruptRecord(f"a block that {said}: look at what writes to this topic")


def _unpacked(metadata: memoryview, body: pa.Buffer) -> int:
    """What the buffers of a record batch have unpacked, in bytes."""
    (root,) = struct.unpack_from("<I", metadata, 0)
    batch = _target(metadata, _field(metadata, root, _HEADER))
    vector = _target(metadata, _field(metadata, batch, _BUFFERS))
    (n,) = struct.unpack_from("<I", metadata, vector)
    total = 0
    for offset, length in np.frombuffer(metadata, "<i8", 2 * n, vector + 4).reshape(-1, 2).tolist():
        if length >= _MIN_PACKED:
            (size,) = struct.unpack_from("<q", body, offset)
            total += max(size, length)
    return total


def _field(metadata: memoryview, table: int, place: int) -> int:
    """Where a field of a table is. Raises ValueError where it is left out."""
    (back,) = struct.unpack_from("<i", metadata, table)
    vtable = table - back
    (size,) = struct.unpack_from("<H", metadata, vtable)
    at = 4 + 2 * place
    (offset,) = struct.unpack_from("<H", metadata, vtable + at) if at < size else (0,)
    if not offset:
        raise ValueError("a message without what it is for")
    return table + offset


def _target(metadata: memoryview, at: int) -> int:
    (offset,) = struct.unpack_from("<I", metadata, at)
    return at + offset
