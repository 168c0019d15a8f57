"""The errors a user can act on. Each message is one line and says what to do.

HeadraceError
├── UsageError        wrong settings or wrong arguments             (exit 2)
├── LogError          a historical log that cannot be read
├── BrokerError       Kafka cannot be reached, started, or refuses
├── FencedError       another worker took over this worker's place
├── StoreError        a store cannot be opened, read or written
│   ├── StoreLocked   another process holds it
│   ├── OtherLayouts  it was written with other tables
│   └── DiskFull      no space left
├── RankLost          the trainer's ranks are no longer together
├── PositionError     blocks or versions do not follow one another
└── CorruptRecord     bytes that are not what their place says they are
    └── Forged        not signed by who should have made them
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class HeadraceError(Exception):
    """Root of all errors that a user can act on; `str(error)` is one line with the remedy."""


class UsageError(HeadraceError):
    """Settings or arguments are wrong: nothing was started."""


class LogError(HeadraceError):
    """A historical log cannot be read."""


class BrokerError(HeadraceError):
    """Kafka cannot be reached or started, or it refuses what was asked."""


class FencedError(HeadraceError):
    """Another worker has taken over; this one must stop without writing anything more."""


class StoreError(HeadraceError):
    """A store cannot be opened, read or written."""


class StoreLocked(StoreError):
    """Another process holds the store."""


class OtherLayouts(StoreError):
    """A store was written with other tables, or with others of their columns."""


class DiskFull(StoreError):
    """No space left for a store; nothing of the failed commit is in it."""


class RankLost(HeadraceError):
    """A rank of the trainer has gone, or never came; the others cannot go on."""


class PositionError(HeadraceError):
    """A block or a version does not follow the one before it."""


class CorruptRecord(HeadraceError):
    """Bytes that cannot be decoded as what their topic or file says they are."""

    reason = "damaged"


class Forged(CorruptRecord):
    """Bytes without a signature, or with one that is not of their maker. `reason`: "unsigned" or "forged"."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def disk_errors(full: str, failed: str) -> Iterator[None]:
    """An OSError becomes DiskFull, saying `full`, where no space is left, else StoreError, saying what `failed`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(full) from error
        raise StoreError(f"{failed} ({error}): check the directory") from error
