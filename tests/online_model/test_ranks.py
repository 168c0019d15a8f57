"""A trainer on two ranks learns what it would on one, from one store that does not know how many there are."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from embedding_store.errors import CorruptRecord, RankLost, UsageError
from embedding_store.ranks import Launch, Ranks, launched
from online_model.ranks import FurtherRanks, begin_again, follow, let_go, on_all_ranks
from online_model.settings import FeatureSettings, TrainerSettings
from online_model.trainer import Trainer, open_trainer
from tests.embedding_store.test_ranks import on_ranks
from tests.online_model.logs import START, make_blocks, make_rows
from tests.processes import processes

SMALL = TrainerSettings(
    features=FeatureSettings(dim=8, users=3_000, items=3_000, categories=100), batch_size=64, window=20_000
)
TIGHT = TrainerSettings(
    features=FeatureSettings(dim=8, users=600, items=8_000, categories=1_000), batch_size=64, window=1_000
)


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, done in a process of its own: TorchRec wants one process group in a process's life."""
    with ProcessPoolExecutor(1, processes) as pool:
        return pool.submit(work, *arguments).result(timeout=120)


@contextmanager
def trainer_on(size: int, store: Path, settings: TrainerSettings = SMALL) -> Iterator[tuple[Trainer, list[int]]]:
    """(a trainer on the store, the process ids of its further ranks)."""
    torch.set_num_threads(1)
    further = FurtherRanks(size, store.with_name("ranks"), settings, 1, "cpu", 1) if size > 1 else None
    ranks = Ranks(0, size, further.meeting) if further else None
    trainer = open_trainer(settings, store, lambda: START, 1, ranks=ranks)
    try:
        yield trainer, further.pids if further else []
        if further is not None:
            further.end(trainer.ranks)
    finally:
        trainer.store.close()


