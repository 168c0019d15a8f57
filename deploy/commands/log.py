"""headrace log inspect | validate | sort: what is in a historical log, whether it can be replayed, and in order."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.commands.common import ConfigOption, JsonOption, Output, progress, settings_for
from embedding_store.errors import LogError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from deploy.settings import Settings
    from replay.inspection import Inspection
    from replay.readers import ColumnMapping, LogReader

app = typer.Typer(help="What is in a historical log; whether it can be replayed; a log in time order.")
FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="The log: a path or a URL.")]
FormatOption = Annotated[
    str | None, typer.Option("--format", metavar="NAME", help="Format of the log. [found out]", show_default=False)
]
ShareOption = Annotated[
    float | None,
    typer.Option(
        "--max-rejected-share", min=0, max=1, help="Share of wrong rows that is let pass. [0.01]", show_default=False
    ),
]


@app.command(epilog="Example: headrace log inspect UserBehavior.csv")
def inspect(
    file: FileArgument, format_: FormatOption = None, config: ConfigOption = None, json: JsonOption = False
) -> None:
    """Kinds, times, order, duplicates, wrong rows, users, items."""
    settings = settings_for(config)
    from replay import inspection

    with Output(json) as output, progress(f"reading {file}") as (bar, task):
        log = opened(settings, file, format_, max_rejected_share=1.0)
        found = inspection.inspect(log, lambda _: show_read(bar, task, log))
        output.result(figures(log, found), table(log, found))


@app.command(epilog="Example: headrace log validate UserBehavior.csv --max-rejected-share 0.001")
def validate(
    file: FileArgument, format_: FormatOption = None, share: ShareOption = None, config: ConfigOption = None,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """Whether a replay takes the log: exit 1, and one line, if too many rows are wrong or no format fits."""
    settings = settings_for(config, log__max_rejected_share=share)
    from replay.inspection import Inspection, require_valid, watched

    with Output(json) as output, progress(f"reading {file}") as (bar, task):
        log = opened(settings, file, format_, settings.log.max_rejected_share)
        found = Inspection()
        try:
            for _ in watched(log.records(), found, lambda _: show_read(bar, task, log)):
                pass
            require_valid(log, found, settings.log.max_rejected_share)
        except LogError:
            output.result(figures(log, found) | {"ok": False})  # of the rows that were read
            raise
        said = f"{file}: format {log.name}, {log.rows:,} rows, {log.wrong:,} of them wrong, {found.events:,} events"
        output.result(figures(log, found) | {"ok": True}, said)


@app.command(epilog="Example: headrace log sort UserBehavior.csv --out sorted.jsonl.gz")
def sort(
    file: FileArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A .jsonl or .jsonl.gz file, of format events.")],
    format_: FormatOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Write the log in time order, as JSON lines that can be replayed as a log of format events.

    Logs of any length are sorted, in bounded memory: what is too long is sorted on disk, in the folder of --out.
    """
    settings = settings_for(config)
    packed = ".gz" if out.name.endswith(".gz") else ""
    if not out.name.removesuffix(packed).endswith(".jsonl"):
        raise UsageError(f"{out}: name a file that ends in .jsonl or .jsonl.gz")
    if out.exists() and Path(file).exists() and out.samefile(file):
        raise UsageError(f"{out} is the log itself: name another file with --out")
    from replay.inspection import Inspection

    partial = out.with_name(f".{out.name}.partial{packed}")
    found = Inspection()
    with Output(json) as output, progress(f"sorting {file}") as (bar, task):
        log = opened(settings, file, format_, settings.log.max_rejected_share)
        try:
            _write_sorted(log, partial, found, bar, task)
            partial.replace(out)
        except OSError as error:
            raise LogError(f"{out}: {error.strerror or error}; make room or choose another place") from None
        finally:
            partial.unlink(missing_ok=True)
        said = f"{out}: {found.events:,} events of {found.users.different:,} users, from {said_time(found.from_ms)}"
        output.result(figures(log, found) | {"out": str(out)}, said)


def _write_sorted(log: LogReader, partial: Path, found: Inspection, bar: Progress, task: Any) -> None:
    from replay.inspection import watched
    from replay.readers import in_time_order
    from replay.sinks import JsonlSink

    def show_written(so_far: Inspection) -> None:
        bar.update(task, description=f"writing {partial.name[1:]}", said=f"{so_far.events:,} events")

    with JsonlSink(partial) as sink:
        ordered = in_time_order(log, directory=partial.parent, progress=lambda: show_read(bar, task, log))
        for record in watched(ordered, found, show_written):
            sink.send(record)


