"""headrace broker start | stop | status | fetch: the embedded one-node Kafka."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from deploy.commands.common import (
    ConfigOption,
    DataDirOption,
    JsonOption,
    Output,
    jars_progress,
    no_broker,
    progress,
    settings_for,
)

app = typer.Typer(help="The embedded one-node Kafka.")
NOTHING: dict[str, Any] = {"bootstrap": None, "version": None, "pid": None, "seconds_to_start": None}


@app.command(epilog="Example: headrace broker start --data-dir state --port 9092")
def start(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="TCP port on 127.0.0.1. [the last run's, or any]"),
    ] = None,
    secure: Annotated[
        bool, typer.Option("--secure", help="Over TLS, with a password: made once, and settings for clients with them.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Start Kafka in the background, or say where the one that runs is.

    With --secure the settings that let a client in are in DIR/kafka/secure/client.toml; commands with the same
    --data-dir know them.
    """
    from deploy import broker

    settings = settings_for(config, data_dir=data_dir)
    with Output(json) as out:
        with progress("starting Kafka") as (bar, task):
            running = broker.ensure(settings.data_dir, port=port, progress=jars_progress(bar, task), secure=secure)
        out.result(asdict(running), f"Kafka {running.version} runs at {running.bootstrap} (pid {running.pid})")


@app.command(epilog="Example: headrace broker stop --data-dir state")
def stop(config: ConfigOption = None, data_dir: DataDirOption = None, json: JsonOption = False) -> None:
    """Stop the broker; its data stays. No error if none runs."""
    from deploy import broker

    settings = settings_for(config, data_dir=data_dir)
    with Output(json) as out:
        with progress("stopping Kafka"):
            stopped = broker.stop(settings.data_dir)
        said = f"stopped (pid {stopped.pid})" if stopped else f"no broker ran on {settings.data_dir}"
        out.result(asdict(stopped) if stopped else NOTHING, said)


@app.command(epilog="Example: headrace broker status --json")
def status(config: ConfigOption = None, data_dir: DataDirOption = None, json: JsonOption = False) -> None:
    """Where the broker runs; exit 1 if it does not."""
    from deploy import broker

    settings = settings_for(config, data_dir=data_dir)
    with Output(json) as out:
        running = broker.status(settings.data_dir)
        if running is None:
            out.result(NOTHING)
            raise no_broker(settings)
        out.result(asdict(running), f"Kafka {running.version} runs at {running.bootstrap} (pid {running.pid})")


@app.command(epilog="Example: headrace broker fetch")
def fetch(json: JsonOption = False) -> None:
    """Fetch Kafka (45 MB) into the user's cache, and prepare it there (70 MB) to start fast."""
    from deploy.kafka_aot import make_cache
    from deploy.kafka_jars import KAFKA_VERSION, cache_dir, kafka_jars

    with Output(json) as out:
        with progress("looking for Kafka") as (bar, task):
            jars = kafka_jars(jars_progress(bar, task))
        with progress("preparing Kafka to start fast"):
            make_cache()
        out.result({"version": KAFKA_VERSION, "jars": len(jars)}, f"Kafka {KAFKA_VERSION} is in {cache_dir()}")
