"""Readers of public and exported logs, by name. A new one is a class in a file of its own and a line here."""

from __future__ import annotations

from pathlib import Path

from embedding_store.errors import UsageError
from replay.readers import files
from replay.readers.base import Layout, LogReader, Record, TableReader, new_items
from replay.readers.detection import likeness
from replay.readers.gamerch import GaMerch
from replay.readers.generic import Generic
from replay.readers.kuairand import KuaiRand
from replay.readers.movielens import MovieLens
from replay.readers.onlineretail import OnlineRetail
from replay.readers.openbandit import OpenBandit
from replay.readers.recorded import Events, RecordedTopics
from replay.readers.settings import ColumnMapping, LogSettings
from replay.readers.sorting import in_time_order
from replay.readers.taobao import Taobao
from replay.readers.values import BadRow, SetAside
from replay.readers.yoochoose import YooChoose
from replay.recording import is_recording

_ALL: tuple[type[LogReader], ...] = (
    Events, Generic, GaMerch, KuaiRand, MovieLens, OnlineRetail, OpenBandit, RecordedTopics, Taobao, YooChoose,
)  # fmt: skip
READERS: dict[str, type[LogReader]] = {reader.name: reader for reader in _ALL}


def open_log(
    name: str, path: str | Path, max_rejected_share: float = 0.01, columns: ColumnMapping | None = None
) -> LogReader:
    """A reader of the log of format `name` at `path`, a local file or a URL; `columns` are for the format generic.

    Raises UsageError for an unknown name and a mapping that does not fit, LogError for a bad file.
    """
    if name not in READERS:
        raise UsageError(f"no reader is named {name!r}; there are {', '.join(sorted(READERS))}")
    return READERS[name].open(path, max_rejected_share, columns)


def detect(path: str | Path) -> str | None:
    """The name of the format that the file at `path` is written in, by its names of columns and its first rows; None
    if no reader takes it (a mapping for `generic` may then). Raises LogError if there is no such file."""
    if not files.is_web(str(path)) and is_recording(path):
        return RecordedTopics.name
    others = (Generic.name, RecordedTopics.name)
    likely = {name: likeness(reader, path) for name, reader in READERS.items() if name not in others}
    best = max(likely, key=lambda name: likely[name])
    return best if likely[best] else None


__all__ = [
    "READERS", "BadRow", "ColumnMapping", "Layout", "LogReader", "LogSettings", "Record", "SetAside", "TableReader",
    "detect", "in_time_order", "new_items", "open_log",
]  # fmt: skip
