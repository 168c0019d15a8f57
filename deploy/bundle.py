"""`headrace doctor --bundle FILE`: one archive to attach to a bug report, without secrets and without users.

    about.json          version, platform, machine          packages.txt     what is installed
    checks.json         the doctor's findings               settings.toml    all settings, secrets as ***
    environment.txt     HEADRACE_… variables                metrics/*.txt    /metrics of workers that run here
    stores.json         where the stores are, their sizes   checkpoints.json what is kept of them
    kafka.json          our topics: configs and ends        logs/*           ends of logs, newest first
    CONTENTS.txt        this list, with sizes, and what is missing and why

Everything goes through `scrub` on its way in. Of stores and checkpoints only heads are read: no row, no id of a user.
Logs are the one place where an id may stand: the command says so.
"""

from __future__ import annotations

import io
import json
import os
import platform
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from deploy.check import Check
from deploy.machine_checks import tail
from deploy.scrub import HIDDEN, is_secret, known_secrets, scrub, scrubbed
from deploy.settings import PREFIX, Settings, dump
from embedding_store.errors import HeadraceError, UsageError

MAX_BYTES = 20 << 20  # of all members before compression: so the archive is smaller
MAX_MEMBER = 2 << 20
LOG_TAIL, MAX_LOGS = 256 << 10, 40
LOG_NAMES = ("*.log", "*.err", "*.out")
HTTP_S = 5.0
_MAX_SECRETS = 1 << 16  # bytes of a file of secrets


@dataclass
class Bundle:
    """The members so far: name → bytes; `missing`: what is not in it, and why."""

    secrets: set[str] = field(default_factory=set)
    members: dict[str, bytes] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, text: str) -> None:
        """Scrubbed; the end of what is too long."""
        raw = scrub(text, self.secrets).encode()
        if len(raw) > MAX_MEMBER:
            raw = b"[the beginning is left out]\n" + raw[-MAX_MEMBER:].partition(b"\n")[2]
        if sum(map(len, self.members.values())) + len(raw) > MAX_BYTES:
            self.missing[name] = f"the bundle has {MAX_BYTES >> 20} MB already"
        else:
            self.members[name] = raw

    def add_json(self, name: str, ask: Callable[[], Any]) -> None:
        """What `ask` gives; where it raises HeadraceError, why not."""
        try:
            value = ask()
        except HeadraceError as error:
            self.missing[name] = scrub(str(error), self.secrets)
            return
        self.add(name, json.dumps(scrubbed(value), indent=1, default=str) + "\n")


def write_bundle(
    file: Path, settings: Settings, checks: Iterable[Check], environment: Mapping[str, str], logs: Iterable[Path] = ()
) -> dict[str, Any]:
    """Writes the archive, mode 0600, and gives {"file", "bytes", "members": {name: bytes}, "missing": {name: why}}.

    `logs`: files beside those under the data directory. Raises UsageError where `file` is there already, a log is not,
    or the archive cannot be written.
    """
    logs = [*logs]
    for path in logs:
        if not path.is_file():
            raise UsageError(f"--log {path}: there is no such file")
    bundle = Bundle(known_secrets(environment, _secret_files(settings, environment)))
    try:
        number = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UsageError(f"{file} exists already: name a new file with --bundle") from None
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}: name another file with --bundle") from None
    try:
        with os.fdopen(number, "wb") as out:
            _gather(bundle, settings, checks, environment, logs)
            _pack(bundle, out)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    sizes = {name: len(raw) for name, raw in bundle.members.items()}
    return {"file": str(file), "bytes": file.stat().st_size, "members": sizes, "missing": bundle.missing}


def _gather(
    bundle: Bundle, settings: Settings, checks: Iterable[Check], environment: Mapping[str, str], logs: list[Path]
) -> None:
    from deploy import store_checks

    bundle.add_json("about.json", _about)
    bundle.add("packages.txt", "".join(f"{line}\n" for line in _packages()))
    bundle.add_json("checks.json", lambda: [asdict(check) for check in checks])
    try:
        bundle.add("settings.toml", _without_values(dump(settings)))
    except HeadraceError as error:
        bundle.missing["settings.toml"] = scrub(str(error), bundle.secrets)
    ours = {name: value for name, value in sorted(environment.items()) if name.startswith(PREFIX)}
    bundle.add("environment.txt", "".join(f"{k}={HIDDEN if is_secret(k) else v}\n" for k, v in ours.items()))
    bundle.add_json("stores.json", lambda: store_checks.heads(settings))
    bundle.add_json("checkpoints.json", lambda: store_checks.kept(settings))
    if settings.bootstrap:
        bundle.add_json("kafka.json", lambda: _kafka(settings))
    else:
        bundle.missing["kafka.json"] = "no Kafka is named and no embedded one runs"
    for name, port in _ports(settings):
        _metrics(bundle, name, port, settings)
    for name, path in _logs(settings.data_dir, logs):
        bundle.add(f"logs/{name}", tail(path, LOG_TAIL).decode(errors="replace"))


