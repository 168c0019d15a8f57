"""headrace join | train | serve: one worker of each kind, in the foreground."""

from __future__ import annotations

import gc
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from deploy.commands.common import BootstrapOption, ConfigOption, DataDirOption, connected, settings_for

if TYPE_CHECKING:
    from streams.settings import ServeWorkerSettings

AfterStdinOption = Annotated[
    bool,
    typer.Option(
        "--after-stdin",
        hidden=True,
        help="Load (torch takes seconds), then wait for a line on stdin before reading settings and connecting.",
    ),
]
LogsOption = Annotated[
    str | None,
    typer.Option("--logs", metavar="text|json", help="How log lines are written. [text]", show_default=False),
]
BackfillOption = Annotated[
    str | None,
    typer.Option(
        "--backfill",
        metavar="DIR",
        help="Begin with what `headrace backfill` made: a path or a URL.",
        show_default=False,
    ),
]


def _stops_while_starting(kind: str) -> None:
    """Until the worker listens to SIGTERM itself (torch takes seconds to import) there is nothing to drain. Nor is
    there to SIGHUP: the settings are read later anyway."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if kind == "serve" else signal.getsignal(signal.SIGHUP))


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command(epilog="Example: headrace join --config headrace.toml")(join)
    app.command(epilog="Example: headrace train --config headrace.toml")(train)
    app.command(epilog="Example: headrace serve --config headrace.toml --port 8080")(serve)


def join(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    backfill: BackfillOption = None,
    logs: LogsOption = None,
    after_stdin: AfterStdinOption = False,
) -> None:
    """Join events to examples, in the foreground.

    What was shown is joined with what was done. SIGTERM drains and stops.
    """
    _run("join", after_stdin, config, data_dir=data_dir, bootstrap=bootstrap, logs=logs, join__backfill=backfill)


def train(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    backfill: BackfillOption = None,
    logs: LogsOption = None,
    after_stdin: AfterStdinOption = False,
) -> None:
    """Learn from examples, publish versions.

    In the foreground. SIGTERM drains and stops.
    """
    _run("train", after_stdin, config, data_dir=data_dir, bootstrap=bootstrap, logs=logs, train__backfill=backfill)


def serve(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="HTTP port; 0: any free one. [8080]")] = None,
    logs: LogsOption = None,
    after_stdin: AfterStdinOption = False,
) -> None:
    """Answer over HTTP with the newest version.

    Rank and recommend, in the foreground. SIGTERM drains and stops, SIGHUP reads policy, arms and limits again.
    """
    _run("serve", after_stdin, config, data_dir=data_dir, bootstrap=bootstrap, logs=logs, serve__port=port)


def _run(kind: str, after_stdin: bool, config: Path | None, **flags: Any) -> None:
    """The worker, on a Kafka that answers and whose topics keep what the guarantees need.

    With `after_stdin` first everything is loaded, and then a line on stdin, or its end, is awaited.
    """
    _stops_while_starting(kind)
    if after_stdin:
        _load(kind)
        sys.stdin.readline()
    settings = connected(settings_for(config, **flags))
    from streams.topics import check_topics, wait_for_broker

    join, train = settings.join, settings.train  # what is wrong with them is said before Kafka is looked for
    if kind == "train" and train.backfill:
        from streams.backfill import Backfill

        Backfill(train.backfill).check(settings.topics, join.join)
    wait_for_broker(settings.connection)
    check_topics(
        settings.connection,
        settings.topics,
        purchase_window_ms=join.join.purchase_window_ms,
        snapshot_interval_ms=int(train.snapshot_interval_s * 1000),
        join_interval_ms=int(join.snapshot_interval_s * 1000),
    )
    if kind == "serve":

        def again() -> ServeWorkerSettings:
            new = settings_for(config, **flags)
            serve = (new if new.bootstrap else new.with_flags({"bootstrap": settings.bootstrap})).serve
            return serve if new.mentions("kafka") else msgspec.structs.replace(serve, kafka=settings.kafka)

        _load(kind).run_serve(settings.serve, again)
    else:
        getattr(_load(kind), f"run_{kind}")(getattr(settings, kind))


def _load(kind: str) -> ModuleType:
    """The worker's module. What it brings stays: collecting garbage meanwhile costs a tenth of the time."""
    gc.disable()
    module = import_module(f"streams.{kind}_worker")
    gc.enable()
    return module
