"""What ranks send each other comes out as it went in, or is refused: by the sender what has no type of ours, by the
receiver what is damaged or names what it does not know."""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass, make_dataclass
from enum import IntEnum
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embedding_store import codec
from embedding_store.codec import DEEPEST, Message, decode, may_be_sent
from embedding_store.columns import TableRows
from embedding_store.errors import CorruptRecord


@dataclass
class Sent:
    first: Any
    second: Any = None


class SentStruct(msgspec.Struct, kw_only=True, frozen=True):
    value: Any


may_be_sent(Sent, SentStruct, TableRows)

DTYPES = ["?", "<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8"]
ints = st.integers(-(1 << 63), (1 << 64) - 1)
keys = st.one_of(st.none(), st.booleans(), ints, st.text(), st.binary(), st.floats(allow_nan=False))
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
arrays = st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, shapes))
texts = st.lists(st.text()).map(lambda some: np.array([*some, None], object)[:-1])
values = st.recursive(
    st.one_of(keys, st.floats(), arrays, texts),
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.sets(keys), st.dictionaries(keys, inner),
        st.builds(Sent, inner, inner), st.builds(SentStruct, value=inner),
        hnp.arrays("<i8", st.just(3)).map(lambda ids: TableRows(ids, {"n": ids + 1})),
    ),
    max_leaves=12,
)  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Alike in types, bits and order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        alike = (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and (a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same([*a.items()], [*b.items()])
    if isinstance(a, set):
        return same(sorted(a, key=repr), sorted(b, key=repr))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, Sent | TableRows):
        return same(vars(a), vars(b))
    if isinstance(a, SentStruct):
        return same(a.value, b.value)
    return a == b


def sent(head: object, rest: bytes = b"") -> np.ndarray:
    """A message with any head."""
    packed = msgspec.msgpack.encode(head)
    return np.frombuffer(bytearray(struct.pack("<Q", len(packed)) + packed + rest), np.uint8)


@given(values)
def test_what_is_sent_comes_out_as_it_was(value: Any) -> None:
    message = Message(value).bytes()
    assert len(message) == Message(value).size
    assert same(decode(message), value)


def test_arrays_may_lie_in_memory_as_they_like_and_can_be_written_to() -> None:
    plain = np.arange(24, dtype=np.int32).reshape(4, 6)
    for array in (
        plain,
        plain[:, ::2],
        plain.T,
        plain[::-1],
        np.asfortranarray(plain),
        np.broadcast_to(plain, (2, 4, 6)),
    ):
        out = decode(Message((b"odd", array)).bytes())[1]
        assert out.tolist() == array.tolist()
        assert out.flags.c_contiguous
        assert out.flags.aligned
        out[:] = 7


def test_arrays_are_not_copied_by_who_gets_them() -> None:
    message = Message([np.arange(1_000), np.ones((10, 10), np.float32)]).bytes()
    for array in decode(message):
        assert np.shares_memory(array, message)


class Number(IntEnum):
    ONE = 1


class Text(str):
    __slots__ = ()


@dataclass
class NotSent:
    first: int = 0


looped: list = []
looped.append(looped)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "a builtins.object cannot be sent"), (print, "builtin_function_or_method"), (int, "a builtins.type"),
        (NotSent(), r"test_codec\.NotSent"), (Number.ONE, "Number"), (Text("a"), "Text"), (np.int64(1), "numpy.int64"),
        (1j, "complex"), (bytearray(b"a"), "bytearray"), (frozenset({1}), "frozenset"), (range(3), "range"),
        (1 << 64, "more than 64 bits"), (-(1 << 63) - 1, "more than 64 bits"), ("\ud800", "not Unicode"),
        (np.array([1, None], object), "of str"), (np.array([["a"]], object), "of str"),
        (np.array(["a"]), "arrays of <U1"), (np.zeros(1, ">i8"), "arrays of >i8"), (np.zeros(1, "M8[s]"), "datetime64"),
        (np.zeros(1, [("a", "<i8")]), "arrays of"), (np.zeros(1, complex), "complex128"),
        (np.ma.masked_array([1], [True]), "MaskedArray"), (looped, "holds itself"),
    ],
)  # fmt: skip
def test_what_has_no_type_of_ours_is_refused_where_it_is_sent(value: Any, said: str) -> None:
    for within in (value, [value], {"a": (value,)}, Sent(value)):
        with pytest.raises(TypeError, match=said):
            Message(within)


def test_a_message_that_is_too_large_is_refused_where_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "LARGEST", 100)
    Message(np.zeros(8))
    with pytest.raises(TypeError, match="too many"):
        Message(np.zeros(12))