def _pack(bundle: Bundle, out: io.BufferedWriter) -> None:
    lines = [f"{len(raw):>10,}  {name}" for name, raw in bundle.members.items()]
    lines += [f"   missing  {name}: {why}" for name, why in bundle.missing.items()]
    members = {"CONTENTS.txt": ("\n".join(lines) + "\n").encode(), **bundle.members}
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, raw in members.items():
            entry = tarfile.TarInfo(f"headrace-bundle/{name}")
            entry.size, entry.mtime, entry.mode = len(raw), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(raw))


def _about() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "headrace": _version("headrace"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "load": os.getloadavg(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def _packages() -> list[str]:
    found = {(str(d.metadata["Name"]), d.version) for d in metadata.distributions() if d.metadata["Name"]}
    return sorted(f"{name}=={version}" for name, version in found)


def _without_values(toml: str) -> str:
    """Settings as text, those with a secret's name without their values; a comment behind one goes too."""
    lines = []
    for line in toml.splitlines():
        name, equals, _ = line.partition(" = ")
        lines.append(f'{name} = "{HIDDEN}"' if equals and is_secret(name.strip()) else line)
    return "\n".join(lines) + "\n"


def _secret_files(settings: Settings, environment: Mapping[str, str]) -> Iterator[str]:
    """Texts of files that settings with a secret's name name: what is in them must be nowhere."""
    named = {value for name, value in environment.items() if name.startswith(PREFIX) and is_secret(name)}
    try:
        for line in dump(settings).splitlines():
            name, equals, value = line.partition(" = ")
            if equals and is_secret(name.strip()) and value.startswith('"'):
                named.add(value[1:].partition('"')[0])
    except HeadraceError:
        pass  # said by the checks
    for path in map(Path, filter(None, named)):
        try:
            with path.open("rb") as file:
                yield file.read(_MAX_SECRETS).decode(errors="replace")
        except OSError:
            continue  # no file's name, or not ours to read


def _kafka(settings: Settings) -> dict[str, Any]:
    from streams.topics import overview

    return {"bootstrap": settings.bootstrap, "topics": overview(settings.connection, settings.topics)}


def _ports(settings: Settings) -> Iterator[tuple[str, int]]:
    serve = settings.serve.admin_port or settings.serve.port
    wanted = {"join": settings.join.metrics_port, "train": settings.train.metrics_port, "serve": serve}
    return ((name, port) for name, port in wanted.items() if port)


def _metrics(bundle: Bundle, name: str, port: int, settings: Settings) -> None:
    member, token = f"metrics/{name}.txt", settings.http.token
    own = {"Authorization": f"Bearer {token.reveal()}"} if token else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=own)
    try:
        with urllib.request.urlopen(request, timeout=HTTP_S) as answer:  # noqa: S310  # nosec B310 - our own
            bundle.add(member, answer.read(MAX_MEMBER).decode(errors="replace"))
    except (OSError, urllib.error.URLError, ValueError) as error:
        bundle.missing[member] = f"nothing answers on 127.0.0.1:{port} ({error})"


def _logs(data_dir: Path, more: list[Path]) -> Iterator[tuple[str, Path]]:
    """(name in the archive, file) of the newest logs. A RocksDB's own *.log is no log: it holds rows."""
    found = {path.resolve(): path.name for path in more}
    for folder, inner, files in os.walk(data_dir):
        if "CURRENT" in files or Path(folder).name in ("snapshots", "checkpoints") or folder.endswith("kafka/data"):
            inner.clear()
            continue
        for path in (Path(folder) / name for name in files):
            if any(path.match(pattern) for pattern in LOG_NAMES) and path.is_file() and not path.is_symlink():
                found.setdefault(path.resolve(), str(path.relative_to(data_dir)))
    newest = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[:MAX_LOGS]
    used: set[str] = set()
    for path in newest:
        name = found[path]
        while name in used:
            name = f"_{name}"
        used.add(name)
        yield name, path
