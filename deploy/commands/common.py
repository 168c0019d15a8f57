"""What the commands share: their common options, where results and progress go, which broker is meant."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from embedding_store.errors import BrokerError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

    from deploy.settings import Settings
    from replay.player import Played

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings file. Without it: headrace.toml here, if there is one."),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Where all state lives. [.headrace]", show_default=False),
]
BootstrapOption = Annotated[
    str | None,
    typer.Option(
        "--bootstrap", metavar="HOST:PORT", help="Kafka to use instead of the embedded one.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]


def settings_for(config: Path | None, **flags: Any) -> Settings:
    """The settings of a command; flags with a dot in the name are written with two underscores (`join__wait_ms`)."""
    from deploy.settings import load

    return load(config, os.environ, {name.replace("__", "."): value for name, value in flags.items()})


def connected(settings: Settings) -> Settings:
    """The settings with `bootstrap` filled in, and [kafka] where the embedded broker is a secure one.

    Raises BrokerError if none is named and no embedded broker runs.
    """
    from deploy import broker

    if settings.bootstrap:
        return settings
    running = broker.status(settings.data_dir)
    if running is None:
        raise no_broker(settings)
    secure = {} if settings.mentions("kafka") else broker.client_flags(settings.data_dir)
    return settings.with_flags({"bootstrap": running.bootstrap, **secure})


def millis(option: str, text: str | None) -> int | None:
    """ms UTC of a time as 2017-11-26, 2017-11-26T09:30, or of ms."""
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{option} {text}: not a time; write 2026-01-31, 2026-01-31T09:30 or milliseconds") from None
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)


def no_broker(settings: Settings) -> BrokerError:
    """The error that says how to get a broker."""
    start = f"headrace broker start --data-dir {settings.data_dir}"
    return BrokerError(f"no broker runs on {settings.data_dir}: `{start}`, or name one with --bootstrap HOST:PORT")


class Output:
    """A command's stdout. With `as_json` whatever else writes to it goes to stderr, and the result is its only line."""

    def __init__(self, as_json: bool) -> None:
        self._json, self._stdout = as_json, -1

    def __enter__(self) -> Self:
        if self._json:
            sys.stdout.flush()
            self._stdout = os.dup(1)
            os.dup2(2, 1)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._json:
            self._restore()

    def result(self, value: Mapping[str, Any], text: RenderableType | None = None) -> None:
        """Print the result: `value` as JSON, or `text` for a reader. A reader that has gone ends the command (141)."""
        try:
            if self._json:
                import orjson

                self._restore()
                options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
                sys.stdout.write(orjson.dumps(value, option=options, default=str).decode() + "\n")
            elif text is not None:
                sys.stdout.write(f"{text}\n" if isinstance(text, str) else _rendered(text))
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes at the end
            raise typer.Exit(141) from None  # as a program that SIGPIPE ends

    def _restore(self) -> None:
        if self._stdout >= 0:
            sys.stdout.flush()
            os.dup2(self._stdout, 1)
            os.close(self._stdout)
            self._stdout = -1


def _rendered(text: RenderableType) -> str:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as captured:
        console.print(text)
    return captured.get()


@contextmanager
def until_signalled() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT came: they end what is in the block by this alone, and not the process."""
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, frame: came.append(number)) for number in numbers]
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def say(line: str) -> None:
    """One line on stderr, before the command goes on."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[tuple[Progress, Any]]:
    """A progress bar on stderr, on a terminal only: (bar, task)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=False) as bar:
        yield bar, bar.add_task(description, total=total, said="")


def jars_progress(bar: Progress, task: Any) -> Any:
    """A callback (done, total) for the fetching of Kafka's jars."""

    def show(done: int, total: int) -> None:
        bar.update(task, description="fetching Kafka", total=total, completed=done, said=f"{done} of {total} files")

    return show


def show_played(bar: Progress, task: Any, played: Played) -> None:
    """How far a play has come, on its bar."""
    said = f"{played.events:,} events, {played.events_per_s:,.0f}/s"
    if played.paused:
        said += ", paused"
    elif played.eta_s is not None:
        said += f", {timedelta(seconds=round(played.eta_s))} left"
    if played.fraction is None:
        bar.update(task, completed=played.events, said=said)
    else:
        bar.update(task, total=1.0, completed=played.fraction, said=said)
