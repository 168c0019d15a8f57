"""What can be set about the simulated marketplace."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=1, le=1_000_000)]
UserModelName: TypeAlias = Literal["taste", "mission"]


class SimulatorSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The marketplace: the same settings are the same world."""

    seed: Annotated[int, Meta(ge=0, lt=1 << 32)] = 7
    users: Count = 2000
    items: Annotated[int, Meta(ge=20, le=100_000)] = 600  # on the shelf at any time, sold out or not
    categories: Annotated[int, Meta(ge=2, le=100)] = 12
    requests_per_s: Annotated[float, Meta(gt=0, le=100_000)] = 150.0
    item_life_s: Annotated[float, Meta(gt=0)] = 240.0  # how long an item is on offer, on average
    taste_turn_s: Annotated[float, Meta(gt=0)] = 3600.0  # how long a taste takes to turn right round
    time_scale: Annotated[float, Meta(gt=0)] = 120.0  # an hour to a purchase takes 3600 / time_scale seconds
    user_model: Annotated[UserModelName, Meta(description="how users choose: taste or mission")] = "taste"
    bots: Annotated[float, Meta(ge=0, le=0.5, description="share of the users that are bots")] = 0.0
    promotions: Annotated[float, Meta(ge=0, le=1, description="share of the items that are reduced at a time")] = 0.05
    restock_s: Annotated[float, Meta(gt=0, description="how long what is sold out stays away")] = 30.0
