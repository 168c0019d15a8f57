"""The run: each system scores each batch before it learns it, and the figures of all of it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from embedding_store.errors import UsageError
from online_model.settings import TrainerSettings
from replay.comparison import bootstrap, metrics
from replay.comparison.contract import Orders, System
from replay.comparison.stream import Batch, Stream

HEADRACE = "headrace"
OURS = (HEADRACE, "frozen", "retrained")
SYSTEMS = (
    HEADRACE, "popularity", "item_knn", "river_logistic", "river_fm", "river_biased_mf", "vw", "frozen", "retrained",
)  # fmt: skip
SECONDS = {
    "river_fm": 50,
    "vw": 30,
    "river_logistic": 25,
    "river_biased_mf": 8,
}  # a log of 100,000 clicks, about; else 4
COMPARED = {
    "auc": "AUC", "ne": "normalised entropy", "ndcg_at_10": "NDCG@10", "auc_known": "AUC on known items",
    "ndcg_at_10_known": "NDCG@10 on known items",
}  # figures that a difference is given of, and their titles  # fmt: skip
LESS_IS_BETTER = ("ne",)
WINDOWS = 20  # of a learning curve


@dataclass
class Scores:
    """What one system gave."""

    name: str
    probabilistic: bool
    score: np.ndarray  # float64 [n] of the stream's scores
    ranked: dict[str, np.ndarray]  # float64 [m] of the stream's positions, by figure
    seconds: float = 0.0  # of scoring and learning


@dataclass
class Truth:
    """What all systems are measured against."""

    label: np.ndarray  # float32 [n]
    user: np.ndarray  # int64 [n]
    ts: np.ndarray  # int64 [n]
    known: np.ndarray  # bool [n] the item had been seen before the batch
    position_user: np.ndarray  # int64 [m]
    position_known: np.ndarray  # bool [m]

    @staticmethod
    def of(stream: Stream) -> Truth:
        scored = [batch.scored for batch in stream.batches]
        ranked = [batch.ranked for batch in stream.batches if batch.ranked is not None]
        columns = {n: np.concatenate([getattr(part, n) for part in scored]) for n in ("label", "user", "ts", "known")}
        return Truth(
            **columns,
            position_user=np.concatenate([np.empty(0, np.int64), *(part.user for part in ranked)]),
            position_known=np.concatenate([np.empty(0, bool), *(part.known for part in ranked)]),
        )


def choose(names: str | None) -> tuple[str, ...]:
    """The systems of a list as "headrace,vw", in the order of SYSTEMS; all without one. Raises UsageError."""
    if names is None:
        return SYSTEMS
    given = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in given if name not in SYSTEMS]
    if unknown or not given:
        what = f"no system is named {', '.join(unknown)}" if unknown else "no system is named"
        raise UsageError(f"--systems: {what}; there are {', '.join(SYSTEMS)}")
    return tuple(name for name in SYSTEMS if name in given)


def make(names: Sequence[str], stream: Stream, model: TrainerSettings) -> dict[str, System]:
    """The systems by name. Those of Headrace share one trainer."""
    import torch

    from replay.comparison import counting, ours, peers

    torch.set_num_threads(1)  # the last bits hang on it
    leader, batches, seed = ours.Leader(model), len(stream.batches), model.seed
    makers: dict[str, Callable[[], System]] = {
        HEADRACE: lambda: ours.Online(leader),
        "popularity": lambda: counting.Popularity(stream),
        "item_knn": lambda: counting.ItemKnn(stream),
        "river_logistic": peers.RiverLogistic,
        "river_fm": lambda: peers.RiverFm(seed),
        "river_biased_mf": lambda: peers.RiverBiasedMf(seed),
        "vw": lambda: peers.VowpalWabbit(seed),
        "frozen": lambda: ours.frozen(leader, batches),
        "retrained": lambda: ours.retrained(leader, batches),
    }
    return {name: makers[name]() for name in names}


def run(
    systems: dict[str, System], stream: Stream, progress: Callable[[int], None] = lambda batches: None
) -> list[Scores]:
    """Test, then train: all systems score a batch, and what is ranked in it, before any learns it.

    `progress` is told how many batches are done.
    """
    score: dict[str, list[np.ndarray]] = {name: [] for name in systems}
    ranked: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in systems}
    seconds = dict.fromkeys(systems, 0.0)
    for done, batch in enumerate(stream.batches, 1):
        for step in (_test, _train):
            for name, system in systems.items():
                start = time.perf_counter()
                step(system, batch, score[name], ranked[name])
                seconds[name] += time.perf_counter() - start
        progress(done)
    return [
        Scores(name, system.probabilistic, np.concatenate(score[name]), _joined(ranked[name]), seconds[name])
        for name, system in systems.items()
    ]  # fmt: skip


def _test(system: System, batch: Batch, score: list[np.ndarray], ranked: list[dict[str, np.ndarray]]) -> None:
    system.catalogue(batch.catalogue)
    some = len(batch.scored.label) > 0  # none in a batch of purchases alone, or before what is measured
    score.append(_sound(system.score(batch.scored.candidates), system) if some else np.empty(0))
    if batch.ranked is not None:
        order = system.order if isinstance(system, Orders) else system.score
        every = _sound(order(batch.ranked.candidates), system)
        ranked.append(metrics.gains(every.reshape(len(batch.ranked.user), -1)))


def _sound(scores: np.ndarray, system: System) -> np.ndarray:
    """The scores. One that is no number would stand above all others, whatever is compared with it."""
    if not np.isfinite(scores).all():
        raise ValueError(f"{type(system).__name__} gave a score that is no number")
    return scores


def _train(system: System, batch: Batch, *_: object) -> None:
    system.learn(batch)


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = ("hr_at_10", "ndcg_at_10", "mrr")
    return {name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0) for name in names}


@dataclass(frozen=True)
class Task:
    """Some systems on one stream."""

    names: tuple[str, ...]
    stream: Stream
    model: TrainerSettings
    called: str = ""  # in the result, where there is one system


def run_all(
    names: Sequence[str],
    stream: Stream,
    model: TrainerSettings,
    jobs: int = 1,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Scores]:
    """`run` of all the systems, in `jobs` processes at most. `progress` is told the share of this process's work."""
    found = {scores.name: scores for scores in run_tasks(tasks_of(names, stream, model), jobs, progress)}
    return [found[name] for name in names]


