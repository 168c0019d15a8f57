"""The files of an open store as a kill -9 leaves them."""

from __future__ import annotations

import shutil
from pathlib import Path

from embedding_store.checkpoint import CheckpointStore
from embedding_store.rocks import DEFAULT_FAMILY


def killed(store: CheckpointStore, path: Path) -> None:
    """Copies them to `path`, and closes the store. What runs behind its back is stopped first, with nothing flushed:
    a compaction would take files away while they are copied."""
    store.db.family(DEFAULT_FAMILY).cancel_all_background(wait=True)
    shutil.copytree(store.path, path)
    store.close()
