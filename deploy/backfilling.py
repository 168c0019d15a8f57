"""headrace backfill: a log, or a recording, by one of the engines into a directory."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from deploy.processes import alone
from deploy.settings import Settings
from embedding_store.errors import LogError
from replay.backfill import Engine, Task, backfill, existing, figures, join_locally, ranges_of
from replay.layout import LaidOut, lay_out
from replay.readers import LogReader, detect, in_time_order, open_log
from replay.readers.files import check_file, identity
from replay.recording import EVENTS, Recording, is_recording
from streams.backfill import Folder, Origin
from streams.join_snapshots import settings_hash

LAID_OUT = "recording"  # in the output, until that is done
MARKER = f"{LAID_OUT}.json"

Say = Callable[[str], None]


def run_backfill(
    settings: Settings, log: str, out: str, engine: str, master: str, format_: str | None, say: Say
) -> dict[str, Any]:
    """The figures of `headrace backfill --json`. `say` is told how far it is."""
    began = time.monotonic()
    home = settings.data_dir / "backfill"
    with alone(settings.data_dir / "backfill.lock", "backfill", "wait for it"):
        home.mkdir(exist_ok=True)
        here = engine == "local" or master.startswith("local")
        engine_ = _engine(engine, master, home, say)
        run = _recorded if format_ is None and is_recording(log) else partial(_laid_out, format_=format_, say=say)
        result = run(settings, log, _absolute(out), engine_, str(home.absolute()) if here else None)
    return result | {"seconds": round(time.monotonic() - began, 3), "engine": engine}


def _engine(name: str, master: str, home: Path, say: Say) -> Engine:
    if name == "local":
        so_far = 0

        def heard(events: int) -> None:
            nonlocal so_far
            so_far += events
            say(f"{so_far:,} events")

        return partial(join_locally, heard=heard)
    from replay.spark.java import check_spark
    from replay.spark.job import join_on_spark

    check_spark()  # before anything is laid out
    say("starting Spark")
    return partial(join_on_spark, master=master, scratch=home, done=lambda n: say(f"{n} partitions done"))


def _recorded(settings: Settings, log: str, out: str, engine: Engine, scratch: str | None) -> dict[str, Any]:
    """A recording as it is: its offsets are those of the topic."""
    recording = Recording(log)
    join = settings.join.join
    origin = Origin(recording.about.topics[EVENTS].name, ["recording", _absolute(log)], settings_hash(join), join)
    task = Task(out, origin, ranges_of(recording, before_the_topic=False), scratch)
    if not task.ranges:
        raise LogError(f"{log}: there is no record in it yet: record something first")
    gaps = [[gap.partition, gap.from_offset, gap.to_offset] for gap in recording.gaps(EVENTS)]
    return figures(backfill(task, recording, engine)) | {"gaps": gaps, "events_rejected": 0}


def _laid_out(
    settings: Settings, path: str, out: str, engine: Engine, scratch: str | None, format_: str | None, say: Say
) -> dict[str, Any]:
    """Any other log: it comes before the topic's first record."""
    check_file(path)
    name = format_ or settings.log.format or detect(path)
    if name is None:
        raise LogError(f"{path}: no reader takes it; name its format with --format, or map it ([log.columns])")
    log = open_log(name, path, settings.log.max_rejected_share, settings.log.columns)
    join = settings.join.join
    join = msgspec.structs.replace(join, implicit=join.implicit or not log.has_impressions)
    about = [log.name, *identity(log.path), settings.topics.partitions, repr(settings.log.columns)]
    origin = Origin(settings.topics.events, about, settings_hash(join), join)
    if (there := existing(out, origin)) is not None:
        return figures(there) | {"gaps": [], "events_rejected": 0}
    rejected = _lay_out(settings, log, Folder(out), origin, say)
    recording = Recording(f"{out}/{LAID_OUT}")
    task = Task(out, origin, ranges_of(recording, before_the_topic=True), scratch)
    result = figures(backfill(task, recording, engine)) | {"gaps": [], "events_rejected": rejected}
    Folder(out).remove(LAID_OUT)
    Folder(out).remove(MARKER)
    return result


class _Laid(Struct):
    """What was laid out, and how many of its rows were refused."""

    origin: Origin
    rejected: int


def _lay_out(settings: Settings, log: LogReader, folder: Folder, origin: Origin, say: Say) -> int:
    """Makes the recording in `folder`, unless it is there; how many rows of the log were refused."""
    marker = folder.read(MARKER)
    if marker is not None and (found := msgspec.json.decode(marker, type=_Laid)).origin == origin:
        return found.rejected
    folder.remove(LAID_OUT)

    def show(so_far: LaidOut) -> None:
        say(f"laying out the log: {so_far.events:,} events")

    names = settings.topics.events, settings.topics.items
    records = in_time_order(log, directory=settings.data_dir / "backfill")
    now_ms = time.time_ns() // 1_000_000
    partitions, join = settings.topics.partitions, origin.settings
    so_far = lay_out(records, f"{folder.url}/{LAID_OUT}", partitions, join, now_ms, show, names)
    if not so_far.events:
        raise LogError(f"{log.path}: there is no event in it")
    rejected = log.rejected.total()
    folder.put(MARKER, msgspec.json.encode(_Laid(origin, rejected)))
    return rejected


def _absolute(path: str) -> str:
    """As every machine, and every process with another working directory, reads it."""
    return path.rstrip("/") if "://" in path else str(Path(path).absolute())
