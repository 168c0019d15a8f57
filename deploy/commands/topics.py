"""headrace topics create: the topics that the workers need."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.commands.common import (
    BootstrapOption,
    ConfigOption,
    DataDirOption,
    JsonOption,
    Output,
    connected,
    settings_for,
)

app = typer.Typer(help="The topics that the workers need.")


@app.callback()
def topics() -> None:
    """The topics that the workers need."""


@app.command(epilog="Example: headrace topics create --bootstrap 127.0.0.1:9092")
def create(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    replication: Annotated[
        int, typer.Option(min=1, max=32_767, help="Copies of each partition, on as many brokers.")
    ] = 1,
    json: JsonOption = False,
) -> None:
    """Create missing topics, check those in place."""
    settings = connected(settings_for(config, data_dir=data_dir, bootstrap=bootstrap))
    with Output(json) as out:
        from streams.topics import SNAPSHOT_INTERVAL_MS, create_topics

        interval_ms = SNAPSHOT_INTERVAL_MS
        if settings.mentions("train"):  # else its default, without waiting seconds for torch
            interval_ms = int(settings.train.snapshot_interval_s * 1000)
        names = settings.topics
        create_topics(
            settings.connection,
            names,
            purchase_window_ms=settings.join.join.purchase_window_ms,
            snapshot_interval_ms=interval_ms,
            join_interval_ms=int(settings.join.snapshot_interval_s * 1000),
            replication=replication,
        )
        made = [names.events, names.items, names.examples, names.parameters, names.events_dead]
        out.result(
            {"bootstrap": settings.bootstrap, "topics": made}, f"{', '.join(made)}: in place at {settings.bootstrap}"
        )
