"""headrace dashboards build | push: Grafana's dashboard from code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.commands.common import JsonOption, Output

app = typer.Typer(help="Grafana's dashboard, from code.")


@app.command(epilog="Example: headrace dashboards build --out dashboards")
def build(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the JSON files.")], json: JsonOption = False
) -> None:
    """Write the dashboard's JSON into a folder."""
    from deploy import dashboards

    with Output(json) as output:
        files = dashboards.build(out)
        output.result(_counted(dashboards.dashboards()), "\n".join(map(str, files)))


@app.command(epilog="Example: headrace dashboards push --url http://127.0.0.1:3000 --token $GRAFANA_TOKEN")
def push(
    url: Annotated[str, typer.Option(metavar="URL", help="Grafana's address.")],
    token: Annotated[str, typer.Option(envvar="GRAFANA_TOKEN", help="A service account's token.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """Create or replace the dashboard on a server."""
    from deploy import dashboards

    with Output(json) as output:
        addresses = dashboards.push(url, token)
        output.result(_counted(dashboards.dashboards()), "\n".join(addresses))


def _counted(built: list[dict[str, Any]]) -> dict[str, Any]:
    return {"dashboards": [d["uid"] for d in built], "panels": sum(len(d["panels"]) for d in built)}
