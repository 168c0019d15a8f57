"""A process that commits until it is killed: `python -m tests.embedding_store.committing PATH`.

Commit n sets every row, the state, the dense weights and the blob to n, and puts version n into the outbox, so a
torn commit shows. The sequence is printed once `commit` has returned; every fifth is acknowledged.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import TableRows
from embedding_store.delta import Version, encode
from tests.embedding_store.made import LAYOUTS

IDS = np.arange(-300, 300, dtype=np.int64)


def commit_of(n: int) -> Commit:
    rows = {
        table: TableRows(IDS, {c: np.full((len(IDS), *d[c].shape), n, d[c].base) for c in d.names or ()})
        for table, d in LAYOUTS.items()
    }
    version = Version(1, n, (1, n - 1), dense={"w": np.full(1000, n, np.float32)}, tables={"item": rows["item"]})
    return Commit(1, n, b"%d" % n, version.dense, rows, {"card": {1: b"%d" % n}}, encode(version, 10_000), version)


def main() -> None:
    with CheckpointStore(Path(sys.argv[1]), LAYOUTS) as store:
        head = store.head()
        n = head.sequence if head else 0
        while True:
            n += 1
            store.commit(commit_of(n))
            sys.stdout.write(f"{n}\n")
            sys.stdout.flush()
            if n % 5 == 0:
                store.acknowledge(n - 2)


if __name__ == "__main__":
    main()
