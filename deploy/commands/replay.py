"""headrace replay: a historical log through the system."""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.commands.checkpoint import place_of
from deploy.commands.common import (
    BootstrapOption,
    ConfigOption,
    DataDirOption,
    JsonOption,
    Output,
    connected,
    millis,
    progress,
    say,
    settings_for,
    show_played,
    until_signalled,
)
from embedding_store.errors import HeadraceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploy.settings import Settings
    from replay.player import Player, PlaySettings
    from replay.readers import LogReader


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace replay taobao UserBehavior.csv --direct --deterministic")(replay)


def replay(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Its format, as taobao; or dead.")] = None,
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="The log: a path or a URL. [log.path]")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    bootstrap: BootstrapOption = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Without Kafka: join and train in this process, by the log's clock.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="With --direct: bit for bit the same each time.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --direct: go on where the last one was killed.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Of first weights and negatives.")] = None,
    speed: Annotated[float | None, typer.Option(min=1e-6, help="Onto Kafka: times the pace of the log. [1]")] = None,
    max_speed: Annotated[bool, typer.Option("--max-speed", help="Onto Kafka: as fast as it goes.")] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Onto Kafka: do not wait for the workers, say only what was sent.")
    ] = False,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Onto Kafka: /metrics on 127.0.0.1 while it is played; 0: none.")
    ] = 0,
    from_time: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="Only what happened from then on (UTC, or ms).")
    ] = None,
    until_time: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Only what came before.")] = None,
    duplicates: Annotated[float, typer.Option(min=0, max=1, help="A fault: share of events sent twice.")] = 0.0,
    shuffle_ms: Annotated[int, typer.Option(min=0, help="A fault: events change places within so much.")] = 0,
    delay: Annotated[float, typer.Option(min=0, max=1, help="A fault: share that comes late …")] = 0.0,
    delay_ms: Annotated[int, typer.Option(min=1, help="… by up to so much.")] = 5_000,
    drop: Annotated[float, typer.Option(min=0, max=1, help="A fault: share that never comes.")] = 0.0,
    garbage: Annotated[float, typer.Option(min=0, max=1, help="A fault: share with a broken record before it.")] = 0.0,
    fault_seed: Annotated[int, typer.Option(min=0, help="Same log and seed: same faults.")] = 0,
    from_checkpoint: Annotated[
        str | None,
        typer.Option("--from-checkpoint", metavar="EPOCH.SEQUENCE",
                     help="Of a recording, as --direct: go on from a copy of this kept checkpoint."),
    ] = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Of a recording, as --direct: go on with the live topics where it ends.")
    ] = False,
    to_end: Annotated[bool, typer.Option("--to-end", help="With --continue: up to where they end by then.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Of dead: write them to FILE, to be edited.")
    ] = None,
    repair: Annotated[
        str | None, typer.Option("--repair", metavar="MODULE:FUNCTION", help="Of dead: bytes to bytes or None.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Of dead: those that were read before, too.")] = False,
    json: JsonOption = False,
) -> None:
    """A historical log through the system.

    Onto Kafka, for the workers that run there, or --direct in this process, without Kafka. Onto Kafka SIGUSR1 pauses
    it, SIGUSR2 goes on.

    `headrace replay recording DIR --direct` takes the very records of the live topics, as they were recorded; with
    --continue it then learns on from the live ones until Ctrl-C, --until or --to-end.

    `headrace replay dead` takes the refused records instead, those that are new in events.dead: as they are or through
    --repair, what is accepted by now goes back to events; or with --out all of them go to a file, and `headrace replay
    dead FILE` sends that back. They come late by then: they correct what is still open and enter the users' histories.
    """
    if name == "dead":
        from deploy.commands.dead import replay_dead

        for_logs = (direct, deterministic, resume, speed, max_speed, no_wait, from_time, until_time, duplicates,
                    shuffle_ms, delay, drop, garbage, from_checkpoint, go_on, to_end, metrics_port)  # fmt: skip
        if any(for_logs):
            raise UsageError("replay dead knows --out, --repair, --again and where Kafka is: leave the others out")
        return replay_dead(settings_for(config, data_dir=data_dir, bootstrap=bootstrap), file, out, repair, again, json)
    direct = direct or go_on or from_checkpoint is not None  # these have no other way
    _refuse(
        (out or repair or again, "--out, --repair and --again are of `headrace replay dead`"),
        (speed is not None and max_speed, "--speed and --max-speed exclude each other"),
        (direct and (speed is not None or max_speed or no_wait or metrics_port or (bootstrap and not go_on)),
         "--direct goes without Kafka and as fast as it can: leave the other options out"),
        ((deterministic or resume) and not direct,
         "--deterministic and --resume are of a replay without Kafka: add --direct"),
        (to_end and not go_on, "--to-end is of --continue"),
    )  # fmt: skip
    settings = settings_for(
        config, data_dir=data_dir, bootstrap=bootstrap, log__format=name, log__path=file, model__seed=seed,
        model__ranker__seed=seed,
    )  # fmt: skip
    if not settings.log.format or not settings.log.path:
        raise UsageError("which log? headrace replay NAME FILE, or [log] format and path in the settings")
    travels = direct and settings.log.format == "recording"
    _refuse(
        (not travels and (from_checkpoint or go_on),
         "--from-checkpoint and --continue are of: headrace replay recording DIR"),
        (travels and (from_time or duplicates or shuffle_ms or delay or drop or garbage),
         "a recording is replayed --direct as it is: leave --from and the faults out"),
    )  # fmt: skip
    if travels:
        place, until_ms = place_of(from_checkpoint, "--from-checkpoint"), millis("--until", until_time)
        with Output(json) as output:
            result = _travel(settings, deterministic, resume, place, go_on, to_end, until_ms)
            output.result(result, _text(result))
        return
    from replay.readers import open_log

    log = open_log(settings.log.format, settings.log.path, settings.log.max_rejected_share, settings.log.columns)
    faults = {
        "seed": fault_seed, "duplicates": duplicates, "shuffle_ms": shuffle_ms, "delay": delay, "delay_ms": delay_ms,
        "drop": drop, "garbage": garbage,
    }  # fmt: skip
    pace = {"speed": 0.0 if max_speed or direct else speed or 1.0, "closing_ms": settings.join.join.closing_ms}
    play = _play_settings(pace, from_time, until_time, faults)
    with Output(json) as output:
        if direct:
            result = _directly(settings, log, play, deterministic, resume)
        else:
            result = _onto_kafka(settings, log, play, wait=not no_wait, metrics_port=metrics_port)
        output.result(result, _text(result))
    if not direct and not no_wait:
        _refuse_what_is_wrong(result)


