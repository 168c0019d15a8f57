"""Which Java Spark would run on. (That of the embedded Kafka will not do: it lacks modules that Spark demands.)"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from embedding_store.errors import UsageError

OLDEST = 17
REMEDY = f"install Java {OLDEST} or newer (Debian: openjdk-17-jre-headless) and set JAVA_HOME, or use --engine local"


def java_for_spark() -> tuple[str, str]:
    """(version, path) of the Java that Spark's launcher takes. Raises UsageError with what to do."""
    home = os.environ.get("JAVA_HOME", "")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    if java is None:
        raise UsageError(f"Spark needs Java and there is none: {REMEDY}")
    try:
        ran = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        raise UsageError(f"Spark needs Java and {java} does not run: {REMEDY}") from None
    match = re.search(r'version "((\d+)[^"]*)"', ran.stderr + ran.stdout)
    if match is None or int(match[2]) < OLDEST:
        found = match[1] if match else f"no version (exit {ran.returncode})"
        raise UsageError(f"Spark needs Java {OLDEST} and {java} says {found}: {REMEDY}")
    return match[1], java


def check_spark() -> str:
    """What there is for Spark, in a line. Raises UsageError where something is missing, with what to do."""
    if find_spec("pyspark") is None:
        raise UsageError("the package pyspark is not installed: pip install pyspark pandas, or use --engine local")
    version, java = java_for_spark()
    return f"Java {version} at {java}"
