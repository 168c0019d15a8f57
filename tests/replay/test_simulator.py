"""The simulated marketplace: the same seed is the same world, luck is shared, and what it claims to be true is."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from embedding_store.errors import UsageError
from replay.player import PlaySettings
from replay.simulator import (
    Marketplace,
    Policy,
    Request,
    Simulation,
    SimulatorSettings,
    Step,
    oracle_policy,
    random_policy,
    simulate_to,
)
from replay.sinks import JsonlSink, KafkaSink
from streams.events import Click, Impression, Item, Purchase, Refund, Watch, decode, encode
from streams.topics import TopicSettings

START = 1_700_000_000_000
SETTINGS = SimulatorSettings(seed=3)
SMALL = SimulatorSettings(seed=3, users=100, items=60, requests_per_s=20.0)


def first_items(world: Marketplace, request: Request) -> tuple[list[str | int], list[float] | None]:
    return [item.item for item in world.catalogue()[: request.k]], None


def drive(
    settings: SimulatorSettings, seconds: float, policy: Policy, step_ms: int = 50
) -> tuple[Marketplace, list[Step], list[Impression]]:
    """A closed loop: every request is answered at the end of its step."""
    world, steps, shown = Marketplace(settings), [], []
    world.start(START)
    for now in range(START + step_ms, START + int(seconds * 1000) + 1, step_ms):
        steps.append(world.advance(now))
        for request in steps[-1].requests:
            items, propensities = policy(world, request)
            shown.append(world.show(request, items, ts=now, propensities=propensities))
    return world, steps, shown


def requests(steps: list[Step]) -> list[Request]:
    return [request for step in steps for request in step.requests]


# --- the same seed, the same world


@pytest.mark.parametrize("policy", [random_policy, oracle_policy])
def test_the_same_settings_give_the_same_records(policy: Policy) -> None:
    first, second, other = (
        [encode(record) for record in Simulation(settings, seconds=5, policy=policy)]
        for settings in (SMALL, SMALL, msgspec.structs.replace(SMALL, seed=4))
    )
    assert first == second
    assert first != other


def test_two_recommenders_meet_the_same_users_requests_and_births() -> None:
    worlds = [drive(SMALL, 30, policy)[1] for policy in (random_policy, first_items, oracle_policy)]
    births = [
        [(item.item, item.category, item.price, item.seller, item.created) for step in steps for item in step.items
         if item.created is not None and item.created > START and item.stock]
        for steps in worlds
    ]  # fmt: skip
    assert requests(worlds[0]) == requests(worlds[1]) == requests(worlds[2])
    assert len(requests(worlds[0])) == pytest.approx(600, rel=0.2)
    assert len({item for item, *_ in births[0]}) > 3
    assert set(births[0]) == set(births[1]) == set(births[2])


def test_arrivals_and_births_do_not_depend_on_the_steps_taken() -> None:
    fine, coarse = (drive(SMALL, 30, first_items, step_ms)[1] for step_ms in (10, 1000))
    assert requests(fine) == requests(coarse)
    assert [i.item for s in fine for i in s.items if i.stock == 0] == [
        i.item for s in coarse for i in s.items if i.stock == 0
    ]


def test_the_coins_are_the_same_whatever_was_shown_before() -> None:
    """One page of two worlds holds the same items: whoever saw it does the same in both, but for being tired."""
    reactions = []
    for before in (first_items, oracle_policy):
        world = Marketplace(msgspec.structs.replace(SMALL, item_life_s=1e6))
        world.start(START)
        pending = world.advance(START + 10_000).requests
        for request in pending[:-50]:
            world.show(request, before(world, request)[0], ts=request.ts)
        world.advance(START + 100_000)
        world._seen.clear()  # tiredness is of what was shown, rightly: here only luck is compared
        for request in pending[-50:]:
            world.show(request, first_items(world, request)[0], ts=START + 100_000)
        last = {request.request_id for request in pending[-50:]}
        reactions.append([e for e in world.advance(START + 200_000).events if e.request_id in last])  # type: ignore[union-attr]
    assert len(reactions[0]) > 5
    assert reactions[0] == reactions[1]


def test_a_slot_has_its_own_coin_however_long_the_page() -> None:
    from replay.simulator.coins import coins

    long, short = coins(1, 2, 3, 10, 5), coins(1, 2, 3, 4, 5)
    assert np.array_equal(long[:, :4], short)
    assert np.unique(long).size == 50
    many = np.concatenate([coins(1, u, r, 10, 11).ravel() for u in range(20) for r in range(50)])
    assert abs(many.mean() - 0.5) < 0.005
    assert np.histogram(many, 10, (0, 1))[0].std() < 0.03 * many.size / 10
    assert many.min() > 0
    assert many.max() < 1


# --- the records


def test_reactions_follow_their_impressions_and_come_due_by_time() -> None:
    _, steps, shown = drive(SETTINGS, 30, random_policy)
    pages = {page.request_id: page for page in shown}
    events = [event for step in steps for event in step.events]
    times = [event.ts for event in events]
    assert times == sorted(times)
    ids = [event.event_id for event in [*shown, *events]]
    assert len(set(ids)) == len(ids)
    kinds = Counter(type(event).__name__ for event in events)
    assert set(kinds) == {"Click", "Watch", "Cart", "Favourite", "Purchase", "Refund"}
    clicked = {}
    for event in events:
        page = pages[event.request_id]  # type: ignore[index, union-attr]
        assert event.item in page.items  # type: ignore[union-attr]
        assert (event.user, event.scenario) == (page.user, page.scenario)  # type: ignore[union-attr]
        after = event.ts - page.ts
        match event:
            case Click():
                assert 200 <= after <= 2000
                clicked[event.request_id, event.item] = event.ts
            case Watch():
                assert page.scenario in ("live", "video")
                assert 0 < event.play_ms <= event.duration_ms <= 60_000
                assert after >= event.play_ms
            case Purchase() | Refund():
                assert event.ts > clicked[event.request_id, event.item]
        assert decode(encode(event)) == event
    sizes = {page.scenario: len(page.items) for page in shown}
    assert sizes == {"live": 3, "video": 4, "search": 10, "shelf": 10}
    assert all(page.context for page in shown if page.scenario == "search")


def test_items_are_born_and_end_within_a_minute_and_stay_as_many() -> None:
    world, steps, _ = drive(SETTINGS, 60, first_items, step_ms=500)
    assert len(world.catalogue()) == 600
    changes = [item for step in steps for item in step.items]
    gone = {item.item for item in changes if item.stock == 0}
    assert 60 < len(gone) < 300, "turnover to be seen in a minute, but not of everything"
    assert not gone & {item.item for item in world.catalogue()}
    assert {item.item for item in world.catalogue()} <= {item.item for item in changes} | {f"i{n}" for n in range(600)}
    assert all(item.title and item.category and item.seller and item.price for item in world.catalogue())


def test_requests_come_at_the_rate_that_is_set_and_in_sessions() -> None:
    asked = requests(drive(SETTINGS, 30, first_items, step_ms=500)[1])
    assert len(asked) == pytest.approx(30 * 150, rel=0.05)
    by_user = Counter(request.user for request in asked)
    assert len(by_user) > 300
    assert sum(count for _, count in by_user.most_common(100)) > 0.2 * len(asked), "some are here far more than others"
    share = Counter(request.scenario for request in asked)
    assert share["shelf"] > share["video"] > share["search"] > share["live"] > 0


def test_what_is_not_on_offer_is_never_clicked_and_a_page_needs_items() -> None:
    world, _, _ = drive(SMALL, 1, lambda world, request: (["nothing", 5, "i99999"], None))
    assert not [event for event in world.advance(START + 100_000).events]
    assert world.click_probability("u1", "nothing", 0, START) == 0.0
    request = world.advance(world.now_ms + 1000).requests[0]
    with pytest.raises(UsageError, match="at least one item"):
        world.show(request, [], ts=world.now_ms)


# --- the truth


def test_the_stated_probabilities_are_those_of_the_clicks() -> None:
    world, steps, chances, hits = Marketplace(SETTINGS), [], [], []
    world.start(START)
    for now in range(START + 100, START + 60_001, 100):
        steps.append(world.advance(now))
        for request in steps[-1].requests:
            items = (oracle_policy if request.number % 4 == 0 else random_policy)(world, request)[0]
            chances.append(world.click_probabilities(request.user, items, now, request.scenario, request.query))
            world.show(request, items, ts=now)
            hits.append((request.request_id, items))
    late = world.advance(START + 63_000).events
    clicked = {(e.request_id, e.item) for s in [*steps, Step(events=late)] for e in s.events if isinstance(e, Click)}
    chance = np.concatenate(chances)
    hit = np.array([(request, item) in clicked for request, items in hits for item in items])
    for low, high in ((0, 0.02), (0.02, 0.05), (0.05, 0.15), (0.15, 0.4), (0.4, 1)):
        within = (chance >= low) & (chance < high)
        sigma = np.sqrt((chance[within] * (1 - chance[within])).sum()) / within.sum()
        assert hit[within].mean() == pytest.approx(chance[within].mean(), abs=4 * sigma)


def test_position_tiredness_age_and_the_search_matter() -> None:
    world = Marketplace(SMALL)
    world.start(START)
    item = world.catalogue()[0]
    top, low = (world.click_probability("u1", item.item, position, START) for position in (0, 9))
    assert top > 1.5 * low
    mine, other = (world.click_probability("u1", item.item, 0, START, "search", q) for q in (item.category, "c999"))
    assert mine > 1.5 * other
    request = Request(0, "u1", "shelf", START, 10, "r")
    for _ in range(5):
        world.show(request, [item.item], ts=START)
    assert world.click_probability("u1", item.item, 0, START) < 0.8 * top
    later = world.click_probability("u2", item.item, 0, START + 60_000)
    assert later != world.click_probability("u2", item.item, 0, START), "tastes turn and items fade"


class Popularity:
    """Shows what was clicked most often for its views so far, and something else now and then: learns, but not whom."""

    def __init__(self) -> None:
        self.views: dict[str | int, float] = defaultdict(lambda: 20.0)
        self.clicks: dict[str | int, float] = defaultdict(lambda: 1.2)

    def __call__(self, world: Marketplace, request: Request) -> tuple[list[str | int], list[float] | None]:
        ids = [item.item for item in world.catalogue()]
        page = sorted(ids, key=lambda item: -self.clicks[item] / self.views[item])[: request.k]
        rng = np.random.default_rng(request.number)
        for slot in np.flatnonzero(rng.random(len(page)) < 0.1).tolist():
            if (other := ids[rng.integers(len(ids))]) not in page:
                page[slot] = other
        return page, None

    def see(self, record: object) -> None:
        if isinstance(record, Impression):
            for item in record.items:
                self.views[item] += 1
        elif isinstance(record, Click):
            self.clicks[record.item] += 1


def test_a_recommender_that_learns_has_much_to_win() -> None:
    settings = msgspec.structs.replace(SETTINGS, requests_per_s=100.0)
    rates = {}
    popularity = Popularity()
    policies: dict[str, Policy] = {"random": random_policy, "popularity": popularity, "oracle": oracle_policy}
    for name, policy in policies.items():
        run = Simulation(settings, seconds=25, policy=policy)
        for record in run:
            popularity.see(record) if name == "popularity" else None
        rates[name] = run.true_ctr
    assert 0.05 <= rates["random"] <= 0.08
    assert rates["popularity"] >= 1.3 * rates["random"]
    assert rates["oracle"] >= 2 * rates["popularity"]
    assert rates["oracle"] >= 3 * rates["random"]


@pytest.mark.parametrize("seed", [1, 2, 5])
def test_every_seed_is_such_a_world(seed: int) -> None:
    world = Marketplace(msgspec.structs.replace(SETTINGS, seed=seed))
    world.start(START)
    assert 0.045 <= world.random_ctr(400) <= 0.085
    assert world.best_ctr(400) >= 4 * world.random_ctr(400)


def test_it_costs_little() -> None:
    """150 requests a second of up to 10 items: under 30 % of a core, of this process's own time."""
    started = time.process_time()
    drive(SETTINGS, 20, first_items, step_ms=20)
    assert time.process_time() - started < 0.3 * 20


# --- into a file and onto Kafka


def test_into_a_file_with_seed_and_truth(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        with JsonlSink(tmp_path / name) as sink:
            done = simulate_to(sink, SMALL, events=2000)
    assert (done.seed, done.played.ticks) == (3, 0)
    assert 2000 <= done.events < 2100
    assert 0.02 < done.true_ctr < 0.12
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines()
    assert len(lines) == done.played.records + done.played.items
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_records_of_a_run_are_in_time_order_and_end_when_told() -> None:
    run = Simulation(SMALL, seconds=7.55, start_ms=START)
    times = [record.ts for record in run if not isinstance(record, Item)]
    assert times == sorted(times)
    assert START + 7_000 < times[-1] <= START + 7_550


def test_onto_kafka(
    broker: str, topics: TopicSettings, read_topic: Callable[[str], list[tuple[int, bytes | None, bytes]]]
) -> None:
    with KafkaSink(broker, topics.events, topics.items) as sink:
        done = simulate_to(sink, SMALL, seconds=10, pace=PlaySettings(closing_ms=1000))
    assert len(read_topic(topics.items)) == done.played.items
    assert len(read_topic(topics.events)) == done.played.records + done.played.ticks
    assert done.played.ticks >= 4
