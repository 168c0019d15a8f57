"""The twin that never learns: it leaves the processor to the others, until somebody waits for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.demo import frozen
from deploy.demo.twin import TwinProcess, TwinSettings
from online_model.serving.settings import ReplicaSettings
from online_model.settings import FeatureSettings, RankerSettings
from replay.simulator import SimulatorSettings

SETTINGS = TwinSettings(SimulatorSettings(), ReplicaSettings(), FeatureSettings(), RankerSettings())


def niceness(pid: int) -> set[int]:
    """Of the threads of a process."""
    stats = [stat.read_text("utf-8") for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {int(stat.rpartition(")")[2].split()[16]) for stat in stats}


def test_it_steps_back_while_the_shop_is_open_and_no_longer(tmp_path: Path) -> None:
    async def live() -> None:
        with TwinProcess(SETTINGS, tmp_path / "twin.log") as twin:
            pid = twin._process.pid
            twin.open(time.time_ns() // 1_000_000)
            while 19 not in niceness(pid):
                await asyncio.sleep(0.01)  # it loads; that it has begun it tells nobody
            await twin.reached(8)
            assert niceness(pid) == {0}
            assert twin.clicks.shown[7]

    asyncio.run(asyncio.wait_for(live(), 120))


def test_where_it_fails_while_the_shop_is_open_it_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def life() -> Iterator[None]:
        yield
        raise ValueError("it is over")

    monkeypatch.setattr(frozen, "_weigh_session", lambda nice: None)
    with pytest.raises(ValueError, match="it is over"):
        frozen._live(life(), threading.Event())
