"""What the stores under a data directory say of themselves: positions, formats, sizes. No rows, and no user's id.

Read-only, beside a worker that may have them open.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from deploy.check import Check
from deploy.settings import Settings
from embedding_store.errors import HeadraceError, StoreError

TRIES = 3  # a worker may put other files in place while its store is read


def store_checks(settings: Settings) -> list[Check]:
    """Whether this version can read what is there."""
    checks = []
    for name, told in heads(settings).items():
        if "error" in told:
            remedy = "use the version that wrote it, or another --data-dir; `headrace checkpoint verify` says more"
            checks.append(Check(f"store {name}", False, told["error"], remedy))
        else:
            at = told.get("version") or f"offset {told.get('next_offset')}"
            detail = f"format {told['format']}, at {at}, {told['bytes'] / 1e6:,.1f} MB"
            checks.append(Check(f"store {name}", True, detail))
    return checks


def heads(settings: Settings) -> dict[str, dict[str, Any]]:
    """JSON-ready, by store: "train", "join/0", …; with "error" instead where it cannot be read."""
    found = {}
    if (settings.train.store / "CURRENT").exists():
        found["train"] = _told(settings.train.store, _train)
    joins = settings.data_dir / "join"
    for path in sorted(joins.glob("*/CURRENT"), key=lambda p: (len(p.parent.name), p.parent.name)):
        if path.parent.name.isdecimal():
            found[f"join/{path.parent.name}"] = _told(path.parent, _join)
    return found


def kept(settings: Settings) -> list[dict[str, Any]]:
    """JSON-ready: what each kept checkpoint says of itself. Raises StoreError."""
    from embedding_store.kept import KeptCheckpoints

    manifests = KeptCheckpoints(settings.train.checkpoints_url).newest_first()
    return [{**m.about, "kept_ms": m.made_ms, "bytes": sum(file.size for file in m.files)} for m in manifests]


def _told(path: Path, read: Any) -> dict[str, Any]:
    size = 0
    for file in path.iterdir():
        with contextlib.suppress(OSError):  # RocksDB removes files while it runs
            size += file.stat().st_size
    for attempt in range(TRIES):
        try:
            return {**read(path), "bytes": size}
        except StoreError as error:
            if attempt == TRIES - 1:
                return {"error": str(error), "bytes": size}
        except HeadraceError as error:
            return {"error": str(error), "bytes": size}
    raise AssertionError("not reached")


def _train(path: Path) -> dict[str, Any]:
    from embedding_store.checkpoint import FORMAT, CheckpointStore
    from online_model.checkpoints import about, positions_of, state_of

    with CheckpointStore(path, None, read_only=True) as store:
        head = store.head()
        if head is None:
            return {"format": FORMAT, "version": "none yet"}
        state_of(head, path)
        positions = {
            str(p): {"handled": at.handled, "rows": at.rows, "rolled_back": len(at.rolled_back)}
            for p, at in positions_of(store).items()
        }
        return {**about(head), "positions": positions}


def _join(path: Path) -> dict[str, Any]:
    from streams.join_store import FORMAT, head_of

    return {"format": FORMAT, **head_of(path)}
