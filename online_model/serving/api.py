"""What goes over HTTP: the bodies of the requests, checked while they are decoded, and the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

MAX_BODY_BYTES = 1_000_000
MAX_WAIT_MS = 30_000
MAX_ID_CHARS = 256

# JSON's integers have no end, the answer's have 64 bits: a longer id is a string ("7" and 7 are one id).
Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_ID_CHARS)]
Integer: TypeAlias = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Id: TypeAlias = Text | Integer
Query: TypeAlias = Annotated[str, Meta(max_length=1000)]  # what was searched for; "": nothing
Scenario: TypeAlias = Literal["live", "video", "search", "shelf"]


class Context(Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of the moment beside user and scenario."""

    query: Query = ""


class RankRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Score these candidates for this user; neither needs to be known."""

    user: Id
    candidates: Annotated[list[Id], Meta(min_length=1, max_length=1000)]
    scenario: Scenario = "shelf"
    context: Context = Context()
    shown: Annotated[
        int, Meta(ge=0, le=100, description="the best so many will be shown: they are logged as an impression")
    ] = 0
    explain: bool = False


class Filters(Struct, frozen=True, forbid_unknown_fields=True):
    """Which items may be recommended. A list that is empty rules nothing out."""

    in_stock: Annotated[bool, Meta(description="not what is sold out")] = True
    unseen: Annotated[bool, Meta(description="nothing that is in the user's history")] = False
    categories: Annotated[list[Id], Meta(max_length=100, description="of these categories only")] = []
    region: Annotated[str, Meta(max_length=64, description='sold there; "": anywhere')] = ""
    blocked: Annotated[list[Id], Meta(max_length=1000, description="none of these items")] = []


class RecommendRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Choose k items for this user."""

    user: Id
    scenario: Scenario = "shelf"
    context: Context = Context()
    k: Annotated[int, Meta(ge=1, le=100)] = 10
    filters: Filters = Filters()
    log: Annotated[bool, Meta(description="the items are shown: log them as an impression")] = True
    explain: bool = False


class SimilarQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`GET /v1/items/{id}/similar`."""

    k: Annotated[int, Meta(ge=1, le=100)] = 10


class ModelQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`newer_than`: answer as soon as the sequence is larger, or when `wait_ms` are over."""

    newer_than: int = -1
    wait_ms: Annotated[int, Meta(ge=0, le=MAX_WAIT_MS)] = 0


@dataclass(slots=True)
class Explanation:
    """What made an item's place."""

    tasks: dict[str, float]  # the part of its score that each task makes
    features: dict[str, float]  # by how much its score falls when the model is not told them
    rules: list[str]  # and draws that moved it, in words


class Ranked(Struct, gc=False):  # made and encoded in a third of a dataclass's time: there are hundreds in an answer
    """An item's score and the probabilities behind it (watch, purchase: given a click)."""

    item: str | int
    score: float
    click: float
    watch: float
    purchase: float
    explanation: Explanation | None = None


class Shown(Ranked, gc=False):
    """An item in its place; `propensity`: the probability that it was put there, given the places before it; None:
    where the policy cannot say."""

    position: int = 0
    propensity: float | None = None


@dataclass(slots=True)
class Answer:
    """What each answer says of itself. `moment_ms`: when it was made (ms UTC): ages are of then. `degraded`: time was
    short, so some candidates were not scored. In a ranking they come last, in retrieval's order, with zeros; in a
    recommendation they are left out. `arm`: of the experiment, "" without one.
    """

    request_id: str
    model_version: str
    model_age_ms: int  # since the version was made
    learned_to_ms: int  # event time up to which it has learned
    feature_hash: int
    moment_ms: int
    arm: str
    degraded: bool


@dataclass(slots=True)
class Ranking(Answer):
    """The candidates of a request, the best first."""

    items: list[Ranked]


@dataclass(slots=True)
class Recommendation(Answer):
    """What to show."""

    candidates: int  # how many items were scored
    items: list[Shown]


@dataclass(slots=True)
class Alike:
    """An item and how similar it is: `together`: to be clicked with it; `alike`: the cosine of both vectors; `score`:
    their sum."""

    item: str | int
    score: float
    together: float
    alike: float


@dataclass(slots=True)
class SimilarItems:
    """Items like one, the most similar first."""

    item: str | int
    model_version: str
    model_age_ms: int
    learned_to_ms: int
    items: list[Alike]


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
    policy: str = ""  # a hash of policy, experiment and arms: replicas with one policy make pages alike
