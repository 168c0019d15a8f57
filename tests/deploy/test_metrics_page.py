"""docs/metrics.md has every metric that a process exports, with its type and labels, and no other."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from deploy.freshness_metrics import StageFreshness
from online_model.examples import Counts
from online_model.serving.holder import Holder
from online_model.serving.live import LiveUsers
from online_model.trainer import open_trainer
from replay.player_metrics import tell_player
from streams.events import Click
from streams.follower import Follower
from streams.impressions import ImpressionLog
from streams.live_events import LiveEvents
from streams.metrics import JoinMetrics, LaneFigures, tell_process
from streams.settings import ServeWorkerSettings, TrainWorkerSettings
from streams.train_figures import TrainFigures
from tests.online_model.test_trainer import SMALL, learn, mixed

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \|([\w, ]*)\|", re.MULTILINE)

Metrics = dict[str, tuple[str, frozenset[str]]]  # name → type, labels


def _listed() -> Metrics:
    found = ROW.findall(PAGE.read_text("utf-8"))
    listed = {name: (kind, frozenset(labels.replace(",", " ").split())) for name, kind, labels in found}
    assert len(listed) == len(found), "a metric is there twice"
    return listed


def _exported(registry: CollectorRegistry) -> Iterator[tuple[str, tuple[str, frozenset[str]]]]:
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert family.samples, f"{name} is not told"
        if not name.endswith("_created"):
            yield name, (family.type, frozenset(labels))


class Serving:
    """A replica as far as its gauges go."""

    epoch, sequence, created_ms, policy = 1, 2, 3, None

    def rows(self) -> dict[str, int]:
        return {"item": 4}

    nbytes = rows

    def recall(self) -> float:
        return 0.95


def _join(folder: Path) -> CollectorRegistry:
    metrics = JoinMetrics(lambda: {0: LaneFigures(Counts(), 5, 2, 1_000, 3, 4)})
    tell_process(metrics.registry, folder)
    return metrics.registry


async def _train(folder: Path) -> CollectorRegistry:
    settings = TrainWorkerSettings(bootstrap="127.0.0.1:1", data_dir=folder)
    (folder / "snapshots" / "1-1").mkdir(parents=True)
    figures = TrainFigures(settings, lambda: (0, 0))
    assert not [name for name, _ in _exported(figures.metrics.registry) if name == "headrace_train_loss"]
    trainer = open_trainer(SMALL, settings.store, lambda: 1)
    learn(trainer, mixed())
    trainer.commit()
    looking = asyncio.gather(*figures.tasks(trainer))
    while "\nheadrace_train_checkpoint_bytes 0.0\n" in generate_latest(figures.metrics.registry).decode():
        await asyncio.sleep(0.01)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    text = generate_latest(figures.metrics.registry).decode()
    trainer.store.close()
    assert float(re.search(r"^headrace_train_checkpoint_bytes (.*)$", text, re.MULTILINE)[1]) > 1_000  # type: ignore[index]
    return figures.metrics.registry


async def _serve(folder: Path) -> CollectorRegistry:
    settings = ServeWorkerSettings(bootstrap="127.0.0.1:1", data_dir=folder)
    holder, live = Holder(Serving()), LiveUsers(10, 250)  # type: ignore[arg-type]
    follower = Follower(settings, holder, live)
    await follower._consumer.stop()  # it was never started
    LiveEvents(settings, holder, live, follower.caught_up)
    ImpressionLog(settings, holder.metrics.registry)
    metrics = holder.metrics
    metrics.request("/v1/rank", 200, 0.01)
    metrics.candidates("rank", 3)
    metrics.refused("invalid")
    metrics.answered("rank", degraded=True)
    tell_process(metrics.registry, folder)
    return metrics.registry


def _demo(folder: Path) -> CollectorRegistry:
    registry = CollectorRegistry()
    StageFreshness(registry)
    tell_player(registry, lambda: {Click: 1}, lambda: 0.5)
    tell_process(registry, folder)
    return registry


@pytest.mark.usefixtures("one_thread")
def test_the_page_lists_what_the_processes_export(tmp_path: Path) -> None:
    exported: Metrics = {}
    for name in ("join", "train", "serve", "demo"):
        (tmp_path / name).mkdir()
    exported.update(_exported(_join(tmp_path / "join")))
    exported.update(_exported(asyncio.run(_train(tmp_path / "train"))))
    exported.update(_exported(asyncio.run(_serve(tmp_path / "serve"))))
    exported.update(_exported(_demo(tmp_path / "demo")))
    assert _listed() == exported
