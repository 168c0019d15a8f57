"""The figures of a system: of its scores of what was shown, and of the places where it puts what was clicked.

AUC counts a tie half. Normalised entropy is the log loss over the entropy of the base rate (He et al. 2014, section 3):
1 is what a constant reaches, less is better. Calibration is predicted over actual clicks. A rank among others with the
same score is any of theirs with the same chance: HR and NDCG are the expected ones (McSherry and Najork, ECIR 2008), so
a constant score hits by chance alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLIP = 1e-7  # probabilities are kept this far from 0 and 1
TOP = 10
BUCKETS = 10  # of the expected calibration error


@dataclass
class Figures:
    """Of some scores; None where undefined, or where scores are no probabilities."""

    auc: float | None
    ne: float | None
    calibration: float | None  # predicted / actual
    ece: float | None  # expected calibration error: mean distance of prediction and rate, over BUCKETS of equal size
    count: int
    positives: int


@dataclass
class Ranking:
    """Means over positions."""

    hr_at_10: float | None
    ndcg_at_10: float | None
    mrr: float | None
    positions: int


def figures(score: np.ndarray, label: np.ndarray, probabilistic: bool) -> Figures:
    """score float64 [n], label 0 or 1 [n]."""
    positives, n = int(label.sum()), len(label)
    if not positives or positives == n:
        return Figures(None, None, None, None, n, positives)
    ne = calibration = ece = None
    if probabilistic:
        base = positives / n
        entropy = -base * np.log(base) - (1 - base) * np.log1p(-base)
        ne = float(log_loss(score, label).mean() / entropy)
        calibration = float(score.sum() / positives)
        ece = float(np.abs([(p - rate) * share for p, rate, share in reliability(score, label)]).sum())
    return Figures(auc(score, label), ne, calibration, ece, n, positives)


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """The chance that a positive is scored above a negative, ties half. Both kinds must be there."""
    _, at, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[at]
    positive = label == 1
    n = int(positive.sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(score) - n)))


def log_loss(p: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Of each probability, float64 [n]."""
    p = np.clip(p, CLIP, 1 - CLIP)
    return np.where(label == 1, -np.log(p), -np.log1p(-p))


def reliability(p: np.ndarray, label: np.ndarray, buckets: int = BUCKETS) -> list[tuple[float, float, float]]:
    """(mean prediction, rate of clicks, share of the scores) of buckets of as many scores each, by prediction."""
    parts = np.array_split(np.argsort(p, kind="stable"), min(buckets, len(p)))
    return [(float(p[at].mean()), float(label[at].mean()), len(at) / len(p)) for at in parts]


def places(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(how many stand above, how many beside the first of each row), int64 [m] each; scores [m, k]."""
    first, others = scores[:, :1], scores[:, 1:]
    return (others > first).sum(1), (others == first).sum(1)


def gains(scores: np.ndarray) -> dict[str, np.ndarray]:
    """hr_at_10, ndcg_at_10 and mrr of the first of each row of scores [m, k], float64 [m] each: expected ones."""
    above, beside = places(scores)
    place = np.arange(1, scores.shape[1] + 1)
    of_place = {
        "hr_at_10": (place <= TOP) * 1.0, "ndcg_at_10": (place <= TOP) / np.log2(1 + place), "mrr": 1 / place,
    }  # fmt: skip
    out = {}
    for name, gain in of_place.items():
        total = np.append(0.0, np.cumsum(gain))
        out[name] = (total[above + beside + 1] - total[above]) / (beside + 1)
    return out


def ranking(each: dict[str, np.ndarray]) -> Ranking:
    """The means of what `gains` gave."""
    n = len(each["mrr"])
    means = {name: float(values.mean()) if n else None for name, values in each.items()}
    return Ranking(means["hr_at_10"], means["ndcg_at_10"], means["mrr"], n)


def windows(ts: np.ndarray, parts: int) -> list[np.ndarray]:
    """The scores in so many windows of the stream, as many in each, in order: indices."""
    return [part for part in np.array_split(np.arange(len(ts)), parts) if len(part)]
