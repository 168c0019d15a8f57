"""headrace record: live topics into Parquet, for later replay."""

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
    progress,
    say,
    settings_for,
    until_signalled,
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace record --out recording --from-beginning")(record)


def record(
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="A directory, or a URL as s3://bucket/recording.")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    from_beginning: Annotated[
        bool, typer.Option("--from-beginning", help="A new recording begins with all events that Kafka still has.")
    ] = False,
    seconds: Annotated[float | None, typer.Option(min=0, help="For so long; else until it is stopped.")] = None,
    to_end: Annotated[bool, typer.Option("--to-end", help="Up to where the topics end now.")] = False,
    rows_per_file: Annotated[int, typer.Option(min=1, help="A file is closed at so many records …")] = 100_000,
    file_seconds: Annotated[float, typer.Option(min=0.1, help="… and when its first has waited so long.")] = 60.0,
    json: JsonOption = False,
) -> None:
    """Live topics into Parquet files by hour, for later replay.

    The topics events and items, record by record with their offsets, until it is stopped (Ctrl-C or SIGTERM write what
    waits in memory). Started again over the same directory it goes on where that ends: killed at any moment, it loses
    and doubles nothing. `headrace replay recording DIR` reads it.
    """
    settings = connected(settings_for(config, data_dir=data_dir, bootstrap=bootstrap))
    from deploy.time_travel import recording_alone
    from replay.recorder import Recorder, RecorderSettings

    with Output(json) as output, recording_alone(settings.data_dir, out), progress("recording") as (bar, task):
        recorder = Recorder(
            settings.connection, settings.topics, out,
            RecorderSettings(rows_per_file=rows_per_file, file_seconds=file_seconds), from_beginning,
            said=lambda line: say(f"headrace: {line}"),
        )  # fmt: skip
        with until_signalled() as stopped:
            say(f"headrace: recording {settings.topics.events} and {settings.topics.items} into {out}")
            done = recorder.run(
                stopped, seconds, to_end,
                lambda so_far: bar.update(task, said=f"{so_far.events:,} events, {so_far.files:,} files"),
            )  # fmt: skip
        gaps = [dict(zip(("topic", "partition", "from", "to"), gap, strict=True)) for gap in done.gaps]
        result = {
            "events": done.events, "records": done.records, "items": done.items, "files": done.files, "gaps": gaps,
            "seconds": round(done.seconds, 3), "out": out,
        }  # fmt: skip
        output.result(result, f"{done.events:,} events and {done.items:,} items in {done.files:,} files of {out}")
