"""Readers of public and exported logs, by name. A new one is a class in a file of its own and a line here."""

from __future__ import annotations

from pathlib import Path

from embedding_store.errors import UsageError
from replay.readers.base import BadRow, DelimitedReader, LogReader, Record, in_time_order, new_items
from replay.readers.kuairand import KuaiRand
from replay.readers.taobao import Taobao

READERS: dict[str, type[LogReader]] = {reader.name: reader for reader in (Taobao, KuaiRand)}


def open_log(name: str, path: str | Path, max_rejected_share: float = 0.01) -> LogReader:
    """A reader of the log of format `name` at `path`. UsageError for an unknown name, LogError for a bad file."""
    if name not in READERS:
        raise UsageError(f"no reader is named {name!r}; there are {', '.join(sorted(READERS))}")
    return READERS[name].open(path, max_rejected_share)


__all__ = [
    "READERS", "BadRow", "DelimitedReader", "LogReader", "Record", "in_time_order", "new_items", "open_log",
]  # fmt: skip
