"""Freshness from outside: ticks into each partition, timed until a replica says that it is past them."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

RECENT = 2_000  # probes in the figures of the moment: 25 s at 4 partitions and 50 ms


@dataclass
class Freshness:
    """Probes in flight and what the returned ones took. Filled from producer callbacks, hence the lock."""

    waiting: dict[int, deque[tuple[int, float]]] = field(default_factory=dict)  # partition → (offset, sent at)
    took_ms: list[float] = field(default_factory=list)
    reached: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def sent(self, partition: int, offset: int, at: float) -> None:
        """A probe has its place in the log; `at` is time.monotonic() before it was sent."""
        with self.lock:
            if self.reached.get(partition, -1) > offset:  # the replica was faster than the acknowledgement
                self.took_ms.append((time.monotonic() - at) * 1e3)
            else:
                self.waiting.setdefault(partition, deque()).append((offset, at))

    def served(self, positions: dict[int, int], at: float) -> None:
        """A replica was seen at `positions` (it has the effect of everything below them) at time.monotonic() `at`."""
        with self.lock:
            for partition, position in positions.items():
                self.reached[partition] = max(position, self.reached.get(partition, -1))
                queue = self.waiting.get(partition, deque())
                while queue and queue[0][0] < position:
                    self.took_ms.append((at - queue.popleft()[1]) * 1e3)

    def figures(self, recent: bool = False) -> dict[str, float | int | None]:
        """p50, p95, p99 in ms and the count, of all probes or of the recent ones."""
        with self.lock:
            took = np.array(self.took_ms[-RECENT:] if recent else self.took_ms)
            count = len(self.took_ms)
        if not len(took):
            return {"p50": None, "p95": None, "p99": None, "count": 0}
        p50, p95, p99 = (round(float(p), 1) for p in np.percentile(took, [50, 95, 99]))
        return {"p50": p50, "p95": p95, "p99": p99, "count": count}