def test_names_of_classes_differ() -> None:
    may_be_sent(Sent)  # once more
    with pytest.raises(ValueError, match="another class of the name Sent"):
        may_be_sent(dataclass(type("Sent", (), {})))


@pytest.mark.parametrize("hint", [int | None, Literal[1], "np.ndarray | None"])
def test_a_field_of_several_classes_is_refused_before_anything_is_sent(hint: Any) -> None:
    """It would be found damaged by every other rank."""
    with pytest.raises(ValueError, match="field of Many is of no one class"):
        may_be_sent(make_dataclass("Many", [("field", hint)], namespace={"__module__": __name__}))


def test_what_is_nested_as_deep_as_may_be_is_sent() -> None:
    value: Any = np.arange(2)
    for _ in range(DEEPEST):
        value = [value]
    assert same(decode(Message(value).bytes()), value)
    with pytest.raises(TypeError, match="nested"):
        Message([value])


@given(values, st.data())
def test_bytes_that_are_bent_are_refused_or_are_another_value(value: Any, data: st.DataObject) -> None:
    """Nothing else than CorruptRecord comes of them, and no more memory than the message has."""
    message = Message(value).bytes()
    how = data.draw(st.sampled_from(["cut", "longer", "bent"]))
    if how == "bent":
        at = data.draw(st.integers(0, len(message) - 1))
        message[at] ^= data.draw(st.integers(1, 255))
        with suppress(CorruptRecord):
            Message(decode(message))
        return
    n = len(message)
    other = message[: data.draw(st.integers(0, n - 1))] if how == "cut" else np.append(message, np.uint8(0))
    with pytest.raises(CorruptRecord):
        decode(other.copy())


@pytest.mark.parametrize(
    ("head", "rest"),
    [
        ([codec.ARRAY, "<i8", 1 << 60], b""), ([codec.ARRAY, "<i8", 1 << 63, 1 << 63], b""),
        ([codec.ARRAY, "<i8", 1], b"1234567"), ([codec.ARRAY, "<i8", -1], b""), ([codec.ARRAY, "<i8", 1.0], b""),
        ([codec.ARRAY, "<i8", True], b""), ([codec.ARRAY, "<i8", 0, 1 << 62, 1 << 62], b""),
        ([codec.ARRAY, "<i8", *[1] * 99], bytes(32)), ([codec.ARRAY, "O", 1], bytes(32)),
        ([codec.ARRAY, "<M8[s]", 0], b""), ([codec.ARRAY], b""), ([codec.ARRAY, 5], b""),
        ([codec.ARRAY, "|b1", 8], bytes(16) + b"\2" * 16), ([codec.LIST], b"more"),
        ([codec.OBJECT], b""), ([codec.OBJECT, "os.system", "true"], b""), ([codec.OBJECT, ["Sent"], 1, 2], b""),
        ([codec.OBJECT, "NotSent", 1], b""), ([codec.OBJECT, "Sent", 1], b""), ([codec.OBJECT, "Sent", 1, 2, 3], b""),
        ([codec.OBJECT, "TableRows", 3, [codec.DICT]], b""),
        ([codec.OBJECT, "TableRows", [codec.ARRAY, "<i8", 0], [codec.LIST]], b""),
        ([codec.OBJECT, "TableRows", [codec.ARRAY, "<i8", 0], [codec.DICT, "n", [codec.TEXTS, "a"]]], b""),
        ([codec.TEXTS, 1], b""), ([codec.DICT, 1], b""), ([codec.DICT, [codec.LIST], 1], b""),
        ([codec.SET, [codec.LIST]], b""), ([], b""), ([99], b""), ([-1], b""), ([True], b""), (["LIST"], b""),
        ({"a": 1}, b""), (msgspec.msgpack.Ext(1, b""), b""),
    ],
)  # fmt: skip
def test_what_is_forged_is_refused(head: object, rest: bytes) -> None:
    with pytest.raises(CorruptRecord, match="damaged"):
        decode(sent(head, rest))


def test_a_head_without_end_is_refused() -> None:
    for packed in (
        b"\x92\x00" * 200,
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc1",
        b"",
    ):
        raw = struct.pack("<Q", len(packed)) + packed
        with pytest.raises(CorruptRecord, match="damaged"):
            decode(np.frombuffer(bytearray(raw), np.uint8))
    for length in (1 << 63, (1 << 64) - 1, 2):
        with pytest.raises(CorruptRecord, match="ends early"):
            decode(np.frombuffer(bytearray(struct.pack("<Q", length) + b"\xc0"), np.uint8))