def learn(trainer: Trainer, rows: int, every: int = 7, start: int = 0) -> dict[str, np.ndarray]:
    """Rows of a made log; a commit every so many blocks. The scores as they were measured."""
    blocks = make_blocks(make_rows(rows, seed=3, users=200, items=100, from_row=start), 100, 0, start // 100 * 10)
    for number, block in enumerate(blocks):
        trainer.offer(block, start // 100 + number)
        while trainer.step():
            pass
        if number % every == 0:
            trainer.commit()
    while trainer.step(drain=True):
        pass
    trainer.commit()
    return trainer._evaluation.tasks["click"].state()


def _columns(trainer: Trainer) -> dict[str, np.ndarray]:
    store = trainer.store
    return {f"{t}.{n}": c for t in store.layouts for rows in store.iter_rows(t) for n, c in rows.columns.items()}


def _session(size: int, store: Path, rows: int, starts: list[int], settings: TrainerSettings, every: int) -> tuple:
    """What a trainer on the store scored and knows once it has learned so many rows from each start."""
    with trainer_on(size, store, settings) as (trainer, _):
        sequence = trainer.sequence
        scores = [learn(trainer, rows, every, start) for start in starts][-1]
        dropped = sum(trainer.info()["no_room"].values())
        return scores, _columns(trainer), trainer.positions[0].accounted, trainer.digest(), sequence, dropped


def test_two_ranks_learn_what_one_does_and_hand_the_store_to_and_fro(tmp_path: Path) -> None:
    """A hundred steps on the same batches, on one rank and on two, one, two: one store each."""
    rows, starts = 2_400, [0, 2_400, 4_800]
    assert 3 * rows / SMALL.batch_size > 100
    one, columns, accounted, *_ = alone(_session, 1, tmp_path / "one", rows, starts, SMALL, 40)
    digests = []
    for start, size in zip(starts, (2, 1, 2), strict=True):
        two, *told, digest, sequence, _ = alone(_session, size, tmp_path / "two", rows, [start], SMALL, 40)
        assert sequence > 0 or start == 0, "it goes on from the commit of another number of ranks"
        digests.append(digest)
    assert abs(_loss(two) - _loss(one)) < 1e-5
    np.testing.assert_allclose(two["p"], one["p"], atol=3e-3)  # of single ones: what is rounded otherwise adds up
    assert (two["key"] == one["key"]).all()
    assert told[1] == accounted
    for name, column in columns.items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(told[0][name], column, atol=3e-3, err_msg=name)
        else:
            assert (told[0][name] == column).all(), name
    *_, digest, _, _ = alone(_session, 2, tmp_path / "again", rows, [0], SMALL, 40)
    assert digest == digests[0], "the same ranks, the same log: the same digest"


def _loss(scores: dict[str, np.ndarray]) -> float:
    p, label = scores["p"].astype(np.float64), scores["label"].astype(bool)
    return -float(np.log(np.where(label, p, 1 - p)).mean())


@pytest.mark.nightly
def test_rows_leave_the_memory_of_both_ranks_and_come_back(tmp_path: Path) -> None:
    found = []
    for size in (1, 2):
        _, columns, *_, dropped = alone(_session, size, tmp_path / str(size), 4_000, [0], TIGHT, 1)
        assert dropped == 0
        found.append(columns)
    for name, column in found[0].items():
        np.testing.assert_allclose(found[1][name], column, atol=1e-5, err_msg=name)


def _not_finite(store: Path) -> None:
    with trainer_on(2, store) as (trainer, _):
        learn(trainer, 1_000)
        before = trainer._ranker.weights()
        rows = make_rows(64, seed=3, users=200, items=100, from_row=1_000)
        rows.rate[63] = 1e-45  # its weight is infinite, on one rank
        (block,) = make_blocks(rows, 64, 0, 100)
        trainer.offer(block, 10)
        trainer.step(drain=True)
        assert trainer.info()["left_out"] == 64
        for name, weights in trainer._ranker.weights().items():
            assert (weights == before[name]).all(), name
        trainer.commit()


def test_a_batch_that_is_not_finite_is_left_out_on_all_ranks(tmp_path: Path) -> None:
    alone(_not_finite, tmp_path / "s")


class _Counter:
    """Something that all ranks have."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.number, self.secret = ranks, 0, 0

    @on_all_ranks
    def add(self, number: int, *, times: int = 1) -> int:
        self.number += number * times
        return self.number

    def not_for_all(self) -> None:
        self.secret += 1


def _only_what_is_for_all(ranks: Ranks) -> None:
    counter = _Counter(ranks)
    name = _Counter.add.__qualname__
    forged: list[Any] = [
        ("_Counter.not_for_all", (), {}), ("not_for_all", (), {}), ("add", (2,), {}), ("__init__", (None,), {}),
        (name, [2], {}), (name, (2,)), ([name], (2,), {}), name, None, (b"", (), {}),
    ]  # fmt: skip
    if ranks.rank == 0:
        assert counter.add(2, times=3) == 6
        let_go(ranks)
        for call in forged:
            ranks.from_first(lambda call=call: call)  # type: ignore[misc]
        begin_again(ranks)
        return
    assert follow(counter) is False
    assert counter.number == 6
    for _ in forged:
        with pytest.raises(CorruptRecord, match="calls what is not for all"):
            follow(counter)
    assert follow(counter) is True
    assert (counter.number, counter.secret) == (6, 0)


def test_the_first_rank_can_only_call_what_is_for_all_of_them(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path / "meeting", _only_what_is_for_all) == [0, 0]


def _leaves_before_they_meet(folder: Path) -> None:
    further = FurtherRanks(2, folder, SMALL, 1, "cpu", 1)
    (folder / "pid").write_text(str(further.pids[0]))
    os._exit(0)


def test_a_follower_ends_with_its_parent(tmp_path: Path) -> None:
    """Before it has met the first rank, too: nothing but its standard input tells it."""
    parent = processes.Process(target=_leaves_before_they_meet, args=(tmp_path,))
    parent.start()
    parent.join()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "pid").read_text())).wait(100)  # a meeting would be waited for longer


def _loses_a_rank(store: Path) -> tuple[str, int]:
    """(what the first rank says, what was learned before)."""
    rows = 0
    try:
        with trainer_on(2, store) as (trainer, pids):
            rows = trainer.positions[0].rows if trainer.positions else 0
            learn(trainer, 2_000, start=rows)
            os.kill(pids[0], signal.SIGKILL)
            learn(trainer, 2_000, start=rows + 2_000)
    except RankLost as error:
        return str(error), rows
    return "nothing was lost", rows


def test_a_rank_that_is_lost_ends_the_trainer_at_its_last_commit(tmp_path: Path) -> None:
    for before in (0, 2_000):
        said, rows = alone(_loses_a_rank, tmp_path / "s")
        assert "the 2 ranks of the trainer are no longer together" in said
        assert "\n" not in said
        assert rows == before
    *_, accounted, _, sequence, _ = alone(_session, 1, tmp_path / "s", 2_000, [4_000], SMALL, 7)
    assert accounted[0] == 6_000
    assert sequence > 0


IN_A_NETWORK_OF_ITS_OWN = """
import fcntl, socket, struct, sys
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x49))  # SIOCSIFFLAGS: up, loopback, running
from torch.distributed.run import main
main(sys.argv[1:])
"""


@pytest.mark.nightly
def test_ranks_under_torchrun_learn_what_followers_do(tmp_path: Path) -> None:
    """In a network that has nothing but a loopback interface: torchrun's own meeting listens on all there are."""
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("needs a right to unshare the network")
    torchrun = [sys.executable, "-c", IN_A_NETWORK_OF_ITS_OWN, "--nproc-per-node", "2"]
    meeting = ["--master-addr", "127.0.0.1", "--master-port", "29500"]
    words = ["unshare", "-rn", *torchrun, *meeting, "-m", "tests.online_model.launched", str(tmp_path / "one")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *_, digest, _, _ = alone(_session, 2, tmp_path / "two", 1_000, [0], SMALL, 7)
    assert done.stdout.splitlines()[-1] == digest


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_half_of_a_launch_is_refused(missing: str) -> None:
    said = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert launched(said) == Launch(1, 2, 1, 2, "127.0.0.1", 29500, by_agent=False)
    assert launched({}) is None
    with pytest.raises(UsageError, match=missing):
        launched({name: value for name, value in said.items() if name != missing})


def test_a_meeting_where_nobody_is_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        with pytest.raises(RankLost, match=f"nobody is at 127.0.0.1:{port}"):
            Launch(1, 2, 1, 2, "127.0.0.1", port, by_agent=True).meet(timedelta(seconds=1))
        with pytest.raises(UsageError, match="set MASTER_PORT"):
            Launch(0, 2, 0, 2, "127.0.0.1", port, by_agent=False).meet()
