"""headrace bench growth: where the cost of an event leaves the line, while one thing grows."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.common import JsonOption, Output, progress
from embedding_store.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace bench growth --axis candidates --axis history --out docs")(growth)


def growth(
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="One of: ids, memory, users, windows, busiest, history, partitions, candidates, catalogue, "
            "replicas, ranks. Again for more. [all]"
        ),
    ] = None,
    largest: Annotated[int, typer.Option(min=1, help="No point above it; 1e8 ids take 20 GB of disk.")] = 10_000_000,
    folder: Annotated[Path | None, typer.Option(help="Where stores are meanwhile. [where temporary files are]")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Plots and figures to DIR/plots, tables into DIR/scale.md.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """What an event costs while one thing grows and all else stays, point by point, each on one core: slopes and knees.

    All axes as they stand: half an hour on a quiet machine, 10 GB of disk, 5 GB of memory.
    """  # fmt: skip
    with Output(json) as output:
        from deploy.bench.common import plots_folder
        from deploy.bench.growth import bench_growth, chosen, points_of
        from deploy.bench.growth_report import growth_table, write

        axes = chosen(axis or (), largest)
        if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UsageError(f"{folder} is no folder that can be written to: choose another with --folder")
        if out is not None:
            plots_folder(out)
        count = 1 + sum(len(points_of(one, largest)) for one in axes)
        with _server() as server, progress("growth", count) as (bar, task):
            result = bench_growth(axes, largest, folder, server, lambda: bar.advance(task))
        written = [] if out is None else [str(path) for path in write(result, out)]
        output.result(result, "\n".join([result["machine"], growth_table(result), *written]))


@contextmanager
def _server() -> Iterator[Callable[[], tuple[str, int]]]:
    """What gives (address, pid) of a broker of our own, started when it is first asked for."""
    from deploy.broker import Broker

    with ExitStack() as stack:
        started: list[tuple[str, int]] = []

        def server() -> tuple[str, int]:
            if not started:
                home = stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-bench-"))
                broker = stack.enter_context(Broker.start(Path(home)))
                started.append((broker.bootstrap, broker.pid))
            return started[0]

        yield server
