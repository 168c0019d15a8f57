"""headrace demo: everything on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.common import BootstrapOption, ConfigOption, DataDirOption, JsonOption, Output, say, settings_for
from embedding_store.errors import HeadraceError, UsageError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace demo --seconds 60 --json")(demo)


def demo(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    log: Annotated[str | None, typer.Option(metavar="NAME", help="Play a historical log of this format.")] = None,
    path: Annotated[Path | None, typer.Option(metavar="FILE", help="The log's file, with --log.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="How long, without --log; 0: until Ctrl-C. [120]", show_default=False)
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0, help="Simulated events per second, about. [1000]", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the simulated users.", show_default=False)] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Go on from what the last run left; without it that is deleted.")
    ] = False,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port of the live page; 0: any free one.")] = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Do without the live page.")] = False,
    json: JsonOption = False,
) -> None:
    """Everything on one machine, with a live page.

    A Kafka, the workers, a replica, and events from simulated users who answer what it recommends, or from a log.
    Ctrl-C ends it early and cleanly.
    """
    settings = settings_for(
        config, data_dir=data_dir, bootstrap=bootstrap, demo__log=log, demo__path=path and str(path),
        demo__seconds=seconds, demo__rate=rate, demo__seed=seed, demo__keep=keep or None, demo__port=port,
        demo__page=False if no_page else None,
    )  # fmt: skip
    options = settings.demo
    if (options.log is None) != (options.path is None):
        raise UsageError("a log needs both: --log NAME (its format) and --path FILE")
    if options.log is not None and (rate is not None or seed is not None):
        raise UsageError("--rate and --seed are of simulated users, and a log has its own: leave them out with a log")
    if options.path is not None and not Path(options.path).is_file():
        raise UsageError(f"{options.path}: there is no such file; check --path")
    with Output(json) as out:
        from deploy.demo.run import run_demo

        result = run_demo(settings, options)
        if json:
            say(_text(result))
        out.result(result, _text(result))
    if result["lost"] or result["duplicated"]:
        raise HeadraceError(
            f"{result['lost']} examples were lost and {result['duplicated']} trained twice: a fault of Headrace;"
            f" keep {settings.data_dir / 'demo'} and report it"
        )


def _text(result: dict) -> str:
    from deploy.recount import said_of

    fresh = result.get("freshness_ms") or {}
    lines = [
        f"{result['events_in']:,} events in, {said_of(result)}",
        f"version {result['trainer_version']} (replica {result['replica_version']}),"
        f" {result['versions_published']:,} published",
    ]
    if fresh.get("p50") is not None:
        lines.append(f"freshness p50 {fresh['p50']:.0f} ms, p95 {fresh['p95']:.0f} ms, p99 {fresh['p99']:.0f} ms")
    if result.get("ctr_last_window") is not None and result.get("ctr_frozen_last_window") is not None:
        lines.append(
            f"click-through rate {100 * result['ctr_last_window']:.1f} %,"
            f" of the twin that never learns {100 * result['ctr_frozen_last_window']:.1f} %"
        )
    return "\n".join(lines)
