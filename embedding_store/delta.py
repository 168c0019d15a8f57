"""Versions on the wire: what a commit changed, as parts small enough for Kafka, keyed by feature id.

A part is one safetensors file (https://github.com/huggingface/safetensors, section "Format"); its metadata holds
JSON under "headrace" (`_Meta`) and the xxh3 of the whole part under "check" (taken with 16 zeros in its own place).
A part is a row of pieces, piece i being the tensors "i.<column>": rows of a table, some of the dense weights, ids that
are gone, blobs. Large things run on over several parts. A version exists only when its last part is there and
all before it: a replica never sees half of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from embedding_store.columns import MOMENTUM, WEIGHTS, TableRows, concat
from embedding_store.encoding import Encoding, decode_weights, encode_weights
from embedding_store.errors import CorruptRecord

MAX_PART_BYTES = 900_000  # below Kafka's default limit of 1 MB a record
_FORMAT = 2
_NO_CHECK = "0" * 16
_HEADER_BYTES = 1024  # what a part takes beside its tensors and the JSON of the version
_TENSOR_BYTES = 256  # what a tensor's entry in the header may take
# What foreign bytes may raise; RecursionError: JSON that is nested without end.
_NO_PART = (SafetensorError, msgspec.MsgspecError, LookupError, TypeError, ValueError, RecursionError)


@dataclass
class Version:
    """The model's changes from the version `base` to this one, or all of the model (`base` None)."""

    epoch: int
    sequence: int
    base: tuple[int, int] | None = None  # (epoch, sequence) of the version this goes on from; None: it holds everything
    created_ms: int = 0
    positions: dict[int, int] = field(default_factory=dict)  # partition of `events` → all below has had its effect
    info: dict = field(default_factory=dict)  # free JSON: metrics, counts, settings
    dense: dict[str, np.ndarray] = field(default_factory=dict)  # dense weights, absolute
    tables: dict[str, TableRows] = field(default_factory=dict)  # the touched rows, absolute
    gone: dict[str, np.ndarray] = field(default_factory=dict)  # table → int64 [n] ids that are no more
    blobs: dict[str, dict[int, bytes]] = field(default_factory=dict)  # family → id → bytes


class _Head(msgspec.Struct, kw_only=True):
    """What a version's first part says for all of it."""

    base: tuple[int, int] | None
    created_ms: int
    positions: list[tuple[int, int]]
    info: dict
    dense: dict[str, list[int]]  # name → shape
    rows: Encoding = "fp32"  # of the tables' weights


class _Meta(msgspec.Struct, kw_only=True):
    """The JSON of a part."""

    format: int
    epoch: int
    sequence: int
    part: int
    last: bool
    first: str  # the check of the version's first part, which makes them one; "" in that part itself
    pieces: list[tuple[str, str]]  # (kind: table, dense, gone, blobs; name)
    head: _Head | None


@dataclass
class _Piece:
    kind: str
    name: str
    columns: dict[str, np.ndarray]
    whole: bool = False  # columns differ in length: not to be cut

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes + _TENSOR_BYTES for c in self.columns.values())

    def split(self, budget: int, force: bool) -> tuple[_Piece | None, _Piece | None]:
        """(what of it takes at most `budget` bytes, the rest); with `force` at least a row, or all that is whole."""
        n = len(next(iter(self.columns.values())))
        if self.nbytes <= budget or (force and (self.whole or n <= 1)):
            return self, None
        if self.whole or n == 0:
            return None, self
        overhead = _TENSOR_BYTES * len(self.columns)
        stop = (budget - overhead) * n // (self.nbytes - overhead)
        stop = max(stop, 1 if force else 0)
        return (self._cut(0, stop), self._cut(stop, n)) if stop > 0 else (None, self)

    def _cut(self, start: int, stop: int) -> _Piece:
        return _Piece(self.kind, self.name, {n: c[start:stop] for n, c in self.columns.items()})


