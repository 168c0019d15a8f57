"""Where the time of the trainer's steps goes: a stopwatch that only metrics read."""

from __future__ import annotations

from time import perf_counter

# prepare: negatives, labels, next-item figures. look_up: rows and features. forward: scores and losses. backward:
# gradients, and with them tables and weights. evaluate: the scores are booked. count: statistics and cards.
STAGES = ("prepare", "look_up", "forward", "backward", "evaluate", "count")


class Stages:
    """`seconds`: by stage, since the start; may be read from any thread. On a GPU the time of the host: what it only
    hands over is counted where it is waited for.

    >>> stages = Stages()
    >>> stages.begin()
    >>> stages.done("prepare")
    >>> [stage for stage, seconds in stages.seconds.items() if seconds > 0]
    ['prepare']
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._at = 0.0

    def begin(self) -> None:
        """A step begins, and with it its first stage."""
        self._at = perf_counter()

    def done(self, stage: str) -> None:
        """All since `begin`, or since the last stage was done, was this one."""
        now = perf_counter()
        self.seconds[stage] += now - self._at
        self._at = now
