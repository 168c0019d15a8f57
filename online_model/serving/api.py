"""What goes over HTTP: the bodies of the requests, checked while they are decoded, and the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

MAX_BODY_BYTES = 1_000_000
MAX_WAIT_MS = 30_000

# JSON's integers have no end, the answer's have 64 bits: a longer id is a string ("7" and 7 are one id).
Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
Integer: TypeAlias = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Id: TypeAlias = Text | Integer
Query: TypeAlias = Annotated[str, Meta(max_length=1000)]  # what was searched for; "": nothing
Scenario: TypeAlias = Literal["live", "video", "search", "shelf"]


class RankRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Score these items for this user; neither needs to be known."""

    user: Id
    items: Annotated[list[Id], Meta(min_length=1, max_length=1000)]
    scenario: Scenario = "shelf"
    query: Query = ""


class RecommendRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Choose k items for this user."""

    user: Id
    scenario: Scenario = "shelf"
    query: Query = ""
    k: Annotated[int, Meta(ge=1, le=100)] = 10


class ModelQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`newer_than`: answer as soon as the sequence is larger, or when `wait_ms` are over."""

    newer_than: int = -1
    wait_ms: Annotated[int, Meta(ge=0, le=MAX_WAIT_MS)] = 0


@dataclass(slots=True)
class Ranked:
    """An item's score and the probabilities behind it (watch, purchase: given a click)."""

    item: str | int
    score: float
    click: float
    watch: float
    purchase: float


@dataclass(slots=True)
class Ranking:
    """The items of a request, the best first. `moment_ms`: when that was (ms UTC): ages are of then."""

    model_version: str
    feature_hash: int
    moment_ms: int
    items: list[Ranked]


@dataclass(slots=True)
class Shown:
    """An item in its place; `propensity`: the probability that it was put there, given the places before it."""

    item: str | int
    score: float
    position: int
    propensity: float


@dataclass(slots=True)
class Recommendation:
    """What to show. The impression event repeats `request_id`, `model_version`, `feature_hash` and the propensities."""

    request_id: str
    model_version: str
    feature_hash: int
    candidates: int  # how many items were scored
    items: list[Shown]


@dataclass(slots=True)
class ModelInfo:
    """Which version a replica serves. Times: ms UTC; positions: partition → offset of `events` handled."""

    version: str
    epoch: int
    sequence: int
    created_ms: int
    applied_ms: int
    positions: dict[str, int]
    rows: dict[str, int]
    info: dict[str, Any]
