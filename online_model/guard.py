"""The guard: a version whose figures have fallen past set bounds is not published; the last good one stays.

It looks at each commit, at the last `examples` scores of each of its tasks, and counts scores, never time. What a
trainer does with it:

- Past a bound, the version is **held**: committed as always, but with nothing to publish. So are those after it.
- After so many further scores, all of them scored since, the figures are looked at again. Within the bounds, the hold
  ends: the next version begins an epoch, and replicas go on from the snapshot that is made of it. It holds all that has
  changed meanwhile, so that nothing has to be kept for them, however long it takes.
- With `rollback` the trainer's owner goes back to a kept checkpoint as soon as a hold begins (`roll_back_if_due`), and
  publishes again from there. Where the figures are past the bounds once more, before they were within them for
  `examples` scores, to the one before it; after ROLLBACKS in a row it gives up, and holds.

Nothing is held before the figures were within the bounds once: at a cold start there is no good version to stay with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import orjson
from msgspec import Struct

from embedding_store.checkpoint import CheckpointStore
from embedding_store.errors import CorruptRecord, DiskFull, StoreError, StoreLocked
from embedding_store.kept import KeptCheckpoints
from online_model.checkpoints import roll_back
from online_model.evaluation.scores import Figures, TaskScores
from online_model.guard_settings import GuardSettings

log = logging.getLogger("headrace")

ENOUGH = 20  # positives, predicted or actual: figures of fewer are noise
ROLLBACKS = 3  # in a row


class GuardState(Struct, frozen=True):
    """What the guard has decided, as of a commit; part of its state, in no digest."""

    held: bool = False
    why: dict[str, str] = {}  # task → what is wrong, while held
    proven: bool = False  # the figures were within the bounds once
    since: dict[str, int] | None = {}  # task → scores up to here are not looked at; None: up to the next opening
    rollbacks: int = 0  # in a row
    due: bool = False  # a rollback

    @property
    def trusted(self) -> bool:
        """Whether this is a model to go back to: not held, nor on trial after a rollback."""
        return not self.held and not self.rollbacks

    def info(self) -> dict[str, Any]:
        """JSON-ready, what a version says."""
        return {"held": self.held, "why": self.why, "rollbacks": self.rollbacks}


def state_from(told: dict[str, Any] | None, scores: Mapping[str, TaskScores]) -> GuardState:
    """The guard's state out of a commit's, for a trainer that opens with these scores."""
    state = msgspec.convert(told or {}, GuardState)
    return state if state.since is not None else msgspec.structs.replace(state, since=_scored(scores))


def decide(
    state: GuardState, settings: GuardSettings, window: int, scores: Mapping[str, TaskScores]
) -> GuardState:
    """The state for the next commit. A function of its arguments: asked again, it says the same."""
    if not settings.tasks:
        return GuardState()
    examples, since = settings.examples or window, state.since or {}
    told: dict[str, str] = {}
    for task in settings.tasks:
        count, before = scores[task].scored, since.get(task, 0)
        if count - (before if before <= count else 0) >= examples:  # of another window they are counted anew
            fault = fault_of(scores[task].recent(examples), settings)
            told |= {} if fault is None else {task: fault}
    wrong = {task: text for task, text in told.items() if text}
    if wrong:
        return _past_bounds(state, settings, wrong, scores) if state.proven else state
    unknown = state.why.keys() & set(settings.tasks) - told.keys()
    if not told or unknown:
        return state
    return GuardState(proven=True, since=since)


def _past_bounds(
    state: GuardState, settings: GuardSettings, wrong: dict[str, str], scores: Mapping[str, TaskScores]
) -> GuardState:
    due = settings.rollback and state.rollbacks < ROLLBACKS
    return msgspec.structs.replace(state, held=True, why=wrong, since=_scored(scores), due=due)


def fault_of(figures: Figures, settings: GuardSettings) -> str | None:
    """Which bound the figures are past, in words; "": none; None: there is too little to say so."""
    actual, predicted = figures.positives, figures.predicted
    if max(actual, predicted) < ENOUGH:
        return None
    # Where nothing was positive at all the ratio has no value, but is past any bound: as if there were one.
    ratio = predicted / max(actual, 1)
    if not settings.min_calibration <= ratio <= settings.max_calibration:
        bounds = f"{settings.min_calibration:g} to {settings.max_calibration:g}"
        return f"{predicted:,.0f} positives predicted, {actual:,} came: {ratio:.3g} and not {bounds}"
    if figures.ne is not None and actual >= ENOUGH and figures.ne > settings.max_ne:
        return f"normalised entropy {figures.ne:.3f}, more than {settings.max_ne:g}"
    return ""


def given_up(state: GuardState) -> GuardState:
    """A rollback was due and cannot be done: what is held stays so until the figures are better."""
    return msgspec.structs.replace(state, due=False, rollbacks=ROLLBACKS)


def report(before: GuardState, after: GuardState, last: str, place: tuple[int, int]) -> None:
    """Says in the log what a commit has changed. last: the version before it; place: its own epoch and sequence."""
    now, of = f"{place[0]}.{place[1]}", {"epoch": place[0], "sequence": place[1]}
    if after.held and not before.held:
        wrong = "; ".join(f"{task}: {text}" for task, text in sorted(after.why.items()))
        log.error("version %s and those after it are not published, replicas stay at %s (%s): look for the cause in "
                  "the input; %s", now, last, wrong, _what_next(after), extra=of)  # fmt: skip
    elif after.held and after.since != before.since:
        log.error("versions are still held back, %s too; %s", now, _what_next(after), extra=of)
    elif before.held and not after.held:
        log.warning("the figures are within the bounds again: published from version %s on", now, extra=of)


def _what_next(state: GuardState) -> str:
    if state.due:
        return "going back to a kept checkpoint"
    if state.rollbacks:
        return (
            f"rolled back {state.rollbacks} times in a row or in vain, which has not helped: what is learned meanwhile "
            "is published once the figures are within the bounds; `headrace checkpoint rollback --version` goes to an "
            "older checkpoint"
        )
    return (
        "they are published once the figures are within the bounds; `headrace checkpoint rollback` goes back, other "
        "bounds are set in [model.guard]"
    )


def roll_back_if_due(path: Path, kept: KeptCheckpoints) -> bool:
    """Before a trainer opens its store at `path`: does what the guard's last commit there wanted.

    Goes to the newest kept checkpoint that was not held, for a second rollback in a row to the one before it, and so
    on. False: it was due and cannot be done, and the log says why; `given_up` is for the trainer to say.

    Raises StoreLocked, DiskFull.
    """
    if not (path / "CURRENT").exists():
        return True
    try:
        with CheckpointStore(path, None, read_only=True) as store:
            head = store.head()
        state = _state_of(head.state) if head is not None else GuardState()
        if not state.due:
            return True
        places = [(m.about["epoch"], m.about["sequence"]) for m in kept.newest_first() if not m.about.get("held")]
        if not places:
            raise StoreError(f"nothing is kept in {kept.url}")
        after = GuardState(proven=True, since=None, rollbacks=state.rollbacks + 1)
        done = _roll_back_to_the_first_whole(path, kept, places[min(state.rollbacks, len(places) - 1) :], after)
    except (StoreLocked, DiskFull):
        raise
    except StoreError as error:
        log.error("the guard cannot roll back: %s", error)
        return False
    log.warning(
        "rolled back to version %s, the %s in a row: %s rows are set aside, going on as version %s",
        done["from"], after.rollbacks, done["set_aside_rows"], done["version"],
    )  # fmt: skip
    return True


def _roll_back_to_the_first_whole(
    path: Path, kept: KeptCheckpoints, places: list[tuple[int, int]], after: GuardState
) -> dict[str, Any]:
    """Raises as `roll_back`, StoreError where none of them is whole."""
    for place in places:
        try:
            return roll_back(path, kept, place, msgspec.to_builtins(after))
        except CorruptRecord as error:
            log.error("%s", error)
    raise StoreError(f"none of the checkpoints in {kept.url} that it could go back to is whole")


def is_held(told: Mapping[str, Any]) -> bool:
    """Whether a version's info says that it was held back."""
    return bool(told.get("guard", {}).get("held"))


def _state_of(state: bytes) -> GuardState:
    return msgspec.convert(orjson.loads(state).get("guard") or {}, GuardState)


def _scored(scores: Mapping[str, TaskScores]) -> dict[str, int]:
    return {task: some.scored for task, some in scores.items()}
