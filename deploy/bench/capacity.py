"""What a load needs of machines, from what was measured on one core: the model of docs/scale.md, as a pure function.

All is in proportion: twice the events take twice the processor time. Where `headrace bench growth` finds a knee that
does not hold, and the constants are those of its largest point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

NEEDED = {"ids", "memory", "users", "candidates", "replicas", "ranks"}  # axes that the constants come from
USED = 0.6  # of a core, a disk or a memory, so that a peak finds room


@dataclass(frozen=True)
class Constants:
    """Of one core of the machine that was measured. µs are of processor time."""

    join_us: float  # an event in the join worker
    rows_an_event: float  # rows that leave it
    train_us: float  # a row, on one rank
    rank_0_us: float  # a row, in rank 0 of several: all go in step, so this bounds any number of them
    touched_a_row: float  # rows of tables that a commit writes for a row learned
    commit_us: float  # a touched row: read, encoded, written, compacted
    apply_us: float  # a touched row, in a replica
    event_bytes: float
    block_bytes: float  # a row in `examples`
    version_bytes: float  # a touched row in `parameters`
    broker_in_us: float  # of the broker, for a version's megabyte that it takes
    broker_us: float  # … that it gives to one reader
    join_bytes: float  # a user in a join worker's store
    store_bytes: float  # an id in the trainer's store
    replica_bytes: float  # an id in a replica's memory


@dataclass(frozen=True)
class Load:
    """What is asked for."""

    events_per_s: float = 1e6
    ids: float = 1e9
    users_share: float = 0.9  # of the ids
    hot_share: float = 0.1  # of the ids are in the trainer's memory
    replicas: int = 10
    machine_gb: float = 256.0  # memory of one machine


def constants_of(result: dict[str, Any]) -> Constants:
    """From what `headrace bench growth` found. All of NEEDED must be among them."""

    def first(axis: str) -> dict[str, Any]:
        return next(iter(result["axes"][axis]["points"].values()))

    def last(axis: str) -> dict[str, Any]:
        return list(result["axes"][axis]["points"].values())[-1]

    sizes, memory = result["constants"], last("memory")
    candidates, readers = last("candidates"), last("replicas")
    growth_us = last("ids")["commit_us_a_row"] - first("ids")["commit_us_a_row"]  # `memory` has a small store
    more = int(list(result["axes"]["replicas"]["points"])[-1])
    megabytes = readers["version_bytes"] / 1e6
    users, items = 0.9, 0.1
    return Constants(
        join_us=last("users")["cpu_us"],
        rows_an_event=last("users")["rows_an_event"],
        train_us=first("ranks")["cpu_us"],
        rank_0_us=last("ranks")["rank_0_us"],
        touched_a_row=memory["rows_touched_a_row"],
        commit_us=memory["commit_us_a_touched_row"] + growth_us,
        apply_us=candidates["apply_us_a_row"],
        event_bytes=sizes["event_bytes"],
        block_bytes=last("users")["block_bytes_a_row"],
        version_bytes=memory["version_bytes_a_touched_row"],
        broker_in_us=readers["broker_alone_us"] / megabytes,
        broker_us=max(readers["broker_us"] - readers["broker_alone_us"], 0.0) / more / megabytes,
        join_bytes=sizes["join_bytes_a_user"],
        store_bytes=users * sizes["store_bytes"]["user"] + items * sizes["store_bytes"]["item"],
        replica_bytes=users * candidates["replica_bytes"]["user"] + items * candidates["replica_bytes"]["item"],
    )


def needs(c: Constants, load: Load) -> dict[str, float]:
    """What the load needs, as the design stands: cores, GB, MB/s. What one process would have to be is in `…_cores`
    of `one_…`: above 1 it cannot be."""
    rows = load.events_per_s * c.rows_an_event
    touched, commits = rows * c.touched_a_row, _commits_us(c)
    versions = touched * c.version_bytes / 1e6
    blocks, events = rows * c.block_bytes / 1e6, load.events_per_s * c.event_bytes / 1e6
    join = load.events_per_s * c.join_us / 1e6 / USED
    into, out = events + blocks + versions, events * (1 + load.replicas) + blocks + versions * load.replicas
    return {
        "join_cores": join,
        "partitions": math.ceil(join),
        "join_disk_gb": load.ids * load.users_share * c.join_bytes / 1e9 / USED,
        "rows_per_s": rows,
        "train_ranks": rows * c.train_us / 1e6 / USED,
        "one_rank_0_cores": rows * (c.rank_0_us + commits) / 1e6 / USED,
        "touched_rows_per_s": touched,
        "one_store_writer_cores": touched * c.commit_us / 1e6 / USED,
        "train_memory_gb": load.ids * load.hot_share * (c.store_bytes + 80) / 1e9 / USED,  # 80: the map of ids
        "store_disk_gb": load.ids * c.store_bytes / 1e9 / USED,
        "kafka_in_mb_per_s": into,
        "kafka_out_mb_per_s": out,
        "kafka_cores": (into * c.broker_in_us + out * c.broker_us) / 1e6 / USED,
        "one_replica_apply_cores": touched * c.apply_us / 1e6 / USED,
        "replica_memory_gb": load.ids * c.replica_bytes / 1e9 / USED,
        "replica_in_mb_per_s": events + versions,
    }


def breaks(c: Constants, load: Load) -> list[tuple[str, float]]:
    """(what, at how many events/s or ids) of what one process has to do alone, what breaks first by its share of the
    load at the head. ids only count for the last of them, a replica's memory."""
    row = c.rows_an_event
    alone = {
        "the trainer's store has one writer (events/s)": 1e6 * USED / (row * c.touched_a_row * c.commit_us),
        "a replica applies all versions (events/s)": 1e6 * USED / (row * c.touched_a_row * c.apply_us),
        "one rank learns all rows (events/s)": 1e6 * USED / (row * (c.train_us + _commits_us(c))),
        "several ranks go in step, rank 0 with them (events/s)": 1e6 * USED / (row * (c.rank_0_us + _commits_us(c))),
    }
    shares = [(what, limit, limit / load.events_per_s) for what, limit in alone.items()]
    held = load.machine_gb * 1e9 * USED / c.replica_bytes
    shares.append(("a replica holds all rows (ids)", held, held / load.ids))
    return [(what, limit) for what, limit, _ in sorted(shares, key=lambda found: found[2])]


def _commits_us(c: Constants) -> float:
    """µs a row learned: its part of the commits, which are rank 0's, in the thread that learns."""
    return c.touched_a_row * c.commit_us


def as_rows(c: Constants) -> list[tuple[str, float]]:
    """(name, value) of the constants."""
    return [(field.name, getattr(c, field.name)) for field in fields(c)]
