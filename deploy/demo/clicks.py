"""The click-through rate over time, of a closed loop."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

CLICKS_COME_S = 3  # the simulator's users click at most 2 s after they were shown something
WINDOW_S = 10


@dataclass
class ClickRate:
    """Items shown and clicked, by the second of the run in which they were shown."""

    shown: Counter[int] = field(default_factory=Counter)
    clicked: Counter[int] = field(default_factory=Counter)

    def add(self, second: int, shown: int = 0, clicked: int = 0) -> None:
        self.shown[second] += shown
        self.clicked[second] += clicked

    def rate(self, from_s: int, to_s: int) -> float | None:
        """Clicks per item shown in the seconds [from_s, to_s); None where nothing was shown."""
        seconds = range(max(0, from_s), to_s)
        shown = sum(self.shown[s] for s in seconds)
        return sum(self.clicked[s] for s in seconds) / shown if shown else None

    def recent(self, second: int) -> float | None:
        """The rate of the last window whose clicks have all come by `second`."""
        end = second - CLICKS_COME_S
        return self.rate(end - WINDOW_S, end)