def tasks_of(names: Sequence[str], stream: Stream, model: TrainerSettings) -> list[Task]:
    """One for each system; Headrace's own share a trainer, and so a task."""
    parts = [(name,) for name in names if name not in OURS]
    own = tuple(name for name in names if name in OURS)
    return [Task(part, stream, model) for part in [*parts, *([own] if own else [])]]


def run_tasks(
    tasks: Sequence[Task], jobs: int = 1, progress: Callable[[float], None] = lambda share: None
) -> list[Scores]:
    """All the tasks, in `jobs` processes at most. `progress` is told the share of this process's work."""
    groups = [group for group in _groups(tasks, jobs) if group]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, len(groups) - 1), context) as pool:
        others = [pool.submit(_run_group, group) for group in groups[1:]]
        first = _run_group(groups[0], progress)
        return [scores for some in [first, *map(Future.result, others)] for scores in some]


def _run_group(group: Sequence[Task], progress: Callable[[float], None] = lambda share: None) -> list[Scores]:
    """One task after the other."""
    found: list[Scores] = []
    total, before = sum(len(task.stream.batches) for task in group), 0
    for task in group:
        systems = make(task.names, task.stream, task.model)
        done = run(systems, task.stream, lambda batches, before=before: progress((before + batches) / total))  # type: ignore[misc]
        before += len(task.stream.batches)
        found += [replace(scores, name=task.called or scores.name) for scores in done]
    return found


def _groups(tasks: Sequence[Task], jobs: int) -> list[list[Task]]:
    """The tasks, dealt so that the work is even: the costliest first, each to the group with the least so far."""
    groups: list[list[Task]] = [[] for _ in range(jobs)]
    work = [0.0] * jobs
    costs = [sum(SECONDS.get(name, 4) for name in task.names) for task in tasks]
    for cost, task in sorted(zip(costs, tasks, strict=True), key=lambda pair: pair[0], reverse=True):
        least = work.index(min(work))
        groups[least].append(task)
        work[least] += cost
    return groups


