"""What `headrace doctor` asks of the machine: file system, handles, memory, ports, locks, space for Kafka."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from deploy.check import Check
from deploy.processes import listening
from deploy.settings import Settings

# RocksDB's locks, renames and fsyncs are not what they say there.
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "afs", "fuse.sshfs", "fuse.s3fs")
PASSING = {"overlay": "goes with its container", "tmpfs": "is memory", "ramfs": "is memory", "aufs": "goes with it"}
STORE_FILES = 512  # that a RocksDB keeps open at most (embedding_store/rocks.py)
OTHER_FILES = 512  # sockets, libraries, Kafka's clients
LEAST_FILES = 1_024
LEAST_MEMORY, GOOD_MEMORY = 1 << 30, 3 << 30
LEAST_FREE = 1 << 30
CGROUP = Path("/sys/fs/cgroup/memory.max")
_LOG_TAIL = 200_000  # bytes


def machine_checks(settings: Settings) -> list[Check]:
    """All of them; none raises for what it finds."""
    data_dir = settings.data_dir.absolute()
    return [
        file_system(data_dir), file_handles(settings.topics.partitions), memory(), *ports(settings), locks(data_dir),
        broker_space(data_dir),
    ]  # fmt: skip


def file_system(path: Path) -> Check:
    """Of the data directory: one that keeps what RocksDB counts on."""
    place = os.path.realpath(path)
    mounts = [m for m in psutil.disk_partitions(all=True) if _inside(place, m.mountpoint)]
    if not mounts:
        return Check("file system", True, "of an unknown kind")
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype
    if kind in NETWORK:
        remedy = "put --data-dir on a disk of this machine; [train] checkpoints and [join] snapshots may be shared"
        return Check("file system", False, f"{kind}, over the network: locks and fsync are not sure", remedy)
    if kind in PASSING:
        return Check("file system", True, f"{kind}: what is kept there {PASSING[kind]}", "use a volume or a disk")
    return Check("file system", True, kind)


def _inside(path: str, mount: str) -> bool:
    return path == mount or path.startswith(mount.rstrip("/") + "/")


def file_handles(partitions: int) -> Check:
    """Whether a join worker with all partitions could open its stores' files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = STORE_FILES * (partitions + 1) + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return Check("file handles", True, f"{'no limit' if soft == resource.RLIM_INFINITY else f'{soft:,}'}")
    limit = "" if hard == resource.RLIM_INFINITY or hard >= wanted else f" (above the hard limit of {hard:,}: as root)"
    remedy = f"ulimit -n {wanted}{limit}, or LimitNOFILE={wanted} in the service: {partitions} partitions"
    return Check("file handles", soft >= LEAST_FILES, f"{soft:,}, {wanted:,} when stores are large", remedy)


def memory(cgroup: Path = CGROUP) -> Check:
    """What is there for this process: of the machine, or of its control group."""
    available, of = psutil.virtual_memory().available, "free"
    try:
        limit = cgroup.read_text().strip()
    except OSError:
        limit = "max"
    if limit.isdecimal() and int(limit) < available:
        available, of = int(limit), "the control group's limit"
    detail = f"{available / 1e9:.1f} GB, {of}"
    if available >= GOOD_MEMORY:
        return Check("memory", True, detail)
    remedy = "give it 3 GB, or use smaller tables: [model.features] items, users; [join] in_memory"
    return Check("memory", available >= LEAST_MEMORY, detail, remedy)


def ports(settings: Settings) -> Iterator[Check]:
    """Those that workers would listen on: free, or held by a worker of ours."""
    wanted = {"serve.port": settings.serve.port, "serve.admin_port": settings.serve.admin_port,
              "join.metrics_port": settings.join.metrics_port, "train.metrics_port": settings.train.metrics_port}
    for name, port in wanted.items():
        process = listening(port) if port else None
        if process is None:
            continue
        try:
            line, what = process.cmdline(), f"pid {process.pid}, {process.name()}"
        except psutil.Error:
            line, what = [], f"pid {process.pid}"
        if any("headrace" in word or word == "deploy.cli" for word in line):
            yield Check("port", True, f"{name} {port} is a worker's ({what})")
        else:
            variable = f"HEADRACE_{name.replace('.', '_').upper()}"
            yield Check("port", False, f"{name} {port} is taken ({what})", f"stop it, or set {variable}")


def locks(data_dir: Path) -> Check:
    """The stores' locks: held by processes that live here and run. (The kernel frees those of the dead.)"""
    held, wrong = [], []
    for path in sorted(data_dir.glob("**/LOCK")) if data_dir.is_dir() else []:
        if (pid := holder(path)) is None:
            continue
        store = path.parent.relative_to(data_dir)
        if pid == 0:
            wrong.append(f"{store} is held from another container or machine")
            continue
        try:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_STOPPED:
                wrong.append(f"{store} is held by pid {pid}, which is stopped (SIGSTOP)")
            else:
                held.append(f"{store} by pid {pid}")
        except psutil.Error:
            held.append(f"{store} by pid {pid}")
    if wrong:
        return Check("locks", False, "; ".join(wrong), "let it go on (kill -CONT PID) or end it; do not delete locks")
    return Check("locks", True, f"in use: {', '.join(held)}" if held else "no store is in use")


def holder(lock: Path, table: Path = Path("/proc/locks")) -> int | None:
    """The process that holds a lock on this file; 0: one that cannot be seen from here; None: nobody."""
    try:
        inode = lock.stat().st_ino
        lines = table.read_text().splitlines()
    except OSError:
        return None
    for line in lines:  # 1: POSIX  ADVISORY  WRITE 708 00:1b:1234 0 EOF
        words = line.split()
        if len(words) >= 6 and words[1] != "->" and words[5].rsplit(":", 1)[-1] == str(inode):
            pid = int(words[4])
            return pid if pid > 0 and psutil.pid_exists(pid) else 0
    return None


def broker_space(data_dir: Path) -> Check:
    """Whether the embedded Kafka ran, or will run, out of space."""
    home = data_dir / "kafka"
    if not (home / "data").is_dir():
        return Check("broker's space", True, "there is no embedded Kafka here")
    free = shutil.disk_usage(home / "data").free
    size = sum(path.stat().st_size for path in (home / "data").glob("**/*.log"))
    detail = f"{size / 1e9:.1f} GB of records, {free / 1e9:.1f} GB free"
    remedy = "free some, then `headrace broker stop` and start; shorter retention needs shorter windows"
    if free < LEAST_FREE:
        return Check("broker's space", False, detail, remedy)
    if b"No space left on device" in tail(home / "broker.log", _LOG_TAIL):
        return Check("broker's space", True, f"{detail}; its log says that there was none left once", remedy)
    return Check("broker's space", True, detail)


def tail(path: Path, most: int) -> bytes:
    """The last `most` bytes of a file, from the beginning of a line; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            raw = file.read(most)
    except OSError:
        return b""
    return raw if size <= most else raw.partition(b"\n")[2]
