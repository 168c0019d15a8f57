"""All samples of a run, for whoever opens the page late."""

from __future__ import annotations

import threading
from bisect import bisect_right

LIMIT = 1_800  # samples kept: half an hour at one a second, 2 MB that a page which is opened then is sent
RECENT = 600  # the newest ones are never thinned


class History:
    """The encoded samples of a run, numbered from 1 in the order they came; safe to use from several threads.

    Past `limit` samples every second one of the older ones is dropped: a run of days stays whole, but coarser.
    """

    def __init__(self, limit: int = LIMIT, recent: int = RECENT) -> None:
        self._limit, self._recent = limit, recent
        self._numbers: list[int] = []
        self._samples: list[bytes] = []
        self._last = 0
        self._lock = threading.Lock()

    def add(self, sample: bytes) -> None:
        """Keep one more sample (JSON bytes)."""
        with self._lock:
            self._last += 1
            self._numbers.append(self._last)
            self._samples.append(sample)
            if len(self._samples) > self._limit:
                self._numbers = self._numbers[: -self._recent : 2] + self._numbers[-self._recent :]
                self._samples = self._samples[: -self._recent : 2] + self._samples[-self._recent :]

    def after(self, number: int) -> tuple[int, list[bytes]]:
        """(number of the newest sample, the kept samples with a number above `number`)."""
        with self._lock:
            return self._last, self._samples[bisect_right(self._numbers, number) :]

    def __len__(self) -> int:
        return len(self._samples)
