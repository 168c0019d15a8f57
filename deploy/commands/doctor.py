"""headrace doctor: what is installed, and whether it works; an archive of it for a bug report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
)  # fmt: skip
from embedding_store.errors import HeadraceError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from deploy.doctor import Check
    from deploy.settings import Settings


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace doctor --bundle headrace-bundle.tar.gz")(doctor)


def doctor(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    start_broker: Annotated[
        bool, typer.Option("--start-broker", help="Really start a Kafka, in a temporary folder.")
    ] = False,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", metavar="FILE", help="A new .tar.gz to attach to a bug report; no secrets in it.",
                     show_default=False),
    ] = None,
    log: Annotated[
        list[Path] | None,
        typer.Option("--log", metavar="FILE", help="With --bundle: a worker's log, its end goes in too. Repeatable.",
                     show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check what is installed and whether it works.

    The packages, the device, a look-up in TorchRec, Kafka and its topics, the settings, the machine, the stores.
    """
    if log and bundle is None:
        raise UsageError("--log goes with --bundle FILE")
    if bundle is not None and bundle.exists():
        raise UsageError(f"{bundle} exists already: name a new file with --bundle")
    settings, wrong = _settings(config, data_dir=data_dir, bootstrap=bootstrap)
    from deploy.doctor import examine

    with Output(json) as out:
        with progress("checking") as (bar, task):
            checks = examine(settings, start_broker, lambda name: bar.update(task, said=name), wrong)
            made = _bundle(bundle, settings, checks, log or []) if bundle is not None else {}
        failed = [check.name for check in checks if not check.ok]
        out.result({"ok": not failed, "checks": checks, **({"bundle": made} if made else {})}, _table(checks))
    if made:
        _say_what_is_in(made)
    if failed:
        raise HeadraceError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}; do what each one says")


def _settings(config: Path | None, **flags: Any) -> tuple[Settings, UsageError | None]:
    """Those that are meant; where they cannot be read, those of the flags alone, and why."""
    try:
        return settings_for(config, **flags), None
    except UsageError as error:
        from deploy.settings import Settings

        return Settings([]).with_flags(flags), error


def _bundle(file: Path, settings: Settings, checks: list[Check], logs: list[Path]) -> dict[str, Any]:
    from deploy import broker
    from deploy.bundle import write_bundle

    if not settings.bootstrap and broker.status(settings.data_dir):
        settings = connected(settings)
    return write_bundle(file, settings, checks, os.environ, logs)


def _say_what_is_in(made: dict[str, Any]) -> None:
    for name, size in made["members"].items():
        say(f"{size:>10,}  {name}")
    for name, why in made["missing"].items():
        say(f"   missing  {name}: {why}")
    say(f"headrace: {made['file']} ({made['bytes']:,} bytes, readable by you alone): values that are called password, "
        "token, key or the like are left out; logs may name users: look through them before you send it")  # fmt: skip


def _table(checks: list[Check]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for check in checks:
        word = Text("ok", "green") if check.ok else Text("FAILED", "bold red")
        if check.ok and check.remedy:
            word = Text("ok, but", "yellow")
        grid.add_row(word, check.name, Text(f"{check.detail}\n→ {check.remedy}" if check.remedy else check.detail))
    return grid
