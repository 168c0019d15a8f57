"""What is in a log: kinds, times, order, duplicates, bad rows, how many users and items. One read, bounded memory."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from embedding_store.errors import LogError
from embedding_store.ids import hash_text
from replay.readers.base import LogReader, Record
from streams.events import Forget, Impression, Item, Tick, units

EXACT_IDS = 1 << 21  # different ids that are counted exactly; 16 bytes each
HOUR_MS = 3_600_000
PROGRESS_RECORDS = 2_048


class IdCounter:
    """Counts different ids, and how often one came again: exactly up to `most` different ones, estimated past that.

    Adaptive sampling (Wegman; Flajolet, "On adaptive sampling", Computing 43, 1990): when there are too many, only the
    ids whose 64-bit hash ends in `level` zero bits are kept, and counts are multiplied by 2 ** level. An id is kept
    with all its repeats or not at all, so the repeats are estimated without bias too. The standard error of the
    number of different ids is about 1.2 / most ** 0.5: 0.08 % by default.

    >>> ids = IdCounter()
    >>> for id in (7, "7", 8): ids.add(id)
    >>> ids.different, ids.repeats, ids.exact
    (2, 1, True)
    """

    def __init__(self, most: int = EXACT_IDS) -> None:
        self.most, self.level = most, 0
        self._hashes = np.zeros(0, np.int64)  # sorted
        self._counts = np.zeros(0, np.int64)
        self._new = array("q")
        self._flush_at = 1 << 14

    def add(self, raw: str | int) -> None:
        """7 and "7" are the same id, as they are in the system."""
        self._new.append(hash_text(str(raw)))
        if len(self._new) >= self._flush_at:
            self._flush()

    @property
    def different(self) -> int:
        self._flush()
        return len(self._hashes) << self.level

    @property
    def repeats(self) -> int:
        """How many of the ids that were added had come before."""
        self._flush()
        return int(self._counts.sum() - len(self._counts)) << self.level

    @property
    def exact(self) -> bool:
        self._flush()
        return self.level == 0

    def _flush(self) -> None:
        if not self._new:
            return
        new = self._sampled(np.array(self._new, np.int64))
        self._new = array("q")
        hashes = np.concatenate([self._hashes, new])
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        counts = np.concatenate([self._counts, np.ones(len(new), np.int64)])[order]
        starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else order
        self._hashes = hashes[starts]
        self._counts = np.add.reduceat(counts, starts) if len(starts) else counts
        while len(self._hashes) > self.most:
            self.level += 1
            kept = self._ends_in_zeros(self._hashes)
            self._hashes, self._counts = self._hashes[kept], self._counts[kept]
        self._flush_at = max(1 << 14, len(self._hashes) // 2)  # merging then costs a constant number of steps an id

    def _sampled(self, hashes: np.ndarray) -> np.ndarray:
        return hashes[self._ends_in_zeros(hashes)]

    def _ends_in_zeros(self, hashes: np.ndarray) -> np.ndarray:
        return hashes & ((1 << self.level) - 1) == 0


@dataclass
class Inspection:
    """What was found so far. Times are ms UTC. Ticks count as nothing."""

    kinds: Counter[str] = field(default_factory=Counter)  # records of events by kind
    catalogue: int = 0  # records of items; one before each event counts each time
    events: int = 0  # an impression of k items counts as k
    shown: int = 0  # items in impressions
    from_ms: int | None = None
    to_ms: int | None = None
    disordered: int = 0  # events with a time before that of an earlier one …
    disorder_ms: int = 0  # … and by how much at most
    event_ids: IdCounter = field(default_factory=IdCounter)
    users: IdCounter = field(default_factory=IdCounter)
    items: IdCounter = field(default_factory=IdCounter)  # of events and of the catalogue
    categories: IdCounter = field(default_factory=IdCounter)
    hours: Counter[int] = field(default_factory=Counter)  # events by hour since 1970

    def add(self, record: Record) -> None:
        """Count a record."""
        if isinstance(record, Item):
            self.catalogue += 1
            self.items.add(record.item)
            if record.category is not None:
                self.categories.add(record.category)
            return
        if isinstance(record, Tick):
            return
        self._see_time(record.ts)
        self.kinds[type(record).__struct_config__.tag] += 1  # type: ignore[index]
        self.events += units(record)
        self.hours[record.ts // HOUR_MS] += units(record)
        self.event_ids.add(record.event_id)
        self.users.add(record.user)
        if isinstance(record, Impression):
            self.shown += len(record.items)
            for item in record.items:
                self.items.add(item)
        elif not isinstance(record, Forget):
            self.items.add(record.item)

    def _see_time(self, ts: int) -> None:
        if self.from_ms is None or self.to_ms is None:
            self.from_ms = self.to_ms = ts
        elif ts < self.to_ms:
            self.disordered += 1
            self.disorder_ms = max(self.disorder_ms, self.to_ms - ts)
            self.from_ms = min(self.from_ms, ts)
        else:
            self.to_ms = ts

    @property
    def ordered(self) -> bool:
        """Whether no event is before an earlier one. A row that becomes several events may put them out of order."""
        return self.disordered == 0

    @property
    def duplicates(self) -> int:
        """Events whose event_id came before; an estimate where `event_ids.exact` is False."""
        return self.event_ids.repeats

    @property
    def seconds(self) -> float:
        """From the first event to the last."""
        return 0.0 if self.from_ms is None or self.to_ms is None else (self.to_ms - self.from_ms) / 1000

    @property
    def events_per_s(self) -> float | None:
        return self.events / self.seconds if self.seconds else None

    @property
    def busiest_hour(self) -> tuple[int, float] | None:
        """Its start in ms, and its events per second."""
        if not self.hours:
            return None
        hour, count = max(self.hours.items(), key=lambda entry: (entry[1], -entry[0]))
        return hour * HOUR_MS, count / 3600

    @property
    def click_rate(self) -> float | None:
        """Clicks per item shown; None where the log does not tell what was shown."""
        return self.kinds["click"] / self.shown if self.shown else None

    @property
    def exact(self) -> bool:
        """Whether all counts are exact, none an estimate."""
        return all(ids.exact for ids in (self.event_ids, self.users, self.items, self.categories))


def inspect(log: LogReader, progress: Callable[[Inspection], None] | None = None) -> Inspection:
    """Reads all of `log`, which must have been opened with a `max_rejected_share` of 1 if wrong rows are to be counted
    to the end. `log.rows` and `log.rejected` go with the result. Raises LogError as the log does."""
    found = Inspection()
    for _ in watched(log.records(), found, progress):
        pass
    return found


def watched(
    records: Iterable[Record], found: Inspection, progress: Callable[[Inspection], None] | None = None
) -> Iterator[Record]:
    """The records, each counted in `found` on its way; `progress` every 2,048."""
    for number, record in enumerate(records):
        found.add(record)
        if progress and number % PROGRESS_RECORDS == 0:
            progress(found)
        yield record


def require_valid(log: LogReader, found: Inspection, max_rejected_share: float) -> None:
    """Raises LogError, with one line, if more than that share of the rows that were read is bad, or if no row gave an
    event."""
    bad = log.wrong
    if not found.events:
        raise LogError(f"{log.path}: no event in {log.rows:,} rows; check the file and the name of its format")
    if bad > max_rejected_share * log.rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in log.rejected.most_common(5))
        raise LogError(
            f"{log.path}: {bad:,} of {log.rows:,} rows are wrong ({reasons}), {100 * bad / log.rows:.2f} % where"
            f" {100 * max_rejected_share:g} % may be; correct them, or let more pass with --max-rejected-share"
        )
