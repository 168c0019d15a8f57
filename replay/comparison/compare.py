"""`headrace compare`: log, seeds and systems in; JSON and the report out."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from embedding_store.errors import HeadraceError
from online_model.settings import TrainerSettings
from replay.comparison import intervals as freshness
from replay.comparison.alignment import align
from replay.comparison.harness import HEADRACE, SYSTEMS, Scores, Task, measure, run_all, run_tasks, tasks_of
from replay.comparison.report import render, shortfalls
from replay.comparison.stream import OTHERS, RANKED, Stream, read_stream
from replay.comparison.variants import Variant, said_of
from replay.player import in_window
from replay.readers import LogReader, in_time_order
from streams.joiner import JoinSettings

VERSIONS = ("headrace", "torch", "torchrec", "river", "vowpalwabbit", "numpy")


@dataclass(frozen=True)
class CompareSettings:
    """One comparison. `limit`: of events; `intervals`: the experiment of intervals.py too.

    from_ms, until_ms: what happened before is learned and not measured, what happened from then on is not read.
    variants: settings of joiner and model in place of `join` and `model`, which then say the seed alone.
    """

    join: JoinSettings
    model: TrainerSettings
    partitions: int = 4
    seeds: tuple[int, ...] = (0,)
    systems: tuple[str, ...] = SYSTEMS
    limit: int | None = None
    intervals: bool = False
    jobs: int = 1
    directory: Path | None = None  # where a log is put in order that does not fit in memory
    from_ms: int | None = None
    until_ms: int | None = None
    variants: tuple[Variant, ...] = ()


def compare(
    log: LogReader, settings: CompareSettings, progress: Callable[[str, float], None] = lambda what, share: None
) -> dict[str, Any]:
    """JSON-ready: `systems` (means over the seeds), `runs` (each seed's), `shortfalls`, `intervals`, `about`; with
    variants also `differences` of the settings, and `verdicts`.

    `progress` is told what is being done, and how far that is. Raises UsageError, LogError.
    """
    join, model = _effective(settings.join, log), settings.model
    variants = tuple(replace(v, join=_effective(v.join, log)) for v in settings.variants)
    result: dict[str, Any] = {"systems": {}, "runs": []}
    for seed in settings.seeds:
        reading, comparing = (partial(progress, f"seed {seed}: {what}") for what in ("reading", "comparing"))
        if variants:
            found, stream, compared = _sides(log, variants, settings, seed, (reading, comparing))
            names = tuple(v.name for v in variants)
            result["runs"].append({"seed": seed, "compared": compared, **measure(found, stream, seed, sides=names)})
        else:
            seeded = _seeded(model, seed)
            stream = _read(log, join, seeded, settings, reading)
            found = run_all(settings.systems, stream, seeded, settings.jobs, comparing)
            result["runs"].append({"seed": seed, **measure(found, stream, seed)})
        result.setdefault("about", _about(log, stream, settings, join, _seeded(model, settings.seeds[0])))
    result["systems"] = _means([run["systems"] for run in result["runs"]])
    result["shortfalls"] = shortfalls(result)
    if variants:
        result |= said_of(variants, result["runs"])
    if settings.intervals:
        model = msgspec.structs.replace(_seeded(model, settings.seeds[0]), batch_size=freshness.BATCH)
        stream = _read(log, join, model, settings, partial(progress, "intervals: reading"))
        result["intervals"] = freshness.measure_intervals(stream, model, partial(progress, "intervals: serving"))
    return result


def _effective(join: JoinSettings, log: LogReader) -> JoinSettings:
    """What is joined here: clicks without impressions where the log has none, and nothing is downsampled."""
    return msgspec.structs.replace(join, implicit=join.implicit or not log.has_impressions, unclicked_of=1)


def _sides(
    log: LogReader,
    variants: Sequence[Variant],
    settings: CompareSettings,
    seed: int,
    progress: tuple[Callable[[float], None], Callable[[float], None]],
) -> tuple[list[Scores], Stream, dict[str, Any]]:
    """(scores of the variants and of the systems beside them, in one order; the stream in that order; what was
    measured, where their streams differ)."""
    reading, comparing = progress
    models = {v.name: _seeded(v.model, seed) for v in variants}
    keys = {v.key: v for v in variants}
    sides = align({key: _read(log, v.join, models[v.name], settings, reading) for key, v in keys.items()})
    tasks = [Task((HEADRACE,), sides.by_key[v.key].stream, models[v.name], v.name) for v in variants]
    others = tasks_of(settings.systems, sides.drawn_from, _seeded(settings.model, seed))
    found = {scores.name: scores for scores in run_tasks([*tasks, *others], settings.jobs, comparing)}
    ordered = [sides.in_one_order(found[v.name], v.key) for v in variants]
    left_out = {v.name: sides.about["left_out"][v.key] for v in variants} if sides.about else {}
    about = sides.about | ({"left_out": left_out} if left_out else {})
    return [*ordered, *(found[name] for name in settings.systems)], sides.drawn_from, about


def write(result: Mapping[str, Any], out: Path) -> tuple[Path, Path]:
    """(compare.html, compare.json) in the folder `out`, which is made if need be. Raises HeadraceError."""
    report, data = out / "compare.html", out / "compare.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        report.write_text(render(result), "utf-8")
        data.write_text(json.dumps(result, indent=1), "utf-8")
    except OSError as error:
        raise HeadraceError(f"{out}: cannot write the report ({error.strerror}); choose another --out") from None
    return report, data


def _seeded(model: TrainerSettings, seed: int) -> TrainerSettings:
    ranker = msgspec.structs.replace(model.ranker, seed=seed)
    return msgspec.structs.replace(model, seed=seed, ranker=ranker)


def _read(
    log: LogReader,
    join: JoinSettings,
    model: TrainerSettings,
    settings: CompareSettings,
    progress: Callable[[float], None],
) -> Stream:
    records = in_window(in_time_order(log, directory=settings.directory), None, settings.until_ms)
    stream = read_stream(
        records, join, model, settings.partitions, settings.limit, lambda _: progress(log.progress() or 0.0),
        settings.from_ms,
    )  # fmt: skip
    stream.rejected += log.rejected.total()
    return stream


def _means(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of every fraction over the runs; of counts, and of what is None in one of them, the first run's.

    The intervals of a run are no other's: of several runs there are none.
    """
    if len(runs) == 1:
        return dict(runs[0])
    out: dict[str, Any] = {}
    for name, value in runs[0].items():
        if name == "intervals":
            continue
        values = [run[name] for run in runs]
        if isinstance(value, Mapping):
            out[name] = _means(values)
        elif isinstance(value, float) and all(isinstance(v, float) for v in values):
            out[name] = float(np.mean(values))
        else:
            out[name] = value
    return out


def _about(
    log: LogReader, stream: Stream, settings: CompareSettings, join: JoinSettings, model: TrainerSettings
) -> dict[str, Any]:
    """What the report says of the run."""
    ranked = sum(len(batch.ranked.user) for batch in stream.batches if batch.ranked is not None)
    return {
        "log": f"{log.name} {Path(log.path).name}", "events": stream.events, "rejected": stream.rejected,
        "limit": settings.limit, "from_ms": settings.from_ms, "until_ms": settings.until_ms,
        "scored": sum(len(batch.scored.label) for batch in stream.batches),
        "positives": int(sum(batch.scored.label.sum() for batch in stream.batches)), "users": stream.users,
        "items": stream.items, "batches": len(stream.batches), "implicit": stream.implicit,
        "negatives": max(batch.drawn.shape[1] for batch in stream.batches) if stream.implicit else 0,
        "positions": ranked,
        "ranked_among": f"{OTHERS} sampled active items, at {RANKED:,} positions at most",
        "seeds": list(settings.seeds), "versions": {name: version(name) for name in VERSIONS},
        "machine": f"{os.cpu_count()} processors, {platform.system()} {platform.machine()}, Python"
        f" {platform.python_version()}",
        **({} if settings.variants else {"join": msgspec.to_builtins(join), "model": msgspec.to_builtins(model)}),
        "batch_size": max(len(batch.rows) for batch in stream.batches),
    }  # fmt: skip