def _refuse(*rules: tuple[object, str]) -> None:
    """Raises UsageError with what is said of the first that holds."""
    for wrong, said in rules:
        if wrong:
            raise UsageError(said)


def _refuse_what_is_wrong(result: dict[str, Any]) -> None:
    """Raises HeadraceError where the workers have not learned what was played, or not once each."""
    if result["trained_examples"] is None:
        raise HeadraceError(
            "the workers have not learned it, nothing more for a minute: are join and train running, or does the guard"
            " hold versions back? Their logs say"
        )
    if result["lost"] or result["duplicated"]:
        raise HeadraceError(
            f"{result['lost']} examples were lost and {result['duplicated']} trained twice, of all that is in Kafka: a"
            " fault of Headrace, if [join] says the same here as to the workers; then keep the topics and report it"
        )


def _play_settings(
    pace: dict[str, Any], from_time: str | None, until_time: str | None, faults: dict[str, Any]
) -> PlaySettings:
    import msgspec

    from replay.player import PlaySettings

    window = {"from_ms": millis("--from", from_time), "until_ms": millis("--until", until_time)}
    try:
        return msgspec.convert({**pace, **window, "faults": faults}, PlaySettings)
    except msgspec.ValidationError as error:
        raise UsageError(str(error).replace("`", "")) from None


def _directly(
    settings: Settings, log: LogReader, play: PlaySettings, deterministic: bool, resume: bool
) -> dict[str, Any]:
    from deploy.replaying import replay_directly

    with progress(f"replaying {log.name}") as (bar, task):
        return replay_directly(
            settings, log, play, deterministic=deterministic, resume=resume,
            progress=lambda so_far: bar.update(
                task, completed=so_far.events, said=f"{so_far.events:,} events, {so_far.events_per_s:,.0f}/s"
            ),
        )  # fmt: skip


