"""A replay has one result: whatever the day, and however often it was killed on the way."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from online_model.settings import TrainerSettings
from replay import direct, joining
from replay.direct import DirectReplay, DirectSettings
from replay.joining import partition_of
from replay.readers import Record, in_time_order, open_log
from replay.sinks import KafkaSink
from streams.events import Item
from streams.joiner import JoinSettings
from streams.topics import TopicSettings, create_topics
from tests.public_logs import KUAIRAND, TAOBAO_BY_USER
from tests.replay import replay_child
from tests.streams.children import processes

KILLS = 5  # `make figures ONLY=replay.kills` has more


def _run(store: Path, seed: int = 0, **more: bool | int) -> dict:
    return DirectReplay(replay_child.settings(store, seed, **more)).run(replay_child.log())


def test_one_log_and_one_seed_give_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = _run(tmp_path / "1")
    monkeypatch.setattr(direct, "COMMIT_SECONDS", 0.0)  # other commits …
    monkeypatch.setattr(direct, "COMMIT_SHARE", 1.0)
    monkeypatch.setattr(joining, "SLICE", 777)  # … and other blocks
    again, other = _run(tmp_path / "2"), _run(tmp_path / "3", seed=1)
    assert one["lost"] == one["duplicated"] == 0
    assert one["trained_examples"] == one["examples"] > 10_000
    assert one["balance"] == one["oracle_balance"]
    assert one["left_out"] == 0
    assert one["prequential"]["click"]["auc"] > 0.55
    assert other["examples_digest"] == again["examples_digest"] == one["examples_digest"]
    assert other["checkpoint_digest"] != one["checkpoint_digest"]
    assert again["prequential"] == one["prequential"]


@contextmanager
def _replaying(store: Path) -> Iterator[Iterator[Any]]:
    """What a replay in a process of its own says, slice after slice; at the end it is killed, if it is not over."""
    ours, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=replay_child.main, args=(store, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        yield iter(ours.recv, None)
    finally:
        child.kill()
        child.join()
        ours.close()


def _to_its_end(store: Path) -> tuple[int, dict]:
    """The number of its slices, its figures."""
    with _replaying(store) as said:
        for slices in itertools.count():
            if isinstance(line := next(said), dict):
                return slices, line
    raise AssertionError("not reached")


def test_a_replay_that_was_killed_and_resumed_gives_the_same_checkpoint(tmp_path: Path) -> None:
    dice = random.Random(12)
    slices, expected = _to_its_end(tmp_path / "whole")
    moments = sorted(dice.sample(range(1, slices), KILLS))
    for moment in moments:
        with _replaying(tmp_path / "killed") as said:
            while next(said) < moment:
                pass
            time.sleep(dice.uniform(0, 0.03))  # anywhere in the next slice or two
    _, resumed = _to_its_end(tmp_path / "killed")
    assert resumed["resumed_at"] >= moments[-1] - 1, "it went on, and did not begin anew"
    for name in ("checkpoint_digest", "examples_digest", "prequential", "balance", "lost", "duplicated"):
        assert resumed[name] == expected[name], f"after kills at {moments}"


def _one_of_a_kind() -> Iterator[Record]:
    """A log in which each item has a seller and a word that no other has."""
    for record in itertools.islice(replay_child.log(), 3_000):
        if isinstance(record, Item):
            record = msgspec.structs.replace(record, seller=f"seller of {record.item}", title=f"only {record.item}")
        yield record


def _many_items() -> Iterator[Record]:
    """Twice as many, half of them news of an item that nobody sees."""
    for number, record in enumerate(replay_child.log()):
        yield record
        yield Item(item=f"new{number}")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("log", "small"),
    [(_many_items, {"users": 600, "items": 2_600, "categories": 100}), (_one_of_a_kind, {"sellers": 60, "words": 300})],
)
def test_a_full_table_is_full_at_the_same_place_whenever_commits_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Callable[[], Iterator[Record]], small: dict[str, int]
) -> None:
    """Rows that are not committed cannot make room for others: who gets one must not hang on the clock."""
    monkeypatch.setattr(direct, "COMMIT_SHARE", 1.0)
    model = TrainerSettings(batch_size=16, features=msgspec.structs.replace(replay_child.SMALL, **small))
    results = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(direct, "COMMIT_SECONDS", seconds)
        settings = DirectSettings(tmp_path / str(seconds), replay_child.JOIN, model, deterministic=True)
        results.append(DirectReplay(settings).run(log()))
    one, two = results
    assert one["checkpoint_digest"] == two["checkpoint_digest"]
    assert one["no_room"] == two["no_room"]


def test_windows_longer_than_half_an_hour_are_closed_at_the_end(tmp_path: Path) -> None:
    join = JoinSettings(wait_ms=3_600_000, open_ms=7_200_000, disorder_ms=600_000)
    settings = DirectSettings(tmp_path, join, replay_child.settings(tmp_path).model, deterministic=True)
    figures = DirectReplay(settings).run(replay_child.log())
    assert figures["balance"]["open"] == 0
    assert figures["examples"] > 10_000


def test_without_determinism_nothing_is_lost_either(tmp_path: Path) -> None:
    figures = _run(tmp_path, deterministic=False)
    assert figures["lost"] == figures["duplicated"] == 0
    assert figures["trained_examples"] == figures["examples"]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "path", "events", "rejected"),
    [("kuairand", KUAIRAND, 111_140, 0), ("taobao", TAOBAO_BY_USER, 100_001, 0)],
)
def test_two_replays_of_a_real_log_give_one_digest(
    public_log: Callable[[str], Path], tmp_path: Path, name: str, path: str, events: int, rejected: int
) -> None:
    results = []
    for run in range(2):
        log = open_log(name, public_log(path))
        join = JoinSettings(implicit=not log.has_impressions)
        settings = DirectSettings(tmp_path / str(run), join, TrainerSettings(), deterministic=True)
        results.append(DirectReplay(settings).run(in_time_order(log)))
    one, two = results
    assert one["events_in"] == events
    assert one["events_rejected"] == rejected
    assert one["lost"] == one["duplicated"] == 0
    assert two["checkpoint_digest"] == one["checkpoint_digest"]
    assert two["examples_digest"] == one["examples_digest"]


def test_users_are_in_the_partitions_that_kafka_puts_them_in(broker: str, topic_prefix: str) -> None:
    topics = TopicSettings(prefix=topic_prefix, partitions=7)
    create_topics(broker, topics)
    with KafkaSink(broker, topics.events, topics.items) as sink:
        for user in ("u1", 12, -5, "ü", "1" * 80):
            assert partition_of(user, 7) == sink.place(topics.events, user)[1]
