"""headrace doctor: what is installed, and whether it works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from deploy.commands.common import (
    BootstrapOption,
    ConfigOption,
    DataDirOption,
    JsonOption,
    Output,
    progress,
    settings_for,
)  # fmt: skip
from embedding_store.errors import HeadraceError

if TYPE_CHECKING:
    from rich.table import Table

    from deploy.doctor import Check


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace doctor --start-broker")(doctor)


def doctor(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    start_broker: Annotated[
        bool, typer.Option("--start-broker", help="Really start a Kafka, in a temporary folder.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check what is installed and whether it works.

    The packages, the device, a look-up in TorchRec, Kafka, the settings, the data directory.
    """
    settings = settings_for(config, data_dir=data_dir, bootstrap=bootstrap)
    from deploy.doctor import examine

    with Output(json) as out:
        with progress("checking") as (bar, task):
            checks = examine(settings, start_broker, lambda name: bar.update(task, said=name))
        failed = [check.name for check in checks if not check.ok]
        out.result({"ok": not failed, "checks": checks}, _table(checks))
    if failed:
        raise HeadraceError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}; do what each one says")


def _table(checks: list[Check]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for check in checks:
        word = Text("ok", "green") if check.ok else Text("FAILED", "bold red")
        grid.add_row(word, check.name, Text(check.detail if check.ok else f"{check.detail}\n→ {check.remedy}"))
    return grid
