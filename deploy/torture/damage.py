"""What is done to the disk under the workers, and what must come of it.

A flipped or missing byte is refused, with one line that names what is damaged, or it makes no difference. What is
refused is brought back as the line says: by a copy, or by a kept checkpoint. What is not refused is left as it is; the
verdict on the whole run says whether it made a difference. No space left is a worker's end with one line, or it waits.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.processes import ends_with_parent
from deploy.torture.cluster import READY_S, Cluster
from deploy.torture.disk import Disk
from deploy.torture.faults import Fault
from deploy.workers import Worker, WorkerFailed
from embedding_store.faults import VARIABLE
from embedding_store.kept import place_of_number
from embedding_store.rocks import in_use
from embedding_store.snapshot import latest_snapshot

SLOW_S = 0.4  # each write to a store
STORE_FILES = ("*.sst", "*.log", "MANIFEST-*")
NO_SPACE = "no space left"


@dataclass
class DiskFaults:
    """Does them to `cluster`, whose data directory is on `disk`."""

    cluster: Cluster
    disk: Disk
    say: Callable[[str], None]
    damaged: int = 0  # files
    refused: int = 0
    undetected: int = 0  # taken for sound
    _copies: dict[Path, Path] = field(default_factory=dict)  # of stores with damage that nobody has refused yet
    _full: bool = False

    def do(self, fault: Fault) -> bool:
        """False where there was nothing to do it to. Raises WorkerFailed where a worker ends otherwise than it may."""
        return getattr(self, f"_{fault.kind}")(fault, random.Random(f"disk {fault.seed}"))

    def mend(self, worker: Worker) -> bool:
        """Whether a worker that ended by itself found no space, or only now what was damaged before.

        The store is then as it was before the damage, as an old copy of it: what came after is learned or joined again.
        """
        if self._full and NO_SPACE in worker.last_line():
            return True
        store = self._named(worker)
        if store is None:
            return False
        self.refused += 1
        copy = self._copies.pop(store)
        if not in_use(store):  # else another worker has found it good
            self.say(f"{worker.name} refused it later: {worker.last_line()}")
            _put_back(copy, store)
        return True

    # --- damage -------------------------------------------------------------------------------------------------

    def _damage_store(self, fault: Fault, dice: random.Random) -> bool:
        store = self.cluster.settings.train.store
        worker = self._damaged(fault, store, dice)
        if self._refuses(worker, lambda: self.cluster.training() is not None):
            copy = self._refused_in_one_line(worker, store)
            if dice.random() < 0.5 and self._kept():
                self._said_well("checkpoint", "rollback")
            else:
                _put_back(copy, store)
            self.cluster.again(fault.target)
        return True

    def _damage_join(self, fault: Fault, dice: random.Random) -> bool:
        self.cluster.halt(fault.target)
        store = self._own_store(dice)
        if store is None:
            self.cluster.again(fault.target)
            return False
        worker = self._damaged(fault, store, dice)
        since = self._lengths()
        if self._refuses(worker, lambda: "joining partitions" in self._said(since)):
            copy = self._refused_in_one_line(worker, store)
            if dice.random() < 0.5:
                _put_back(copy, store)
            else:
                shutil.rmtree(store)  # a shared snapshot takes its place
            self.cluster.again(fault.target)
        return True

    def _damage_join_copy(self, fault: Fault, dice: random.Random) -> bool:
        """The store is lost, and of its copies the newest is damaged: an older one must be taken, or none."""
        self.cluster.halt(fault.target)
        store = self._own_store(dice)
        join = self.cluster.settings.join
        folder = None if store is None else Path(join.snapshots) / f"{join.topics.prefix}join" / store.name
        newest = None if folder is None else _newest(folder)
        if store is None or newest is None:
            self.cluster.again(fault.target)
            return False
        self._damage(newest, ("*",), dice)
        shutil.rmtree(store)
        since = self._lengths()
        self.cluster.again(fault.target)
        worker = self.cluster.workers[fault.target]
        if self._refuses(worker, lambda: "joining partitions" in self._said(since)):
            raise WorkerFailed(f"{worker.name} took no older copy, and did not join again: {worker.last_line()}")
        said = self._said(since)
        self._judge(f"going on from the snapshot {newest}" in said, f"snapshot {newest} not taken" in said, newest)
        shutil.rmtree(newest)
        return True

    def _damage_checkpoint(self, fault: Fault, dice: random.Random) -> bool:
        """Both `verify` and `rollback` must refuse it. It is then deleted, as they say."""
        deadline = time.monotonic() + READY_S
        while (kept := self._kept()) is None:
            self.cluster.revive()
            if time.monotonic() > deadline:
                log = self.cluster.workers["train"].log
                raise WorkerFailed(f"no checkpoint is kept within {READY_S:.0f} s: see {log}")
            time.sleep(0.1)
        self.cluster.halt(fault.target)
        path = self._damage(kept, ("*",), dice)
        found = self._command("checkpoint", "verify")
        version = "{}.{}".format(*place_of_number(int(kept.name)))
        back = self._command("checkpoint", "rollback", "--version", version)
        refused = found.returncode == back.returncode == 1 and str(path) in found.stderr
        self._judge(not refused, refused, kept)
        shutil.rmtree(kept)
        self.cluster.again(fault.target)
        return True

    def _damage_snapshot(self, fault: Fault, dice: random.Random) -> bool:
        newest = latest_snapshot(self.cluster.settings.data_dir / "snapshots")
        if newest is None:
            return False
        worker = self.cluster.halt(fault.target)
        self._damage(newest, ("*",), dice)
        since = self._lengths()
        self.cluster.again(fault.target)
        replica = next(replica for replica in self.cluster.replicas if replica.worker is worker)
        if self._refuses(worker, lambda: replica.sequence not in (None, -1)):
            raise WorkerFailed(f"{worker.name} ended on a damaged snapshot: {worker.last_line()}")
        said = self._said(since)
        refused = str(newest) in said  # the replica may ask for it to be written anew then, and serve that
        self._judge(not refused and f"serving snapshot {newest.name}" in said, refused, newest)
        shutil.rmtree(newest, ignore_errors=True)  # unless the trainer was quicker
        return True

    def _damaged(self, fault: Fault, store: Path, dice: random.Random) -> Worker:
        """Started again over a store of which one file is damaged."""
        worker = self.cluster.halt(fault.target)
        if store not in self._copies:  # else an older copy is the one that is surely sound
            self._copies[store] = self.cluster.config.with_name("copies") / store.relative_to(store.parents[1])
            _put_back(store, self._copies[store])
        self._damage(store, STORE_FILES, dice)
        self.cluster.again(fault.target)
        return worker

    def _damage(self, folder: Path, patterns: Sequence[str], dice: random.Random) -> Path:
        """One file of `folder` has a flipped bit, or ends too early. (Another name of it stays what it was.)"""
        found = [[p for p in sorted(folder.glob(pattern)) if p.stat().st_size] for pattern in patterns]
        path = dice.choice(dice.choice([files for files in found if files]))
        raw = bytearray(path.read_bytes())
        place, flip = dice.randrange(len(raw)), dice.random() < 0.5
        if flip:
            raw[place] ^= 1 << dice.randrange(8)
        else:
            del raw[place:]
        new = path.with_name(path.name + ".damaged")
        new.write_bytes(raw)
        new.replace(path)
        self.damaged += 1
        self.say(f"  {path}: {'a bit is flipped in byte' if flip else 'it ends at byte'} {place:,}")
        return path

    # --- no space, and a slow disk ------------------------------------------------------------------------------

    def _full_disk(self, fault: Fault, dice: random.Random) -> bool:
        """Full while a worker starts, which needs new files, and for a while."""
        if not self.disk.mounted:
            self.say("  not done: it needs the right to mount a tmpfs (root)")
            return False
        self.cluster.halt(fault.target)
        self._full = True
        self.disk.fill()
        try:
            self.cluster.again(fault.target)
            worker, until = self.cluster.workers[fault.target], time.monotonic() + 2 * fault.lasts_s
            while worker.state == "up" and time.monotonic() < until:
                time.sleep(0.1)
        finally:
            self.disk.free()
        self.say(f"  {worker.name}: {worker.last_line() if worker.state == 'down' else 'it waits'}")
        self.cluster.revive()
        self._full = False
        return True

    def _slow_disk(self, fault: Fault, dice: random.Random) -> bool:
        """Each write to the worker's stores takes long. Then it is killed, as it stands."""
        self.cluster.halt(fault.target)
        self.cluster.again(fault.target, **{VARIABLE: f"store.write:1:{SLOW_S}"})
        time.sleep(fault.lasts_s)
        self.cluster.revive()
        self.cluster.kill(fault.target)
        return True

    # --- what comes of it ---------------------------------------------------------------------------------------

    def _refuses(self, worker: Worker, is_up: Callable[[], bool]) -> bool:
        """Waits until a worker ends (True), or is up (False)."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if worker.state == "down":
                return True
            if is_up():
                return False
            self.cluster.revive(besides=worker.name)
            time.sleep(0.1)
        raise WorkerFailed(f"{worker.name} is not up after {READY_S:.0f} s: {worker.last_line()} [log: {worker.log}]")

    def _refused_in_one_line(self, worker: Worker, store: Path) -> Path:
        """The copy of the store. Raises WorkerFailed where the worker's last line is not what it must be."""
        assert worker.process is not None
        code = worker.process.returncode
        if code != 1 or self._named(worker) != store:
            raise WorkerFailed(
                f"{worker.name} ended otherwise than with a line that names {store} (exit {code}): {worker.last_line()}"
            )
        self.refused += 1
        self.say(f"  refused: {worker.last_line()}")
        return self._copies.pop(store)

    def _judge(self, taken: bool, named: bool, what: Path) -> None:
        self.undetected += taken
        self.refused += named and not taken
        if taken:
            self.say(f"  NOT DETECTED: {what}")

    def _named(self, worker: Worker) -> Path | None:
        """Which damaged store the last line of a worker names."""
        line = worker.last_line()
        stores = (store for store in self._copies if f"{store} " in line or f"{store}/" in line)
        return next(stores, None) if line.startswith("headrace: ") else None

    def _own_store(self, dice: random.Random) -> Path | None:
        """A store of a join worker that was just killed."""
        folder = self.cluster.settings.data_dir / "join"
        stores = [p for p in sorted(folder.glob("[0-9]*")) if (p / "CURRENT").exists() and not in_use(p)]
        return dice.choice(stores) if stores else None

    def _kept(self) -> Path | None:
        return _newest(Path(self.cluster.settings.train.checkpoints_url))

    def _lengths(self) -> dict[str, int]:
        """Of the logs."""
        return {name: w.log.stat().st_size for name, w in self.cluster.workers.items()}

    def _said(self, since: dict[str, int]) -> str:
        """By all workers since then."""
        logs = [(self.cluster.workers[name].log, length) for name, length in since.items()]
        return "\n".join(log.read_bytes()[length:].decode(errors="replace") for log, length in logs)

    def _command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.cluster.launcher, *arguments, "--config", str(self.cluster.config)], capture_output=True, text=True,
            start_new_session=True, preexec_fn=ends_with_parent(), timeout=READY_S,
        )  # fmt: skip

    def _said_well(self, *arguments: str) -> None:
        done = self._command(*arguments)
        if done.returncode:
            raise WorkerFailed(f"headrace {' '.join(arguments)} failed: {done.stderr.strip()}")
        self.say(f"  {done.stdout.strip()}")


def _newest(folder: Path) -> Path | None:
    """The copy with the largest number that has a manifest."""
    return max((p.parent for p in folder.glob("[0-9]*/manifest.json")), key=lambda p: int(p.name), default=None)


def _put_back(copy: Path, store: Path) -> None:
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(copy, store)
