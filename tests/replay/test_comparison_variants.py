"""Several settings side by side: equal ones are equal, what is worse is seen to be, and all are measured alike."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embedding_store.errors import UsageError
from online_model.settings import TrainerSettings
from replay.comparison.alignment import Sides, align
from replay.comparison.compare import CompareSettings, compare
from replay.comparison.harness import COMPARED, Truth
from replay.comparison.stream import OTHERS, Stream, read_stream
from replay.comparison.variants import Variant, differing
from replay.readers import open_log
from streams.events import encode
from streams.joiner import JoinSettings
from tests.replay.comparison_logs import MODEL, PARTITIONS, join, log, stream

SHORT = JoinSettings(wait_ms=200, click_window_ms=1_000)
SMALL = msgspec.structs.replace(MODEL, batch_size=100)
ABSURD = msgspec.structs.replace(SMALL, features=msgspec.structs.replace(MODEL.features, learning_rate=100.0))


@cache
def _other(impressions: bool) -> Stream:
    own = msgspec.structs.replace(SHORT, implicit=not impressions)
    return read_stream(log(impressions), own, SMALL, PARTITIONS)


def _measured(sides: Sides, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(example, user, ts, item, label, known of each score; user, item, others, known of each position) of a side."""
    side = sides.by_key[key]
    batches = side.stream.batches
    scores = np.concatenate([
        np.stack((s.example, s.user, s.ts, s.candidates.item, s.label.astype(int), s.known), 1)
        for s in (batch.scored for batch in batches)
    ])  # fmt: skip
    ranked = [batch.ranked for batch in batches if batch.ranked is not None]
    positions = np.concatenate([
        np.column_stack((p.user, p.candidates.item.reshape(-1, 1 + OTHERS), p.known)) for p in ranked
    ])  # fmt: skip
    return scores[np.argsort(side.order)], positions[np.argsort(side.position_order)]


@pytest.mark.parametrize("impressions", [True, False])
def test_other_joins_and_batches_are_measured_on_the_same_at_the_same_moment(impressions: bool) -> None:
    streams = {b"a": stream(impressions), b"b": _other(impressions)}
    sides = align(streams)
    one, other = (_measured(sides, key) for key in streams)
    assert len(one[0]) > 1_000
    assert len(one[1]) > 50
    assert np.array_equal(one[0], other[0])
    assert np.array_equal(one[1], other[1])
    closed = {key: {int(e): int(ms) for batch in s.batches for e, ms, part in zip(
        batch.rows.example_id, batch.rows.closed, batch.rows.part, strict=True) if part == 0}
        for key, s in streams.items()}  # fmt: skip
    for key in streams:
        learned_to = 0
        for batch in sides.by_key[key].stream.batches:
            for example in batch.scored.example[batch.scored.example != 0]:
                complete = min(closed[b"a"][int(example)], closed[b"b"][int(example)])
                assert learned_to <= complete, "it has learned what came after the moment at which the other scored"
            learned_to = max(learned_to, batch.to_ms)


def test_a_click_is_one_where_any_of_the_settings_has_joined_it() -> None:
    streams = {b"a": stream(True), b"b": _other(True)}
    sides = align(streams)
    assert sides.about["clicks_that_not_all_have"] > 0
    clicked = {
        int(e) for s in streams.values() for b in s.batches for e in b.scored.example[b.scored.label == 1]
    }  # fmt: skip
    scores, _ = _measured(sides, b"b")
    assert {int(row[0]) for row in scores if row[4]} == clicked & {int(row[0]) for row in scores}


def test_scores_of_every_side_come_in_one_order() -> None:
    streams = {b"a": stream(False), b"b": _other(False)}
    sides = align(streams)
    truths = {}
    for key in streams:
        side = sides.by_key[key]
        truth = Truth.of(side.stream)
        values = np.empty(len(truth.user), np.int64)
        values[side.order] = truth.user
        truths[key] = values[sides.by_key[sides.key].order]
    assert np.array_equal(truths[b"a"], truths[b"b"])
    assert np.array_equal(truths[b"a"], Truth.of(sides.drawn_from).user)


