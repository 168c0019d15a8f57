"""A version comes out as it went in, or not at all."""

from __future__ import annotations

import contextlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from embedding_store import delta
from embedding_store.columns import TableRows
from embedding_store.delta import MAX_PART_BYTES, Assembler, Version, encode
from embedding_store.errors import CorruptRecord
from tests.embedding_store.made import assert_same_version, rows_of, version_of


def _assemble(parts: list[bytes]) -> list[Version]:
    assembler = Assembler()
    return [v for v in map(assembler.add, parts) if v is not None]


def test_one_part() -> None:
    version = version_of(7)
    parts = encode(version)
    assert len(parts) == 1
    (out,) = _assemble(parts)
    assert_same_version(version, out)


@pytest.mark.parametrize("max_bytes", [4_000, 10_000, 50_000])
def test_many_parts_of_at_most_so_many_bytes(max_bytes: int) -> None:
    version = version_of(7, n=800)
    parts = encode(version, max_bytes)
    assert len(parts) > 2
    assert max(map(len, parts)) <= max_bytes
    (out,) = _assemble(parts)
    assert_same_version(version, out)


def test_a_real_version_fits_kafkas_default_limit() -> None:
    parts = encode(version_of(1, n=40_000))
    assert len(parts) > 2
    assert max(map(len, parts)) <= MAX_PART_BYTES


def test_an_empty_version_and_empty_tables() -> None:
    empty = Version(1, 1, tables={"user": rows_of("user", [])}, blobs={"card": {}})
    (out,) = _assemble(encode(empty))
    assert_same_version(empty, out)


def test_what_cannot_be_split_still_goes_out() -> None:
    version = Version(1, 1, blobs={"card": {1: b"a", 2: b"x" * 5_000, 3: b"b"}}, info={"long": "y" * 5_000})
    (out,) = _assemble(encode(version, 2_000))
    assert_same_version(version, out)


def test_views_of_columns_are_written_as_they_read() -> None:
    """safetensors takes memory as it lies there: a strided view would silently be other numbers."""
    wide = np.arange(40, dtype=np.float32).reshape(10, 4)
    rows = TableRows(np.arange(1, 11)[::-1], {"weights": wide[:, ::2], "clicks": wide[:, 1]})
    (out,) = _assemble(encode(Version(1, 1, tables={"item": rows}, dense={"w": wide.T})))
    np.testing.assert_array_equal(out.tables["item"].columns["weights"], wide[:, ::2])
    np.testing.assert_array_equal(out.tables["item"].columns["clicks"], wide[:, 1])
    np.testing.assert_array_equal(out.tables["item"].ids, np.arange(10, 0, -1))
    np.testing.assert_array_equal(out.dense["w"], wide.T)


def test_a_part_is_a_safetensors_file() -> None:
    tensors = load(encode(Version(1, 1, tables={"user": rows_of("user", [4, 5])}))[0])
    assert tensors["0.ids"].tolist() == [4, 5]
    assert tensors["0.column.history"].shape == (2, 3)


PARTS = {sequence: encode(version_of(sequence, n=300, seed=sequence), 6_000) for sequence in (1, 2)}
ZOMBIES = encode(version_of(1, n=300, seed=99), 6_000)  # the same name, other content


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.integers(0, 30)), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_order_of_parts_never_gives_half_a_version(order: list[tuple[int, int]]) -> None:
    sources = {1: PARTS[1], 2: PARTS[2], 3: ZOMBIES}
    sent = [sources[which][i % len(sources[which])] for which, i in order]
    sent += [*PARTS[1][:3], *PARTS[2]]
    out = _assemble(sent)
    for version in out:
        seed = 99 if version.sequence == 1 and len(out) and _is_zombie(version) else version.sequence
        assert_same_version(version, version_of(version.sequence, n=300, seed=seed))
    assert out[-1].sequence == 2, "a version that is sent whole arrives, whatever came before"


def _is_zombie(version: Version) -> bool:
    return bool(version.dense["w"][0, 0] == version_of(1, n=300, seed=99).dense["w"][0, 0])


def test_parts_that_come_twice_and_versions_sent_again_are_one_version() -> None:
    a, b = PARTS[1], PARTS[2]
    twice = [part for part in a for _ in range(2)]
    assert [v.sequence for v in _assemble(twice)] == [1]
    assert [v.sequence for v in _assemble([*a[:4], *a, *b[:1], *b])] == [1, 2]


def test_a_missing_part_drops_the_version_and_not_the_next() -> None:
    a, b = PARTS[1], PARTS[2]
    assert [v.sequence for v in _assemble([*a[:2], *a[3:], *b])] == [2]


def test_the_parts_of_two_senders_are_never_mixed() -> None:
    mine, zombies = PARTS[1], ZOMBIES
    assert _assemble([*mine[:2], *zombies[2:]]) == []


