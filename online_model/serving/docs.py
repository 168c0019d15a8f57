"""The OpenAPI document as one page of plain HTML: nothing is loaded from anywhere, no script runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import orjson

from online_model.serving.problems import KINDS

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
pre { background: #f4f4f4; padding: .8em; overflow-x: auto; font-size: 13px }
table { border-collapse: collapse } td, th { text-align: left; padding: .2em .8em .2em 0; vertical-align: top }
h2 { border-top: 1px solid #ddd; padding-top: 1em } summary { cursor: pointer }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } pre { background: #262626 } }
"""


def page(document: dict[str, Any]) -> str:
    """`document`: as made by `openapi.document`."""
    info = document["info"]
    operations = [
        _operation(path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [
        f'<details id="{escape(name)}"><summary>{escape(name)}</summary>{_json(schema)}</details>'
        for name, schema in document["components"]["schemas"].items()
    ]
    parts = [
        f"<h1>{escape(info['title'])}</h1>", f"<p>{escape(info['description'])}</p>",
        '<p>For programs: <a href="/openapi.json">/openapi.json</a></p>', *operations, _problems(),
        "<h2>Schemas</h2>", *schemas,
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><title>{escape(info["title"])}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(operation['summary'])}.</p>"]
    if parameters := operation.get("parameters"):
        rows = [(p["name"], p["in"], orjson.dumps(p["schema"]).decode()) for p in parameters]
        parts.append(_table(("parameter", "in", "schema"), rows))
    for name, example in _contents(operation.get("requestBody", {})):
        parts.append(f"<p>Body, {escape(name)}:</p>{_json(example)}")
    for name, example in _contents(operation["responses"]["200"]):
        parts.append(f"<p>Answer, {escape(name)}:</p>{_json(example)}")
    refusals = [(status, answer["description"]) for status, answer in operation["responses"].items() if status != "200"]
    return "".join([*parts, _table(("status", "refusal"), refusals)])


def _contents(of: dict[str, Any]) -> list[tuple[str, Any]]:
    """(schema's name and example's name, example) of each example."""
    found = []
    for content in of.get("content", {}).values():
        schema = content.get("schema", {}).get("$ref", "").rsplit("/", 1)[-1]
        examples = {"": {"value": content["example"]}} if "example" in content else content.get("examples", {})
        found += [(f"{schema} {name}".strip(), example["value"]) for name, example in examples.items()]
    return found


def _problems() -> str:
    rows = "".join(
        f'<tr id="{kind.slug}"><td>{kind.slug}</td><td>{kind.status}</td><td>{escape(kind.title)}. '
        f"{escape(kind.about)}</td></tr>"
        for kind in KINDS
    )
    head = "<tr><th>type /docs#…</th><th>status</th><th></th></tr>"
    return f"<h2>Problems</h2><table>{head}{rows}</table>"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cells = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{''.join(cells)}</table>"


def _json(value: Any) -> str:
    return f"<pre>{escape(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())}</pre>"