def encode(version: Version, max_bytes: int = MAX_PART_BYTES, rows: Encoding = "fp32") -> list[bytes]:
    """The parts of a version, at least one, in the order to send them. `rows`: how the tables' weights are written.

    A part is longer than `max_bytes` only where one row or one blob (or the JSON) is.
    """
    return list(encode_stream(version, version.tables.items(), version.blobs.items(), max_bytes, rows))


def encode_stream(
    head: Version,
    tables: Iterable[tuple[str, TableRows]],
    blobs: Iterable[tuple[str, Mapping[int, bytes]]],
    max_bytes: int,
    rows: Encoding = "fp32",
) -> Iterator[bytes]:
    """As `encode`, with the rows and blobs of `head` replaced by streams, so that a version need not fit in memory."""
    info = _Head(
        base=head.base,
        created_ms=head.created_ms,
        positions=sorted(head.positions.items()),
        info=head.info,
        dense={name: list(array.shape) for name, array in head.dense.items()},
        rows=rows,
    )
    first = ""
    room = max_bytes - len(msgspec.json.encode(info))
    parts = _fill(_pieces(head, tables, blobs, max_bytes // 2, rows), room, max_bytes)
    for number, (pieces, last) in enumerate(_and_whether_last(parts)):
        meta = _Meta(
            format=_FORMAT,
            epoch=head.epoch,
            sequence=head.sequence,
            part=number,
            last=last,
            first=first,
            pieces=[(p.kind, p.name) for p in pieces],
            head=None if number else info,
        )
        part, check = _seal(meta, pieces)
        first = first or check
        yield part


def row_bytes(layout: np.dtype, encoding: Encoding) -> int:
    """What a row of a table with this `layout` (that of the store) takes in a version, with its id."""
    weights = encode_weights(np.zeros((1, *layout[WEIGHTS].shape), np.float32), encoding)
    own = sum(layout[name].itemsize for name in layout.names or () if name not in (WEIGHTS, MOMENTUM))
    return np.dtype(np.int64).itemsize + own + sum(array.nbytes for array in weights.values())


@dataclass(frozen=True)
class PartHead:
    """What a part says of its version, for those who want no more of it."""

    epoch: int
    sequence: int
    last: bool  # of the version's parts
    created_ms: int | None  # None: not the first part, which alone says it and what follows
    positions: dict[int, int]


def head_of_part(part: bytes) -> PartHead:
    """What a part says of its version; the arrays are not looked at, nor whether they are sound. Raises
    CorruptRecord."""
    try:
        texts = msgspec.json.decode(part[8 : 8 + int.from_bytes(part[:8], "little")])["__metadata__"]
        meta = msgspec.json.decode(texts["headrace"], type=_Meta)
    except _NO_PART as error:
        raise CorruptRecord(f"these bytes are no part of a version ({error}): they are left out") from error
    head = meta.head
    created_ms, positions = (None, {}) if head is None else (head.created_ms, dict(head.positions))
    return PartHead(meta.epoch, meta.sequence, meta.last, created_ms, positions)


def place_of_part(part: bytes) -> tuple[int, int]:
    """(epoch, sequence) of the version that this is a part of. Raises CorruptRecord."""
    meta, _, _ = _open(part)
    return meta.epoch, meta.sequence


class Assembler:
    """Puts the parts of versions together again: `add` them as they arrive.

    Parts may come again, and a version may break off and be sent again from its first part (its sender crashed).
    A part that does not follow the one before it drops what was collected: that version never comes out.
    """

    def __init__(self) -> None:
        self._first = ""  # the check of the first part of the version under way
        self._next = 0  # the number of the part that follows
        self._head: _Head | None = None
        self._pieces: list[_Piece] = []

    def add(self, part: bytes) -> Version | None:
        """The version that this part completes, or None.

        Raises CorruptRecord on bytes that are no part of a version; what was collected before stays.
        """
        meta, pieces, check = _open(part)
        if meta.part == 0:
            self._drop()
            self._first = check
        elif meta.first == self._first and meta.part < self._next:
            return None  # it was sent twice
        elif meta.first != self._first or meta.part != self._next:
            self._drop()
            return None
        self._next += 1
        self._head = self._head or meta.head
        self._pieces += pieces
        if not meta.last:
            return None
        head, collected = self._head, self._pieces
        self._drop()
        try:
            return _build(meta, head, collected)
        except _NO_PART as error:
            raise CorruptRecord(f"version {meta.epoch}.{meta.sequence} does not fit together ({error})") from error

    def _drop(self) -> None:
        self._first, self._next, self._head, self._pieces = "", 0, None, []


def _pieces(
    head: Version,
    tables: Iterable[tuple[str, TableRows]],
    blobs: Iterable[tuple[str, Mapping[int, bytes]]],
    blob_bytes: int,
    encoding: Encoding,
) -> Iterator[_Piece]:
    for name, array in head.dense.items():
        yield _Piece("dense", name, {"flat": array.reshape(-1)})
    for name, ids in head.gone.items():
        yield _Piece("gone", name, {"ids": ids})
    for name, rows in tables:
        columns = {f"column.{n}": c for n, c in rows.columns.items() if n != WEIGHTS}
        if WEIGHTS in rows.columns:
            columns |= {f"weights.{n}": c for n, c in encode_weights(rows.columns[WEIGHTS], encoding).items()}
        yield _Piece("table", name, {"ids": rows.ids, **columns})
    for name, family in blobs:
        yield from _blob_pieces(name, family, blob_bytes)


def _blob_pieces(name: str, family: Mapping[int, bytes], max_bytes: int) -> Iterator[_Piece]:
    """Blobs in pieces of about `max_bytes`; a larger blob is one by itself."""
    ids = np.fromiter(family.keys(), np.int64, len(family))
    values = list(family.values())
    sizes = np.fromiter(map(len, values), np.int64, len(values))
    group = np.cumsum(sizes + 16) // max_bytes
    bounds = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(values)]
    for start, stop in pairwise(bounds):
        joined = np.frombuffer(b"".join(values[start:stop]), np.uint8)
        columns: dict[str, np.ndarray] = {"ids": ids[start:stop], "sizes": sizes[start:stop], "bytes": joined}
        yield _Piece("blob", name, columns, whole=True)


def _fill(pieces: Iterable[_Piece], first_room: int, max_bytes: int) -> Iterator[list[_Piece]]:
    """Pieces, cut where they must be, into parts of `max_bytes`, the first of `first_room`; at least one part."""
    part: list[_Piece] = []
    room, full = first_room - _HEADER_BYTES, max_bytes - _HEADER_BYTES
    for piece in pieces:
        rest: _Piece | None = piece
        while rest is not None:
            taken, rest = rest.split(room, force=not part and room == full)
            if taken is not None:
                part.append(taken)
                room -= taken.nbytes
            if rest is not None:
                yield part
                part, room = [], full
    yield part


def _and_whether_last(parts: Iterator[list[_Piece]]) -> Iterator[tuple[list[_Piece], bool]]:
    before = next(parts)
    for part in parts:
        yield before, False
        before = part
    yield before, True


def _seal(meta: _Meta, pieces: list[_Piece]) -> tuple[bytes, str]:
    """(the part's bytes, its check)"""
    # save() takes the arrays' memory as it lies there: without ascontiguousarray a slice of columns is silently wrong
    tensors = {f"{i}.{n}": np.ascontiguousarray(c) for i, p in enumerate(pieces) for n, c in p.columns.items()}
    raw = save(tensors, {"check": _NO_CHECK, "headrace": msgspec.json.encode(meta).decode()})
    check = xxhash.xxh3_64_hexdigest(raw)
    return raw.replace(_check_text(_NO_CHECK), _check_text(check), 1), check


def _open(part: bytes) -> tuple[_Meta, list[_Piece], str]:
    """(meta, pieces, check) of a part; the arrays are its own memory. Raises CorruptRecord."""
    try:
        texts = msgspec.json.decode(part[8 : 8 + int.from_bytes(part[:8], "little")])["__metadata__"]
        check = texts["check"]
        if _checked(part, check) != check:
            raise CorruptRecord("a part of a version was damaged on its way (its check differs): it is left out")
        tensors = load(part)
        meta = msgspec.json.decode(texts["headrace"], type=_Meta)
        columns: list[dict[str, np.ndarray]] = [{} for _ in meta.pieces]
        for key, array in tensors.items():
            number, column = key.split(".", 1)
            columns[int(number)][column] = array
    except _NO_PART as error:
        raise CorruptRecord(f"these bytes are no part of a version ({error}): they are left out") from error
    if meta.format != _FORMAT:
        raise CorruptRecord(f"a version of format {meta.format}, but this is {_FORMAT}: upgrade the older side")
    return meta, [_Piece(kind, name, c) for (kind, name), c in zip(meta.pieces, columns, strict=True)], check


def _checked(part: bytes, check: str) -> str:
    """What the check of a part should be; the part is not copied for it. Raises ValueError."""
    text = _check_text(check)
    at, rest = part.index(text), memoryview(part)
    hashed = xxhash.xxh3_64(rest[:at])
    hashed.update(_check_text(_NO_CHECK))
    hashed.update(rest[at + len(text) :])
    return hashed.hexdigest()


def _check_text(check: str) -> bytes:
    # In this form, with bare quotes, it cannot stand inside another text of the header.
    return f'"check":"{check}"'.encode()


def _build(meta: _Meta, head: _Head | None, pieces: list[_Piece]) -> Version:
    if head is None:
        raise ValueError("its first part has no head")
    flat: dict[str, list[np.ndarray]] = {}
    gone: dict[str, list[np.ndarray]] = {}
    tables: dict[str, list[TableRows]] = {}
    version = Version(meta.epoch, meta.sequence, head.base, head.created_ms, dict(head.positions), head.info)
    for piece in pieces:
        columns = piece.columns
        if piece.kind == "dense":
            flat.setdefault(piece.name, []).append(columns["flat"].reshape(-1))
        elif piece.kind == "gone":
            gone.setdefault(piece.name, []).append(_ids(columns))
        elif piece.kind == "table":
            tables.setdefault(piece.name, []).append(_rows(columns, head.rows))
        else:
            version.blobs.setdefault(piece.name, {}).update(_blobs(columns))
    version.dense = {n: np.concatenate(parts).reshape(head.dense[n]) for n, parts in flat.items()}
    version.gone = {n: np.concatenate(parts) for n, parts in gone.items()}
    version.tables = {n: concat(parts) for n, parts in tables.items()}
    return version


def _rows(columns: dict[str, np.ndarray], encoding: Encoding) -> TableRows:
    own = {n.removeprefix("column."): c for n, c in columns.items() if n.startswith("column.")}
    weights = {n.removeprefix("weights."): c for n, c in columns.items() if n.startswith("weights.")}
    if weights:
        own = {WEIGHTS: decode_weights(weights, encoding), **own}
    return TableRows(_ids(columns), own)


def _ids(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Raises ValueError: without this a tensor of no bytes could say that it has any number of ids."""
    ids = columns["ids"]
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise ValueError(f"ids are {ids.dtype}{list(ids.shape)}")
    return ids


def _blobs(columns: dict[str, np.ndarray]) -> dict[int, bytes]:
    ids, sizes, joined = _ids(columns), columns["sizes"], columns["bytes"].tobytes()
    # Sizes that go back and forth would make more of the bytes than there are.
    if sizes.dtype != np.int64 or np.any((sizes < 0) | (sizes > len(joined))) or sizes.sum() != len(joined):
        raise ValueError("the sizes of blobs do not add up")
    ends = np.cumsum(sizes).tolist()
    starts = [0, *ends][: len(ends)]
    return {i: joined[a:b] for i, a, b in zip(ids.tolist(), starts, ends, strict=True)}
