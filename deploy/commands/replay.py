"""headrace simulate | replay: events onto Kafka (or into a file), from simulated users or from a historical log."""

from __future__ import annotations

import time
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
)
from embedding_store.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from replay.player import Played

DEFAULT_EVENTS = 20_000


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command(epilog="Example: headrace simulate --events 20000 --out events.jsonl.gz")(simulate)
    app.command(epilog="Example: headrace replay taobao UserBehavior.csv --max-speed")(replay)


def simulate(
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    events: Annotated[int | None, typer.Option(min=1, help="How many events, about. [20000]")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="How many seconds of event time.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the world: same seed, same users.")] = None,
    policy: Annotated[
        str, typer.Option(metavar="NAME", help="What is shown: random, or oracle (the best).")
    ] = "random",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .jsonl or .jsonl.gz file instead of Kafka.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Simulated users onto Kafka, or into a file.

    Onto Kafka at the pace of a clock, the events' times are now. Into a file as fast as it goes, always the same bytes.
    """
    settings = settings_for(config, data_dir=data_dir, bootstrap=bootstrap, simulator__seed=seed)
    from replay.player import PlaySettings
    from replay.simulator.run import POLICIES, START_MS, simulate_to
    from replay.sinks import JsonlSink, KafkaSink

    if policy not in POLICIES:
        raise UsageError(f"no policy is named {policy!r}; there are {', '.join(POLICIES)}")
    if events is None and seconds is None:
        events = DEFAULT_EVENTS
    world = settings.simulator
    sink: KafkaSink | JsonlSink
    if out is None:
        settings = connected(settings)
        sink = KafkaSink(settings.bootstrap, settings.topics.events, settings.topics.items)
        start_ms, pace = int(time.time() * 1000), PlaySettings(speed=1.0, closing_ms=0)
    else:
        sink, start_ms, pace = JsonlSink(out), START_MS, PlaySettings()
    with Output(json) as output, progress("simulating", events) as (bar, task):
        with sink:
            done = simulate_to(
                sink, world, seconds=seconds, events=events, policy=POLICIES[policy], start_ms=start_ms, pace=pace,
                progress=lambda played: _show(bar, task, played),
            )  # fmt: skip
        result = {"events": done.events, "seed": done.seed, "true_ctr": done.true_ctr}
        output.result(result, f"{done.events:,} events, seed {done.seed}, true click rate {100 * done.true_ctr:.2f} %")


def replay(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Format of the log, as taobao.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The log.")],
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    speed: Annotated[float | None, typer.Option(min=1e-6, help="Times the pace of the log. [1]")] = None,
    max_speed: Annotated[bool, typer.Option("--max-speed", help="As fast as it goes.")] = False,
    json: JsonOption = False,
) -> None:
    """Play a historical log onto Kafka, for the workers that run there."""
    if speed is not None and max_speed:
        raise UsageError("--speed and --max-speed exclude each other")
    settings = settings_for(config, data_dir=data_dir, bootstrap=bootstrap)
    from replay.player import PlaySettings, play
    from replay.readers import open_log
    from replay.sinks import KafkaSink

    log = open_log(name, file)
    if not log.has_impressions and not settings.join.join.implicit:
        say(f"headrace: a {name} log has no impressions: the join worker learns from it with join.implicit = true only")
    settings = connected(settings)
    pace = PlaySettings(speed=0.0 if max_speed else speed or 1.0)
    with Output(json) as output, progress(f"playing {file.name}") as (bar, task):
        with KafkaSink(settings.bootstrap, settings.topics.events, settings.topics.items) as sink:
            played = play(log, sink, pace, lambda so_far: _show(bar, task, so_far))
        result = {
            "events_in": played.events, "events_rejected": played.rejected.total(), "records": played.records,
            "items": played.items, "ticks": played.ticks, "events_per_s": round(played.events_per_s, 1),
            "seconds": round(played.seconds, 3),
        }  # fmt: skip
        said = f"{played.events:,} events in {played.seconds:.1f} s, {played.rejected.total():,} rows rejected"
        output.result(result, said)


def _show(bar: Progress, task: Any, played: Played) -> None:
    bar.update(task, completed=played.events, said=f"{played.events:,} events, {played.events_per_s:,.0f}/s")
