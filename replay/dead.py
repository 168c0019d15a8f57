"""Refused records on their way back: from `events.dead` or a file of it, repaired, to `events`.

A run takes what is new for the group `<prefix>headrace-dead`. The group moves on only when all of it is in the file or
kept by the broker; a run that was killed before does the same again, which is harmless: a record that was sent twice
has the same event_id, and inside the duplicate window counts once.
"""

from __future__ import annotations

import base64
import importlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import msgspec
import orjson
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

from embedding_store.errors import BrokerError, LogError, UsageError
from replay.live_topics import OUTAGE_SECONDS
from replay.sinks import KafkaSink
from streams.dead_letters import DeadLetter
from streams.events import Rejected, Tick, decode
from streams.kafka_clients import Bootstrap, client_arguments
from streams.topics import TopicSettings, wait_for_broker

Repair: TypeAlias = Callable[[bytes], bytes | None]
FETCH_BYTES = 32 << 20  # of a partition at once


@dataclass
class Told:
    """What came of the letters. `refused`: by reason, those that are still no events; `skipped`: those that had no
    value, that the repair left out, or ticks, which are of no use any more."""

    read: int = 0
    written: int = 0
    sent: int = 0
    skipped: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class Line(msgspec.Struct, omit_defaults=True):
    """A letter in a file, one a line. `value`: its text, or base64 where `base64` is set; an editor may as well put
    the object itself there."""

    value: Any
    reason: str = ""
    detail: str = ""
    partition: int = -1
    offset: int = -1
    timestamp_ms: int | None = None
    base64: bool = False

    @classmethod
    def of(cls, letter: DeadLetter) -> Line:
        value, coded = letter.value, False
        if value is not None:
            try:
                value.decode()
            except UnicodeDecodeError:
                value, coded = base64.b64encode(value), True
        text = None if value is None else value.decode()
        return cls(
            text, letter.reason, letter.detail, letter.partition, letter.offset, letter.timestamp_ms, coded
        )  # fmt: skip

    def raw(self) -> bytes | None:
        """The bytes of the record. Raises ValueError."""
        match self.value:
            case None:
                return None
            case str():
                return base64.b64decode(self.value, validate=True) if self.base64 else self.value.encode()
            case dict():
                return orjson.dumps(self.value)
            case _:
                raise ValueError("`value` is neither a text nor an object")


class NewLetters:
    """The letters that are new for the group, or with `again` all there are, up to the present end of the topic.

    Raises BrokerError when Kafka cannot be reached or has no such topic.
    """

    def __init__(self, bootstrap: Bootstrap, topics: TopicSettings, again: bool = False) -> None:
        wait_for_broker(bootstrap)
        self._bootstrap, self._again = bootstrap, again
        try:
            self._kafka = KafkaConsumer(
                **client_arguments(bootstrap), group_id=f"{topics.prefix}headrace-dead",
                enable_auto_commit=False, isolation_level="read_committed", auto_offset_reset="earliest",
                fetch_max_bytes=2 * FETCH_BYTES, max_partition_fetch_bytes=FETCH_BYTES,
            )  # fmt: skip
            there = self._kafka.partitions_for_topic(topics.events_dead)
        except KafkaError as error:
            raise self._failed(error) from error
        if not there:
            self._kafka.close()
            raise BrokerError(f"Kafka at {bootstrap} has no topic {topics.events_dead}: look at the topic prefix")
        self._places = [TopicPartition(topics.events_dead, partition) for partition in sorted(there)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kafka.close()

    def __iter__(self) -> Iterator[DeadLetter]:
        """Letters. What is in the topic without being one (no headers) comes as a letter of place -1."""
        kafka, places = self._kafka, self._places
        try:
            kafka.assign(places)
            if self._again:
                kafka.seek_to_beginning(*places)
            ends = kafka.end_offsets(places)
            heard = time.monotonic()
            while any(kafka.position(place) < ends[place] for place in places):
                found = kafka.poll(timeout_ms=1_000)
                for records in found.values():
                    for record in records:
                        yield _letter(record.headers, record.value)
                if found:
                    heard = time.monotonic()
                elif time.monotonic() - heard > OUTAGE_SECONDS:  # to poll a broker that is away has no records
                    raise self._failed(KafkaTimeoutError(f"no records for {OUTAGE_SECONDS:.0f} s"))
        except KafkaError as error:
            raise self._failed(error) from error

    def done(self) -> None:
        """All that was read is safe: the group moves on."""
        try:
            self._kafka.commit()
        except KafkaError as error:
            raise self._failed(error) from error

    def _failed(self, error: KafkaError) -> BrokerError:
        return BrokerError(f"Kafka at {self._bootstrap} does not answer ({error}): look at `headrace broker status`")


def _letter(headers: Iterable[tuple[str, bytes]], value: bytes | None) -> DeadLetter:
    try:
        return DeadLetter.of(headers, value)
    except ValueError as error:
        return DeadLetter("", f"sent by something else ({error})", -1, -1, None, value)


def write_file(letters: Iterable[DeadLetter], path: Path) -> Told:
    """The letters as JSON lines (`Line`), on the disk when this returns. Raises LogError, UsageError if it exists."""
    told = Told()
    try:
        with path.open("xb") as file:
            for letter in letters:
                file.write(msgspec.json.encode(Line.of(letter)) + b"\n")
                told.read += 1
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise UsageError(f"{path} is there already: choose another name, or send it back first") from None
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}; choose another place") from None
    told.written = told.read
    return told


