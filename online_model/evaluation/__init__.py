"""Prequential figures: each example is scored once, before it is learned, by task and scenario (test-then-train)."""

from online_model.evaluation.drift import Drift
from online_model.evaluation.prequential import Evaluation
from online_model.evaluation.ranking import Ranking, mid_ranks, ranked
from online_model.evaluation.scores import Figures, TaskScores
from online_model.evaluation.watch_time import WatchTime

__all__ = ["Drift", "Evaluation", "Figures", "Ranking", "TaskScores", "WatchTime", "mid_ranks", "ranked"]
