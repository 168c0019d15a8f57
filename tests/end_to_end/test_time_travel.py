"""Recorded, replayed, and on with the live topics: as if there had been no seam."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from online_model.examples import ExamplesDigest
from replay import time_travel
from replay.live_topics import LiveTopics
from replay.merging import Merge
from replay.oracle import read_topic
from replay.recorder import Recorder
from replay.recording import EVENTS, Recording
from replay.simulator import Simulation, SimulatorSettings
from replay.sinks import KafkaSink
from replay.time_travel import RecordedReplay
from streams.blocks import decode_block
from streams.events import Item
from streams.topics import TopicSettings
from tests.replay import replay_child
from tests.streams.children import running, wait_for

pytestmark = [pytest.mark.broker, pytest.mark.nightly, pytest.mark.partitions(3)]

SAME = ("checkpoint_digest", "examples_digest", "examples", "trained_examples", "balance", "prequential")


@pytest.fixture
def records() -> list[Any]:
    return list(Simulation(SimulatorSettings(users=200, items=150, requests_per_s=10), events=3_500))


def send(broker: str, topics: TopicSettings, records: list[Any]) -> None:
    """With a tick to every partition now and then, as the player and the live joiner write them."""
    with KafkaSink(broker, topics.events, topics.items) as sink:
        for number, record in enumerate(records):
            sink.send(record)
            if number % 100 == 0 and not isinstance(record, Item):
                sink.tick(record.ts - 200)


def record(broker: str, topics: TopicSettings, path: Path) -> Recording:
    Recorder(broker, topics, path, from_beginning=True).run(lambda: False, to_end=True)
    return Recording(path)


def replay(recording: Recording, store: Path, **more: Any) -> dict[str, Any]:
    run = RecordedReplay(replay_child.settings(store, partitions=3), recording.begin(EVENTS))
    return run.run(Merge(recording, **more))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(time_travel, "SLICE", 500)


def test_a_replay_that_goes_on_live_is_the_one_over_the_whole(
    broker: str, topics: TopicSettings, records: list[Any], tmp_path: Path
) -> None:
    third = len(records) // 3
    send(broker, topics, records[:third])
    part = record(broker, topics, tmp_path / "part")
    send(broker, topics, records[third : 2 * third])
    rest: Iterator[list[Any]] = iter([records[2 * third :]])
    whole: list[Recording] = []

    def stop() -> bool:
        """The last third is sent while the live topics are read; the replay is stopped when all of it was learned."""
        if merge.live_records > 50:
            for some in rest:
                send(broker, topics, some)
                whole.append(record(broker, topics, tmp_path / "whole"))
        return bool(whole) and merge.live_records == _rows(whole[0]) - _rows(part)

    merge = Merge(part, partial(LiveTopics, broker), stop=stop)
    run = RecordedReplay(replay_child.settings(tmp_path / "1", partitions=3), part.begin(EVENTS))
    through = run.run(merge)
    undisturbed = replay(whole[0], tmp_path / "2")
    assert merge.stopped
    assert {name: through[name] for name in SAME} == {name: undisturbed[name] for name in SAME}
    assert through["examples"] > 2_000
    for found in (through, undisturbed):
        assert found["lost"] == found["duplicated"] == 0


def _rows(recording: Recording) -> int:
    return sum(
        1
        for topic in recording.about.topics
        for p in range(len(recording.begin(topic)))
        for _ in recording.records(topic, p)
    )


def test_a_recording_makes_the_examples_that_the_live_joiner_made(
    broker: str, topics: TopicSettings, records: list[Any], tmp_path: Path
) -> None:
    join = {"wait_ms": replay_child.JOIN.wait_ms, "watch_wait_ms": replay_child.JOIN.watch_wait_ms}
    about = {"prefix": topics.prefix, "partitions": 3}
    worker = {"bootstrap": broker, "data_dir": tmp_path / "data", "topics": about, "join": join, "ticks": "log"}
    with running("join", tmp_path / "join", **worker) as child:
        wait_for(lambda: "joining partitions" in child.says, child=child)
        send(broker, topics, records)
        found = replay(record(broker, topics, tmp_path / "whole"), tmp_path / "1")
        wait_for(lambda: _live(broker, topics).rows >= found["examples"], child=child)
    assert _live(broker, topics).hexdigest() == found["examples_digest"]


def _live(broker: str, topics: TopicSettings) -> ExamplesDigest:
    digest = ExamplesDigest()
    for _, _, value, _ in read_topic(broker, topics.examples):
        digest.add(decode_block(value or b"").examples)
    return digest
