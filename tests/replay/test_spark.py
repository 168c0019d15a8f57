"""On Spark a backfill is, byte for byte, what it is without."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from embedding_store.errors import LogError, UsageError
from replay.backfill import Task
from replay.recording import EVENTS, Recording
from replay.spark.java import check_spark, java_for_spark
from replay.spark.job import _join, hadoop_url, join_on_spark
from tests.replay.laid_out import PARTITIONS, backfilled, contents, recorded, simulated


def _spark_missing() -> str:
    try:
        check_spark()
    except UsageError as error:
        return str(error)
    return ""


needs_spark = pytest.mark.skipif(bool(_spark_missing()), reason=_spark_missing() or "Spark is here")


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("spark") / "1,000 events, 5%20 [all] {a,b}"  # Hadoop has views on such names
    folder.mkdir()
    return recorded(simulated(folder / "log.jsonl", 60), folder / "recording")


def test_a_task_streams_through_several_partitions_one_after_the_other(recording: Recording, tmp_path: Path) -> None:
    """What Spark gives to a task: sorted batches that end anywhere, here with two of three partitions in the first."""
    backfilled(recording, tmp_path / "local")

    def as_spark(task: Task, recording: Recording, partitions: list[int]) -> None:
        for mine in (partitions[:2], partitions[2:]):
            rows = [(p, *record) for p in mine for record in recording.records(EVENTS, p)]
            columns = [pa.array(c) for c in zip(*rows, strict=True)]
            batch = pa.record_batch(columns, ["partition", "offset", "stamp", "key", "value"])
            batches = (batch.slice(start, 37) for start in range(0, len(batch), 37))
            assert [out.column(0).to_pylist() for out in _join(task, batches)] == [[p] for p in mine]

    backfilled(recording, tmp_path / "tasks", as_spark)
    assert contents(tmp_path / "tasks") == contents(tmp_path / "local")


@pytest.mark.nightly
@needs_spark
def test_spark_writes_the_very_files_with_several_partitions_in_one_task(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backfilled(recording, tmp_path / "local")
    seen: list[int] = []
    listening: set[str] = set()

    def done(partitions: int) -> None:
        seen.append(partitions)
        for process in psutil.Process().children(recursive=True):
            found = process.net_connections("tcp") if process.is_running() else []
            listening.update(c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN)

    def spark(task: Task, recording: Recording, partitions: list[int]) -> None:
        join_on_spark(task, recording, partitions, "local[2]", tmp_path, tasks=2, done=done)

    made = backfilled(recording, tmp_path / "spark", spark)
    assert contents(tmp_path / "spark") == contents(tmp_path / "local")
    assert len(made.parts) == PARTITIONS > 2
    assert max(seen) > 0, "it says how far it is"
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}
    assert listening
    (broken,) = [f for f in recording.files(EVENTS) if f.partition == 0][:1]
    Path(broken.path).write_bytes(b"no Parquet")
    with pytest.raises(LogError, match=r"the Spark job failed \(\[FAILED_READ_FILE.*0000-000000000000000"):
        backfilled(recording, tmp_path / "failed", spark)


@pytest.mark.parametrize(("says", "match"), [('openjdk version "11.0.2" 2019', "says 11.0.2"), ("", "no version")])
def test_a_java_that_is_too_old_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, match: str
) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(f"#!/bin/sh\necho '{says}' >&2\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=f"{match}.*install Java 17 or newer.*or use --engine local"):
        java_for_spark()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="does not run: install Java 17"):
        java_for_spark()
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="there is none: install Java 17"):
        java_for_spark()


def test_paths_for_spark() -> None:
    assert hadoop_url("/a b/topic=events") == "file:///a b/topic=events"
    assert hadoop_url("/a,b [1]/100%20") == r"file:///a,b \[1\]/100%20"
    assert hadoop_url("s3://bucket/topic=events") == "s3a://bucket/topic=events"
    assert hadoop_url("hdfs://name/x") == "hdfs://name/x"
    assert hadoop_url("x") == f"file://{os.getcwd()}/x"
