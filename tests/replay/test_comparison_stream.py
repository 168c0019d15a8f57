"""All systems are shown the same stream, and it is the trainer's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedding_store.errors import UsageError
from online_model.examples import Part
from online_model.trainer import Scored
from replay.comparison.stream import OTHERS, read_stream
from replay.direct import DirectReplay, DirectSettings
from streams.events import Item
from tests.replay.comparison_logs import MODEL, PARTITIONS, join, log, stream


@pytest.mark.parametrize("impressions", [True, False])
def test_batches_and_negatives_are_those_of_a_deterministic_replay(tmp_path: Path, impressions: bool) -> None:
    told: list[Scored] = []
    replay = DirectReplay(
        DirectSettings(tmp_path / "s", join(impressions), MODEL, PARTITIONS, deterministic=True), lambda _: None
    )
    replay._trainer.observer = told.append
    replay.run(log(impressions))
    batches = stream(impressions).batches
    assert len(told) == len(batches) > 10
    drawn = 0
    for step, batch in zip(told, batches, strict=True):
        assert step.rows.row_id.tolist() == batch.rows.row_id.tolist()
        shown = int((batch.scored.example != 0).sum())
        if step.drawn.size:
            assert batch.scored.candidates.item[shown:].tolist() == step.drawn.ravel().tolist()
            drawn += step.drawn.size
    assert (drawn > 1_000) == (not impressions)


def test_lessons_are_what_is_scored_each_positive_before_its_negatives() -> None:
    for batch in stream(impressions=False).batches[1:]:
        lessons, label = batch.lessons, batch.lessons.label
        assert sorted(lessons.candidates.item) == sorted(batch.scored.candidates.item)
        assert label.reshape(-1, 1 + MODEL.negatives).tolist() == [[1, 0, 0, 0, 0]] * int(label.sum())
        users = lessons.user.reshape(-1, 1 + MODEL.negatives)
        assert (users == users[:, :1]).all(), "a negative is of the same user, in the same context"


def test_a_late_click_is_a_positive_in_the_figures_and_learned_only_when_it_came() -> None:
    batches, late = stream(impressions=True).batches, 0
    for at, batch in enumerate(batches):
        for example in batch.rows.example_id[batch.rows.part == Part.LATE_CLICK]:
            (before,) = [b for b in batches[: at + 1] if example in b.scored.example]
            assert before.scored.label[before.scored.example == example].tolist() == [1]
            taught = before.lessons.label[before.lessons.example == example]
            assert taught[0] == 0
            late += 1
    assert late > 10


def test_positions_are_clicks_among_others_that_were_active_before() -> None:
    seen: set[int] = set()
    some = 0
    for batch in stream(impressions=True).batches:
        if batch.ranked is not None:
            items = batch.ranked.candidates.item.reshape(-1, 1 + OTHERS)
            for row_id, user, (item, *others) in zip(batch.ranked.row_id, batch.ranked.user, items, strict=True):
                (at,) = np.flatnonzero(batch.rows.row_id == row_id)
                assert (batch.rows.item[at], batch.rows.user[at], batch.rows.click[at]) == (item, user, 1)
                assert item not in others
                assert len(set(others)) == OTHERS
                assert seen >= set(others)
                some += 1
            assert batch.ranked.known.tolist() == [int(item) in seen for item in items[:, 0]]
        seen |= set(batch.rows.item.tolist())
    assert some > 50


def test_the_same_seed_gives_the_same_stream_another_one_other_negatives() -> None:
    one, other = stream(impressions=False), stream(impressions=False, seed=4)
    again = read_stream(log(False), join(False), MODEL, PARTITIONS)
    for mine, same, differs in zip(one.batches, again.batches, other.batches, strict=True):
        assert mine.scored.candidates.item.tolist() == same.scored.candidates.item.tolist()
        assert mine.rows.row_id.tolist() == differs.rows.row_id.tolist()
    last, changed = one.batches[-1].scored.candidates.item, other.batches[-1].scored.candidates.item
    assert last.tolist() != changed.tolist()


def test_a_limit_is_of_events_and_an_empty_log_is_refused() -> None:
    limited = read_stream(log(True), join(True), MODEL, PARTITIONS, limit=100)
    records = [record for record in log(True) if not isinstance(record, Item)][:100]
    assert limited.events == sum(len(getattr(record, "items", [0])) for record in records)
    with pytest.raises(UsageError, match="nothing to score"):
        read_stream(log(False), join(True), MODEL, PARTITIONS, limit=100)
    with pytest.raises(UsageError, match="all clicks or none"):
        read_stream(log(True), join(True), MODEL, PARTITIONS, limit=1)
