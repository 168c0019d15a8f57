"""How much a file looks like a log of a reader: its own source and convert are tried on the first rows."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from embedding_store.errors import LogError
from replay.readers.base import LogReader

ROWS = 200
LEAST = 0.9  # of the rows must be good or set aside: a header that does not belong, a torn line


def likeness(reader: type[LogReader], path: str | Path) -> float:
    """0, or the share of the first rows that `reader` takes. Raises LogError if there is no file."""
    log = reader.open(path, max_rejected_share=1 - LEAST)  # past it the reading ends after 100 rows
    try:
        for _ in islice(log.records(), ROWS):
            pass
    except LogError:
        return 0.0
    share = 1 - log.wrong / log.rows if log.good else 0.0
    return share if share >= LEAST else 0.0
