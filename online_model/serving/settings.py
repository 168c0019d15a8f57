"""What can be set about a replica. Free of torch, so that commands can read their settings at once."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class ReplicaSettings(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How candidates are found, scored and explored.

    An item's score is click · (1 + watch_weight · watch + purchase_weight · purchase).
    """

    nearest: Annotated[int, Meta(ge=1, le=10_000)] = 200  # candidates whose vector matches the user's best
    newest: Annotated[int, Meta(ge=0, le=1000)] = 50
    popular: Annotated[int, Meta(ge=0, le=1000)] = 50
    watch_weight: Annotated[float, Meta(ge=0)] = 0.5
    purchase_weight: Annotated[float, Meta(ge=0)] = 2.0
    epsilon: Annotated[float, Meta(ge=0, le=1)] = 0.1  # of the places go to a candidate drawn uniformly
    seed: Annotated[int, Meta(ge=0)] | None = None  # of the draws; none: another one in each process
    max_age_ms: Annotated[int, Meta(ge=1)] = 60_000  # without a new version for so long, `/readyz` says no
