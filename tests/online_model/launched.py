"""A rank that torchrun starts (test_ranks.py): python -m tests.online_model.launched STORE."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from embedding_store.ranks import Ranks, launched
from online_model.further_rank import run_launched
from online_model.ranks import let_go
from online_model.trainer import open_trainer
from tests.online_model.logs import START
from tests.online_model.test_ranks import SMALL, learn


def main(store: Path) -> None:
    launch = launched()
    assert launch is not None
    if launch.rank:
        run_launched(launch, SMALL, 1, "cpu", 1)
        return
    torch.set_num_threads(1)
    trainer = open_trainer(SMALL, store, lambda: START, 1, ranks=Ranks(0, launch.size, launch))
    learn(trainer, 1_000)
    let_go(trainer.ranks)
    sys.stdout.write(f"{trainer.digest()}\n")
    trainer.store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