@pytest.mark.parametrize("garbage", [b"", b"x", b"\xff" * 100, b'{"kind":"click"}', (2).to_bytes(8, "little") + b"{}"])
def test_garbage_is_refused_and_the_version_under_way_stays(garbage: bytes) -> None:
    assembler, parts = Assembler(), PARTS[1]
    assembler.add(parts[0])
    with pytest.raises(CorruptRecord):
        assembler.add(garbage)
    assert [v.sequence for v in map(assembler.add, parts[1:]) if v] == [1]


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_a_truncated_part_is_refused(keep: float) -> None:
    part = PARTS[1][0]
    with pytest.raises(CorruptRecord):
        Assembler().add(part[: int(len(part) * keep)])


@given(st.integers(0, len(PARTS[1][0]) - 1), st.integers(0, 7))
@settings(max_examples=400, deadline=None)
def test_one_flipped_bit_anywhere_is_refused(at: int, bit: int) -> None:
    part = bytearray(PARTS[1][0])
    part[at] ^= 1 << bit
    with pytest.raises(CorruptRecord):
        Assembler().add(bytes(part))


# --- what is sealed, and lies: whoever may write to the topic can make a check that is right


def _sealed(kind: str, columns: dict[str, np.ndarray], rows: str = "fp32") -> bytes:
    """The one part of a version with one piece."""
    head = delta._Head(base=None, created_ms=0, positions=[], info={}, dense={"t": [3]}, rows=rows)  # type: ignore[arg-type]
    meta = delta._Meta(
        format=delta._FORMAT, epoch=1, sequence=1, part=0, last=True, first="", pieces=[(kind, "t")], head=head
    )
    return delta._seal(meta, [delta._Piece(kind, "t", columns)])[0]


IDS = np.arange(1_000, dtype=np.int64)
FAR = np.array([1_000_000, -1_000_000] * 500 + [1_000_000], np.int64)
MANY = np.zeros((1 << 50, 0), np.int64)
LIES = {
    "ids of no bytes": ("gone", {"ids": MANY}, "fp32"),
    "rows of no bytes": ("table", {"ids": MANY, "column.seen": MANY}, "fp32"),
    "blobs of no bytes": ("blob", {"ids": MANY, "sizes": MANY, "bytes": np.zeros(0, np.uint8)}, "fp32"),
    "sizes that go back": ("blob", {"ids": np.arange(1_001), "sizes": FAR, "bytes": np.zeros(10**6, np.uint8)}, "fp32"),
    "sizes past the end": ("blob", {"ids": IDS, "sizes": IDS + (1 << 60), "bytes": np.zeros(9, np.uint8)}, "fp32"),
    "one row, many scales": (
        "table",
        {"ids": IDS, "weights.": np.zeros((1, 100_000), np.uint8), "weights.scale": np.ones(100_000, np.float32),
         "weights.bias": np.ones(100_000, np.float32)},
        "int8",
    ),
    "weights without rows": ("table", {"ids": IDS, "weights.": np.zeros(1_000, np.float32)}, "fp32"),
    "fewer rows than ids": ("table", {"ids": IDS, "weights.": np.zeros((3, 4), np.float32)}, "fp32"),
    "dense of another size": ("dense", {"flat": np.zeros(4, np.float32)}, "fp32"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_part_that_lies_about_its_sizes_is_refused_and_takes_no_memory(lie: str) -> None:
    part = _sealed(*LIES[lie])
    tracemalloc.start()
    with pytest.raises(CorruptRecord):
        Assembler().add(part)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20 * len(part) + 1_000_000


@pytest.mark.parametrize("depth", [1_000, 1_000_000])
def test_json_without_end_is_no_part(depth: int) -> None:
    header = b'{"__metadata__":' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(CorruptRecord):
        Assembler().add(len(header).to_bytes(8, "little") + header)


SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)
DTYPES = st.sampled_from([np.int64, np.float32, np.uint8, np.float16, np.int8, np.float64])
NAMES = st.sampled_from(["ids", "flat", "sizes", "bytes", "weights.", "weights.scale", "weights.bias", "column.seen"])
ARRAYS = st.builds(lambda shape, dtype, value: np.full(shape, value).astype(dtype), SHAPES, DTYPES, st.integers(-3, 3))


@given(
    st.sampled_from(["table", "dense", "gone", "blob", "other"]),
    st.dictionaries(NAMES, ARRAYS, min_size=1),
    st.sampled_from(["fp32", "fp16", "int8"]),
)
@settings(max_examples=100, deadline=None)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_whatever_is_sealed_comes_out_as_a_version_or_is_refused(
    kind: str, columns: dict[str, np.ndarray], rows: str
) -> None:
    with contextlib.suppress(CorruptRecord):
        version = Assembler().add(_sealed(kind, columns, rows))
        assert version is not None
        for table in version.tables.values():
            assert table.ids.dtype == np.int64
            assert all(len(column) == len(table) for column in table.columns.values())
