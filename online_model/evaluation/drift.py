"""Whether the loss has changed: river's ADWIN (Bifet and Gavaldà, "Learning from time-changing data with adaptive
windowing", SDM 2007) over means of the log loss of GRAIN examples each.

ADWIN keeps as many of the last values as have one mean, and says so when the older part of them has another than the
newer one. It cannot be written down (its state is inside compiled code), but it is a function of the values that it was
fed since it last began: those are kept, at most MOST of them, and feeding them again makes it what it was. When there
are more it begins anew with the newer half, in every run alike. So a run that was killed and goes on finds what an
undisturbed one finds. A value is of labels as they were when the example was scored: what comes later changes no value.

Fed with each example it would take 0.4 µs each, and could not be remembered.
"""

from __future__ import annotations

import numpy as np
from river.drift import ADWIN

GRAIN = 64  # examples to a value
MOST = 1024  # values remembered
DELTA = 0.002  # of a false alarm, by ADWIN's own bound, which is far from tight: none in 40 streams of 1,000 values


class Drift:
    """Of one task."""

    def __init__(self) -> None:
        self.found = 0  # changes of the loss since the start, whether it rose or fell
        self.rose = 0  # of these, those after which it was higher
        self._open = np.zeros(2)  # sum of the losses, and number, of examples that make no value yet
        self._begin(np.empty(0))

    def add(self, losses: np.ndarray) -> None:
        """The log losses of n further examples [n]."""
        start = 0
        while start < len(losses):
            part = losses[start : start + GRAIN - int(self._open[1])]
            start += len(part)
            self._open += part.sum(), len(part)
            if self._open[1] == GRAIN:
                self._feed(float(self._open[0]) / GRAIN)
                self._open[:] = 0

    def metrics(self) -> dict:
        """JSON-ready: changes `found` since the start, those of them after which the loss `rose`, and the mean `loss`
        (None: none) of the `examples` since the last one."""
        loss = float(np.mean(self._values)) if self._values else None
        return {"found": self.found, "rose": self.rose, "loss": loss, "examples": GRAIN * len(self._values)}

    def state(self) -> dict[str, np.ndarray]:
        """All of it, as arrays."""
        counts = np.array([self.found, self.rose], np.int64)
        return {"values": np.array(self._values), "open": self._open.copy(), "counts": counts}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """What `state` gave."""
        self.found, self.rose = (int(n) for n in state["counts"])
        self._open[:] = state["open"]
        self._begin(state["values"])

    def _feed(self, value: float) -> None:
        before = self._adwin.estimation
        self._adwin.update(value)
        self._values.append(value)
        if self._adwin.drift_detected:
            self.found += 1
            self.rose += self._adwin.estimation > before
            self._begin(np.empty(0))  # as river's does with the value after it
        elif len(self._values) == MOST:
            self._begin(np.array(self._values[MOST // 2 :]))

    def _begin(self, values: np.ndarray) -> None:
        """A new one that has seen `values`, which have one mean."""
        self._values: list[float] = values.tolist()
        self._adwin = ADWIN(delta=DELTA, clock=1)
        for value in self._values:
            self._adwin.update(value)
