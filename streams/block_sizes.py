"""A block's bytes are one zstd frame: how large it becomes when it is unpacked is known before it is.

A frame says so in its header (RFC 8878, section 3.1.1), and zstd writes no more than that. Arrow's reader has no such
limit of its own, and buffers in the streams might be packed once more: what join workers write never is, all
else is refused by what the metadata says, a FlatBuffer
(https://arrow.apache.org/docs/format/Columnar.html, "Encapsulated message format", "Compression"; Message.fbs).
"""

from __future__ import annotations

import struct

import pyarrow as pa

from embedding_store.errors import CorruptRecord

MAX_UNPACKED_BYTES = 1 << 28  # of a block; the largest that join workers make have some megabytes

_CODEC = pa.Codec("zstd", compression_level=1)
_MAGIC = b"\x28\xb5\x2f\xfd"
_SINGLE_SEGMENT = 0x20  # then there is no byte about the window
_HEADER, _COMPRESSION = 2, 3  # places of Message.header and RecordBatch.compression in their tables


def pack(plain: pa.Buffer) -> bytes:
    """One frame, which says how large it was."""
    return _CODEC.compress(plain, asbytes=True)


def unpack(raw: bytes) -> pa.Buffer:
    """What `pack` was given. Raises CorruptRecord for what says that it is larger than MAX_UNPACKED_BYTES, ValueError,
    struct.error and what pyarrow raises for what is no such frame."""
    size = _said(raw)
    if size > MAX_UNPACKED_BYTES:
        said = f"unpacks to {size:,} bytes, more than {MAX_UNPACKED_BYTES:,}"
        raise CorruptRecord(f"a block that {said}: look at what writes to this topic")
    return _CODEC.decompress(raw, decompressed_size=size)


def require_plain(streams: pa.Buffer) -> None:
    """Raises ValueError where a buffer of the two streams is packed by itself, ValueError, struct.error and what
    pyarrow raises for what are no streams."""
    source = pa.BufferReader(streams)
    for _ in range(2):  # rows, histories
        for message in pa.ipc.MessageReader.open_stream(source):
            if message.type == "record batch":
                metadata = memoryview(message.metadata)
                (root,) = struct.unpack_from("<I", metadata, 0)
                if _field(metadata, _target(metadata, _field(metadata, root, _HEADER)), _COMPRESSION):
                    raise ValueError("its buffers are packed")
            elif message.type != "schema":
                raise ValueError(f"a message of type {message.type}")


def _said(raw: bytes) -> int:
    """The content size in a frame's header."""
    if not raw.startswith(_MAGIC):
        raise ValueError("it is no zstd frame")
    descriptor = raw[4] if len(raw) > 4 else 0
    single = bool(descriptor & _SINGLE_SEGMENT)
    at = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    match descriptor >> 6:
        case 0 if single:
            return struct.unpack_from("<B", raw, at)[0]
        case 0:
            raise ValueError("its frame does not say how large it is")
        case 1:
            return struct.unpack_from("<H", raw, at)[0] + 256
        case 2:
            return struct.unpack_from("<I", raw, at)[0]
    return struct.unpack_from("<Q", raw, at)[0]


def _field(metadata: memoryview, table: int, place: int) -> int:
    """Where a field of a table is; 0 where it is left out."""
    (back,) = struct.unpack_from("<i", metadata, table)
    vtable = table - back
    (size,) = struct.unpack_from("<H", metadata, vtable)
    at = 4 + 2 * place
    (offset,) = struct.unpack_from("<H", metadata, vtable + at) if at < size else (0,)
    return table + offset if offset else 0


def _target(metadata: memoryview, at: int) -> int:
    """Where the offset at `at` leads to. Raises ValueError where there is none."""
    if not at:
        raise ValueError("a message without what it is for")
    (offset,) = struct.unpack_from("<I", metadata, at)
    return at + offset
