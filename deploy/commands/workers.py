"""headrace join | train | serve: one worker of each kind, in the foreground."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from deploy.commands.common import BootstrapOption, ConfigOption, DataDirOption, connected, settings_for


def _stops_while_starting() -> None:
    """Until the worker listens to SIGTERM itself (torch takes seconds to import) there is nothing to drain."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command(epilog="Example: headrace join --config headrace.toml")(join)
    app.command(epilog="Example: headrace train --config headrace.toml")(train)
    app.command(epilog="Example: headrace serve --config headrace.toml --port 8080")(serve)


def join(config: ConfigOption = None, data_dir: DataDirOption = None, bootstrap: BootstrapOption = None) -> None:
    """Join events to examples, in the foreground.

    What was shown is joined with what was done. SIGTERM drains and stops.
    """
    _stops_while_starting()
    settings = connected(settings_for(config, data_dir=data_dir, bootstrap=bootstrap))
    from streams.join_worker import run_join

    run_join(settings.join)


def train(config: ConfigOption = None, data_dir: DataDirOption = None, bootstrap: BootstrapOption = None) -> None:
    """Learn from examples, publish versions.

    In the foreground. SIGTERM drains and stops.
    """
    _stops_while_starting()
    settings = connected(settings_for(config, data_dir=data_dir, bootstrap=bootstrap))
    from streams.train_worker import run_train

    run_train(settings.train)


def serve(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="HTTP port on 127.0.0.1; 0: any free one.")] = None,
) -> None:
    """Answer over HTTP with the newest version.

    Rank and recommend, in the foreground. SIGTERM drains and stops.
    """
    _stops_while_starting()
    settings = connected(settings_for(config, data_dir=data_dir, bootstrap=bootstrap, serve__port=port))
    from streams.serve_worker import run_serve

    run_serve(settings.serve)
