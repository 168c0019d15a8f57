"""headrace backfill: the joiner's output over months of log."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from deploy.commands.common import ConfigOption, DataDirOption, JsonOption, Output, progress, settings_for
from embedding_store.errors import UsageError

LOCAL_MASTER = "local[*]"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace backfill --engine spark recordings/2026 --out backfill/2026")(backfill)


def backfill(
    log: Annotated[str, typer.Argument(metavar="LOG", help="A recording, or any log: a path or a URL.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where it goes: a path or a URL.")],
    engine: Annotated[
        Literal["local", "spark"], typer.Option("--engine", help="local: one partition after the other, here.")
    ] = "local",
    master: Annotated[
        str | None, typer.Option("--master", help="Of Spark: any cluster. [local[*]]", show_default=False)
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="Format of the log. [found out]", show_default=False)
    ] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    json: JsonOption = False,
) -> None:
    """Join months of log into files, for a trainer to begin with.

    Then `headrace train --backfill DIR` learns it and goes on with the live stream, and `headrace join --backfill DIR`
    goes on from the joiners' states in it. Run twice, or killed and run again, it gives the same.
    """
    if master is not None and engine != "spark":
        raise UsageError("--master is of Spark: add --engine spark")
    settings = settings_for(config, data_dir=data_dir, log__format=format_)
    from deploy.backfilling import run_backfill

    with Output(json) as output, progress("joining") as (bar, task):
        result = run_backfill(
            settings, log, out, engine, master or LOCAL_MASTER, format_, lambda said: bar.update(task, said=said)
        )
        output.result(result, _text(result))


def _text(result: dict[str, Any]) -> str:
    ends = ", ".join(f"{p}: {offset}" for p, offset in result["partitions"].items())
    return (
        f"{result['events_in']:,} events, {result['examples']:,} examples in {result['seconds']:.1f} s "
        f"({result['engine']})\nexamples {result['examples_digest']}; the stream goes on at {ends}"
    )
