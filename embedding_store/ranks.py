"""The ranks: processes that make the same calls in the same order, each with a share of the rows and of every batch.

All ranks know all that is small (positions, dense weights, which ids are gone); an id's row is in the memory of one of
them, its owner. Rank 0 alone has the store, and feeds the others. What is called collective here must be called by all
ranks, with arguments that say the same; a rank that is lost ends the others at their next collective.

Values go from rank to rank as bytes of our own codec (codec.py), which runs no code; what TorchRec pickles for itself
is read by an unpickler that knows a few names. Who may be a rank is not asked, though: on one machine they meet over
the loopback, on several they need a network that is theirs alone.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from embedding_store.checkpoint import CheckpointStore, Head
from embedding_store.codec import LARGEST, Message, decode, may_be_sent
from embedding_store.columns import TableRows
from embedding_store.errors import CorruptRecord, DiskFull, RankLost, UsageError
from embedding_store.expiry import Notes
from embedding_store.ids import finalised

T = TypeVar("T")
may_be_sent(TableRows, Notes, Head)
_PATIENCE = timedelta(days=365)  # a rank may be slow, or have nothing to do: only one that is lost ends a wait
_MEETING = timedelta(seconds=120)  # for all ranks to have started


@dataclass(frozen=True)
class Launch:
    """What `torchrun` told this process in its environment (https://docs.pytorch.org/docs/stable/elastic/run.html)."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # ranks on this machine
    host: str  # where all of them meet
    port: int
    by_agent: bool  # torchrun serves the meeting; else the first rank does

    def meet(self, timeout: timedelta = _MEETING) -> dist.Store:
        """Raises RankLost where nobody serves the meeting, UsageError where it cannot be served."""
        if self.by_agent or self.rank:
            try:
                return dist.TCPStore(self.host, self.port, is_master=False, timeout=timeout)
            except RuntimeError as error:
                raise lost(self.size, f"nobody is at {self.host}:{self.port}") from error
        try:  # a socket of our own: torch's listens on all interfaces
            listening = socket.create_server((self.host, self.port))
        except OSError as error:
            raise UsageError(f"the ranks cannot meet at {self.host}:{self.port} ({error}): set MASTER_PORT") from error
        return dist.TCPStore(
            self.host, self.port, is_master=True, timeout=timeout, wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )  # fmt: skip


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """None where nobody has launched this process as one of several. Raises UsageError where half of it is said."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    try:
        rank, size, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local_rank, host = int(environment["LOCAL_RANK"]), environment["MASTER_ADDR"]
        local_size = int(environment.get("LOCAL_WORLD_SIZE", size))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"RANK or WORLD_SIZE is set, but not all that torchrun sets ({error}): start the worker with torchrun, or "
            "unset them"
        ) from error
    by_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(rank, size, local_rank, local_size, host, port, by_agent)


class Ranks:
    """This process among the ranks. One rank (the default) needs no others, and every call then returns at once."""

    def __init__(self, rank: int = 0, size: int = 1, meeting: Path | Launch | None = None, device: str = "cpu") -> None:
        """rank: 0 … size − 1; meeting: a file, not there yet, that all of one machine's ranks are given, or what
        torchrun said.

        TorchRec wants a process group even for one rank. On one machine gloo talks over the loopback interface unless
        GLOO_SOCKET_IFNAME says otherwise. Raises RankLost where the others do not come, DiskFull where they cannot,
        UsageError where this process is in another group already.
        """
        self.rank, self.size = rank, size
        self.local_size = meeting.local_size if isinstance(meeting, Launch) else size  # ranks on this machine
        distributed_c10d._unpickler = _Unpickler
        if not dist.is_initialized():
            if self.local_size == size:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            backend = "gloo"
            if device.startswith("cuda"):
                backend = "nccl"
                torch.cuda.set_device(exact(device))  # NCCL and fbgemm work on the current one
            with self.together():
                store = _store(meeting, size)
                store.set_timeout(_MEETING)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        if (dist.get_rank(), dist.get_world_size()) != (rank, size):
            raise UsageError(f"this process is rank {dist.get_rank()} of {dist.get_world_size()} already")
        # Numbers and objects of the host go over gloo, whatever moves the embeddings.
        self._group: Any = dist.group.WORLD
        if size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def owns(self, ids: np.ndarray) -> np.ndarray:
        """Which of the ids int64 [n] this rank has the rows of: bool [n]."""
        if self.size == 1:
            return np.ones(len(ids), bool)
        return finalised(ids.astype(np.uint64)) % np.uint64(self.size) == self.rank

    def part(self, n: int) -> slice:
        """This rank's of n things."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum over the ranks, of arrays of one shape and type; in place. Collective."""
        if self.size > 1:
            with self.together():
                dist.all_reduce(torch.from_numpy(array), group=self._group)
        return array

    def least(self, number: int) -> int:
        """The least of the ranks' numbers of 64 bits. Collective."""
        least = torch.tensor([number])
        if self.size > 1:
            with self.together():
                dist.all_reduce(least, dist.ReduceOp.MIN, group=self._group)
        return int(least)

    def add_up(self, tensor: torch.Tensor) -> None:
        """The sum over the ranks, in place, where the tensor is. Collective."""
        if self.size > 1:
            with self.together():
                dist.all_reduce(tensor)

    def every(self, value: T) -> list[T]:
        """The value of every rank, in their order; what can be sent: codec.py. Collective."""
        if self.size == 1:
            return [value]
        message = Message(value)
        told = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        with self.together():
            dist.all_gather(told, torch.tensor([message.size]), group=self._group)
        sizes = [_sound(int(size)) for size in told]
        own, *received = (torch.zeros(max(sizes), dtype=torch.uint8) for _ in range(1 + self.size))  # of one length
        message.write(own.numpy()[: message.size])
        with self.together():
            dist.all_gather(received, own, group=self._group)
        every = zip(received, sizes, strict=True)
        return [value if n == self.rank else decode(sent.numpy()[:size]) for n, (sent, size) in enumerate(every)]

    def at_first(self, value: T) -> list[T]:
        """On rank 0 the value of every rank, in their order; elsewhere nothing. Collective."""
        if self.rank > 0:
            self._send(Message(value))
            return []
        return [value, *[self._receive(rank) for rank in range(1, self.size)]]

    def from_first(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, on every rank. Collective."""
        if self.size == 1:
            return call()
        size = torch.zeros(1, dtype=torch.int64)
        if self.rank == 0:
            value = call()
            message = Message(value)
            size[0] = message.size
        with self.together():
            dist.broadcast(size, 0, group=self._group)
        content = torch.empty(_sound(int(size)), dtype=torch.uint8)
        if self.rank == 0:
            message.write(content.numpy())
        with self.together():
            dist.broadcast(content, 0, group=self._group)
        return value if self.rank == 0 else decode(content.numpy())

    def _send(self, message: Message) -> None:
        with self.together():
            dist.send(torch.tensor([message.size]), 0, group=self._group)
            dist.send(torch.from_numpy(message.bytes()), 0, group=self._group)

    def _receive(self, rank: int) -> Any:
        size = torch.empty(1, dtype=torch.int64)
        with self.together():
            dist.recv(size, rank, group=self._group)
            content = torch.empty(_sound(int(size)), dtype=torch.uint8)
            dist.recv(content, rank, group=self._group)
        return decode(content.numpy())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises RankLost where what is inside fails because another rank is no longer there, DiskFull where there is
        no space for the file by which they meet."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1:
                raise
            if os.strerror(errno.ENOSPC) in str(error):
                full = "no space left for the file by which the ranks meet: free some, and start it again"
                raise DiskFull(full) from error
            reason = re.sub(r"^\[[^]]*\] ", "", str(error)).partition(". ")[0].splitlines()[0]
            raise lost(self.size, reason) from error


class _Unpickler(distributed_c10d._unpickler):
    """With what torch reads what libraries send by its collectives of objects, as TorchRec does once, when tables are
    made: plain values, and what says of which shape a sharded tensor is. Nothing else has a name here, so nothing that
    comes is run."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _SHAPES:
            raise CorruptRecord(
                f"another rank sends an object of {module}.{name}: start all ranks from the same release"
            )
        return super().find_class(module, name)


_SHAPES = {
    "torch.distributed._shard.sharded_tensor.metadata.ShardedTensorMetadata",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "torch.distributed._shard.metadata.ShardMetadata",
    "torch.distributed.remote_device._remote_device",
    "torch.serialization._get_layout",
    "torch.device",
    "torch.Size",
    "torch.float32",
}


def _sound(size: int) -> int:
    """The size that another rank says a message has."""
    if not 0 < size <= LARGEST:
        raise CorruptRecord(
            f"another rank says that its message has {size} bytes: start all ranks from the same release"
        )
    return size


def exact(device: str) -> torch.device:
    """The device with its number: "cuda" is the current one."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _store(meeting: Path | Launch | None, size: int) -> dist.Store:
    if isinstance(meeting, Launch):
        return meeting.meet()
    return dist.HashStore() if meeting is None else dist.FileStore(str(meeting), size)


def lost(size: int, reason: str) -> RankLost:
    """The error of a trainer of so many ranks."""
    return RankLost(
        f"the {size} ranks of the trainer are no longer together ({reason}): start it again, it goes on from its last "
        "commit"
    )


class SharedStore:
    """What tables read from the store. Rank 0 has it, reads, and tells the others. All methods are collective."""

    def __init__(self, store: CheckpointStore | None, ranks: Ranks) -> None:
        """store: on rank 0, None elsewhere."""
        self._store, self._ranks = store, ranks

    def has_rows(self, table: str) -> bool:
        """As `CheckpointStore.has_rows`."""
        return self._ranks.from_first(lambda: self._there.has_rows(table))

    def read_rows(self, table: str, ids: np.ndarray) -> TableRows:
        """The rows of those of `ids` int64 [n] that it has, in their order."""
        return self._ranks.from_first(lambda: self._there.read_rows(table, ids)[1])

    def noted_before(self, table: str, time: int) -> tuple[np.ndarray, np.ndarray]:
        """As `CheckpointStore.noted_before`."""
        return self._ranks.from_first(lambda: self._there.noted_before(table, time))

    def iter_rows(self, table: str, chunk: int) -> Iterator[TableRows]:
        """As `CheckpointStore.iter_rows`; to be read alike on all ranks."""
        chunks = self._there.iter_rows(table, chunk) if self._store is not None else iter(())
        while (rows := self._ranks.from_first(lambda: next(chunks, None))) is not None:
            yield rows

    def iter_blobs(self, name: str) -> list[tuple[int, bytes]]:
        """All of `CheckpointStore.iter_blobs`."""
        return self._ranks.from_first(lambda: list(self._there.iter_blobs(name)))

    @property
    def _there(self) -> CheckpointStore:
        assert self._store is not None
        return self._store
