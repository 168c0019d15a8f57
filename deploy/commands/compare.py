"""headrace compare: Headrace and its peers, or several settings of it, on one stream."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from deploy.commands.common import (
    ConfigOption,
    DataDirOption,
    JsonOption,
    Output,
    millis,
    progress,
    say,
    settings_for,
)
from embedding_store.errors import UsageError

if TYPE_CHECKING:
    from deploy.settings import Settings
    from replay.comparison.variants import Variant

SIMULATED = "simulated"  # another name of our own records


class _SeveralFiles(TyperCommand):
    """`--settings a.toml b.toml`: the names that end in .toml behind it are its own, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        for word in args:
            if word.endswith(".toml") and len(given) > 1 and given[-2] == "--settings":
                given.append("--settings")
            given.append(word)
        return super().parse_args(ctx, given)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    example = "Example: headrace compare taobao UserBehavior.csv --seeds 3 --settings a.toml b.toml"
    app.command(epilog=example, cls=_SeveralFiles)(compare)


def compare(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Format of the log, as taobao; or simulated.")
    ] = None,
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="The log: a path or a URL. [log.path]")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    systems: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these, as headrace,vw. [all]", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of first weights, negatives, positions. [0]")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=20, help="So many seeds, from --seed on.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many events.")] = None,
    from_time: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="Learn what came before, measure from then on (UTC).")
    ] = None,
    until_time: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Only what came before.")] = None,
    settings_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--settings", metavar="A.toml B.toml", show_default=False,
            help="Headrace under each of these settings files side by side, in place of --config.",
        ),
    ] = None,
    intervals: Annotated[
        bool, typer.Option("--intervals", help="Also a serving copy brought up to date every 5 h … 1 s.")
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that share the systems. [2]")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the report. [DATA_DIR/compare]")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Headrace and its peers on one log, test-then-train: each scores a batch before any of them learns it.

    The same batches, candidates and negatives for all. Writes compare.html, and compare.json beside it.

    With --settings: the same log under two or more settings files, and beside them the --systems that are named.
    """
    window = _window(from_time, until_time)
    flags = {
        "data_dir": data_dir, "log__format": "events" if name == SIMULATED else name, "log__path": file,
        "model__seed": seed, "model__ranker__seed": seed,
    }  # fmt: skip
    settings, variants, chosen = _chosen(config, settings_files, flags, systems, intervals)
    from replay.comparison.compare import CompareSettings, write
    from replay.comparison.compare import compare as compared
    from replay.readers import open_log

    log = open_log(settings.log.format, settings.log.path, settings.log.max_rejected_share, settings.log.columns)
    first = settings.model.seed
    wanted = CompareSettings(
        settings.join.join, settings.model, settings.topics.partitions, tuple(range(first, first + seeds)), chosen,
        limit, intervals, jobs or 2, settings.data_dir if settings.data_dir.is_dir() else None, *window, variants,
    )  # fmt: skip
    with Output(json) as output:
        with progress(f"comparing on {log.name}", 1.0) as (bar, task):
            result = compared(log, wanted, lambda what, share: bar.update(task, description=what, completed=share))
        report, data = write(result, out or settings.data_dir / "compare")
        result |= {"report": str(report), "data": str(data)}
        output.result(result, _text(result))


def _window(from_time: str | None, until_time: str | None) -> tuple[int | None, int | None]:
    start, end = millis("--from", from_time), millis("--until", until_time)
    if start is not None and end is not None and start >= end:
        raise UsageError("--from must be before --until")
    return start, end


def _chosen(
    config: Path | None, files: list[Path] | None, flags: dict[str, Any], systems: str | None, intervals: bool
) -> tuple[Settings, tuple[Variant, ...], tuple[str, ...]]:
    """(settings, those that are compared, the systems); the heavy imports come once the settings are right."""
    if files and (config or intervals):
        raise UsageError("--settings stands in place of --config, and --intervals is of one model: leave it out")
    if files:
        settings, variants, chosen = _side_by_side(files, flags, systems)
    else:
        settings, variants, chosen = settings_for(config, **flags), (), ()
    if not settings.log.format or not settings.log.path:
        raise UsageError("which log? headrace compare NAME FILE, or [log] format and path in the settings")
    if not files:
        from replay.comparison.harness import choose

        chosen = choose(systems)
    return settings, variants, chosen


def _side_by_side(
    files: list[Path], flags: dict[str, Any], systems: str | None
) -> tuple[Settings, tuple[Variant, ...], tuple[str, ...]]:
    """(settings of what a comparison has one of, what is compared, the systems beside it). Raises UsageError."""
    from deploy.comparing import ignored, read_settings
    from replay.comparison.harness import OURS, SYSTEMS, choose

    dotted = {name.replace("__", "."): value for name, value in flags.items()}
    settings, variants = read_settings(files, os.environ, dotted, SYSTEMS)
    chosen = choose(systems) if systems else ()
    if own := [name for name in chosen if name in OURS]:
        raise UsageError(f"--systems: with --settings Headrace is in each file's place: leave out {', '.join(own)}")
    for line in ignored(files, [variant.name for variant in variants]):
        say(f"headrace: {line}")
    return settings, variants, chosen


def _text(result: dict[str, Any]) -> str:
    lines = [f"{'':16}{'AUC':>8}{'NE':>8}{'calib.':>8}{'HR@10':>8}{'NDCG@10':>9}"]
    for name, f in result["systems"].items():
        cells = (f["auc"], f["ne"], f["calibration"], f["hr_at_10"])
        lines.append(f"{name:16}" + "".join(map(_cell, cells)) + " " + _cell(f["ndcg_at_10"]))
    for name, f in result.get("intervals", {}).items():
        lines.append(f"serving copy, every {name:8}{_cell(f['auc'])} AUC, {f['syncs']:,} times")
    if "verdicts" in result:
        for key, values in result["differences"].items():
            lines.append(f"{key}: " + ", ".join(f"{value} in {name}" for name, value in values.items()))
        lines += result["verdicts"]
    else:
        lines += result["shortfalls"] or ["Headrace beats every other in every figure that both have"]
    return "\n".join([*lines, result["report"]])


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.4f}':>8}"
