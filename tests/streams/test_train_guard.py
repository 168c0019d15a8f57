"""The guard in the real worker: what it holds back reaches no replica, what it goes back to reaches all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from deploy.processes import free_port
from embedding_store.snapshot import latest_snapshot
from online_model.examples import Block
from online_model.guard_settings import GuardSettings
from online_model.positions import position_of
from online_model.settings import TrainerSettings
from streams.topics import TopicSettings
from tests.online_model.guarded import N
from tests.online_model.logs import make_blocks, make_rows
from tests.online_model.test_trainer import SMALL
from tests.streams.children import Child, running, wait_for
from tests.streams.test_train_worker import _in_epoch, _send, _served, _sum, _versions

GOOD, POISON = 4, 3  # blocks, in turn

# It learns so slowly that the figures hang on the labels alone, wherever commits are.
SLOW = msgspec.structs.replace(
    SMALL, learning_rate=1e-6, wide_rate=1e-6, features=msgspec.structs.replace(SMALL.features, learning_rate=1e-6),
    guard=GuardSettings(examples=N, max_ne=9, min_calibration=0.2, max_calibration=2),
)  # fmt: skip

pytestmark = [pytest.mark.broker, pytest.mark.partitions(1)]


def _blocks(poisoned: int, more: int) -> list[Block]:
    """GOOD blocks in which a fifth is clicked, so many rows without a click, and `more` good rows."""
    rows = make_rows(GOOD * N + poisoned + more)
    rows.click[GOOD * N : GOOD * N + poisoned] = 0
    rows.purchase = np.where(rows.click == 1, 0, -1).astype(np.int8)
    return make_blocks(rows, N)


@pytest.fixture
def settings(broker: str, topics: TopicSettings, tmp_path: Path) -> dict:
    about = {"prefix": topics.prefix, "partitions": topics.partitions}
    return {
        "bootstrap": broker, "data_dir": tmp_path / "data", "topics": about, "device": "cpu",
        "metrics_port": free_port(), "checkpoint_interval_s": 0.5,
        "dense_interval_s": 0.0,  # no version comes without rows
    }  # fmt: skip


def _model(model: TrainerSettings) -> dict:
    return msgspec.to_builtins(model)


def _metric(settings: dict, name: str) -> float:
    text = httpx.get(f"http://127.0.0.1:{settings['metrics_port']}/metrics", timeout=30).text
    found = re.search(rf"^headrace_train_{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def _health(settings: dict) -> tuple[int, dict]:
    answer = httpx.get(f"http://127.0.0.1:{settings['metrics_port']}/health", timeout=30)
    return answer.status_code, answer.json()


def _learn(broker: str, topics: TopicSettings, blocks: list[Block], settings: dict, child: Child) -> None:
    """Sends them, and returns when their rows are learned."""
    rows = _metric(settings, "rows_total") + _sum(blocks)[0]
    _send(broker, topics, blocks)
    wait_for(lambda: _metric(settings, "rows_total") == rows, child=child)


def _accounted(info: dict[str, Any]) -> tuple[int, int]:
    return position_of(info["partitions"]["0"]).accounted


def _to_the_end(broker: str, topics: TopicSettings, epoch: int, blocks: list[Block], child: Child) -> str:
    """The name of the version of the epoch that all rows have gone into, or were taken out of again."""

    def done() -> str:
        versions = _in_epoch(broker, topics, epoch)
        last = versions[-1] if versions else None
        return f"{epoch}.{last.sequence}" if last and _accounted(last.info) == _sum(blocks) else ""

    return wait_for(done, child=child)


def test_held_killed_and_released_replicas_get_all_of_it(
    broker: str, topics: TopicSettings, settings: dict, tmp_path: Path
) -> None:
    blocks = _blocks(POISON * N, 3 * N)
    settings |= {"model": _model(SLOW)}
    serve = {name: settings[name] for name in ("bootstrap", "data_dir", "topics")} | {"port": 0}
    with running("train", tmp_path / "log", **settings) as child:
        wait_for(lambda: "training on partitions" in child.says, child=child)
        _learn(broker, topics, blocks[:GOOD], settings, child)
        _to_the_end(broker, topics, 1, blocks[:GOOD], child)
        assert _health(settings) == (200, {"ok": True})
        _learn(broker, topics, blocks[GOOD : GOOD + 2], settings, child)
        wait_for(lambda: _metric(settings, "guard_held") == 1, child=child)
        status, said = _health(settings)
        assert (status, said["ok"]) == (503, False)
        assert said["why"].startswith("versions are held back by the guard (click: ")
        last = child.said.split("replicas stay at ")[1].split()[0]
        child.kill()
        child.start()
        wait_for(lambda: "training on partitions" in child.says, child=child)
        assert _metric(settings, "guard_held") == 1
        _learn(broker, topics, blocks[GOOD + 2 : GOOD + POISON], settings, child)
        wait_for(lambda: "versions are still held back" in child.says, child=child)
        assert f"1.{_versions(broker, topics)[-1].sequence}" == last
        with running("serve", tmp_path / "old.log", **serve) as old:  # it starts while versions are held back
            wait_for(lambda: _served(old)["version"] == last, child=old)
            _learn(broker, topics, blocks[GOOD + POISON :], settings, child)
            end = _to_the_end(broker, topics, 2, blocks, child)
            assert _metric(settings, "guard_held") == 0
            assert _health(settings)[0] == 200
            wait_for(lambda: _metric(settings, 'lag_records{partition="0"}') == 0, child=child)
            assert _metric(settings, "checkpoint_bytes") > 0
            with running("serve", tmp_path / "new.log", **serve) as new:
                for replica in (old, new):
                    wait_for(lambda replica=replica: _served(replica)["version"] == end, child=replica)
                    assert _accounted(_served(replica)["info"]) == _sum(blocks)
        assert child.stop() == 0, child.said


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_rollback_by_itself(broker: str, topics: TopicSettings, settings: dict, tmp_path: Path, ranks: int) -> None:
    """In the same process: back to the kept checkpoint, published again, nothing lost and nothing learned twice."""
    blocks = _blocks(3 * N // 4, 2 * N + N // 4)
    going_back = msgspec.structs.replace(SLOW, guard=msgspec.structs.replace(SLOW.guard, rollback=True))
    settings |= {"model": _model(going_back), "ranks": ranks}
    serve = {name: settings[name] for name in ("bootstrap", "data_dir", "topics")} | {"port": 0}
    with running("train", tmp_path / "log", **settings) as child:
        wait_for(lambda: "training on partitions" in child.says, child=child)
        _learn(broker, topics, blocks[:GOOD], settings, child)
        last = _to_the_end(broker, topics, 1, blocks[:GOOD], child)
        wait_for(lambda: f"kept checkpoint {last}" in child.said, child=child)
        pid = child.pid
        with running("serve", tmp_path / "serve.log", **serve) as replica:
            wait_for(lambda: _served(replica)["version"] == last, child=replica)
            _send(broker, topics, blocks[GOOD : GOOD + 1])
            wait_for(lambda: "rolled back to version 1." in child.said, child=child)
            wait_for(lambda: child.said.count("training on partitions") == 2, child=child)
            wait_for(lambda: _served(replica)["epoch"] == 2, child=replica)
            assert (_metric(settings, "guard_held"), _metric(settings, "guard_rollbacks")) == (0, 1)
            _send(broker, topics, blocks[GOOD + 1 :])
            end = _to_the_end(broker, topics, 2, blocks, child)
            wait_for(lambda: _served(replica)["version"] == end, child=replica)
            assert _metric(settings, "guard_rollbacks") == 0, "the figures are good again"
        assert child.pid == pid
        assert child.stop() == 0, child.said
    assert latest_snapshot(tmp_path / "data" / "snapshots").name == end.replace(".", "-")
