"""headrace replay: a historical log through the system."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.common import (
    BootstrapOption,
    ConfigOption,
    DataDirOption,
    JsonOption,
    Output,
    connected,
    progress,
    say,
    settings_for,
    show_played,
)
from embedding_store.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace replay taobao UserBehavior.csv --max-speed")(replay)


def replay(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Format of the log, as taobao.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The log.")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    speed: Annotated[float | None, typer.Option(min=1e-6, help="Times the pace of the log. [1]")] = None,
    max_speed: Annotated[bool, typer.Option("--max-speed", help="As fast as it goes.")] = False,
    json: JsonOption = False,
) -> None:
    """Play a historical log onto Kafka, for the workers that run there."""
    if speed is not None and max_speed:
        raise UsageError("--speed and --max-speed exclude each other")
    settings = settings_for(config, data_dir=data_dir, bootstrap=bootstrap)
    from replay.player import PlaySettings, play
    from replay.readers import open_log
    from replay.sinks import KafkaSink

    log = open_log(name, file)
    if not log.has_impressions and not settings.join.join.implicit:
        say(f"headrace: a {name} log has no impressions: the join worker learns from it with join.implicit = true only")
    settings = connected(settings)
    pace = PlaySettings(speed=0.0 if max_speed else speed or 1.0)
    with Output(json) as output, progress(f"playing {file.name}") as (bar, task):
        with KafkaSink(settings.bootstrap, settings.topics.events, settings.topics.items) as sink:
            played = play(log, sink, pace, lambda so_far: show_played(bar, task, so_far))
        result = {
            "events_in": played.events, "events_rejected": played.rejected.total(), "records": played.records,
            "items": played.items, "ticks": played.ticks, "events_per_s": round(played.events_per_s, 1),
            "seconds": round(played.seconds, 3),
        }  # fmt: skip
        said = f"{played.events:,} events in {played.seconds:.1f} s, {played.rejected.total():,} rows rejected"
        output.result(result, said)
