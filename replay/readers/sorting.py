"""The records of a log in time order, however long it is: an external merge sort (Knuth, TAOCP vol. 3, 5.4).

A log of up to `hold` records is sorted in memory. A longer one that is in order is streamed: one read finds that out,
a second yields the records. Any other is cut into runs of `hold` records, each sorted and written to a temporary file,
and the runs are merged. The file has no name in any directory, so nothing has to be cleaned up: it is gone with its
descriptor, after an error, Ctrl-C, `close()` of the iterator, and kill -9 too.
"""

from __future__ import annotations

import heapq
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, TypeAlias

import msgspec

from embedding_store.errors import LogError
from replay.readers.base import LogReader, Record, new_items
from streams.events import Event, Item

Timed: TypeAlias = tuple[int, int, Record]  # time in ms, place in the log, record

SORT_RECORDS = 1_000_000  # records of a run, about 300 MB while it is sorted
WAITING_ITEMS = 100_000  # more in a row are a whole catalogue: it goes to the top, and is not held for its event
PROGRESS_RECORDS = 2_048

_encoder = msgspec.msgpack.Encoder()  # twenty times as fast as the JSON of streams.events, which checks every field
_decoder = msgspec.msgpack.Decoder(list[tuple[int, int, Event | Item]])


def in_time_order(
    log: LogReader,
    hold: int = SORT_RECORDS,
    directory: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> Iterator[Record]:
    """The records of `log` by time, rows of one time in the order of the file; Items stay before their event.

    At most `hold` records (2 or more) are held, and `hold` ** 0.5 of each run while runs are merged: no more than
    `hold` up to `hold` ** 1.5 records, a thousand million by default. `directory`: where a log that needs it is sorted
    on disk, some 100 bytes a record; by default where temporary files go (TMPDIR). `progress` is called every 2,048
    records that are read before the first comes out; `log.rows` says how far it is.

    Raises LogError for what the log raises, a full disk, and a log that changes while it is read.
    """
    return new_items(_in_time_order(log, hold, directory, progress or (lambda: None)))


def _in_time_order(
    log: LogReader, hold: int, directory: Path | None, progress: Callable[[], None]
) -> Iterator[Record]:
    timed = _reported(_timed(log.records()), progress)
    held = list(itertools.islice(timed, hold))
    if len(held) < hold:
        held.sort(key=itemgetter(0))  # stable: no place needs to be compared
        yield from (record for _, _, record in held)
        return
    if _are_in_order(held):
        del held[:-1]
        # From here on only times are looked at. Where they are out of order after all, the log is read again.
        if _are_in_order(itertools.chain(held, timed)):
            yield from _streamed(log)
            return
        held, timed = [], _reported(_timed(log.records()), progress)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            yield from _merged(file, _write_runs(file, itertools.chain(_drained(held), timed), hold))
    except msgspec.ValidationError as error:
        raise LogError(f"{log.path}: a record that no topic would take ({error}): mend or leave out its row") from None
    except OSError as error:
        place = directory or tempfile.gettempdir()
        raise LogError(
            f"{log.path}: cannot be sorted in {place} ({error.strerror or error}): it takes some 100 bytes a record;"
            " make room, or name another directory with TMPDIR"
        ) from None


def _timed(records: Iterable[Record]) -> Iterator[Timed]:
    """The records with their times and places. An Item has the time of the event after it; behind the last, of that."""
    waiting: list[Item] = []
    number = last = 0
    for record in records:
        if isinstance(record, Item):
            waiting.append(record)
            if len(waiting) < WAITING_ITEMS:
                continue
            for item in waiting:
                yield 0, number, item
                number += 1
            waiting.clear()
            continue
        for item in waiting:
            yield record.ts, number, item
            number += 1
        waiting.clear()
        yield record.ts, number, record
        number += 1
        last = max(last, record.ts)
    for item in waiting:
        yield last, number, item
        number += 1


def _reported(timed: Iterator[Timed], progress: Callable[[], None]) -> Iterator[Timed]:
    for entry in timed:
        if entry[1] % PROGRESS_RECORDS == 0:
            progress()
        yield entry


def _are_in_order(timed: Iterable[Timed]) -> bool:
    return all(a[0] <= b[0] for a, b in itertools.pairwise(timed))


def _streamed(log: LogReader) -> Iterator[Record]:
    reached = 0
    for ts, _, record in _timed(log.records()):
        if ts < reached:
            raise LogError(f"{log.path}: changed while it was read; wait until nothing writes to it")
        reached = ts
        yield record


def _drained(entries: list[Timed]) -> Iterator[Timed]:
    """The entries, each let go as it is taken, so that they are not held twice."""
    entries.reverse()
    while entries:
        yield entries.pop()


def _write_runs(file: BinaryIO, timed: Iterator[Timed], hold: int) -> list[list[tuple[int, int]]]:
    """Sorts and writes; for each run the (offset, length) of its chunks in `file`."""
    chunk = math.isqrt(hold)
    runs = []
    offset = 0
    while run := list(itertools.islice(timed, hold)):
        run.sort(key=itemgetter(0))
        places = []
        for start in range(0, len(run), chunk):
            packed = _encoder.encode(run[start : start + chunk])
            file.write(packed)
            places.append((offset, len(packed)))
            offset += len(packed)
        runs.append(places)
        run.clear()  # before the next is read: one run is in memory at a time
    file.flush()
    return runs


def _merged(file: BinaryIO, runs: list[list[tuple[int, int]]]) -> Iterator[Record]:
    # (time, place) is unique, so records are never compared.
    for _, _, record in heapq.merge(*(_read_run(file.fileno(), places) for places in runs)):
        yield record


def _read_run(descriptor: int, places: list[tuple[int, int]]) -> Iterator[Timed]:
    for offset, length in places:
        yield from _decoder.decode(os.pread(descriptor, length, offset))
