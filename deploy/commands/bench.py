"""headrace bench: figures, each beside a reference that was measured in the same run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.commands import bench_all, bench_growth
from deploy.commands.common import BootstrapOption, JsonOption, Output, progress, say

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(help="Figures, each beside a reference measured in the same run.")

RunsOption = Annotated[int, typer.Option(min=1, help="Runs; the figures are their medians.")]


@app.callback()
def bench() -> None:
    """Figures, each beside a reference measured in the same run."""


@app.command(epilog="Example: headrace bench intake --events 200000 --runs 3")
def intake(
    events: Annotated[int, typer.Option(min=50_000, help="Events in the topic.")] = 400_000,
    faust_events: Annotated[int, typer.Option(min=1_000, help="How many of them stock Faust reads.")] = 40_000,
    runs: RunsOption = 3,
    bootstrap: BootstrapOption = None,
    json: JsonOption = False,
) -> None:
    """Whole batches through Faust, beside stock Faust and the bare client on the same topic.

    Without --bootstrap an embedded broker is started for it, and removed.
    """
    with Output(json) as out:
        from deploy.bench.intake import bench_intake

        with _broker(bootstrap) as server, progress("intake", 3 * runs) as (bar, task):
            result = bench_intake(server, events, faust_events, runs, lambda: bar.advance(task))
        out.result(result, _table("intake", result))


@app.command(epilog="Example: headrace bench join --events 400000 --runs 3")
def join(
    events: Annotated[int, typer.Option(min=10_000, help="Events in the log.")] = 2_000_000,
    page: Annotated[int, typer.Option(min=1, max=100, help="Items of an impression.")] = 10,
    runs: RunsOption = 1,
    json: JsonOption = False,
) -> None:
    """The joiner with its store on one core, beside plain dictionaries. Exit 1 if their rows differ."""
    with Output(json) as out:
        from deploy.bench.common import BenchError
        from deploy.bench.join import bench_join

        with progress("join", 4 * runs) as (bar, task):
            result = bench_join(events, page, runs, lambda: bar.advance(task))
        out.result(result, _table("join", result))
        if not result["digest_equal"]:
            raise BenchError("the joiner's rows are not those of the reference: the figures mean nothing; report it")


@app.command(epilog="Example: headrace bench store --rows 200000 --largest 1000000 --ids 1000000 --memory 100000")
def store(
    rows: Annotated[int, typer.Option(min=1_000, help="Ids in the row map.")] = 2_000_000,
    largest: Annotated[int, typer.Option(min=10_000, help="Rows of the largest table that is committed.")] = 10_000_000,
    touched: Annotated[int, typer.Option(min=1, help="Rows that a commit changes.")] = 50_000,
    ids: Annotated[int, typer.Option(min=10_000, help="Ids that go through memory.")] = 20_000_000,
    memory: Annotated[int, typer.Option(min=1_000, help="Rows of the table that they go through.")] = 2_000_000,
    map_only: Annotated[bool, typer.Option("--map-only", help="The row map and nothing else: seconds.")] = False,
    runs: RunsOption = 1,
    json: JsonOption = False,
) -> None:
    """The row map, commits and restores of large tables, and more ids than memory holds, on one core.

    Exit 1 if a row did not come back as it was learned. As it stands: five minutes, 5 GB of memory, 10 GB of disk.
    """
    with Output(json) as out:
        from deploy.bench.common import BenchError
        from deploy.bench.store import bench_store

        with progress("store", (3 if map_only else 7) * runs) as (bar, task):
            result = bench_store(rows, largest, touched, ids, memory, runs, lambda: bar.advance(task), map_only)
        out.result(result, _table("store", result))
        if not map_only and not result["tier_exact"]:
            raise BenchError("rows came back from the store as they were not learned: report it")


@app.command(epilog="Example: headrace bench train --steps 200 --runs 3")
def train(
    ids: Annotated[int, typer.Option(min=1_000, help="Ids of each of the 8 features.")] = 200_000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of 1,024 examples that are timed, at least.")] = 200,
    runs: RunsOption = 3,
    json: JsonOption = False,
) -> None:
    """A training step with id map, tracking and commits, beside bare TorchRec and torch by hand, on one core."""
    with Output(json) as out:
        from deploy.bench.train import bench_train

        with progress("train", 3 * runs) as (bar, task):
            result = bench_train(ids, steps, runs, lambda: bar.advance(task))
        out.result(result, _table("train", result))


@app.command(epilog="Example: headrace bench publish --rows 200000 --dim 64 --runs 3")
def publish(
    rows: Annotated[int, typer.Option(min=1_000, help="Rows that are sent, 20,000 a version.")] = 400_000,
    dim: Annotated[int, typer.Option(min=4, help="Weights of a row.")] = 64,
    runs: RunsOption = 1,
    json: JsonOption = False,
) -> None:
    """Versions encoded and put together again, as fp32, fp16 and int8, beside safetensors alone, on one core."""
    with Output(json) as out:
        from deploy.bench.publish import bench_publish

        with progress("publish", 2 * runs) as (bar, task):
            result = bench_publish(rows, dim, runs, lambda: bar.advance(task))
        out.result(result, _table("publish", result))


@app.command(epilog="Example: headrace bench learners --events 100000 --runs 3")
def learners(
    events: Annotated[
        int, typer.Option(min=5_000, help="Events in the log; some two in five become examples.")
    ] = 100_000,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step; 512: a train worker's that is behind.")] = 512,
    runs: RunsOption = 1,
    json: JsonOption = False,
) -> None:
    """Headrace's step beside river and Vowpal Wabbit on the same examples, on one core."""
    with Output(json) as out:
        from deploy.bench.learners import bench_learners

        with progress("learners", runs) as (bar, task):
            result = bench_learners(events, batch, runs, lambda: bar.advance(task))
        out.result(result, _table("learners", result))


