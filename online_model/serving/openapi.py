"""The OpenAPI 3.1 document of the HTTP API, made from the structs that decode the requests and make the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import orjson

from online_model.serving import problems
from online_model.serving.api import (
    MAX_BODY_BYTES,
    MAX_ID_CHARS,
    Alike,
    ModelInfo,
    ModelQuery,
    Ranked,
    Ranking,
    RankRequest,
    Recommendation,
    RecommendRequest,
    Shown,
    SimilarItems,
    SimilarQuery,
)
from online_model.serving.problems import Kind, Problem
from online_model.serving.settings import Limits

API_VERSION = "1"
JSON = "application/json"
PLACE = "#/components/schemas/{name}"

_OF_ALL: dict[str, Any] = {
    "model_version": "1.4711", "model_age_ms": 180, "learned_to_ms": 1_700_000_000_000,
}  # fmt: skip
_OF_ONE: dict[str, Any] = {
    **_OF_ALL, "request_id": "5f0c6a1e4b7d4c1fa0c1f2e3d4b5a697", "feature_hash": -4611686018427387904,
    "moment_ms": 1_700_000_000_180, "arm": "", "degraded": False,
}  # fmt: skip
_TASKS: dict[str, Any] = {"click": 0.25, "watch": 0.5, "purchase": 0.125}


@dataclass(frozen=True)
class Operation:
    """One route as it is described. `query`, `body`: Structs; `answer`: a type, or the media type of what is none."""

    path: str
    method: str
    name: str
    summary: str
    answer: type | str
    example: Any = None
    query: type | None = None
    query_examples: dict[str, Any] = field(default_factory=dict)
    body: type | None = None
    bodies: dict[str, Any] = field(default_factory=dict)
    refusals: tuple[Kind, ...] = ()


class Ok(msgspec.Struct, frozen=True):
    """It is."""

    ok: bool


_WHO = (problems.TOKEN_NEEDED, problems.NOT_ALLOWED)
_ASKING = (*_WHO, problems.TOO_MANY_WAITING, problems.WAITED_TOO_LONG, problems.NOT_READY)
_SENDING = (problems.NOT_JSON, problems.BODY_TIMEOUT, problems.BODY_TOO_LARGE, problems.INVALID)

OPERATIONS = (
    Operation(
        "/v1/rank", "post", "rank", "Score the candidates for a user, the best first", Ranking,
        msgspec.to_builtins(Ranking(**_OF_ONE, items=[Ranked("tea-7", 0.375, **_TASKS), Ranked(42, 0.375, **_TASKS)])),
        body=RankRequest,
        bodies={
            "simple": {"user": "u1", "candidates": ["tea-7", 42]},
            "search": {
                "user": "u1", "scenario": "search", "context": {"query": "red shoes"}, "candidates": ["tea-7", 42],
                "shown": 2, "explain": True,
            },
        },
        refusals=(*_SENDING, *_ASKING),
    ),
    Operation(
        "/v1/recommend", "post", "recommend", "Choose items for a user from the whole catalogue", Recommendation,
        msgspec.to_builtins(Recommendation(
            **_OF_ONE, candidates=160, items=[Shown("tea-7", 0.375, **_TASKS, position=0, propensity=0.9)],
        )),
        body=RecommendRequest,
        bodies={
            "simple": {"user": "u1", "scenario": "shelf", "k": 5},
            "filtered": {
                "user": "u1", "k": 5, "log": False,
                "filters": {"unseen": True, "categories": ["tea"], "region": "de", "blocked": [42]},
            },
        },
        refusals=(*_SENDING, *_ASKING),
    ),
    Operation(
        "/v1/items/{id}/similar", "get", "similar", "Items like one", SimilarItems,
        msgspec.to_builtins(SimilarItems("tea-7", **_OF_ALL, items=[Alike(42, 0.75, 0.5, 0.25)])),
        query=SimilarQuery, query_examples={"k": 5}, refusals=(problems.UNKNOWN_ITEM, problems.INVALID, *_ASKING),
    ),
    Operation(
        "/v1/model", "get", "model", "Which version is served; with `wait_ms`: wait for the next one", ModelInfo,
        msgspec.to_builtins(ModelInfo(
            "1.4711", 1, 4711, 1_700_000_000_000, 1_700_000_000_020, {"0": 123_456}, {"user": 10, "item": 40},
            {"rows": 12_345},
        )),
        query=ModelQuery, query_examples={"newer_than": -1, "wait_ms": 20}, refusals=(problems.INVALID, *_WHO),
    ),
    Operation("/healthz", "get", "healthz", "Whether the process answers", Ok, {"ok": True}),
    Operation(
        "/readyz", "get", "readyz", "Whether it should be asked: it has a model that is not stale", Ok, {"ok": True},
        refusals=(problems.NOT_READY,),
    ),
    Operation("/metrics", "get", "metrics", "Counters and gauges for Prometheus", "text/plain", refusals=_WHO),
    Operation("/openapi.json", "get", "openapi", "This document", JSON, refusals=_WHO),
    Operation("/docs", "get", "docs", "This document, to be read", "text/html", refusals=_WHO),
)  # fmt: skip


def document(limits: Limits) -> dict[str, Any]:
    """The document, as JSON's own types. `limits`: as they are set here."""
    types = [t for o in OPERATIONS for t in (o.query, o.body, o.answer) if t is not None and not isinstance(t, str)]
    _, schemas = msgspec.json.schema_components([*dict.fromkeys(types), Problem], ref_template=PLACE)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schemas)
    made = {
        "openapi": "3.1.0",
        "info": {
            "title": "Headrace: a serving replica", "version": API_VERSION, "description": _about(limits),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }  # fmt: skip
    return orjson.loads(orjson.dumps(made))  # nothing shared with the parts it is made of


def _about(limits: Limits) -> str:
    return (
        f"Limits: a body has up to {MAX_BODY_BYTES:,} bytes and is there within {limits.body_ms:,} ms; "
        f"{limits.waiting:,} requests wait for their turn, up to {limits.give_up_ms:,} ms; an answer that would take "
        f"longer than {limits.deadline_ms:,} ms is cut short and says `degraded`. "
        'The ids "7" and 7 are one id. Times: ms UTC. Refusals are problem documents (RFC 9457).'
    )


def _operation(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary}
    if parameters := _parameters(operation, schemas):
        made["parameters"] = parameters
    if operation.body is not None:
        examples = {name: {"value": value} for name, value in operation.bodies.items()}
        content = {JSON: {"schema": _reference(operation.body), "examples": examples}}
        made["requestBody"] = {"required": True, "content": content}
    if problems.TOKEN_NEEDED in operation.refusals:
        made["security"] = [{"token": []}, {}]  # without one where none is set
    made["responses"] = _responses(operation)
    return made


def _parameters(operation: Operation, schemas: dict[str, Any]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if "{id}" in operation.path:
        text = {"type": "string", "minLength": 1, "maxLength": MAX_ID_CHARS}
        made.append({"name": "id", "in": "path", "required": True, "schema": text, "example": "tea-7"})
    if operation.query is not None:
        for name, schema in schemas[operation.query.__name__]["properties"].items():
            example = operation.query_examples[name]
            made.append({"name": name, "in": "query", "required": False, "schema": schema, "example": example})
    return made


def _responses(operation: Operation) -> dict[str, Any]:
    if isinstance(operation.answer, str):
        content: dict[str, Any] = {operation.answer: {}}
    else:
        content = {JSON: {"schema": _reference(operation.answer), "example": operation.example}}
    made: dict[str, Any] = {"200": {"description": "Right", "content": content}}
    for status in sorted({kind.status for kind in operation.refusals}):
        kinds = [kind for kind in operation.refusals if kind.status == status]
        made[str(status)] = _refused(kinds)
    made["500"] = _problem("A fault of the replica", {"internal-error": _INTERNAL})
    return made


def _refused(kinds: Sequence[Kind]) -> dict[str, Any]:
    """All kinds of one status."""
    examples = {kind.slug: Problem(kind.type, kind.title, kind.status, kind.about) for kind in kinds}
    made = _problem(". ".join(kind.title for kind in kinds), examples)
    if any(kind.retry for kind in kinds):
        seconds = {"type": "integer", "minimum": 0}
        made["headers"] = {"Retry-After": {"description": "seconds", "required": True, "schema": seconds}}
    return made


_INTERNAL = Problem(
    problems.BLANK, "Internal Server Error", 500, "internal error: the replica's log says more under this instance",
    "urn:uuid:0b5cf3a4-6a3f-4a52-9f5e-1c2d3e4f5a6b",
)  # fmt: skip


def _problem(description: str, examples: dict[str, Problem]) -> dict[str, Any]:
    values = {name: {"value": msgspec.to_builtins(example)} for name, example in examples.items()}
    content = {problems.MEDIA_TYPE: {"schema": _reference(Problem), "examples": values}}
    return {"description": description, "content": content}


def _reference(type_: type) -> dict[str, str]:
    return {"$ref": PLACE.format(name=type_.__name__)}