def opened(settings: Settings, file: str, format_: str | None, max_rejected_share: float) -> LogReader:
    """The log in `file`: of the format that is named, else as in [log] if that is this file, else as it looks.

    Raises LogError where no format fits, UsageError for an unknown one.
    """
    from replay.readers import detect, open_log

    name = format_ or (settings.log.format if settings.log.path == file else "") or detect(file)
    if name is None:
        raise LogError(
            f"{file}: no format fits; name one with --format, or let `headrace init {file}` map its columns"
        )
    columns = settings.log.columns if name == "generic" else None
    return open_log(name, file, max_rejected_share, columns)


def show_read(bar: Progress, task: Any, log: LogReader) -> None:
    """How far a log has been read, on its bar."""
    bar.update(task, said=f"{log.rows:,} rows")


def figures(log: LogReader, found: Inspection) -> dict[str, Any]:
    """What was found, for --json. Times in ms UTC; `rejected` counts the rows that gave no event, `wrong` those among
    them that should have."""
    return {
        "file": str(log.path), "format": log.name, "rows": log.rows, "rejected": log.rejected.total(),
        "wrong": log.wrong, "reasons": dict(log.rejected), "kinds": dict(found.kinds), "from": found.from_ms,
        "to": found.to_ms, "ordered": found.ordered, "disordered": found.disordered,
        "disorder_ms": found.disorder_ms, "duplicates": found.duplicates, "events": found.events,
        "users": found.users.different, "items": found.items.different, "categories": found.categories.different,
        "exact": found.exact, "events_per_s": found.events_per_s, "click_rate": found.click_rate,
    }  # fmt: skip


def table(log: LogReader, found: Inspection) -> Table:
    """What was found, for a reader."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, said in _lines(log, found):
        grid.add_row(Text(name, "bold"), Text(said))
    return grid


def _lines(log: LogReader, found: Inspection) -> list[tuple[str, str]]:
    about = "" if found.exact else "about "
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in log.rejected.most_common())
    lines = [
        ("format", f"{log.name}: {log.about}"),
        ("columns", _columns(log)),
        ("rows", f"{log.rows:,}, {log.wrong:,} of them wrong" + (f" (without an event: {reasons})" if reasons else "")),
        ("events", ", ".join(f"{count:,} {kind}" for kind, count in found.kinds.most_common()) or "none"),
        ("users", f"{about}{found.users.different:,}"),
        ("items", f"{about}{found.items.different:,} in {about}{found.categories.different:,} categories"),
        ("time", f"{said_time(found.from_ms)} to {said_time(found.to_ms)}"),
        ("order", _order(found)),
        ("duplicates", f"{about}{found.duplicates:,} events whose event_id came before"),
    ]
    if found.events_per_s is not None and found.busiest_hour is not None:
        hour, peak = found.busiest_hour
        lines.append(("rate", f"{found.events_per_s:,.3g} events/s, {peak:,.3g} in the hour from {said_time(hour)}"))
    if found.click_rate is not None:
        lines.append(("clicks", f"{100 * found.click_rate:.2f} % of {found.shown:,} items shown"))
    return lines


def _columns(log: LogReader) -> str:
    from replay.readers import TableReader
    from replay.readers.generic import Generic

    if isinstance(log, Generic):
        return said_mapping(log.mapping)
    return ", ".join(log.columns) if isinstance(log, TableReader) else "those of its records"


def said_mapping(mapping: ColumnMapping) -> str:
    """Which column is what, and what its kinds mean."""
    from replay.readers.generic import FIELDS

    named = [f"{field} is {getattr(mapping, field)}" for field in FIELDS if getattr(mapping, field)]
    kinds = [f"{value!r} is {kind}" for value, kind in mapping.kinds.items()]
    if not (mapping.kind or mapping.clicked or mapping.rating):
        kinds = [f"every row is a {mapping.default_kind}"]
    return ", ".join([*named, *kinds])


def _order(found: Inspection) -> str:
    from replay.fitting import said_duration

    if found.ordered:
        return "by time"
    return (
        f"not by time: {found.disordered:,} events come after a later one, by up to"
        f" {said_duration(found.disorder_ms)}; a replay sorts them"
    )


def said_time(ms: int | None) -> str:
    """A time of event time, to the second."""
    return "-" if ms is None else datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