@app.command(epilog="Example: headrace bench scale --steps 200 --runs 3")
def scale(
    steps: Annotated[int, typer.Option(min=20, help="Steps of 1,024 rows.")] = 200,
    runs: RunsOption = 1,
    json: JsonOption = False,
) -> None:
    """The trainer on two ranks beside one, on the same batches. Exit 1 if their losses differ by more than 1e-5."""
    with Output(json) as out:
        from deploy.bench.common import BenchError
        from deploy.bench.scale import CLOSE, bench_scale

        with progress("scale", 2 * runs) as (bar, task):
            result = bench_scale(steps, runs, lambda: bar.advance(task))
        out.result(result, _table("scale", result))
        if not result["loss_difference"] <= CLOSE:
            raise BenchError(f"two ranks learn otherwise than one: their losses differ by {result['loss_difference']}")


@app.command(epilog="Example: headrace bench serve --runs 3, or for the memory: --share 0.8 --seconds 1000 --runs 1")
def serve(
    items: Annotated[int, typer.Option(min=1_000, help="Items of the model.")] = 100_000,
    users: Annotated[int, typer.Option(min=1_000, help="Its users, all with histories.")] = 200_000,
    rate: Annotated[float, typer.Option(min=0, help="Requests a second; 0: a share of the knee.")] = 0.0,
    share: Annotated[float, typer.Option(min=0.01, max=1, help="Of the knee, where p99 goes past 25 ms.")] = 0.4,
    seconds: Annotated[float, typer.Option(min=1, help="Of a run.")] = 30.0,
    poisson: Annotated[bool, typer.Option("--poisson", help="Requests come at random, not at even distances.")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Runs; the figures are of the best.")] = 3,
    bootstrap: BootstrapOption = None,
    json: JsonOption = False,
) -> None:
    """A replica on one core, asked to rank 500 candidates, while versions come: beside the bare forward.

    Without --bootstrap an embedded broker is started for it, and removed.
    """
    with Output(json) as out:
        from deploy.bench.common import on_cores
        from deploy.bench.serve import apart, bench_serve

        arrivals = "poisson" if poisson else "even"
        core, others = apart()
        with on_cores(others), _broker(bootstrap) as server, progress("serve", 1 + runs) as (bar, task):
            result = bench_serve(
                server, core, items, users, rate, share, seconds, runs, arrivals, lambda: bar.advance(task)
            )
        out.result(result, _table("serve", result))


@app.command(epilog="Example: headrace bench freshness --rate 5000 --runs 3")
def freshness(
    rate: Annotated[float, typer.Option(min=10, max=1_000_000, help="Events a second of the standard mix.")] = 5_000.0,
    seconds: Annotated[float, typer.Option(min=2, help="Of a run; some 80 probes a second.")] = 30.0,
    warm_up: Annotated[float, typer.Option(min=0, help="Seconds of load before the first run.")] = 15.0,
    runs: Annotated[int, typer.Option(min=1, help="Runs; the figures are of that with the median p99.")] = 1,
    histogram: Annotated[
        bool, typer.Option("--histogram", help="Also what `headrace monitor` shows, by probes of its own.")
    ] = False,
    bootstrap: BootstrapOption = None,
    json: JsonOption = False,
) -> None:
    """From an event to the replica that has learned of it: Kafka and all workers on two cores, by probes.

    Without --bootstrap an embedded broker is started for it, and removed.
    """
    with Output(json) as out:
        from deploy.bench.freshness import bench_freshness

        with _broker(bootstrap) as server, progress("freshness", 1 + runs) as (bar, task):
            result = bench_freshness(server, rate, seconds, runs, warm_up, lambda: bar.advance(task), histogram)
        out.result(result, _table("freshness", result))
        if not result["keeps_up"]:
            say(f"the system falls behind: of {result['rate']:,.0f} events/s it handles {result['handled_per_s']:,.0f}")


@app.command(name="end_to_end", epilog="Example: headrace bench end_to_end --events 100000 --faust-events 20000")
def end_to_end(
    events: Annotated[int, typer.Option(min=10_000, help="Events of the standard mix.")] = 300_000,
    faust_events: Annotated[int, typer.Option(min=1_000, help="How many of them plain Faust is sent.")] = 60_000,
    runs: RunsOption = 1,
    bootstrap: BootstrapOption = None,
    json: JsonOption = False,
) -> None:
    """From Kafka to a replica on two cores, beside plain Faust, and beside joiner and TorchRec alone.

    Without --bootstrap an embedded broker is started for it, and removed. Exit 1 if an example was lost or doubled.
    """
    with Output(json) as out:
        from deploy.bench.common import BenchError, on_cores
        from deploy.bench.end_to_end import bench_end_to_end, cores

        with on_cores(cores()), _broker(bootstrap) as server, progress("end_to_end", 4 * runs) as (bar, task):
            result = bench_end_to_end(server, events, faust_events, runs, lambda: bar.advance(task))
        out.result(result, _table("end_to_end", result))
        if result["lost"] or result["duplicated"]:
            raise BenchError(
                f"{result['lost']} lost, {result['duplicated']} duplicated: the rates mean nothing; report it"
            )


bench_growth.register(app)
bench_all.register(app)


@contextmanager
def _broker(bootstrap: str | None) -> Iterator[str]:
    """The named broker, or one of our own for as long as it is needed."""
    if bootstrap is not None:
        yield bootstrap
        return
    from deploy.broker import Broker

    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder, Broker.start(Path(folder)) as broker:
        yield broker.bootstrap


def _table(name: str, result: dict[str, Any]) -> Table:
    from rich.table import Table

    from deploy.bench.common import machine

    table = Table(title=f"{name}: {machine()}", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for key, value in _flat("", result):
        table.add_row(key, _cell(value))
    return table


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(name, figure) of all that is in it."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    inside = value.items() if isinstance(value, dict) else enumerate(value, 1)
    for key, part in inside:
        yield from _flat(f"{name} {key}".strip(), part)


def _cell(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:,.{1 if value >= 10 else 2}f}"
        case int():
            return f"{value:,}"
    return "–" if value is None else str(value)