def _travel(settings: Settings, deterministic: bool, resume: bool, place: tuple[int, int] | None, go_on: bool,
            to_end: bool, until_ms: int | None) -> dict[str, Any]:  # fmt: skip
    """A recording's very records, without Kafka; with `go_on` the live topics behind them."""
    from deploy.time_travel import Journey, replay_recording
    from replay.recording import EVENTS, Recording

    recording = Recording(settings.log.path)
    journey = Journey(deterministic, resume, place, go_on, to_end, until_ms)
    for topic in recording.about.topics:
        for gap in recording.gaps(topic):
            say(f"headrace: {topic}, partition {gap.partition}: the recording has not got the records "
                f"{gap.from_offset} to {gap.to_offset}: Kafka had deleted them")  # fmt: skip
    if late := [p for p, offset in enumerate(recording.begin(EVENTS)) if offset]:
        say(f"headrace: the recording begins in the middle of partition {', '.join(map(str, late))}: what was open "
            "then is not in it, and users begin without a history")  # fmt: skip
    if go_on:
        settings = connected(settings)
    with until_signalled() if go_on else nullcontext(bool) as stopped, progress("replaying it") as (bar, task):
        return replay_recording(
            settings, recording, journey, stopped,
            lambda so_far: bar.update(
                task, completed=so_far.events, said=f"{so_far.events:,} events, {so_far.events_per_s:,.0f}/s"
            ),
        )  # fmt: skip


def _onto_kafka(
    settings: Settings, log: LogReader, play: PlaySettings, wait: bool, metrics_port: int
) -> dict[str, Any]:
    from deploy.replaying import NOT_LEARNED, Followed
    from replay.player import Player, WallClock
    from replay.sinks import KafkaSink

    if not log.has_impressions and not settings.join.join.implicit:
        say(f"headrace: a {log.name} log has no impressions: join learns of it with join.implicit = true only")
    settings, began_cpu_s = connected(settings), time.process_time()
    if settings.join.ticks == "live":
        say('headrace: with [join] ticks = "live" idle partitions are moved by the clock of today, and what is older is'
            ' late: workers learn of a log with ticks = "log"')
    followed, clock = Followed(settings) if wait else None, WallClock()
    with progress(f"playing {log.name}") as (bar, task):
        with KafkaSink(settings.connection, settings.topics.events, settings.topics.items) as sink:
            directory = settings.data_dir if settings.data_dir.is_dir() else None
            player = Player(sink, play, clock, lambda so_far: show_played(bar, task, so_far), directory)
            end_metrics = _serve_metrics(player, settings, metrics_port)
            signal.signal(signal.SIGUSR1, lambda number, frame: player.pause())
            signal.signal(signal.SIGUSR2, lambda number, frame: player.resume())
            played = player.play(log)
            end_metrics()
        if not played.records:
            raise UsageError("there is no event between --from and --until")
        result: dict[str, Any] = {
            "events_in": played.events, "events_rejected": played.rejected.total(), "records": played.records,
            "items": played.items, "ticks": played.ticks, "events_per_s": round(played.events_per_s, 1),
            "seconds": round(played.seconds, 3), "faults": vars(played.faults),
            "play_cpu_s": round(time.process_time() - began_cpu_s, 3),
        }  # fmt: skip
        if followed is not None:
            bar.update(task, description="waiting for the workers", total=1.0, completed=0.0)
            model = followed.wait(lambda share: bar.update(task, completed=share, said=""))
            if model is None:
                result |= NOT_LEARNED
            else:
                taken = clock.now() - (played.began or 0.0)
                result |= {"learned_after_s": round(taken, 3), "learned_per_s": round(played.events / taken, 1)}
                result |= followed.figures(model)
                result["events_rejected"] = played.rejected.total() + result["balance"]["rejected"]
            followed.close()
    return result


def _serve_metrics(player: Player, settings: Settings, port: int) -> Callable[[], None]:
    """What the player says of itself. Returns what ends it."""
    from prometheus_client import CollectorRegistry

    from replay.player_metrics import tell_player
    from streams.listener import serve_metrics
    from streams.metrics import tell_process

    registry = CollectorRegistry()
    tell_player(registry, lambda: player.played.kinds, lambda: player.behind_s)
    tell_process(registry, settings.data_dir)
    return serve_metrics(registry, port)


def _text(result: dict[str, Any]) -> str:
    lines = [f"{result['events_in']:,} events in {result['seconds']:.1f} s, {result['events_rejected']:,} rejected"]
    if result.get("trained_examples") is not None:
        from deploy.recount import said_of

        lines.append(said_of(result))
        for task, figures in result["prequential"].items():
            known = [f"{key} {figures[key]:.4f}" for key in ("auc", "ne", "calibration") if figures[key] is not None]
            lines.append(f"{task}: {', '.join(known) or 'only one kind of label'} ({figures['count']:,} scores)")
        lines.append(f"examples {result['examples_digest']}, checkpoint {result['checkpoint_digest'] or '-'}")
    return "\n".join(lines)
