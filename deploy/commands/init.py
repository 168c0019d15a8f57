"""headrace init: a settings file that fits a log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.commands.common import JsonOption, Output, progress, say
from deploy.commands.log import FileArgument, FormatOption, ShareOption, figures, said_mapping, show_read
from embedding_store.errors import LogError, UsageError

if TYPE_CHECKING:
    from replay.readers import LogReader
    from replay.readers.settings import LogSettings


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace init UserBehavior.csv && headrace replay --direct")(init)


def init(
    file: FileArgument,
    format_: FormatOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The settings file.")] = Path("headrace.toml"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    share: ShareOption = None,
    json: JsonOption = False,
) -> None:
    """Write a settings file that fits a log: its format, sizes of the tables, batches and windows, each with a reason.

    A table of no known format is read by its columns' names: what was taken for what is said, and in [log.columns].
    """
    if out.exists() and not force:
        raise UsageError(f"{out} is there already: write over it with --force, or name another with --out")
    from deploy.processes import write_atomically
    from deploy.settings import commented
    from replay.fitting import fitting_settings, learnable
    from replay.inspection import inspect, require_valid
    from replay.readers import open_log

    with Output(json) as output, progress(f"reading {file}") as (bar, task):
        fit = _log_settings(file, format_, share, out)
        log = open_log(fit.format, file, fit.max_rejected_share, fit.columns if fit.format == "generic" else None)
        found = inspect(log, lambda _: show_read(bar, task, log))
        require_valid(log, found, fit.max_rejected_share)
        if not learnable(found):
            raise LogError(f"{file}: it has no impression and no click, so there is nothing to learn from")
        text = commented(_heading(log, file), fitting_settings(fit, found))
        try:
            write_atomically(out, text)
        except OSError as error:
            raise UsageError(f"{out}: {error.strerror}; choose a place that can be written with --out") from None
        said = (
            f"{out} fits {file}: format {log.name}, {log.rows:,} rows, {found.users.different:,} users,"
            f" {found.items.different:,} items"
        )
        output.result(figures(log, found) | {"out": str(out)}, said)


def _log_settings(file: str, format_: str | None, share: float | None, out: Path) -> LogSettings:
    """The section [log]; what was guessed is said on stderr."""
    from replay.readers import detect
    from replay.readers.guessing import guess_columns
    from replay.readers.settings import ColumnMapping, LogSettings

    name, columns = format_ or detect(file), ColumnMapping()
    if name is None or name == "generic":
        name, columns = "generic", guess_columns(file)
        said = said_mapping(columns)
        say(f"headrace: a table of no known format, taken as generic: {said}; look at [log.columns] in {out}")
    elsewhere = "://" not in file and out.resolve().parent != Path.cwd()
    path = str(Path(file).resolve()) if elsewhere else file  # as it is found from where the settings are read
    if share is None:
        return LogSettings(format=name, path=path, columns=columns)
    return LogSettings(format=name, path=path, columns=columns, max_rejected_share=share)


def _heading(log: LogReader, file: str) -> list[str]:
    return [
        f"Settings that fit {file}",
        f"({log.about}).",
        "Written by `headrace init`. What is not here is as it is by default (`headrace doctor` reads it).",
        "The environment (HEADRACE_MODEL_BATCH_SIZE) and flags win over this file.",
    ]
