"""The simulated marketplace in depth: its truth file, a second kind of user, bots, sessions, stock and prices."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

from embedding_store.errors import LogError
from replay.simulator import (
    Marketplace,
    Policy,
    Simulation,
    SimulatorSettings,
    TruthFile,
    oracle_policy,
    random_policy,
    read_truth,
    simulate_to,
)
from replay.simulator.compare import wilson
from replay.simulator.models import SEEN_KEPT, Look, Missions, Seen
from replay.simulator.population import REDUCED, Items, Users
from replay.sinks import JsonlSink
from streams.events import Click, Event, Impression, Item, Purchase, Refund, encode, units

START = 1_700_000_000_000
SETTINGS = SimulatorSettings(seed=3, requests_per_s=60.0)
SMALL = SimulatorSettings(seed=3, users=100, items=60, requests_per_s=20.0)
MODELS = pytest.mark.parametrize("model", ["taste", "mission"])


def with_(settings: SimulatorSettings, **changes: object) -> SimulatorSettings:
    return msgspec.structs.replace(settings, **changes)


def tell(tmp_path: Path, settings: SimulatorSettings, seconds: float, policy: Policy = random_policy) -> tuple:
    """A run into a file: its records, and the truths by request."""
    records, path = [], tmp_path / f"truth-{policy.__name__}.jsonl.gz"
    with TruthFile(path) as truth:
        run = Simulation(settings, seconds=seconds, policy=policy, start_ms=START, truth=truth)
        records = list(run)
    truths = list(read_truth(path))
    assert len({told.request_id for told in truths}) == len(truths)
    return records, {told.request_id: told for told in truths}, run


# --- the truth in a file


@MODELS
@pytest.mark.parametrize("bots", [pytest.param(0.0, marks=pytest.mark.nightly), 0.05])
def test_the_truth_file_is_calibrated(tmp_path: Path, model: str, bots: float) -> None:
    """In each band of the true probability of a click, and of a purchase after one, as many happen as it says."""
    settings = with_(SETTINGS, user_model=model, bots=bots, item_life_s=1e6)
    clicked, click, bought, purchase = [], [], [], []
    for policy in (random_policy, oracle_policy):
        records, truths, _ = tell(tmp_path, settings, 60, policy)
        pages = {r.request_id: r for r in records if isinstance(r, Impression)}
        assert truths.keys() == pages.keys()
        for told in truths.values():
            assert told.items == pages[told.request_id].items
            assert told.ts == pages[told.request_id].ts
            click += told.click
            clicked += [delay is not None for delay in told.click_ms]
            hits = [n for n, delay in enumerate(told.click_ms) if delay is not None]
            purchase += [told.purchase[n] for n in hits]
            bought += [told.purchase_ms[n] is not None for n in hits]
    for chance, hit, bands in (
        (np.array(click), np.array(clicked), (0, 0.02, 0.05, 0.15, 0.4, 1.01)),
        (np.array(purchase), np.array(bought), (0, 0.05, 0.1, 0.2, 1.01)),
    ):
        for low, high in pairwise(bands):
            within = (chance >= low) & (chance < high)
            sigma = np.sqrt((chance[within] * (1 - chance[within])).sum()) if within.any() else 0.0
            assert abs(hit[within].sum() - chance[within].sum()) <= 4 * sigma, (low, high)
    below, above = wilson(int(np.sum(clicked)), len(clicked))
    assert below <= np.mean(click) <= above
    assert sum(bought) > 50


def test_the_delays_of_the_truth_are_those_of_the_events(tmp_path: Path) -> None:
    records, truths, run = tell(tmp_path, with_(SETTINGS, item_life_s=1e6, restock_s=0.1), 60)
    pages = {r.request_id: r.ts for r in records if isinstance(r, Impression)}
    clicks = {(e.request_id, e.item): e.ts for e in records if isinstance(e, Click)}
    purchases = {(e.request_id, e.item): e.ts for e in records if isinstance(e, Purchase)}
    assert len(purchases) > 30
    for (request, item), ts in clicks.items():
        told = truths[request]
        assert ts - pages[str(request)] == told.click_ms[told.items.index(item)]
    for (request, item), ts in purchases.items():
        told = truths[request]
        assert ts - clicks[request, item] == told.purchase_ms[told.items.index(item)]
    for refund in (e for e in records if isinstance(e, Refund)):
        told = truths[refund.request_id]
        assert refund.ts - purchases[refund.request_id, refund.item] == told.refund_ms[told.items.index(refund.item)]
    assert run.true_ctr == pytest.approx(np.mean([c for told in truths.values() for c in told.click]))


def test_a_truth_file_changes_nothing_and_is_the_same_for_the_same_settings(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with JsonlSink(tmp_path / f"{name}.jsonl") as sink, TruthFile(tmp_path / f"{name}.truth.gz") as truth:
            simulate_to(sink, SMALL, events=2000, truth=truth)
    with JsonlSink(tmp_path / "without.jsonl") as sink:
        simulate_to(sink, SMALL, events=2000)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files["a.jsonl"] == files["b.jsonl"] == files["without.jsonl"]
    assert files["a.truth.gz"] == files["b.truth.gz"]


def test_what_is_wrong_with_a_truth_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text('{"request_id": 3}\n')
    (tmp_path / "cut.gz").write_bytes(b"\x1f\x8b\x08\x00")
    for name, said in (("bad", "line 1 is not a truth"), ("cut.gz", "ended"), ("none", "No such file")):
        with pytest.raises(LogError, match=said):
            list(read_truth(tmp_path / name))
    with pytest.raises(LogError, match="choose a place"):
        TruthFile(tmp_path / "no" / "truth.jsonl")


# --- the second user model


@pytest.mark.parametrize("seed", [1, 2, 5])
def test_missions_are_another_world_in_which_there_is_much_to_win(seed: int) -> None:
    world, other = (Marketplace(with_(SETTINGS, seed=seed, user_model=model)) for model in ("mission", "taste"))
    for each in (world, other):
        each.start(START)
    assert 0.02 <= world.random_ctr(400) <= 0.08
    assert world.best_ctr(400) >= 3 * world.random_ctr(400)
    assert world.best_ctr(400) <= 0.7 * other.best_ctr(400), "a reader who found what serves mostly stops"


def test_a_recommender_that_learns_what_each_user_is_after_wins_on_missions() -> None:
    """Shows the category that the user clicked last, from what it has seen alone: no knowledge of the world."""
    last: dict[str, str] = {}

    def follow(world: Marketplace, request: object) -> tuple[list[str | int], None]:
        items = world.catalogue()
        rng = np.random.default_rng([5, request.number])  # type: ignore[attr-defined]
        order = rng.permutation(len(items)).tolist()
        liked = last.get(request.user)  # type: ignore[attr-defined]
        order.sort(key=lambda n: items[n].category != liked)
        return [items[n].item for n in order[: request.k]], None  # type: ignore[attr-defined]

    settings, rates = with_(SETTINGS, user_model="mission", users=200, requests_per_s=100.0), {}
    for name, policy in (("random", random_policy), ("follow", follow), ("oracle", oracle_policy)):
        run, category = Simulation(settings, seconds=20, policy=policy), {}
        for record in run:
            if isinstance(record, Item):
                category[record.item] = record.category
            elif isinstance(record, Click):
                last[str(record.user)] = str(category[record.item])
        rates[name] = run.true_ctr
    assert rates["follow"] > 1.5 * rates["random"]
    assert rates["oracle"] > 1.5 * rates["follow"]


def test_readers_come_from_the_top_and_mostly_stop_where_they_click() -> None:
    """The stated chance of each place of a page is how often it is clicked, and depends on what stands above it."""
    settings = with_(SMALL, user_model="mission")
    users = Users(settings)
    items = Items(settings, users.centres, START)
    model = Missions(settings, users, items, Seen())
    serves = np.flatnonzero(model.liking(4, np.arange(60), 0.0) > 0)[:2]
    other = np.flatnonzero(model.liking(4, np.arange(60), 0.0) < 0)[:3]
    page = np.array([serves[0], other[0], serves[1], other[1], other[2]])
    look = Look(4, page, np.array([0, 1, 2, 4, 5]), 0.0, "shelf")
    rng = np.random.default_rng(1)
    n = 20_000
    clicks = np.array([model.clicks(look, rng.random((2, 5))) for _ in range(n)])
    chance = model.page(look)
    assert np.abs(clicks.mean(0) - chance).max() < 4 * np.sqrt(0.25 / n)
    bare = Look(4, np.array([other[1], other[0], serves[1]]), np.array([0, 1, 2]), 0.0, "shelf")
    assert model.page(bare)[2] > 1.2 * chance[2], "what serves above takes from what serves below"
    first, second = clicks[:, 0], clicks[:, 2]
    assert second[first].mean() < 0.7 * second[~first].mean()


def test_missions_follow_each_other_and_do_not_depend_on_the_order_of_questions() -> None:
    settings = with_(SMALL, user_model="mission", taste_turn_s=100.0)
    users = Users(settings)
    items = Items(settings, users.centres, START)
    forward, backward = (Missions(settings, users, items, Seen()) for _ in range(2))
    times = np.linspace(0, 500, 400).tolist()
    ahead = [forward.mission(7, t) for t in times]
    assert ahead == [backward.mission(7, t) for t in reversed(times)][::-1]
    assert len(set(ahead)) > 5
    assert sum(a != b for a, b in pairwise(ahead)) < 100, "a mission lasts"


# --- bots and sessions


def test_bots_click_nearly_all_like_clockwork_and_only_the_truth_says_so(tmp_path: Path) -> None:
    records, truths, _ = tell(tmp_path, with_(SETTINGS, bots=0.05), 28)
    bots = {told.user for told in truths.values() if told.bot}
    people = {told.user for told in truths.values() if not told.bot}
    assert 20 < len(bots) < 0.2 * len(people)
    assert not bots & people
    clicks: dict[str, list[Click]] = defaultdict(list)
    shown: Counter[str] = Counter()
    for record in records:
        if isinstance(record, Click):
            clicks[str(record.request_id)].append(record)
        elif isinstance(record, Impression) and record.ts < START + 25_000:
            shown[str(record.user)] += units(record)
        assert isinstance(record, Item) or b"bot" not in encode(record)
    by_bot = [found for request, found in clicks.items() if truths[request].bot]
    gaps = {b.ts - a.ts for page in by_bot for a, b in pairwise(page)}
    assert gaps
    assert min(gaps) == 120
    assert all(gap % 120 == 0 for gap in gaps)
    visits = defaultdict(list)
    for told in truths.values():
        visits[told.user].append(told.ts)
    between = np.concatenate([np.diff(sorted(visits[user])) for user in sorted(bots)])
    assert np.mean(np.abs(between - 500) <= 1) > 0.6, "its pages come as regularly, but for sessions that overlap"
    done: Counter[str] = Counter()
    for request, found in clicks.items():
        done[truths[request].user] += sum(truths[request].ts < START + 25_000 for _ in found)
    assert sum(done[user] for user in bots) > 0.9 * sum(shown[user] for user in bots)
    assert sum(done[user] for user in people) < 0.15 * sum(shown[user] for user in people)
    assert not [e for e in records if isinstance(e, Purchase) and str(e.user) in bots]


def test_without_bots_there_are_none_and_people_do_the_same_with_and_without() -> None:
    plain, infested = Users(SETTINGS), Users(with_(SETTINGS, bots=0.3))
    assert not plain.bot.any()
    assert 0.2 < infested.bot.mean() < 0.4
    assert np.array_equal(plain.taste(5, 10.0), infested.taste(5, 10.0))


def test_users_come_in_sessions() -> None:
    world = Marketplace(with_(SETTINGS, users=20_000))
    world.start(START)
    asked = world.advance(START + 120_000).requests
    assert [request.ts for request in asked] == sorted(request.ts for request in asked)
    assert [request.number for request in asked] == list(range(len(asked)))
    assert len(asked) == pytest.approx(120 * 60, rel=0.07), "also at the start: sessions were going on already"
    early = sum(request.ts < START + 10_000 for request in asked)
    assert early == pytest.approx(600, rel=0.2)
    by_user = defaultdict(list)
    for request in asked:
        by_user[request.user].append(request.ts)
    gaps = np.concatenate([np.diff(times) for times in by_user.values() if len(times) > 1])
    assert np.mean(gaps < 12_000) > 0.7, "most requests follow one of the same user within seconds"
    assert 2 < len(asked) / len(by_user) < 6


# --- stock and prices


@MODELS
def test_the_stock_is_never_negative_and_what_is_sold_out_is_not_on_offer(model: str) -> None:
    settings = with_(SETTINGS, items=20, item_life_s=60.0, restock_s=5.0, user_model=model)
    world = Marketplace(settings)
    world.start(START)
    stock = {item.item: item.stock for item in world.catalogue()}
    sold_out = sold = 0
    for now in range(START + 100, START + 120_001, 100):
        step = world.advance(now)
        for item in step.items:
            assert item.stock is not None
            assert item.stock >= 0
            stock[item.item] = item.stock
        sold += sum(event.quantity for event in step.events if isinstance(event, Purchase))
        on_offer = {item.item for item in world.catalogue()}
        assert on_offer == {item for item, left in stock.items() if left}
        missing = [item for item, left in stock.items() if not left]
        sold_out += any(place in world._items.place for place in missing)
        for request in step.requests:
            if missing:
                assert not world.click_probabilities(request.user, missing, now).any()
            world.show(request, oracle_policy(world, request)[0] or [missing[0]], ts=now)
    assert sold > 200
    assert sold_out > 10, "something was sold out, and not because its life was over"


def test_a_purchase_comes_off_the_stock_and_a_refund_goes_back() -> None:
    items = Items(with_(SMALL, restock_s=10.0, item_life_s=1e6), Users(SMALL).centres, START)
    record = items.records[0]
    had = record.stock or 0
    sold = items.take(record.item, 2, 1.0)
    assert sold is not None
    assert sold.stock == had - 2
    assert items.give_back(record.item, 2)[0].stock == had
    assert items.take(record.item, had + 1, 1.0) is None
    gone = items.take(record.item, had, 1.0)
    assert gone is not None
    assert gone.stock == 0
    assert items.give_back(record.item, 1) == []
    assert items.available(record.item) is None
    assert items.take(record.item, 1, 2.0) is None
    assert [back.stock for back in items.advance(11.5) if back.item == record.item] == [100]


def test_some_items_are_reduced_for_a_while_and_everybody_is_told() -> None:
    settings = with_(SMALL, promotions=0.2, item_life_s=400.0)
    world = Marketplace(settings)
    world.start(START)
    price = {item.item: [item.price] for item in world.catalogue()}
    for now in range(START + 1000, START + 300_001, 1000):
        for item in world.advance(now).items:
            price.setdefault(item.item, []).append(item.price)
        assert all(price[item.item][-1] == item.price for item in world.catalogue())
    changes = [b / a for told in price.values() for a, b in pairwise(told) if a != b]  # type: ignore[operator]
    assert len(changes) > 20
    assert all(change == pytest.approx(REDUCED if change < 1 else 1 / REDUCED, abs=0.02) for change in changes)
    steady = Marketplace(with_(settings, promotions=0.0))
    steady.start(START)
    assert not steady._items.reduced.any()


@MODELS
def test_every_kind_of_world_is_the_same_for_the_same_settings(model: str) -> None:
    settings = with_(SMALL, user_model=model, bots=0.1, promotions=0.2)
    first, second = ([encode(record) for record in Simulation(settings, seconds=8)] for _ in range(2))
    assert first == second
    assert len(first) > 300


def test_quiet_times_are_skipped_and_nothing_comes_out_of_order() -> None:
    settings = with_(SMALL, requests_per_s=0.01, item_life_s=1e7, time_scale=1.0)
    run = Simulation(settings, seconds=40_000, start_ms=START)
    events: list[Event] = [record for record in run if not isinstance(record, Item)]
    times = [event.ts for event in events]
    assert times == sorted(times)
    pages = sum(isinstance(event, Impression) for event in events)
    assert 200 < pages < 800
    assert times[-1] - times[0] > 30_000_000


def test_a_user_remembers_the_items_that_were_seen_last_and_how_often():
    dice, seen, plain = np.random.default_rng(5), Seen(), {}
    for _ in range(400):
        page = dice.choice(900, 9, replace=False)
        user = int(dice.integers(3))
        mine = plain.setdefault(user, {})
        assert seen.views(user, page).tolist() == [mine.get(item, 0) for item in page.tolist()]
        seen.add(user, page)
        for item in page.tolist():
            mine[item] = mine.pop(item, 0) + 1
        while len(mine) > SEEN_KEPT:
            del mine[next(iter(mine))]
    assert min(map(len, plain.values())) == SEEN_KEPT
