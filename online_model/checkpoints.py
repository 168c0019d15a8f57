"""What a trainer's checkpoint says of itself, and the way back to an older one. Free of torch.

A rollback takes the model of a kept checkpoint and the positions of the store: the trainer goes on where the input is.
What it had learned since then is booked, by count and sum of row ids, as rolled back: set aside, and not lost.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from xxhash import xxh3_64_hexdigest

from embedding_store.checkpoint import FORMAT, CheckpointStore, Commit, Head
from embedding_store.columns import TOUCHED
from embedding_store.copies import Manifest, replace_directory, settle_directory
from embedding_store.delta import encode
from embedding_store.errors import CorruptRecord, DiskFull, StoreError, StoreLocked
from embedding_store.expiry import Notes, grain
from embedding_store.faults import fault
from embedding_store.kept import KeptCheckpoints
from online_model.features import USER
from online_model.positions import Position, position_of, rolled_back

log = logging.getLogger("headrace")

STATE_FORMAT = 7


def state_of(head: Head, path: Path) -> dict[str, Any]:
    """The trainer's state in a commit of the store at `path`. Raises StoreError where another release wrote it."""
    state = orjson.loads(head.state)
    if state["format"] != STATE_FORMAT:
        raise StoreError(f"the store {path} was written by another release: use that, or an empty data directory")
    return state


def settings_digest(settings: dict[str, Any]) -> str:
    """16 hex digits of a trainer's settings, as they are in its state."""
    return xxh3_64_hexdigest(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS))


def logical_state(state: bytes) -> bytes:
    """What of a trainer's state must be alike in two runs: figures, and what was learned of each partition.

    Left out: where blocks begin and lie in `examples`, which a restart may move, and the settings.
    """
    told = orjson.loads(state) if state else {}
    for at in told.get("intake", {}).get("positions", {}).values():
        del at["source_offset"]
    logical = {"intake": told.get("intake"), "totals": told.get("totals")}
    return orjson.dumps(logical, option=orjson.OPT_SORT_KEYS)


def digest_of(store: CheckpointStore) -> str:
    """The digest of the last commit: rows, dense weights and the logical state."""
    head = store.head()
    return store.digest(logical_state(head.state if head else b""))


def describe(store: CheckpointStore) -> dict[str, Any]:
    """JSON-ready: what the last commit is, and its digest. Reads all of it. Raises StoreError where it is damaged."""
    head = store.head()
    if head is None:
        raise StoreError(f"nothing was committed yet to the store {store.path}: let a train worker learn first")
    digest, rows = store.content(logical_state(head.state))
    return about(head) | {"rows": rows, "digest": digest}


def positions_of(store: CheckpointStore) -> dict[int, Position]:
    """Where the last commit is, by partition. Raises StoreError where there is none, or another release wrote it."""
    head = store.head()
    if head is None:
        raise StoreError(f"nothing was committed yet to the store {store.path}: let a train worker learn first")
    return _positions(state_of(head, store.path))


def about(head: Head) -> dict[str, Any]:
    """JSON-ready: what a commit says of itself, without reading its rows."""
    return {
        "version": f"{head.epoch}.{head.sequence}",
        "epoch": head.epoch,
        "sequence": head.sequence,
        "event_time_ms": head.event_time_ms,
        "created_ms": head.created_ms,
        "format": FORMAT,
        "settings": head.settings,
        "held": (orjson.loads(head.state).get("guard") or {}).get("held", False),  # the guard did not publish it
    }


