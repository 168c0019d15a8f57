"""headrace simulate: events of simulated users, onto Kafka or into a file."""

from __future__ import annotations

import time
from pathlib import Path
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
    settings_for,
    show_played,
)
from embedding_store.errors import UsageError

DEFAULT_EVENTS = 20_000


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace simulate --events 20000 --out events.jsonl.gz")(simulate)


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
                progress=lambda played: show_played(bar, task, played),
            )  # fmt: skip
        result = {"events": done.events, "seed": done.seed, "true_ctr": done.true_ctr}
        output.result(result, f"{done.events:,} events, seed {done.seed}, true click rate {100 * done.true_ctr:.2f} %")
