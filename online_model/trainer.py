"""The trainer: takes blocks, tests then trains on them, and commits versions. A plain object, no Kafka in it.

    trainer = open_trainer(settings, path, clock)      # from its store, or fresh
    for sequence, parts in trainer.store.outbox(): …   # publish again, then trainer.store.acknowledge(sequence)
    trainer.catalogue(items)
    while …:
        trainer.offer(block, source_offset)            # from trainer.positions[partition].source_offset on
        trainer.step()                                 # until it returns 0
        parts = trainer.commit()                       # when its time has come, or trainer.commit_due(); publish them,
                                                       # trainer.store.acknowledge(sequence) once the broker has them

Effectively once: what a step learned and the position behind it are committed in one write, and a block is taken only
where it follows the position. Not promised: that two live runs cut the same batches (arrival decides); a run with
`partitions` does. Nothing reads a clock but the injected one, for a version's `created_ms`; and a stopwatch, which only
metrics read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import orjson
import torch

from embedding_store.checkpoint import CheckpointStore, Commit
from embedding_store.columns import TableRows
from embedding_store.delta import Version, encode
from embedding_store.errors import StoreError
from embedding_store.expiry import Notes
from embedding_store.faults import fault
from embedding_store.owed import Owed
from embedding_store.ranks import Ranks
from embedding_store.tables import EmbeddingTables
from online_model.batch import Candidates, batch_of, candidates_of
from online_model.catalogue import CatalogueItem, new_cards, put_catalogue
from online_model.checkpoints import STATE_FORMAT, digest_of, settings_digest, state_of
from online_model.evaluation import Evaluation, mid_ranks, ranked
from online_model.examples import QUERY_WORDS, Block, Examples, Part, Source
from online_model.features import (
    CARD,
    CATEGORY,
    ITEM,
    SELLER,
    SENT_FIRST,
    TITLE_WORDS,
    UNMEASURED,
    USER,
    WORD,
    table_specs,
)  # fmt: skip
from online_model.feedback import Strategy, strategy
from online_model.guard import GuardState, decide, given_up, report, state_from
from online_model.history import HISTORY
from online_model.learner import USUAL_ROWS, Learner, UsualLoss
from online_model.losses import labels, sampling_correction
from online_model.negatives import RecentItems
from online_model.positions import Position, RowQueue
from online_model.ranker import CLICK, Ranker
from online_model.ranks import on_all_ranks
from online_model.settings import TrainerSettings
from online_model.statistics import count, predicted_plays, warm, watched
from online_model.widening import open_widened

log = logging.getLogger("headrace")

LEFT_OUT = 20  # batches of which it is told where they were


def open_trainer(
    settings: TrainerSettings,
    path: Path | None,
    clock: Callable[[], int],
    partitions: int = 0,
    device: str = "cpu",
    sync: bool = False,
    ranks: Ranks | None = None,
) -> Trainer:
    """A trainer that goes on from the store at `path` (made if there is none); without a path one that keeps nothing
    and cannot commit. Arguments: see Trainer.

    With `sync` a commit outlives a power cut, without it only a kill -9. Settings of another shape of model change the
    store first: `widening.open_widened`. With several `ranks` each opens one, all but the first without a path.

    Raises StoreLocked, StoreError, UsageError, RankLost.
    """
    specs = table_specs(settings.features)
    extra = len(feedback_of(settings).extra)
    ranker, store = Ranker(settings.features.dim, settings.ranker, extra), None
    if path is not None:
        store = open_widened(settings, {spec.name: spec.layout for spec in specs}, ranker, path, clock, sync)
    try:
        tables = EmbeddingTables(specs, device, store, ranks)
        ranker.to(device)
        trainer = Trainer(settings, tables, ranker, store, clock, partitions)
        trainer.restore()
    except BaseException:
        if store is not None:
            store.close()
        raise
    return trainer


@dataclass
class Scored:
    """What a step scored, and has learned since: to score more as of before it, do that before the step."""

    rows: Examples
    implicit: np.ndarray  # int64 [m] the rows that negatives were drawn for
    drawn: np.ndarray  # int64 [m, k] ids of items
    p: np.ndarray  # float32 [n + m · k, heads] probabilities: of the rows, then of the negatives


class Trainer:
    """Test-then-train over tables and ranker, which it owns from now on. Not thread-safe.

    clock: ms UTC. partitions: the number of partitions of a deterministic run (see positions.py), 0 for a live one.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        tables: EmbeddingTables,
        ranker: Ranker,
        store: CheckpointStore | None,
        clock: Callable[[], int],
        partitions: int = 0,
    ) -> None:
        self.settings, self.tables, self._store = settings, tables, store
        self.epoch, self.sequence = 1, 0  # of the last commit; 0: none
        self._ranker, self._clock = ranker, clock
        self._feedback = feedback_of(settings)
        self._learner = Learner(
            tables, ranker, self._feedback, settings.learning_rate, settings.wide_rate, settings.batch_size,
            settings.retrieval, settings.clip, settings.bf16,
        )  # fmt: skip
        self._queue = RowQueue(partitions)
        self._recent = RecentItems(settings.recent_items)
        self._evaluation = Evaluation(settings.window, 1 + settings.ranked_among if settings.ranked_of else 0)
        self._guard = GuardState()
        rate, refresh_ms = settings.row_bytes_per_s, round(settings.refresh_s * 1000)
        self._owed = None if store is None else Owed(
            store, rate, refresh_ms, SENT_FIRST, settings.encoding, UNMEASURED
        )  # fmt: skip
        self._base: tuple[int, int] | None = None  # the version that the next one goes on from
        self._totals = {"trained_rows": 0, "positives": 0, "shown": 0, "event_time_ms": 0, "left_out": 0}
        self._left_out: list[dict] = []  # the last batches from which nothing was learned
        self._usual = UsualLoss()
        self._unclicked_rate = 1.0  # share of unclicked impressions that is kept, as last seen
        self._cards: dict[int, bytes] = {}  # new since the last commit
        self._changed = self._erased = False  # since the last commit: anything; users forgotten, not merely expired
        self._owes_dense = False  # as of the last commit: replicas wait for its dense weights
        self._metrics: dict[str, dict] = {}  # as of the last commit that made them anew
        self._sound = True  # False: a step failed half-way, and only the store knows the truth
        self.delta_rows = 0  # in all versions that were committed to be published, since the start
        self.erasures = self.purged = 0  # commits with users forgotten; those before which its owner purged the store
        self.last_loss = 0.0  # of a row, the mean of the last step
        self.observer: Callable[[Scored], None] | None = None  # is told of each step; changes nothing
        self.mark = 0  # its owner's: committed and restored with the rest, in no digest
        self.on_hold: Callable[[], object] = lambda: None  # called before the first commit that the guard holds back

    @property
    def store(self) -> CheckpointStore:
        """The first rank's."""
        assert self._store is not None
        return self._store

    @property
    def ranks(self) -> Ranks:
        """This trainer's place among the ranks. Of several, what changes anything is called on the first one."""
        return self.tables.ranks

    @property
    def positions(self) -> dict[int, Position]:
        """Where it is in each partition, what the next commit will hold."""
        return self._queue.positions

    @property
    def begun(self) -> bool:
        """Whether the store has a version of this epoch."""
        return self._base is not None and self._base[0] == self.epoch

    @property
    def pending(self) -> int:
        """Rows offered and not learned."""
        return self._queue.rows

    @property
    def owes(self) -> bool:
        """Whether replicas wait for rows that a commit held back: commit also while nothing new comes."""
        return self._owed is not None and self._owed.rows > 0 and not self._guard.held

    @property
    def owes_dense(self) -> bool:
        """Whether replicas wait for dense weights: commit with them, also while nothing new comes."""
        return self._owes_dense and not self._guard.held

    @property
    def owed(self) -> dict[str, int]:
        """How many rows are owed to replicas (`rows`), and for how long the oldest has been (`oldest_ms`)."""
        assert self._owed is not None
        return self._owed.info(self._clock())

    @property
    def guard(self) -> GuardState:
        """What the guard has decided, as of the last commit."""
        return self._guard

    @property
    def rollback_due(self) -> bool:
        """Whether the guard wants a rollback: close the store, `roll_back_if_due`, open the trainer again."""
        return self._guard.due and self.settings.guard.rollback

    @on_all_ranks
    def give_up_rollback(self) -> None:
        """The rollback that is due cannot be done."""
        self._guard = given_up(self._guard)

    @property
    def next_way(self) -> int:
        """By which of WAYS the next item is better foretold, as far as was measured (`ranked_of`)."""
        return 0 if self._evaluation.ranking is None else self._evaluation.ranking.way

    @property
    def left_out(self) -> int:
        """Rows of batches from which nothing was learned: they exploded, or were not finite."""
        return self._totals["left_out"]

    @property
    def figures(self) -> dict[str, dict]:
        """As `Evaluation.metrics`, as of the last commit with dense weights; another object each time."""
        return self._metrics

    @property
    def stage_seconds(self) -> dict[str, float]:
        """The time of all steps by stage (stages.py); it goes on counting."""
        return self._learner.stages.seconds

    @property
    def drifts(self) -> dict[str, int]:
        """Changes of the loss that were found, by task."""
        return {task: drift.found for task, drift in self._evaluation.drift.items()}

    def commit_due(self, rows: int = 0) -> bool:
        """Whether the next step (of so many rows) may find a table full of rows that only a commit lets go of: commit
        before it.

        An id that gets no row is learned by nobody, and counted in `no_room`.
        """
        most = rows or self.settings.batch_size
        users = most + self._queue.users_finished_by(most)
        items = most * (1 + self.settings.negatives + HISTORY)
        words = most * (TITLE_WORDS + QUERY_WORDS)
        return self._changed and self._short_of({USER: users, ITEM: items, CATEGORY: most, SELLER: most, WORD: words})

    def short_of(self, rows: int) -> bool:
        """Whether so many new users or items may find a table full of rows that only a commit lets go of."""
        return self._changed and self._short_of(dict.fromkeys((USER, ITEM), rows))

    @on_all_ranks
    def _short_of(self, rows: dict[str, int]) -> bool:
        found = [self.tables.has_room(table, n) for table, n in rows.items()]  # all of them: a look is collective
        return not all(found)

    @on_all_ranks
    def offer(self, block: Block, source_offset: int) -> bool:
        """Takes a block, which lies at `source_offset` in its partition of `examples`. False: it was seen before.

        Raises PositionError where blocks are missing before it.
        """
        taken = self._queue.offer(block, source_offset)
        with self._whole():
            self._finish_blocks()  # one without rows is done at once
        return taken

    @on_all_ranks
    def step(self, drain: bool = False, rows: int = 0) -> int:
        """Scores, measures and learns the next batch, of `rows` at most (0: `batch_size`). Returns how many it had, 0
        where there is nothing to do.

        1. Negatives are drawn for positives without impressions. 2. All candidates are scored with the model and the
        statistics from before the batch, and the scores are measured. 3. The model learns from the very same scores.
        4. Statistics, recent items, cards; blocks that are done take away the users whom they forget, and bring the
        histories of those who did something.
        Where loss or gradient is not finite, or the loss far above those before (`exploding`), nothing of the model is
        changed: the batch is left out, and booked in `left_out` with its place.

        After an exception the trainer is spent: open it again from the store.
        """
        with self._whole():
            batch = self._queue.take(rows or self.settings.batch_size, drain)
            if batch is not None:
                self._changed = True
                examples = batch.part != Part.FORGET
                if examples.any():
                    self._learn(batch if examples.all() else batch.take(examples))
            self._finish_blocks()
        return 0 if batch is None else len(batch)

    @on_all_ranks
    def score(self, candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities float32 [N, heads], and float32 [N, len(WAYS)] by which next items may be put in order, of what
        may have been learned or not: admits nothing, changes nothing."""
        return self._learner.score(candidates)

    @on_all_ranks
    def catalogue(self, items: Sequence[CatalogueItem]) -> None:
        """Items of the catalogue: admits them, keeps their cards. Those that are known as they are change nothing."""
        with self._whole():
            cards = put_catalogue(self.tables, items, self._totals["event_time_ms"])
            self._cards.update(cards)
            self._changed = self._changed or bool(cards)

    @on_all_ranks
    def commit(self, everything: bool = False, dense: bool = True) -> list[bytes] | None:
        """Makes what was learned durable, as version (epoch, sequence + 1), and returns its parts to publish, none of
        them where the guard holds it back (guard.py).

        None where nothing has changed and nothing that is owed to replicas may go yet. `everything`: all rows that are
        owed go, whatever `row_bytes_per_s` says. `dense`: so do the dense weights, and new figures; without it replicas
        keep those that they have until a later commit (`owes_dense`), the store has the weights in any case.

        1. Touched rows, dense weights and state are read, the version is encoded. 2. One atomic write to the store.
        3. Only then the touched rows count as clean, and the sequence moves. If 1 or 2 raise (DiskFull, StoreError)
        nothing is forgotten: commit again.
        """
        self._need_sound()
        if not self.ranks.from_first(lambda: self._changed or self.owes or (dense and self.owes_dense)):
            return None
        fault("commit.begun")
        touched, notes = self.tables.touched(), self.tables.notes()
        parts, before = None, (self._guard, self.epoch, self._owes_dense)
        self._judge()
        moved = self._changed or self._owes_dense
        dense = moved and (dense or not self.begun)
        self._owes_dense = moved and not dense
        try:
            if self.ranks.rank == 0:
                parts = self._write(touched, notes, everything, dense, before[0])
        finally:
            written = self.ranks.from_first(lambda: parts is not None)
            if not written:
                self._guard, self.epoch, self._owes_dense = before
        if not written:
            return None
        self.tables.clear_touched()
        self.sequence += 1
        self._base = (self.epoch, self.sequence)
        self._cards, self._changed, self._erased = {}, False, False
        fault("commit.done")
        return parts

    def _judge(self) -> None:
        """Whether the version to come is published. Where versions were held back before it, it begins an epoch:
        replicas load the snapshot that is made of it."""
        held = self._guard.held
        self._guard = decide(self._guard, self.settings.guard, self.settings.window, self._evaluation.tasks)
        self.epoch += held and not self._guard.held

    def _write(
        self, touched: dict[str, TableRows], notes: dict[str, Notes], everything: bool, dense: bool, before: GuardState
    ) -> list[bytes] | None:
        """Steps 1 and 2 of a commit. None: there is nothing to write. `before`: the guard as of the last one."""
        assert self._owed is not None
        now_ms, sequence = self._clock(), self.sequence + 1
        gone, weights = self.tables.gone(), self._ranker.weights()
        if dense or not self._metrics:  # figures are 5 ms of work: at a commit without dense weights the last ones do
            self._metrics = self._evaluation.metrics()
        version = Version(
            epoch=self.epoch, sequence=sequence, base=self._base, created_ms=now_ms,
            positions={p: at.handled for p, at in sorted(self.positions.items())}, info=self._info(self._metrics),
            dense=weights if dense else {}, gone=gone, blobs={CARD: self._cards} if self._cards else {},
        )  # fmt: skip
        plan = self._owed.plan(touched, gone, now_ms, everything or self._base is None)
        if not (self._changed or dense or plan.tables):
            return None
        version.tables, version.info["owed"] = plan.tables, plan.info(now_ms)
        if self._guard.held and not before.held:
            self.on_hold()
        parts = [] if self._guard.held else encode(version, rows=self.settings.encoding)
        fault("commit.encoded")
        self.erasures += self._erased
        self.store.commit(Commit(
            self.epoch, sequence, self._state(), {**weights, **self._dense_state()}, touched,
            {**version.blobs, **self.tables.sketches()}, parts, replace(version, dense=weights), gone,
            notes, records=plan.records, dense_owed=self._owes_dense,
            settings=settings_digest(self._settings()),
            event_time_ms=self._totals["event_time_ms"],
        ))  # fmt: skip
        self._owed.accept(plan, now_ms)
        if parts:
            self.delta_rows += sum(map(len, plan.tables.values()))
        report(before, self._guard, "{}.{}".format(*self._base or (0, 0)), (self.epoch, sequence))
        return parts

    def restore(self) -> bool:
        """Goes on from the last commit in the store. False: there is none. Before anything else, in a fresh trainer.

        Other settings than those of the last commit raise the epoch. Raises UsageError where the ranker's shape is
        another.
        """
        fault("recover.opened")
        head = self.ranks.from_first(lambda: None if self._store is None else self._store.head())
        if head is None:
            return False
        state = self.ranks.from_first(lambda: state_of(head, self.store.path))
        own = self._ranker.weights().keys()
        self._ranker.load_weights({name: head.dense[name] for name in head.dense.keys() & own})
        self._learner.load(_part(head.dense, "adam."))
        self._recent.load(_part(head.dense, "recent."))
        self._evaluation.load(_part(head.dense, "scores."))
        fault("recover.weights")
        self.tables.restore()
        if self._owed is not None:
            self._owed.restore()
        fault("recover.rows")
        self._queue.load(state["intake"])
        self._totals, self.mark, self.erasures = state["totals"], state["mark"], state["erased"]
        self._owes_dense = state["owes_dense"]
        self._unclicked_rate, self._left_out = state["unclicked_rate"], state["left_out"]
        self._usual = UsualLoss(**state["usual_loss"])
        self._guard = state_from(state["guard"], self._evaluation.tasks)
        self.sequence, self._base = head.sequence, (head.epoch, head.sequence)
        changed = state["settings"] != self._settings()
        self.epoch = head.epoch + changed  # stored with the first commit, before anything of it is published
        if changed and self._store is not None:
            log.info("the settings have changed: going on from version %s.%s in epoch %s", *self._base, self.epoch)
        fault("recover.done")
        return True

    @on_all_ranks
    def supersede(self, epoch: int, sequence: int) -> bool:
        """Replicas may have versions up to this one. Whether the store has forgotten it, by a power cut or as an old
        copy: the next version then begins a new epoch, which goes on from what the store has.
        """
        if (epoch, sequence) <= (self.epoch, self.sequence):
            return False
        self.epoch = epoch + 1  # stored with the first commit, before anything of it is published
        return True

    def info(self) -> dict:
        """JSON-ready: figures, counts and positions, what a version says of itself."""
        return self._info(self._evaluation.metrics())

    def _info(self, metrics: dict[str, dict]) -> dict:
        return {
            "metrics": metrics,
            "partitions": {str(p): asdict(at) for p, at in sorted(self.positions.items())},
            **self._totals,
            "no_room": {table: self.tables.dropped(table) for table in self.tables.specs},
            "recent_items": len(self._recent),
            "owed": {} if self._owed is None else self.owed,
            "owes_dense": self._owes_dense,
            "guard": self._guard.info(),
            "left_out_batches": self._left_out,
            "settings": self._settings(),
        }

    def digest(self) -> str:
        """The digest of the last commit, as `digest_of` says."""
        return digest_of(self.store)

    def _learn(self, rows: Examples) -> None:
        """Steps 1 to 4 for one batch."""
        stages = self._learner.stages
        stages.begin()
        shown = rows.part == Part.SHOWN
        implicit = np.flatnonzero(shown & (rows.source == Source.IMPLICIT))
        k, seed = self.settings.negatives, self.settings.seed
        drawn = self._recent.draw(rows.row_id[implicit], rows.item[implicit], k, seed)
        plays = self._ranker.plays.cpu().numpy() if self.settings.ranker.watch_quantiles else None
        target = labels(rows, self._feedback, plays)
        if not drawn.size:
            target[implicit, CLICK] = np.nan  # a positive without a negative says nothing
        unclicked = np.flatnonzero(shown & (rows.click == 0))
        if len(unclicked):
            self._unclicked_rate = float(rows.rate[unclicked[-1]])
        sampling = sampling_correction(rows, self.settings.sampling_correction, self._unclicked_rate)
        self._totals["event_time_ms"] = max(self._totals["event_time_ms"], int(rows.closed.max()))
        chance = 1 / max(len(self._recent), 1)
        batch = batch_of(
            rows, target, sampling, implicit, drawn, self._totals["event_time_ms"], chance, self._totals["shown"]
        )
        if self.settings.ranked_of:
            self._rank(rows)
        stages.done("prepare")
        outcome = self._learner.learn(batch, self._usual.limit(self.settings.exploding, len(batch.target)))
        self.last_loss = outcome.loss
        if self.observer is not None:
            self.observer(Scored(rows, implicit, drawn, outcome.p))
        if np.isfinite(outcome.p).all():
            self._evaluation.measure(rows, target, implicit, outcome.p, predicted_plays(rows, outcome.p, plays))
        stages.done("evaluate")
        if outcome.learned:
            self._usual.add(outcome.loss)
            self._count(rows, outcome.rows[: len(rows)], plays)
        else:
            self._leave_out(rows, outcome.loss)
            if np.isfinite(outcome.loss):
                # It counts as far as one that is just not left out: what goes on is what is usual now. Without it a
                # while without clicks made the usual loss so small that no click was ever learned again.
                self._usual.add(min(outcome.loss, self._usual.limit(self.settings.exploding, USUAL_ROWS)))
        self._totals["trained_rows"] += len(rows)
        self._totals["shown"] += int(shown.sum())
        self._totals["positives"] += int((rows.click == 1).sum())
        self._changed = True
        stages.done("count")

    def _rank(self, rows: Examples) -> None:
        """Next-item figures: some of the positives among recently active items."""
        positive = np.flatnonzero((rows.part == Part.SHOWN) & (rows.click == 1))
        chosen = rows.take(positive[ranked(rows.row_id[positive], self.settings.ranked_of, self.settings.seed)])
        n, among = len(chosen), self.settings.ranked_among
        others = self._recent.draw(chosen.row_id, chosen.item, among, self.settings.seed + 1)
        if not others.size:
            return
        candidates, *_ = candidates_of(chosen, np.arange(n), others)
        candidates.position[:] = -1
        _, ways = self._learner.score(candidates)
        assert self._evaluation.ranking is not None
        self._evaluation.ranking.add([mid_ranks(by[:n], by[n:].reshape(n, among)) for by in ways.T])

    def _count(self, rows: Examples, at: np.ndarray, plays: np.ndarray | None) -> None:
        """Step 4: what was learned counts."""
        count(self.tables, rows, at)
        warm(self.tables, rows, at, self._totals["event_time_ms"])
        self._cards.update(new_cards(self.tables, rows, at))
        self._recent.push(rows.item[rows.part == Part.SHOWN])
        if plays is not None and (rows.play_ms >= 0).any():
            self._ranker.plays.copy_(torch.from_numpy(watched(self.tables, rows, at, plays)))

    def _leave_out(self, rows: Examples, loss: float) -> None:
        """A batch from which nothing was learned: it is booked with its places in the input."""
        self._totals["left_out"] += len(rows)
        places = {str(p): [at.next, at.taken] for p, at in sorted(self.positions.items())}
        self._left_out = [*self._left_out, {"rows": len(rows), "loss": repr(loss), "before": places}][-LEFT_OUT:]
        log.warning(
            "a batch of %s rows was left out (loss %s a row): not finite, or far above those before; it ends at %s",
            len(rows), loss, places,
        )  # fmt: skip

    def _finish_blocks(self) -> None:
        """The users that blocks forget and the histories that they bring, once all of their rows are learned.

        In this order, block by block: the histories are from after the forgetting.
        """
        for block in self._queue.finished():
            self._changed = True
            forgotten = block.examples.user[block.examples.part == Part.FORGET]
            if len(forgotten):
                self.tables.forget(USER, forgotten)
                self._erased = True
            if len(block.users):
                self.tables.begin_step(self._totals["event_time_ms"])
                # Seen they were in the rows: how often the block brings them hangs on how the log was cut in blocks.
                nowhere = np.zeros(len(block.users), np.int64)
                at = self.tables.rows(USER, block.users, admit=True, examples=nowhere)
                self.tables.set(USER, "history", at[at > 0], block.histories[at > 0])

    def _need_sound(self) -> None:
        if not self._sound:
            raise StoreError("an earlier step failed: restart the trainer, it goes on from its last commit")

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What is inside is done wholly, or the trainer is spent: half a step must never be committed."""
        self._need_sound()
        self._sound = False
        yield
        self._sound = True

    def _dense_state(self) -> dict[str, np.ndarray]:
        parts = {"adam": self._learner.state(), "recent": self._recent.state(), "scores": self._evaluation.state()}
        return {f"{part}.{name}": array for part, state in parts.items() for name, array in state.items()}

    def _state(self) -> bytes:
        state = {"format": STATE_FORMAT, "intake": self._queue.state(), "totals": self._totals, "mark": self.mark,
                 "erased": int(self.erasures > self.purged), "owes_dense": self._owes_dense}
        state |= {"unclicked_rate": self._unclicked_rate, "left_out": self._left_out, "usual_loss": asdict(self._usual)}
        state["guard"] = msgspec.to_builtins(self._guard)
        return orjson.dumps({**state, "settings": self._settings()}, option=orjson.OPT_SORT_KEYS)

    def _settings(self) -> dict:
        return msgspec.to_builtins(self.settings)


def feedback_of(settings: TrainerSettings) -> Strategy:
    """How purchases are learned."""
    return strategy(settings.feedback, settings.purchase_wait_ms, settings.ranker.entire_space)


def _part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
