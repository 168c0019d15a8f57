"""The joiner as a Spark job.

Spark reads the recording, brings the records of each Kafka partition together and sorts them by (partition, offset), on
disk where they are many; a task then streams through one partition after the other, and none is ever in memory as a
whole. What comes of a partition is written by the task itself: its files are a function of the records, so a task that
Spark does again, or twice at once, changes nothing.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path

import pyarrow as pa

from embedding_store.errors import HeadraceError, LogError
from replay.backfill import Task, join_partition
from replay.recording import EVENTS, Recording
from replay.spark.session import session

LOOK_S = 0.5  # between two looks at what is done
_SCHEMA = "partition int, offset bigint, stamp bigint, key binary, value binary"
_COLUMNS = ("partition", "offset", "stamp", "value")


def join_on_spark(
    task: Task,
    recording: Recording,
    partitions: list[int],
    master: str,
    scratch: Path,
    tasks: int = 0,
    done: Callable[[int], None] = lambda partitions: None,
) -> None:
    """Joins these partitions of the recording at a Spark `master`, in so many Spark `tasks` (0: one a partition).

    `done` is told now and then how many partitions are. Raises UsageError where Spark is not there, LogError where the
    job failed, with what it said.
    """
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    with session(master, scratch) as spark, _watched(partial(_finished, task, partitions), done):
        from pyspark.sql import functions as F

        # Each Kafka partition wholly in one Spark partition: `repartitionById` puts it where it is told.
        number = {partition: place for place, partition in enumerate(partitions)}
        place = F.create_map(*[F.lit(n) for pair in number.items() for n in pair])[F.col("partition")]
        try:
            sorted_ = (
                spark.read.schema(_SCHEMA)
                .parquet(hadoop_url(f"{recording.path.rstrip('/')}/topic={EVENTS}"))
                .where(F.col("partition").isin(partitions))
                .select(*_COLUMNS)
                .repartitionById(tasks or len(partitions), place % (tasks or len(partitions)))
                .sortWithinPartitions("partition", "offset")
            )
            found = sorted_.mapInArrow(partial(_join, task), "partition int").collect()
        except (PySparkException, Py4JError) as error:
            raise LogError(f"the Spark job failed ({_reason(error)}): correct that, and run it again") from error
    for partition in sorted(set(partitions) - {row.partition for row in found}):
        join_partition(task, partition, [])  # a range without a record has no row


def hadoop_url(path: str) -> str:
    """As Spark's own file systems have it: a local path as file://, s3:// as s3a://. They decode no %20, and take it
    for a pattern unless what could be one is escaped."""
    if "://" not in path:
        path = f"file://{Path(path).absolute()}"
    elif path.startswith("s3://"):
        path = f"s3a{path[2:]}"
    return re.sub(r"([\\{}\[\]*?])", r"\\\1", path)


def _join(task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """In a Spark task: joins what comes, sorted, and says which partitions it was."""
    records = (
        record
        for batch in batches
        for record in zip(*[batch.column(name).to_pylist() for name in _COLUMNS], strict=True)
        if record[1] < task.ranges[record[0]].end  # the recording may have grown meanwhile
    )
    for partition, some in itertools.groupby(records, key=itemgetter(0)):
        join_partition(task, partition, (record[1:] for record in some))
        yield pa.record_batch([pa.array([partition], pa.int32())], ["partition"])


def _finished(task: Task, partitions: list[int]) -> int:
    return sum(task.done(partition) is not None for partition in partitions)


def _reason(error: Exception) -> str:
    """The line that says most: of ours, if a task raised one, else of Spark."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    for mark in ("embedding_store.errors.", "SparkException: "):
        for line in lines:
            if mark in line:
                return line.partition(mark)[2][:500]
    return lines[0][:500]


class _watched:
    """Calls `done` with what `count` gives, in a thread, until the end of the `with`."""

    def __init__(self, count: Callable[[], int], done: Callable[[int], None]) -> None:
        self._count, self._done, self._over = count, done, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="backfill-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                self._done(self._count())
            except HeadraceError:
                return  # the job itself says what is wrong with the place
