"""What ranks send each other, as bytes: values of the types named here and nothing else, so no bytes run code.

A message, in this order:

    u64, little-endian   length of the head
    head                 msgpack: the value, with dtype and shape where an array belongs
    arrays               raw, C order, in the order of the head; each begins at a multiple of 16 bytes

None, bool, int of 64 bits, float, str and bytes stand in the head as msgpack has them; all else is an array there, and
its first element says what the others are:

    LIST, TUPLE, SET items · DICT key, value, … · ARRAY dtype, sizes · TEXTS str, … · OBJECT name, fields

OBJECT is of a class that `may_be_sent` was told of, and made by its constructor. Arrays are copied once by who sends,
and are writable views of the message for who gets it: as long as one of them lives, all of the message does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, TypeAlias, get_origin, get_type_hints

import msgspec
import numpy as np

from embedding_store.errors import CorruptRecord

LARGEST = 1 << 34  # bytes of a message: who says more is damaged
DEEPEST = 32  # containers in containers
LIST, TUPLE, SET, DICT, ARRAY, TEXTS, OBJECT = range(7)
_DTYPES = {np.dtype(code).str: np.dtype(code) for code in ("?", *"bhiqBHIQefd")}  # little-endian where it matters
_PLAIN = {type(None), bool, float, str, bytes}
_PREFIX = 8  # bytes
_ALIGNED = 16  # bytes

_Told: TypeAlias = Any  # what msgpack has of a value
_classes: dict[str, type] = {}  # by their names
_fields: dict[type, dict[str, type]] = {}  # of these: name → its type, as far as isinstance looks


def may_be_sent(*classes: type) -> None:
    """Dataclasses and msgspec.Structs, made of values that can be sent; each field of one class, or of any (Any).

    Their names must differ. Raises ValueError.
    """
    for cls in classes:
        hints = get_type_hints(cls)
        names = [field.name for field in (fields(cls) if is_dataclass(cls) else msgspec.structs.fields(cls))]
        known = {name: _looked_at(cls, name, hints[name]) for name in names}
        if _classes.setdefault(cls.__name__, cls) is not cls:
            raise ValueError(f"another class of the name {cls.__name__} may be sent already")
        _fields[cls] = known


def _looked_at(cls: type, name: str, hint: Any) -> type:
    """What a field of this hint must be an instance of."""
    kind = object if hint is Any else get_origin(hint) or hint
    if not isinstance(kind, type) or kind is UnionType:  # else each of these would be refused where it arrives
        raise ValueError(f"{name} of {cls.__name__} is of no one class: {hint}")
    return kind


class Message:
    """A value on its way: `size` bytes, which `write` puts where they are to be. The value must not change between."""

    def __init__(self, value: object) -> None:
        """Raises TypeError where something in it is of no type that can be sent."""
        self._arrays: list[np.ndarray] = []
        try:
            self._head = msgspec.msgpack.encode(self._told(value, 0))
        except UnicodeEncodeError as error:
            raise TypeError(f"text that is not Unicode cannot be sent to other ranks: {error}") from error
        self.size = _PREFIX + len(self._head)
        for array in self._arrays:
            self.size = _aligned(self.size) + array.nbytes
        if self.size > LARGEST:
            raise TypeError(f"{self.size} bytes are too many to be sent to other ranks, {LARGEST} are the most")

    def write(self, into: np.ndarray) -> None:
        """into: uint8 [size], aligned."""
        at = _PREFIX + len(self._head)
        into[:_PREFIX].view("<u8")[0] = len(self._head)
        into[_PREFIX:at] = np.frombuffer(self._head, np.uint8)
        for array in self._arrays:
            begins = _aligned(at)
            into[at:begins] = 0
            at = begins + array.nbytes
            into[begins:at].view(array.dtype).reshape(array.shape)[...] = array

    def bytes(self) -> np.ndarray:
        """All of it: uint8 [size]."""
        into = np.empty(self.size, np.uint8)
        self.write(into)
        return into

    def _told(self, value: Any, depth: int) -> _Told:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is int:
            if not -(1 << 63) <= value < 1 << 64:
                raise TypeError("an int of more than 64 bits cannot be sent to other ranks")
            return value
        if kind is np.ndarray:
            return self._told_array(value)
        if depth == DEEPEST:
            raise TypeError(f"what is nested more than {DEEPEST} deep, or holds itself, cannot be sent to other ranks")
        if kind in _TAGS:
            return [_TAGS[kind], *[self._told(item, depth + 1) for item in value]]
        if kind is dict:
            return [DICT, *[self._told(one, depth + 1) for pair in value.items() for one in pair]]
        if kind in _fields:
            return [OBJECT, kind.__name__, *[self._told(getattr(value, name), depth + 1) for name in _fields[kind]]]
        raise TypeError(
            f"a {kind.__module__}.{kind.__qualname__} cannot be sent to other ranks: see embedding_store/codec.py"
        )

    def _told_array(self, array: np.ndarray) -> _Told:
        if array.dtype == object:
            texts = array.tolist() if array.ndim == 1 else [array]
            if not {str}.issuperset(map(type, texts)):
                raise TypeError("of arrays of objects only those [n] of str can be sent to other ranks")
            return [TEXTS, *texts]
        if array.dtype.str not in _DTYPES:
            raise TypeError(f"arrays of {array.dtype} cannot be sent to other ranks")
        self._arrays.append(array)
        return [ARRAY, array.dtype.str, *array.shape]


def decode(message: np.ndarray) -> Any:
    """The value of a message uint8 [n], aligned and writable, which belongs to it from now on.

    Raises CorruptRecord where the bytes are not wholly a message, or name what this process knows nothing of.
    """
    if len(message) < _PREFIX or (length := int(message[:_PREFIX].view("<u8")[0])) > len(message) - _PREFIX:
        raise _damaged("it ends early")
    try:
        told = msgspec.msgpack.decode(message[_PREFIX : _PREFIX + length].data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(f"{error}") from error
    reader = _Reader(message, _PREFIX + length)
    value = reader.value(told, 0)
    if reader.at != len(message):
        raise _damaged(f"{len(message) - reader.at} bytes belong to nothing")
    return value


class _Reader:
    """Makes values of what the head tells of them."""

    def __init__(self, message: np.ndarray, at: int) -> None:
        self._message, self.at = message, at

    def value(self, told: _Told, depth: int) -> Any:
        kind = type(told)
        if kind in _PLAIN or kind is int:
            return told
        if kind is not list or not told or type(told[0]) is not int or depth > DEEPEST:
            raise _damaged("its head is none")
        tag = told[0]
        if tag == ARRAY:
            return self._array(told)
        if tag == TEXTS:
            return _texts(told)
        if tag == OBJECT:
            return self._object(told, depth)
        items = (self.value(one, depth + 1) for one in told[1:])
        if tag == DICT and len(told) % 2:
            return _made(lambda: dict(zip(items, items, strict=True)))
        if tag in _CONTAINERS:
            return _made(lambda: _CONTAINERS[tag](items))
        raise _damaged(f"there is no type {tag}")

    def _object(self, told: list[_Told], depth: int) -> Any:
        cls = _classes.get(told[1]) if len(told) > 1 and type(told[1]) is str else None
        if cls is None:
            raise _damaged("it names a class that may not be sent")
        if len(told) != 2 + len(_fields[cls]):
            raise _damaged(f"it has {len(told) - 2} fields of {told[1]}, which has {len(_fields[cls])}")
        values = {}
        for (name, kind), one in zip(_fields[cls].items(), told[2:], strict=True):
            values[name] = self.value(one, depth + 1)
            if not isinstance(values[name], kind):
                raise _damaged(f"{name} of a {told[1]} is a {type(values[name]).__name__}")
        return _made(lambda: cls(**values))

    def _array(self, told: list[_Told]) -> np.ndarray:
        dtype = _DTYPES.get(told[1]) if len(told) > 1 and type(told[1]) is str else None
        shape = told[2:]
        if dtype is None or not all(type(size) is int and size >= 0 for size in shape):
            raise _damaged("an array is of no type or size")
        begins = _aligned(self.at)
        end = begins + math.prod(shape) * dtype.itemsize
        if end > len(self._message):
            raise _damaged("an array ends early")
        self.at = end
        raw = self._message[begins:end]
        if dtype.kind == "b" and (raw > 1).any():
            raise _damaged("what is neither true nor false is in an array of bool")
        return _made(lambda: raw.view(dtype).reshape(shape))


def _texts(told: list[_Told]) -> np.ndarray:
    texts = told[1:]
    if not {str}.issuperset(map(type, texts)):
        raise _damaged("a text is none")
    array = np.empty(len(texts), object)
    array[:] = texts
    return array


_TAGS: dict[type, int] = {list: LIST, tuple: TUPLE, set: SET}
_CONTAINERS: dict[int, Callable[[Iterable], Any]] = {tag: kind for kind, tag in _TAGS.items()}


def _made(make: Callable[[], Any]) -> Any:
    """What a constructor makes of what it was sent: it may refuse that."""
    try:
        return make()
    except (TypeError, ValueError, OverflowError) as error:
        raise _damaged(f"{error}") from error


def _aligned(at: int) -> int:
    return -(-at // _ALIGNED) * _ALIGNED


def _damaged(why: str) -> CorruptRecord:
    return CorruptRecord(f"a message of another rank is damaged ({why}): start all ranks from the same release")
