"""headrace compare: Headrace and its peers on one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.commands.common import ConfigOption, DataDirOption, JsonOption, Output, progress, settings_for
from embedding_store.errors import UsageError

SIMULATED = "simulated"  # another name of our own records


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: headrace compare taobao UserBehavior.csv --seeds 3 --intervals")(compare)


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
    """
    log_format = "events" if name == SIMULATED else name
    settings = settings_for(
        config,
        data_dir=data_dir,
        log__format=log_format,
        log__path=file,
        model__seed=seed,
        model__ranker__seed=seed,
    )
    if not settings.log.format or not settings.log.path:
        raise UsageError("which log? headrace compare NAME FILE, or [log] format and path in the settings")
    from replay.comparison.harness import choose

    chosen = choose(systems)
    from replay.comparison.compare import CompareSettings, write
    from replay.comparison.compare import compare as compared
    from replay.readers import open_log

    log = open_log(settings.log.format, settings.log.path, settings.log.max_rejected_share, settings.log.columns)
    first = settings.model.seed
    wanted = CompareSettings(
        settings.join.join, settings.model, settings.topics.partitions, tuple(range(first, first + seeds)), chosen,
        limit, intervals, jobs or 2, settings.data_dir if settings.data_dir.is_dir() else None,
    )  # fmt: skip
    with Output(json) as output:
        with progress(f"comparing on {log.name}", 1.0) as (bar, task):
            result = compared(log, wanted, lambda what, share: bar.update(task, description=what, completed=share))
        report, data = write(result, out or settings.data_dir / "compare")
        result |= {"report": str(report), "data": str(data)}
        output.result(result, _text(result))


def _text(result: dict[str, Any]) -> str:
    lines = [f"{'':16}{'AUC':>8}{'NE':>8}{'calib.':>8}{'HR@10':>8}{'NDCG@10':>9}"]
    for name, f in result["systems"].items():
        cells = (f["auc"], f["ne"], f["calibration"], f["hr_at_10"])
        lines.append(f"{name:16}" + "".join(map(_cell, cells)) + " " + _cell(f["ndcg_at_10"]))
    for name, f in result.get("intervals", {}).items():
        lines.append(f"serving copy, every {name:8}{_cell(f['auc'])} AUC, {f['syncs']:,} times")
    lines += result["shortfalls"] or ["Headrace beats every other in every figure that both have"]
    return "\n".join([*lines, result["report"]])


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.4f}':>8}"
