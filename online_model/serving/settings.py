"""What can be set about a replica. Free of torch, so that commands can read their settings at once."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class ReplicaSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How candidates are found, scored and explored.

    An item's score is click · (1 + watch_weight · watch + purchase_weight · purchase).
    """

    nearest: Annotated[int, Meta(ge=1, le=10_000)] = 80  # candidates whose vector matches the user's best
    # Items that are scanned; past that they are indexed. A scan of 30,000 at dim 32 takes 2 ms (an AMD EPYC core).
    exact_up_to: Annotated[int, Meta(ge=0)] = 30_000
    rebuild_s: Annotated[float, Meta(gt=0)] = 60.0  # between two rebuilds of the index: versions move all vectors
    probe_every: Annotated[int, Meta(ge=1)] = 1_000  # of so many requests one scans all items too, for the recall
    least_recall: Annotated[float, Meta(ge=0, le=1)] = 0.9  # of the index; below it, it is rebuilt at once …
    exact_below_recall: Annotated[float, Meta(ge=0, le=1)] = 0.7  # … and here all items are scanned until it is
    neighbours: Annotated[int, Meta(ge=0, le=1000)] = 40  # that are clicked after the user's last items
    newest: Annotated[int, Meta(ge=0, le=1000)] = 20
    popular: Annotated[int, Meta(ge=0, le=1000)] = 20
    watch_weight: Annotated[float, Meta(ge=0)] = 0.5
    purchase_weight: Annotated[float, Meta(ge=0)] = 2.0
    epsilon: Annotated[float, Meta(ge=0, le=1)] = 0.1  # of the places go to a candidate drawn uniformly
    seed: Annotated[int, Meta(ge=0)] | None = None  # of the draws; none: another one in each process
    max_age_ms: Annotated[int, Meta(ge=1)] = 60_000  # without a new version for so long, `/readyz` says no