def read_file(path: str) -> list[DeadLetter]:
    """The letters of a file as `write_file` makes it, edited. Raises LogError, UsageError with the line's number."""
    letters: list[DeadLetter] = []
    number = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                number += 1
                if not line.isspace():
                    said = msgspec.json.decode(line, type=Line)
                    letters.append(
                        DeadLetter(said.reason, said.detail, said.partition, said.offset, said.timestamp_ms, said.raw())
                    )
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}; give the file that `headrace replay dead --out` wrote") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise UsageError(f"{path}, line {number}: {error}; nothing was sent") from None
    return letters


def load_repair(name: str) -> Repair:
    """The function of "module:function"; the module may lie in the working directory. Raises UsageError."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UsageError(f"--repair {name}: write MODULE:FUNCTION, as mend:fix for the function fix of mend.py")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UsageError(f"--repair {name}: {error}") from None
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise UsageError(f"--repair {name}: {function} is not a function")
    return found


def send(
    letters: Iterable[DeadLetter], bootstrap: Bootstrap, topics: TopicSettings, future_ms: int,
    repair: Repair | None = None,
) -> Told:  # fmt: skip
    """Those that are events by now, after `repair`, to `events`, each where its user's events go; kept by the broker
    when this returns. Raises BrokerError, UsageError where `repair` fails."""
    told = Told()
    with KafkaSink(bootstrap, topics.events, topics.items) as sink:
        for letter in letters:
            told.read += 1
            value = letter.value if repair is None or letter.value is None else _repaired(repair, letter)
            if value is None:
                told.skipped += 1
                continue
            try:
                event = decode(value)
                if event.ts > time.time() * 1000 + future_ms:
                    raise Rejected("from_the_future", "its time has not come yet")
            except Rejected as refused:
                told.refused[refused.reason] += 1
                continue
            if isinstance(event, Tick):
                told.skipped += 1
            else:
                sink.send_raw(value, event.user)
                told.sent += 1
    return told


def _repaired(repair: Repair, letter: DeadLetter) -> bytes | None:
    where = f"the repair of the record at {letter.partition}:{letter.offset}"
    try:
        value = repair(letter.value or b"")
    except Exception as error:  # code of the user's
        raise UsageError(f"{where} failed ({type(error).__name__}: {error}): mend it, and run this again") from error
    if not isinstance(value, bytes | None):
        raise UsageError(f"{where} gave a {type(value).__name__}: it must give bytes, or None to leave it out")
    return value
