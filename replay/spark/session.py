"""A Spark session: on this machine it listens on 127.0.0.1 only, and runs our own Python."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from embedding_store.errors import UsageError
from replay.spark.java import check_spark

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROOT = Path(__file__).parents[2]
ARROW_ROWS = 2_048  # records that a task gets at a time
ARROW_BYTES = 16 << 20


@contextlib.contextmanager
def session(master: str, scratch: Path) -> Iterator[SparkSession]:
    """Spark at `master`, until the end of the `with`. `scratch`: where a local one sorts on disk.

    What is set nowhere else is Spark's own: spark-defaults.conf in SPARK_CONF_DIR. Raises UsageError where Java or
    pyspark is missing, or Spark cannot be started.
    """
    check_spark()
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(master).appName("headrace backfill")
    for name, value in _settings(master, scratch).items():
        builder = builder.config(name, value)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if master.startswith("local"):
        os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    try:
        spark = builder.getOrCreate()
    except (PySparkException, Py4JError, OSError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"Spark does not start at {master} ({said}): check --master, or use --engine local") from error
    try:
        yield spark
    finally:
        spark.stop()


def _settings(master: str, scratch: Path) -> dict[str, str]:
    settings = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(ARROW_ROWS),
        "spark.sql.execution.arrow.maxBytesPerBatch": str(ARROW_BYTES),
        "spark.speculation": "false",
    }
    if master.startswith("local"):
        settings |= {
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.local.dir": str(scratch.absolute()),
            "spark.sql.warehouse.dir": str((scratch / "warehouse").absolute()),
            "spark.executorEnv.PYTHONPATH": str(ROOT),
        }
    return settings
