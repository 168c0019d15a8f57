"""Where things are in the trainer's store: its column families, and the keys in them.

| family | key → value |
|---|---|
| META | ABOUT, the head, the dense weights, those that replicas have if others; RECORD + key → the owner's records |
| BLOBS | family, 0, id → bytes |
| OUTBOX | sequence → parts of a version |
| GONE | table, 0, id → the commit that took it away |
| rows.<table> | id → row |
| notes.<table> | time, id → nothing; of tables that have TOUCHED |

Ids are big-endian with the sign bit flipped: RocksDB's order is theirs. AT in a family is the commit that it is at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from embedding_store.columns import TOUCHED
from embedding_store.rocks import FIRST, Db

META, BLOBS, OUTBOX, GONE = "meta", "blobs", "outbox", "gone"
ABOUT, RECORD = b"about", b"note\x00"
OWN = "."  # how the names of blob families begin that replicas do not need
_SIGN = np.uint64(1 << 63)


def row_family(table: str) -> str:
    """Of a table's rows."""
    return f"rows.{table}"


def note_family(table: str) -> str:
    """Of a table's notes."""
    return f"notes.{table}"


def note_families(layouts: Mapping[str, np.dtype]) -> list[str]:
    """The families of notes that tables of these layouts have."""
    return [note_family(table) for table, layout in layouts.items() if TOUCHED in (layout.names or ())]


def described(layouts: Mapping[str, np.dtype]) -> dict[str, list]:
    """JSON-ready: table → its layout's fields."""
    return {table: dtype.descr for table, dtype in sorted(layouts.items())}


def dtype_of(fields: list) -> np.dtype:
    """The structured dtype whose fields were `described`, and have been JSON since."""
    return np.dtype([(name, text, *(tuple(shape) for shape in rest)) for name, text, *rest in fields])


def ids_of(keys: Sequence[bytes]) -> np.ndarray:
    """The inverse of `rocks.keys_of`: int64 [n]."""
    return _ids(np.frombuffer(b"".join(keys), ">u8"))


def note_keys(times: np.ndarray, ids: np.ndarray) -> list[bytes]:
    """int64 [n] each → sorted keys in whose order the times ascend, then the ids."""
    order = np.lexsort((ids, times))
    keys = np.empty((len(ids), 2), ">u8")
    keys[:, 0], keys[:, 1] = times[order], ids[order].astype(np.uint64) ^ _SIGN
    return keys.view("V16").ravel().tolist()


def noted(keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `note_keys`: (times, ids), int64 [n] each."""
    both = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2)
    return both[:, 0].astype(np.int64), _ids(both[:, 1])


def blob_prefix(name: str) -> bytes:
    """How the keys of a family of blobs begin."""
    return name.encode() + b"\x00"


def blob_names(db: Db) -> Iterator[str]:
    """The families of blobs that hold something."""
    found = next(db.items(BLOBS, FIRST), None)
    while found is not None:
        name = found[0][:-9]  # the id's eight bytes and the zero before them
        yield name.decode()
        found = next(db.items(BLOBS, name + b"\x01"), None)


def sequence_key(sequence: int) -> bytes:
    """Of a version in the outbox."""
    return sequence.to_bytes(8, "big")


def place_value(place: tuple[int, int]) -> bytes:
    """(epoch, sequence) of a commit as 16 bytes."""
    return place[0].to_bytes(8, "big") + place[1].to_bytes(8, "big")


def place_of(value: bytes) -> tuple[int, int]:
    """The inverse of `place_value`."""
    return int.from_bytes(value[:8], "big"), int.from_bytes(value[8:], "big")


def _ids(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint64) ^ _SIGN).astype(np.int64)
