"""All figures of a trainer, and how a batch is booked in them: test, then train."""

from __future__ import annotations

import numpy as np

from online_model.evaluation.drift import Drift
from online_model.evaluation.ranking import Ranking
from online_model.evaluation.scores import TaskScores, log_loss
from online_model.evaluation.watch_time import WatchTime
from online_model.examples import Examples, Part, Source
from online_model.ranker import CLICK, PURCHASE, WATCH


class Evaluation:
    """The tasks by name: click, watch (a long view), purchase; click_sampled for positives against drawn negatives.

    Beside them the watch time, and for those tasks whose labels are there when they are scored the drift of the loss.
    """

    TASKS = ("click", "watch", "purchase", "click_sampled")
    DRIFTING = ("click", "watch", "click_sampled")

    def __init__(self, window: int, among: int = 0) -> None:
        """among: the items that a positive is ranked among, itself included (`ranking.add`); 0: none is."""
        self.tasks = {name: TaskScores(window) for name in self.TASKS}
        self.watch_time = WatchTime(window)
        self.drift = {name: Drift() for name in self.DRIFTING}
        self.ranking = Ranking(window, among) if among else None

    def measure(
        self,
        rows: Examples,
        target: np.ndarray,
        implicit: np.ndarray,
        p: np.ndarray,
        watch_ms: np.ndarray | None = None,
    ) -> None:
        """Books the scores of n rows, made before they are learned.

        target: float32 [n, heads], nan where a row does not say. implicit: int64 [k], the rows without impressions.
        p: probabilities [N, heads] of the rows and, behind them, of the negatives, those of each implicit row together.
        watch_ms: predicted watch time [N], nan where there is none.

        Each is made at first sight: a click's at SHOWN, a long view's and the watch time at WATCH, a purchase's at the
        click's row, which says purchase −1 where the joiner waits. Rows that come later only change its label.
        """
        n, part, where = len(rows), rows.part, rows.scenario
        scored = (rows.source == Source.IMPRESSION) & (part == Part.SHOWN)
        self._score("click", rows, scored, p[:n, CLICK], rows.click)
        self._score("watch", rows, ~np.isnan(target[:, WATCH]), p[:n, WATCH], target[:, WATCH])
        clicked = np.flatnonzero(rows.click == 1)
        nothing = np.zeros(len(clicked), np.uint8)
        self.tasks["purchase"].add(rows.example_id[clicked], p[clicked, PURCHASE], nothing, None, where[clicked])
        for task, later in (("click", Part.LATE_CLICK), ("purchase", Part.PURCHASE)):
            self.tasks[task].flip(rows.example_id[part == later], where[part == later])
        if len(p) > n:
            self._score_sampled(implicit, where, p[:, CLICK], n)
        if watch_ms is not None:
            timed = np.flatnonzero((part == Part.WATCH) & (rows.play_ms >= 0) & ~np.isnan(watch_ms[:n]))
            self.watch_time.add(watch_ms[timed], rows.play_ms[timed], where[timed])

    def metrics(self) -> dict[str, dict]:
        """JSON-ready: task → figures since the start, "recent" with those of the last scores, both by "scenarios"; the
        task's "drift"; with the task watch the figures of watch "time", with click those of the "next_item".

        A sampled task ranks positives against drawn negatives: its rate of positives is made up, so it has no
        normalised entropy and no calibration ("sampled" is true).
        """
        out = {}
        for name, task in self.tasks.items():
            out[name] = {**task.metrics(), "sampled": name.endswith("_sampled")}
            if out[name]["sampled"]:
                _claim_no_rate(out[name])
            if name in self.drift:
                out[name]["drift"] = self.drift[name].metrics()
        out["watch"]["time"] = self.watch_time.metrics()
        if self.ranking is not None:
            out["click"]["next_item"] = self.ranking.metrics()
        return out

    def state(self) -> dict[str, np.ndarray]:
        return {f"{name}.{key}": a for name, part in self._parts().items() for key, a in part.state().items()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        for name, part in self._parts().items():
            own = {key.rpartition(".")[2]: a for key, a in state.items() if key.rpartition(".")[0] == name}
            if own:  # nothing of a ranking that was switched on since
                part.load(own)

    def _score(self, task: str, rows: Examples, which: np.ndarray, p: np.ndarray, label: np.ndarray) -> None:
        """Scores and labels [n] of those rows, bool [n], that say something of the task."""
        p, label = p[which], label[which]
        self.tasks[task].add(rows.example_id[which], p, label, 1 / rows.rate[which], rows.scenario[which])
        self.drift[task].add(log_loss(p, label))

    def _score_sampled(self, implicit: np.ndarray, scenario: np.ndarray, p: np.ndarray, n: int) -> None:
        """Positives against the negatives drawn for each, which stand behind the n rows in `p` [N]."""
        each = (len(p) - n) // len(implicit)
        at = np.concatenate((implicit, np.arange(n, len(p))))
        positive = np.arange(len(at)) < len(implicit)
        where = np.concatenate((scenario[implicit], np.repeat(scenario[implicit], each)))
        self.tasks["click_sampled"].add(np.zeros(len(at), np.int64), p[at], positive, None, where)
        # In the order of the rows, a positive before its negatives: all positives first would be a drift by itself.
        losses = log_loss(p[at], positive)
        turns = np.concatenate((losses[: len(implicit), None], losses[len(implicit) :].reshape(-1, each)), axis=1)
        self.drift["click_sampled"].add(turns.ravel())

    def _parts(self) -> dict[str, TaskScores | WatchTime | Drift | Ranking]:
        drift = {f"drift.{name}": part for name, part in self.drift.items()}
        ranking = {} if self.ranking is None else {"next_item": self.ranking}
        return {**self.tasks, "watch_time": self.watch_time, **drift, **ranking}


def _claim_no_rate(figures: dict) -> None:
    for some in (figures, figures["recent"], *(f for s in figures["scenarios"].values() for f in (s, s["recent"]))):
        some["ne"] = some["calibration"] = some["ece"] = some["predicted"] = None
