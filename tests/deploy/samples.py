"""Samples of a run as the demo publishes them, one a second."""

from __future__ import annotations

import math
import random
from typing import Any

STAGES = {"joined": 0.4, "trained": 0.7, "committed": 0.8, "servable": 1.0}


def sample(t: int, draw: random.Random | None = None) -> dict[str, Any]:
    """The sample of second `t` of a run that learns; the first seconds lack what is not known yet."""
    draw = draw or random.Random(t)
    learned, warm = 1 - math.exp(-t / 60), t > 8
    p50 = 210 + draw.gauss(0, 12)
    version = max(0, 5 * (t - 5))

    def task(base: float, gain: float) -> dict[str, float]:
        auc, ne = base + gain * learned + draw.gauss(0, 0.003), 1.02 - gain * learned + draw.gauss(0, 0.004)
        return {"auc": auc, "ne": ne, "calibration": 1 + draw.gauss(0, 0.02)}

    return {
        "t": float(t),
        "events_in": 1000 * t,
        "events_per_s": 1000 + draw.gauss(0, 40),
        "examples": 780 * t,
        "trained_examples": 770 * t,
        "trained_per_s": 780 + draw.gauss(0, 40),
        "trainer_version": f"1.{version}" if version else "",
        "replica_version": f"1.{version - 1}" if version else "",
        "versions_published": version,
        "freshness_ms": {
            "p50": p50 if warm else None,
            "p95": 1.8 * p50 if warm else None,
            "p99": 2.2 * p50 if warm else None,
            "count": 80 * t if warm else 0,
            "stages": {name: share * p50 for name, share in STAGES.items()} if warm else {},
        },
        "prequential": {"click": task(0.55, 0.2), "watch": task(0.54, 0.14), "purchase": task(0.51, 0.1)}
        if warm
        else {},
        "ctr": 0.052 + 0.043 * learned + draw.gauss(0, 0.0018) if warm else None,
        "ctr_frozen": 0.051 + draw.gauss(0, 0.0016) if warm else None,
        "rejected": 3,
        "duplicates": t // 9,
        "late": t // 4,
        "open": 24_000,
        "rows": {"user": 80 * t, "item": 60 * t, "category": 40},
        "processes": [
            {"name": name, "pid": 4100 + i, "state": "up", "restarts": 0}
            for i, name in enumerate(("broker", "join", "train", "serve"))
        ],
        "note": "simulator, closed loop, seed 7",
    }