def measure(
    found: Sequence[Scores], stream: Stream, seed: int, draws: int = bootstrap.DRAWS, sides: Sequence[str] = ()
) -> dict[str, Any]:
    """JSON-ready: `systems`, `differences` (headrace − other, with intervals), `curves`, `reliability`; with `sides`,
    the names of systems, `pairs` of each with each that comes before it and with each system that is none of them.

    What ends in `_known` is of the scores and positions whose item had been seen before: where negatives are drawn from
    active items, one that was not is always a positive.
    """
    truth = Truth.of(stream)
    whole = bootstrap.Users(truth.user, seed, draws)
    known = bootstrap.Users(truth.user[truth.known], seed, draws)
    drawn = {s.name: _drawn(s, truth, whole, known) for s in found}
    systems = {s.name: _figures(s, truth, drawn[s.name]) for s in found}
    return {
        "systems": systems,
        "differences": _differences(drawn) if HEADRACE in drawn else {},
        "curves": {s.name: _curve(s, truth) for s in found},
        "reliability": {s.name: metrics.reliability(s.score, truth.label, 20) for s in found if s.probabilistic},
        **({"pairs": _pairs(systems, drawn, sides)} if sides else {}),
    }


def _drawn(
    scores: Scores, truth: Truth, whole: bootstrap.Users, known: bootstrap.Users
) -> dict[str, np.ndarray | None]:
    """The draws of each figure."""
    probabilistic, ndcg = scores.probabilistic, scores.ranked["ndcg_at_10"]
    every = whole.draw(scores.score, truth.label, probabilistic, truth.position_user, ndcg)
    mine, at = truth.known, truth.position_known
    some = known.draw(scores.score[mine], truth.label[mine], False, truth.position_user[at], ndcg[at])
    last = np.arange(len(truth.label)) >= len(truth.label) // 2
    return {
        **vars(every), "auc_known": some.auc, "ndcg_at_10_known": some.ndcg_at_10,
        "calibration_last_half": whole.calibration(scores.score, truth.label, last) if probabilistic else None,
    }  # fmt: skip


def _figures(scores: Scores, truth: Truth, drawn: dict[str, np.ndarray | None]) -> dict[str, Any]:
    whole = metrics.figures(scores.score, truth.label, scores.probabilistic)
    half = slice(len(truth.label) // 2, None)
    last = metrics.figures(scores.score[half], truth.label[half], scores.probabilistic)
    known = metrics.figures(scores.score[truth.known], truth.label[truth.known], probabilistic=False)
    at_known = {name: values[truth.position_known] for name, values in scores.ranked.items()}
    return {
        **asdict(whole), **asdict(metrics.ranking(scores.ranked)), "last_half": asdict(last),
        "known_items": {"auc": known.auc, "positives": known.positives, **asdict(metrics.ranking(at_known))},
        "intervals": {name: bootstrap.interval(values) for name, values in drawn.items()},
        "seconds": round(scores.seconds, 2),
    }  # fmt: skip


def _differences(drawn: dict[str, dict[str, np.ndarray | None]]) -> dict[str, dict[str, Any]]:
    """headrace − other, by figure: the interval, None where either has none."""
    own = drawn[HEADRACE]
    return {
        name: {figure: bootstrap.difference(own[figure], other[figure]) for figure in COMPARED}
        for name, other in drawn.items()
        if name != HEADRACE
    }


def _pairs(
    systems: dict[str, dict[str, Any]], drawn: dict[str, dict[str, np.ndarray | None]], sides: Sequence[str]
) -> list[dict[str, Any]]:
    """{of, less, figures: {figure: {difference, interval}}}: `of` − `less`; None for a figure that either has not."""
    others = [name for name in systems if name not in sides]
    pairs = [(one, other) for n, one in enumerate(sides) for other in [*sides[:n], *others]]
    out = []
    for one, other in pairs:
        figures: dict[str, dict[str, Any] | None] = {}
        for name in COMPARED:
            interval = bootstrap.difference(drawn[one][name], drawn[other][name])
            mine, its = (figure_of(systems[system], name) for system in (one, other))
            there = interval is not None and mine is not None and its is not None
            figures[name] = {"difference": mine - its, "interval": interval} if there else None  # type: ignore[operator]
        out.append({"of": one, "less": other, "figures": figures})
    return out


def figure_of(system: Mapping[str, Any], name: str) -> float | None:
    """One of COMPARED, of what `measure` has of a system."""
    known = name.removesuffix("_known")
    return system[name] if known == name else system["known_items"][known]


def _curve(scores: Scores, truth: Truth) -> list[dict[str, Any]]:
    """The figures of each of WINDOWS windows."""
    out = []
    for at in metrics.windows(truth.ts, WINDOWS):
        own = metrics.figures(scores.score[at], truth.label[at], scores.probabilistic)
        out.append({"to_ms": int(truth.ts[at].max()), "auc": own.auc, "ne": own.ne, "calibration": own.calibration})
    return out
