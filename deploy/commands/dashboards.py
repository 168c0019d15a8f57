"""headrace dashboards build | plan | push | validate: Grafana's dashboards and the alerts, from code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.commands.common import JsonOption, Output

if TYPE_CHECKING:
    from deploy.dashboards.grafana import Change

app = typer.Typer(help="Grafana's dashboards and the alerts, from code.")
UrlOption = Annotated[str, typer.Option(metavar="URL", envvar="GRAFANA_URL", help="Grafana's address.")]
TokenOption = Annotated[
    str, typer.Option(envvar="GRAFANA_TOKEN", help="A service account's token.", show_default=False)
]
SourceOption = Annotated[
    str, typer.Option("--prometheus", metavar="URL", help="Prometheus' address, as Grafana reaches it.")
]
RunbooksOption = Annotated[
    str, typer.Option("--runbooks", metavar="URL", help="Where docs/operations.md is read; alerts link into it.")
]
PROMETHEUS, OPERATIONS = "http://127.0.0.1:9090", "docs/operations.md"


@app.command(epilog="Example: headrace dashboards build --out dashboards")
def build(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files.")],
    runbooks: RunbooksOption = OPERATIONS,
    json: JsonOption = False,
) -> None:
    """Write dashboards and alert rules into a folder.

    Dashboards and Grafana's alert rules as JSON, the same rules for Prometheus as YAML.
    """
    from deploy.dashboards import files

    with Output(json) as output:
        written = files.build(out, runbooks)
        output.result(_counted(files=written), "\n".join(map(str, written)))


@app.command(epilog="Example: headrace dashboards plan --url http://127.0.0.1:3000 --token $GRAFANA_TOKEN")
def plan(
    url: UrlOption,
    token: TokenOption,
    prometheus: SourceOption = PROMETHEUS,
    runbooks: RunbooksOption = OPERATIONS,
    json: JsonOption = False,
) -> None:
    """Say what a push would change, as a diff."""
    from deploy.dashboards import grafana

    with Output(json) as output:
        changes = grafana.plan(url, token, prometheus, runbooks)
        text = "\n".join(f"{change}\n{change.diff}".rstrip() for change in changes if change.action != "none")
        output.result(_changed(changes), f"{text}\n{_summary(changes)}".lstrip())


@app.command(epilog="Example: headrace dashboards push --url http://127.0.0.1:3000 --token $GRAFANA_TOKEN")
def push(
    url: UrlOption,
    token: TokenOption,
    prometheus: SourceOption = PROMETHEUS,
    runbooks: RunbooksOption = OPERATIONS,
    json: JsonOption = False,
) -> None:
    """Make a server have what is in the code.

    Data source, folder, dashboards, alert rules. What is equal already is left alone, edits by hand are put back.
    """
    from deploy.dashboards import grafana

    with Output(json) as output:
        changes = grafana.push(url, token, prometheus, runbooks)
        text = "\n".join(str(change) for change in changes if change.action != "none")
        output.result(_changed(changes), f"{text}\n{_summary(changes)}".lstrip())


@app.command(epilog="Example: headrace dashboards validate --prometheus http://127.0.0.1:9090")
def validate(
    prometheus: Annotated[str, typer.Option(metavar="URL", help="Prometheus' address.")] = PROMETHEUS,
    window: Annotated[int, typer.Option(min=10, metavar="SECONDS", help="How far back to look.")] = 300,
    json: JsonOption = False,
) -> None:
    """Ask a Prometheus every query of the dashboards and alerts.

    Exit 1 if one is in error, or has no answer.
    """
    from deploy.dashboards.validate import validate as asked
    from embedding_store.errors import HeadraceError

    with Output(json) as output:
        report = asked(prometheus, window)
        lines = [f"error  {line}" for line in report.errors] + [f"empty  {line}" for line in report.empty]
        lines.append(f"{report.queries_run} queries, {len(report.empty)} empty, {len(report.errors)} in error")
        output.result(
            _counted(
                queries_run=report.queries_run, empty=len(report.empty), errors=len(report.errors),
                empty_queries=report.empty, error_queries=report.errors,
            ),
            "\n".join(lines),
        )  # fmt: skip
        if report.empty or report.errors:
            raise HeadraceError(
                f"{len(report.empty)} queries are empty, {len(report.errors)} in error: does Prometheus scrape join, "
                "train, serve and monitor, and has it for a minute?"
            )


def _counted(**more: Any) -> dict[str, Any]:
    """What there is, in the keys that all these commands share."""
    from deploy.dashboards.alerts import ALERTS
    from deploy.dashboards.boards import BOARDS

    return {
        "dashboards": [board.uid for board in BOARDS], "panels": sum(len(board.panels) for board in BOARDS),
        "rules": len(ALERTS), "queries_run": 0, "empty": 0, "changed": 0, **more,
    }  # fmt: skip


def _changed(changes: Sequence[Change]) -> dict[str, Any]:
    done = [{"kind": c.kind, "uid": c.uid, "action": c.action, "diff": c.diff} for c in changes if c.action != "none"]
    return _counted(changed=len(done), changes=done)


def _summary(changes: Sequence[Change]) -> str:
    counts = {action: sum(c.action == action for c in changes) for action in ("create", "change", "remove", "none")}
    return "{create} to create, {change} to change, {remove} to remove, {none} as they should be".format(**counts)
