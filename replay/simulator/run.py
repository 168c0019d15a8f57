"""The marketplace driven by a policy in virtual time: as a stream of records, or played into a sink."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from replay.player import Played, PlaySettings, play
from replay.readers.base import Record
from replay.simulator.marketplace import Marketplace, Request
from replay.simulator.settings import SimulatorSettings
from replay.simulator.truth import TruthFile
from replay.sinks import Sink
from streams.events import Event, units

START_MS = 1_767_225_600_000  # 2026-01-01: a fixed start, so that the same settings give the same file
QUIET_MS = 3_600_000  # time in which nothing happens is skipped, in steps of at most so much
STEP_MS = 100  # no reaction comes sooner after its impression, so the records of a step are all there at its end

Policy: TypeAlias = Callable[[Marketplace, Request], tuple[list[str | int], list[float] | None]]
"""Chooses request.k ids, top first, and the probability of each to be put in its place, given those before (None: not
known): what a replica logs too."""


def random_policy(world: Marketplace, request: Request) -> tuple[list[str | int], list[float] | None]:
    """Any items, each as likely, in any order; the same for the same seed and request."""
    items = world.catalogue()
    k = min(request.k, len(items))
    chosen = np.random.default_rng([world.settings.seed, 99, request.number]).choice(len(items), k, replace=False)
    return [items[i].item for i in chosen.tolist()], [1 / (len(items) - place) for place in range(k)]


def oracle_policy(world: Marketplace, request: Request) -> tuple[list[str | int], list[float] | None]:
    """The items with the highest true probability of a click: what no recommender can beat on a page."""
    ids = [item.item for item in world.catalogue()]
    chance = world.click_probabilities(
        request.user, ids, request.ts, request.scenario, request.query, positions=[0] * len(ids)
    )
    return [ids[i] for i in np.argsort(-chance, kind="stable")[: request.k].tolist()], None


POLICIES: dict[str, Policy] = {"random": random_policy, "oracle": oracle_policy}


class Simulation:
    """A run of a marketplace under a policy; iterate over it once for its records, by time.

    `shown` items so far, `expected_clicks` the sum of their true probabilities of a click.
    """

    def __init__(
        self,
        settings: SimulatorSettings,
        *,
        seconds: float | None = None,
        events: int | None = None,
        policy: Policy = random_policy,
        start_ms: int = START_MS,
        world: Marketplace | None = None,
        truth: TruthFile | None = None,
    ) -> None:
        """`world`: another than a plain Marketplace of `settings`; with `truth` it must have been told to keep it.
        Ends after `seconds` of event time or about `events` events (k for an impression of k items), what comes
        first; with neither, never."""
        self.world = world or Marketplace(settings, keep_truth=truth is not None)
        self.policy, self._truth = policy, truth
        self._start_ms, self._events = start_ms, events
        self._end_ms = None if seconds is None else start_ms + int(seconds * 1000)
        self.shown, self.expected_clicks = 0, 0.0

    @property
    def true_ctr(self) -> float:
        """The mean true probability of a click over all that was shown."""
        return self.expected_clicks / self.shown if self.shown else 0.0

    def __iter__(self) -> Iterator[Record]:
        world, now, count = self.world, self._start_ms, 0
        world.start(now)
        yield from world.catalogue()
        while (self._end_ms is None or now < self._end_ms) and (self._events is None or count < self._events):
            now = max(now + STEP_MS, world.next_ms(now + QUIET_MS))
            now = now if self._end_ms is None else min(now, self._end_ms)
            step = world.advance(now)
            yield from step.items
            shown = [self._show(request) for request in step.requests]
            for event in heapq.merge(step.events, shown, key=lambda event: event.ts):
                count += units(event)
                yield event
            self._note(world)

    def _note(self, world: Marketplace) -> None:
        if self._truth is not None and world.truth:
            self._truth.write(world.truth)
            world.truth.clear()

    def _show(self, request: Request) -> Event:
        items, propensities = self.policy(self.world, request)
        chance = self.world.page_truth(request, items)
        self.shown += len(items)
        self.expected_clicks += float(chance.sum())
        return self.world.show(request, items, ts=request.ts, propensities=propensities)


@dataclass(frozen=True)
class Simulated:
    """What `simulate_to` did."""

    played: Played
    seed: int
    true_ctr: float  # mean true probability of a click over all that was shown

    @property
    def events(self) -> int:
        return self.played.events


def simulate_to(
    sink: Sink,
    settings: SimulatorSettings,
    *,
    seconds: float | None = None,
    events: int | None = None,
    policy: Policy = random_policy,
    start_ms: int = START_MS,
    world: Marketplace | None = None,
    truth: TruthFile | None = None,
    pace: PlaySettings | None = None,
    progress: Callable[[Played], None] | None = None,
) -> Simulated:
    """Plays a marketplace under `policy` into `sink`, at full speed unless `pace` says otherwise. Raises BrokerError.

    Onto a live Kafka choose `start_ms` so that the run does not end in the future: the joiner refuses such events.
    """
    run = Simulation(
        settings, seconds=seconds, events=events, policy=policy, start_ms=start_ms, world=world, truth=truth
    )
    played = play(run, sink, pace, progress)
    return Simulated(played, settings.seed, run.true_ctr)