def roll_back(
    path: Path, kept: KeptCheckpoints, place: tuple[int, int] | None, guard: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Makes the store at `path` go on from the kept checkpoint `place` (None: the newest) and says what that set aside.

    1. The kept one is fetched beside the store, verified. 2. It is given the store's positions, a new epoch, the
    booking, and a version that goes on from its own: one commit. Users who were forgotten since are forgotten in it
    too. 3. It takes the store's place. 4. The old store goes. Killed in between, the store is the old or the new one:
    open it, or do it again.

    Where there is no store, or none that can be read through, the kept one's own positions hold: what came after is
    learned again, from `examples`, and nothing is set aside. `guard`: its state, JSON-ready, from then on; None: it
    begins anew (guard.py).

    Raises StoreLocked while a worker has the store, StoreError, CorruptRecord, DiskFull.
    """
    settle_directory(path)
    fetched = path.with_name(path.name + ".fetched")
    live, forgotten = _live(path, kept, place)
    manifest = kept.find(place)
    try:
        kept.fetch(manifest, fetched)
        fault("rollback.fetched")
        with CheckpointStore(fetched, None) as store:
            told = describe(store)
            if told["digest"] != manifest.about["digest"]:
                raise CorruptRecord(f"{kept.url}/{manifest.number} is not what was kept: take an older one")
            result = _commit(store, live, forgotten, guard)
    except BaseException:
        shutil.rmtree(fetched, ignore_errors=True)
        raise
    fault("rollback.committed")
    aside = replace_directory(path, fetched)
    shutil.rmtree(aside, ignore_errors=True)
    fault("rollback.done")
    return result | {"from": told["version"]}


def _live(
    path: Path, kept: KeptCheckpoints, place: tuple[int, int] | None
) -> tuple[Head | None, dict[str, np.ndarray]]:
    """(the store's last commit, the ids that went since the kept one); None where there is no store to read it from."""
    if not path.exists():
        return None, {}
    try:
        with CheckpointStore(path, None) as store:
            store.scan()  # a trainer could not go on from one whose rows are damaged
            head = store.head()
            manifest = kept.find(place)
            return head, store.gone_since(_place(manifest))
    except (StoreLocked, DiskFull):
        raise
    except StoreError as error:
        kept.find(place)
        said = str(error)  # not the error: its frames would hold the LOCK
        log.warning("the store's own positions are lost (%s): going on from those of the kept checkpoint", said)
        return None, {}


def _commit(
    store: CheckpointStore, live: Head | None, forgotten: dict[str, np.ndarray], guard: dict[str, Any] | None
) -> dict[str, Any]:
    """Step 2: in the fetched store."""
    head, version = store.head(), store.version()
    assert head is not None
    assert version is not None
    state = orjson.loads(head.state)
    before = _positions(state)
    epoch, sequence = head.epoch + 1, head.sequence + 1
    positions = before
    if live is not None:
        told = orjson.loads(live.state)
        positions = {p: rolled_back(before.get(p), at) for p, at in _positions(told).items()}
        state["intake"] = {**told["intake"], "positions": {str(p): asdict(at) for p, at in positions.items()}}
        state["mark"] = told["mark"]
        epoch, sequence = max(head.epoch, live.epoch) + 1, max(head.sequence, live.sequence) + 1
    state["guard"] = guard or {"since": None}
    # What users did is their own: one who was forgotten after the checkpoint was kept is not brought back by it.
    # A table that was added since is not in it.
    gone = {table: ids for table, ids in forgotten.items() if len(ids) and table in store.layouts}
    if USER in gone:
        state["erased"] = 1  # the next snapshot is made of rewritten files
    partitions = {str(p): asdict(at) for p, at in sorted(positions.items())}
    new = replace(
        version, epoch=epoch, sequence=sequence, base=head.place, gone=gone,
        # Now, not when its model was learned: replicas take what is younger than their snapshot for another trainer's.
        created_ms=max(time.time_ns() // 1_000_000, version.created_ms),
        positions={p: at.handled for p, at in sorted(positions.items())},
        info={**version.info, "partitions": partitions, "guard": {"held": False}},
    )  # fmt: skip
    store.remember_gone((0, 0))  # for a further rollback, which asks this store who went
    dated = {table for table, layout in store.layouts.items() if TOUCHED in (layout.names or ())}
    notes = {table: _notes_of(store, table, ids) for table, ids in gone.items() if table in dated}
    store.acknowledge(head.sequence)  # what it had not published: a replica has it by now, or loads a snapshot
    store.commit(
        Commit(
            epoch, sequence, orjson.dumps(state, option=orjson.OPT_SORT_KEYS), head.dense, parts=encode(new),
            version=new, gone=gone, notes=notes, settings=head.settings, event_time_ms=head.event_time_ms,
        )
    )  # fmt: skip
    booked = {p: at.rolled_back[len(before[p].rolled_back) if p in before else 0 :] for p, at in positions.items()}
    return {
        "version": f"{epoch}.{sequence}",
        "set_aside": {str(p): [asdict(record) for record in some] for p, some in sorted(booked.items()) if some},
        "set_aside_rows": sum(record.rows for some in booked.values() for record in some),
        "restored": live is None,
        "digest": digest_of(store),
    }


def _notes_of(store: CheckpointStore, table: str, ids: np.ndarray) -> Notes:
    """Those of the ids that have a row go with it: one that stayed would expire a row that comes later."""
    _, rows = store.read_rows(table, ids)
    return Notes(rows.ids, grain(rows.columns[TOUCHED]), *np.empty((2, 0), np.int64))


def _positions(state: dict) -> dict[int, Position]:
    return {int(p): position_of(at) for p, at in state["intake"]["positions"].items()}


def _place(manifest: Manifest) -> tuple[int, int]:
    return manifest.about["epoch"], manifest.about["sequence"]
