"""headrace simulate: events of simulated users, onto Kafka or into a file."""

from __future__ import annotations

import time
from contextlib import ExitStack
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
    show_played,
)
from embedding_store.errors import UsageError

if TYPE_CHECKING:
    from deploy.settings import Settings
    from replay.simulator import Marketplace, Policy, SimulatorSettings
    from replay.simulator.views import Views

DEFAULT_EVENTS = 20_000
AS_LOGGED = "as-logged"


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
        str | None,
        typer.Option(metavar="NAME", help="What is shown: random, oracle (the best), as-logged (with --like)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .jsonl or .jsonl.gz file instead of Kafka.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The true probabilities and delays: .jsonl or .jsonl.gz.")
    ] = None,
    like: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="NAME FILE", help="A world fitted to this log.", show_default=False),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(metavar="SPLIT", help="With --like: fit to one half, compare with the other: time or alternate."),
    ] = None,
    user_model: Annotated[str | None, typer.Option(metavar="NAME", help="How users choose: taste or mission.")] = None,
    bots: Annotated[float | None, typer.Option(min=0, max=0.5, help="Share of the users that are bots.")] = None,
    json: JsonOption = False,
) -> None:
    """Simulated users onto Kafka, or into a file.

    Onto Kafka at the pace of a clock, the events' times are now. Into a file as fast as it goes, always the same bytes.
    """
    settings = settings_for(
        config, data_dir=data_dir, bootstrap=bootstrap, simulator__seed=seed, simulator__user_model=user_model,
        simulator__bots=bots,
    )  # fmt: skip
    if check is not None:
        _check(settings, like, check, json)
        return
    if events is None and seconds is None:
        events = DEFAULT_EVENTS
    chosen = _policy(policy, like)
    with Output(json) as output:
        world = _world(settings.simulator, like, truth is not None)
        result = _run(settings, world, chosen, out=out, truth=truth, seconds=seconds, events=events)
        text = f"{result['events']:,} events, seed {result['seed']}, true click rate {100 * result['true_ctr']:.2f} %"
        output.result(result, text)


def _run(
    settings: Settings, world: Marketplace, policy: Policy, *, out: Path | None, truth: Path | None,
    seconds: float | None, events: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Simulate into the file or onto Kafka: the keys of --json."""
    from replay.player import PlaySettings
    from replay.simulator.run import START_MS, simulate_to
    from replay.simulator.truth import TruthFile
    from replay.sinks import JsonlSink, KafkaSink

    sink: KafkaSink | JsonlSink
    if out is None:
        settings = connected(settings)
        sink = KafkaSink(settings.connection, settings.topics.events, settings.topics.items)
        start_ms, pace = int(time.time() * 1000), PlaySettings(speed=1.0, closing_ms=0)
    else:
        sink, start_ms, pace = JsonlSink(out), START_MS, PlaySettings()
    with progress("simulating", events) as (bar, task), ExitStack() as stack:
        stack.enter_context(sink)
        side = None if truth is None else stack.enter_context(TruthFile(truth))
        done = simulate_to(
            sink, world.settings, seconds=seconds, events=events, policy=policy, start_ms=start_ms, pace=pace,
            world=world, truth=side, progress=lambda played: show_played(bar, task, played),
        )  # fmt: skip
    return {"events": done.events, "seed": done.seed, "true_ctr": done.true_ctr}


def _policy(name: str | None, like: tuple[str, str] | None) -> Policy:
    from replay.simulator.fitted import as_logged
    from replay.simulator.run import POLICIES

    policies = POLICIES | ({AS_LOGGED: as_logged} if like else {})
    name = name or (AS_LOGGED if like else "random")
    if name == AS_LOGGED and not like:
        raise UsageError(f"--policy {AS_LOGGED} shows what a log showed: name the log with --like NAME FILE")
    if name not in policies:
        raise UsageError(f"no policy is named {name!r}; there are {', '.join(policies)}")
    return policies[name]


def _world(settings: SimulatorSettings, like: tuple[str, str] | None, keep_truth: bool) -> Marketplace:
    from replay.simulator import Marketplace

    if like is None:
        return Marketplace(settings, keep_truth=keep_truth)
    from replay.simulator.fit import fit
    from replay.simulator.fitted import FittedMarketplace

    return FittedMarketplace(fit(_views(like)), settings, keep_truth=keep_truth)


def _views(like: tuple[str, str]) -> Views:
    from replay.readers import in_time_order, open_log
    from replay.simulator.views import views_of

    return views_of(in_time_order(open_log(*like)))


def _check(settings: Settings, like: tuple[str, str] | None, split: str, json: bool) -> None:
    from replay.simulator.check import check

    if like is None:
        raise UsageError("--check compares a world with the log that it is like: name one with --like NAME FILE")
    with Output(json) as output:
        say("fitting to one half, simulating, comparing with the other")
        found = check(_views(like), split, settings.simulator)
        output.result(found, "\n".join(f"{name}: {value}" for name, value in found.items()))