def test_settings_without_an_example_in_common_are_refused() -> None:
    with pytest.raises(UsageError, match="no example in common"):
        align({b"a": stream(True), b"b": stream(False)})


def test_what_came_before_a_window_is_learned_and_not_measured() -> None:
    whole = stream(True)
    middle = int(np.median(np.concatenate([batch.scored.ts for batch in whole.batches])))
    window = read_stream(log(True), join(True), MODEL, PARTITIONS, from_ms=middle)
    assert len(window.batches) == len(whole.batches)
    for mine, its in zip(window.batches, whole.batches, strict=True):
        assert mine.rows.row_id.tolist() == its.rows.row_id.tolist()
        later = its.scored.ts >= middle
        assert mine.scored.candidates.item.tolist() == its.scored.candidates.item[later].tolist()
        assert mine.scored.known.tolist() == its.scored.known[later].tolist()
        if mine.ranked is not None:
            assert (mine.ranked.candidates.moment >= middle).all()
    assert sum(len(batch.scored.label) for batch in window.batches) > 0
    with pytest.raises(UsageError, match="nothing to score"):
        read_stream(log(True), join(True), MODEL, PARTITIONS, from_ms=1 << 60)


def _compared(path: Path, *variants: tuple[str, JoinSettings, TrainerSettings]) -> dict[str, Any]:
    settings = CompareSettings(
        join(True), MODEL, PARTITIONS, (3,), (), 1_500, variants=tuple(Variant(*of) for of in variants)
    )
    return compare(open_log("events", path), settings)


def test_equal_settings_are_equal_worse_ones_worse_and_their_order_changes_signs_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(encode(record) + b"\n" for record in log(True)))
    a, twin, bad = ("a", join(True), MODEL), ("twin", join(True), MODEL), ("bad", SHORT, ABSURD)
    found, turned = _compared(path, a, twin, bad), _compared(path, bad, a)
    pairs = {(p["of"], p["less"]): p["figures"] for p in found["runs"][0]["pairs"]}
    (other,) = (p["figures"] for p in turned["runs"][0]["pairs"])

    def figures(result: dict[str, Any], name: str) -> dict[str, Any]:
        return {key: value for key, value in result["systems"][name].items() if key != "seconds"}

    assert figures(found, "a") == figures(found, "twin") == figures(turned, "a")
    for name in COMPARED:
        assert pairs["twin", "a"][name] == {"difference": 0.0, "interval": (0.0, 0.0)}
        assert other[name]["difference"] == -pairs["bad", "a"][name]["difference"]
        low, high = pairs["bad", "a"][name]["interval"]
        assert other[name]["interval"] == pytest.approx((-high, -low), abs=1e-12)
    assert pairs["bad", "a"]["ne"]["interval"][0] > 0
    assert any(line.startswith("normalised entropy: a better than bad by ") for line in found["verdicts"])
    assert "AUC: a and twin are equal" in found["verdicts"]
    assert found["differences"]["model.features.learning_rate"] == {"a": 0.4, "twin": 0.4, "bad": 100.0}
    assert set(found["differences"]) == {
        "join.wait_ms", "join.click_window_ms", "model.batch_size", "model.features.learning_rate",
    }  # fmt: skip
    assert found["runs"][0]["compared"]["left_out"].keys() == {"a", "twin", "bad"}


def test_what_cannot_make_a_difference_is_not_one() -> None:
    other = msgspec.structs.replace(MODEL, seed=9, encoding="int8", negatives=2)
    silent = msgspec.structs.replace(join(True), unclicked_of=4)
    assert differing([Variant("a", join(True), MODEL), Variant("b", silent, other)]) == {
        "model.negatives": {"a": 4, "b": 2}
    }
