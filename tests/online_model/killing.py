"""A process that learns and is killed again and again, each time going on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# torch is imported once; each run is a fork of the process that has it, and has no thread yet.
CHILD = """
import os, pathlib, sys, torch
torch.set_num_threads(1)
from {module} import log, opened
blocks = log()
def run():
    trainer = opened(pathlib.Path(sys.argv[1]))
    for number, block in enumerate(blocks):
        trainer.offer(block, number)
        while trainer.step():
            trainer.commit()
            print(os.getpid(), flush=True)
for _ in range(int(sys.argv[2])):
    if not (pid := os.fork()):
        run()
        os._exit(0)
    os.waitpid(pid, 0)
"""


def learn_and_be_killed(module: str, store: Path, kills: Sequence[int], later_s: float = 0.0) -> None:
    """Learns the blocks of the module's `log()` with its `opened(store)`, a commit a step, to their end.

    kills: after so many commits of a run a kill -9, of the n-th run n · `later_s` seconds later.
    """
    command = [sys.executable, "-c", CHILD.format(module=module), str(store), str(len(kills) + 1)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}) as child:
        assert child.stdout is not None
        killed: set[int] = set()
        for attempt, commits in enumerate(kills):
            mine: list[int] = []
            while len(mine) < commits:
                pid = int(child.stdout.readline())
                mine += [pid] if pid not in killed else []
            time.sleep(later_s * attempt)
            os.kill(mine[0], signal.SIGKILL)
            killed.add(mine[0])
        child.stdout.read()
    assert child.returncode == 0
    assert len(killed) == len(kills)
