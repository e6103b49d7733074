"""The simulated shop: what its shoppers do is fixed by the seed, follows docs/simulator.md, and can be learnt."""

import numpy as np
import pytest

from simulator.draws import keys, uniform
from simulator.feed import Feed
from simulator.goods import DAY_MS, available
from simulator.policies import (
    GreedyOracle,
    HistoryOracle,
    PlanningOracle,
    Popularity,
    Random,
    infer_minds,
    play,
    top,
)
from simulator.shop import (
    CART,
    CLICK,
    HOUR_MS,
    PURCHASE,
    REFUND,
    VIEW,
    Events,
    Mind,
    Shop,
    ShopError,
    ShopSettings,
    Visits,
)
from streaming.columns import Kind
from streaming.rewards import EVENT_NAMES, RewardTable

SMALL = ShopSettings(items=200, shoppers=400)
SLATE = 6


def days_under(policy, decisions=4000, settings=SMALL, seed=3):
    """A shop after so many decisions under a policy, and all events in the order in which they came."""
    shop = Shop(settings, seed)
    parts = []
    for turn, _, outcome in play(shop, policy, SLATE, decisions):
        parts += [turn.events, outcome.events]
    return shop, Events(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@pytest.fixture(scope="module")
def random_days():
    return days_under(Random(0), decisions=12_000)


@pytest.fixture(scope="module")
def planner():
    return PlanningOracle(Shop(ShopSettings(), 0), SLATE)


def whole(visits):
    """The visits that began so early that all of them are over."""
    early = visits.start_ms < visits.start_ms.max() - HOUR_MS
    return Visits(*(column[early] for column in visits))


# -- luck ------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_its_keys_alone():
    many = uniform(7, np.arange(1000), 3)

    assert many[500] == uniform(7, np.array([500]), 3)[0]
    assert len(np.unique(many)) == 1000
    assert abs(many.mean() - 0.5) < 0.05
    assert many.min() > 0
    assert many.max() < 1


def test_keys_are_splitmix64_s_finaliser_over_the_parts():
    def mixed(h, part):
        h ^= part
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            h = (h ^ h >> shift) * factor % 2**64
        return ((h ^ h >> 31) + 0x9E3779B97F4A7C15) % 2**64

    h = 0x9E3779B97F4A7C15
    for part in (7, 2**64 - 1, 0, 12):
        h = mixed(h, part)
    assert keys(7, -1, np.zeros(3, np.uint8), 12).tolist() == [h] * 3


def test_the_same_seed_gives_the_same_days_and_another_seed_others():
    _, first = days_under(Random(0), 1000)
    _, again = days_under(Random(0), 1000)
    _, other = days_under(Random(0), 1000, seed=4)

    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.item[:100], other.item[:100])


def test_every_policy_meets_the_same_visits():
    """Common random numbers: visits start at the same times for the same purposes, whatever was shown before."""
    visits, purposes = [], []
    for policy in (Random(0), GreedyOracle()):
        shop = Shop(SMALL, 3)
        came_for = {}
        for turn, _, _ in play(shop, policy, SLATE, 3000):
            for s, v in zip(turn.shopper.tolist(), turn.visit.tolist(), strict=True):
                if v == 0:  # later purposes may follow what was bought
                    came_for.setdefault((s, v), int(shop.purpose[s]))
        over = whole(shop.visits())
        visits.append(dict(zip(zip(over.shopper, over.visit, strict=True), over.start_ms, strict=True)))
        purposes.append(came_for)
    both = visits[0].keys() & visits[1].keys()

    assert len(both) > 200
    assert all(visits[0][v] == visits[1][v] for v in both)
    assert all(purposes[0][v] == purposes[1][v] for v in purposes[0].keys() & purposes[1].keys())


def test_turns_that_are_out_at_the_same_time_do_not_change_what_happens():
    """A page's luck is its own: serving shoppers in another order, or in smaller turns, gives the same visits."""
    accounts = []
    for limit in (256, 7):
        shop = Shop(SMALL, 5)
        while shop.visits().shopper.size < 300:
            turn = shop.next_turn(limit)
            shop.show(turn, np.tile(np.arange(SLATE), (len(turn.shopper), 1)))
        over = shop.visits()
        first = over.visit == 0
        keys = over.shopper[first].tolist()
        accounts.append(
            dict(zip(keys, zip(over.decisions[first], over.clicks[first], strict=True), strict=True))
        )
    both = accounts[0].keys() & accounts[1].keys()
    same = sum(accounts[0][s] == accounts[1][s] for s in both)

    assert len(both) > 150
    assert same >= 0.98 * len(both)  # stock is looked up once an hour, by the turn's earliest shopper


# -- what happens ----------------------------------------------------------------------------------------------


def test_deeds_come_in_their_natural_order(random_days):
    """Whatever is sent back was bought, what is bought was in the cart, what is in the cart was clicked."""
    _, events = random_days
    seen = {name: {} for name in (CLICK, CART, PURCHASE, REFUND)}
    for when, name, item, decision in zip(
        events.timestamp_ms, events.name, events.item, events.decision, strict=True
    ):
        if name != VIEW:
            seen[name].setdefault((decision, item), when)
    for later, earlier in ((CART, CLICK), (PURCHASE, CART), (REFUND, PURCHASE)):
        assert seen[later]
        for deed, when in seen[later].items():
            assert when > seen[earlier][deed]


def test_purchases_come_hours_after_the_click(random_days):
    _, events = random_days
    clicked = {
        (d, i): t
        for t, n, i, d in zip(events.timestamp_ms, events.name, events.item, events.decision, strict=True)
        if n == CLICK
    }
    bought = events.name == PURCHASE
    delays_h = [
        (t - clicked[d, i]) / HOUR_MS
        for t, i, d in zip(
            events.timestamp_ms[bought], events.item[bought], events.decision[bought], strict=True
        )
    ]

    assert 0.5 < np.median(delays_h) < 5
    assert max(delays_h) <= 20.1


def test_events_come_nearly_in_order_of_event_time(random_days):
    """Within the spread of a turn and a page: a learner's watermark, minutes behind, sees nobody's visit end early."""
    _, events = random_days
    behind_ms = np.maximum.accumulate(events.timestamp_ms) - events.timestamp_ms

    prompt = np.isin(events.name, (VIEW, CLICK, CART))
    assert behind_ms[prompt].max() < (SMALL.spread_s + 120) * 1000


def test_a_visit_never_stretches_into_the_next_within_the_gap_that_cuts_sessions():
    shop = Shop(SMALL, 3)
    last = {}
    for turn, _, _ in play(shop, GreedyOracle(), SLATE, 6000):
        for s, v, t in zip(
            turn.shopper.tolist(), turn.visit.tolist(), turn.timestamp_ms.tolist(), strict=True
        ):
            if s in last and last[s][0] != v:
                assert t - last[s][1] > 30 * 60_000
            elif s in last:
                assert 0 < t - last[s][1] < 30 * 60_000
            last[s] = (v, t)


def test_the_history_is_what_was_published_newest_first():
    shop = Shop(SMALL, 3)
    told = {}
    for turn, _, outcome in play(shop, Popularity(SMALL.items), SLATE, 3000):
        for s, name, item in zip(turn.events.shopper, turn.events.name, turn.events.item, strict=True):
            told.setdefault(int(s), []).append((int(item), int(name)))
        for b, s in enumerate(turn.shopper.tolist()):
            known = turn.history.item[b] >= 0
            history = list(
                zip(turn.history.item[b][known].tolist(), turn.history.name[b][known].tolist(), strict=True)
            )
            assert history == told.get(s, [])[::-1][: SMALL.history_length]
        for s, name, item in zip(
            outcome.events.shopper, outcome.events.name, outcome.events.item, strict=True
        ):
            told.setdefault(int(s), []).append((int(item), int(name)))


def test_the_ledger_counts_what_the_events_say():
    shop, events = days_under(Popularity(SMALL.items), 3000)
    over = shop.visits()
    clicks = {}
    for s, v, name in zip(events.shopper.tolist(), events.visit.tolist(), events.name.tolist(), strict=True):
        if name == CLICK:
            clicks[s, v] = clicks.get((s, v), 0) + 1

    assert over.clicks.sum() > 100
    for s, v, n in zip(over.shopper.tolist(), over.visit.tolist(), over.clicks.tolist(), strict=True):
        assert clicks.get((s, v), 0) == n


def test_the_ledger_is_in_the_reward_tables_units():
    """With a table that pays for clicks alone, a visit's reward is its clicks."""
    shop = Shop(SMALL, 3, RewardTable.parse("select_item=1"))
    for _ in play(shop, Popularity(SMALL.items), SLATE, 2000):
        pass
    over = shop.visits()

    assert over.clicks.sum() > 50
    assert np.array_equal(over.reward, over.clicks)


def test_popularity_shows_best_sellers_less_what_the_shopper_took():
    shop, policy, seen = Shop(SMALL, 3), Popularity(SMALL.items), np.zeros(SMALL.items)
    left_out = 0
    for turn, slates, outcome in play(shop, policy, SLATE, 2000):
        np.add.at(seen, turn.events.item, 1)
        for b in range(len(turn.shopper)):
            past = turn.history
            took = past.item[b][(past.name[b] == CLICK) | (past.name[b] == PURCHASE)]
            assert not set(slates[b].tolist()) & set(took.tolist())
            hidden = np.isin(np.arange(SMALL.items), took) | ~turn.available
            # halved each day, so that over these few hours order by plain counts holds but for near ties
            assert seen[slates[b]].min() >= 0.7 * np.sort(seen[~hidden])[-SLATE] - 1
            left_out += len(set(took.tolist()) & set(np.argsort(-seen)[:SLATE].tolist()))
        np.add.at(seen, outcome.events.item, 1)
    assert left_out > 50


def test_what_is_out_of_stock_is_never_clicked_and_never_viewed():
    shop = Shop(ShopSettings(items=200, shoppers=400, stock_outs=0.5), 3)
    rng = np.random.default_rng(0)
    clicks = 0
    for _ in range(100):
        turn = shop.next_turn()
        slates = rng.permuted(np.tile(np.arange(200), (len(turn.shopper), 1)), axis=1)[:, :10]
        outcome = shop.show(turn, slates)
        clicks += len(outcome.events)
        assert turn.available[outcome.events.item].all()
    assert clicks > 20


def test_new_items_appear_in_the_first_ten_days():
    shop = Shop(ShopSettings(new_items=0.5, stock_outs=0.0), 0)
    at = [available(shop.goods, 0, shop.settings.start_ms + d * DAY_MS, 0.0).mean() for d in (0, 5, 11)]

    assert at[0] == pytest.approx(0.5, abs=0.06)
    assert at[0] < at[1] < at[2] == 1.0


def test_about_the_wanted_share_is_out_of_stock_and_comes_back():
    shop = Shop(ShopSettings(new_items=0.0, stock_outs=0.1), 0)
    there = np.array(
        [available(shop.goods, 0, shop.settings.start_ms + h * HOUR_MS, 0.1) for h in range(0, 240, 6)]
    )

    assert there.mean() == pytest.approx(0.9, abs=0.01)
    assert there.any(axis=0).all()


def test_popularity_follows_zipf(random_days):
    """Of unaided views, the most viewed tenth of the items takes more than a third, and the tail is long."""
    _, events = random_days
    views = np.sort(np.bincount(events.item[events.name == VIEW], minlength=SMALL.items))[::-1]

    assert views[:20].sum() > 0.33 * views.sum()
    assert (views[100:] > 0).mean() > 0.5


# -- why planning pays -----------------------------------------------------------------------------------------


def minds_at(shop, n=200, **changes):
    """Minds of fresh shoppers, with changes."""
    minds = shop.minds(np.arange(n))
    return minds._replace(**{k: np.full_like(getattr(minds, k), v) for k, v in changes.items()})


def chance(shop, minds, role):
    """Mean click probability over one role's items: the purpose's category, or its accessories."""
    p = shop.click_probability(minds)
    category = minds.purpose[:, None] + (shop.settings.categories // 2 if role == "accessory" else 0)
    return p[shop.goods.category[None, :] == category].mean()


def test_progress_makes_accessories_attractive():
    shop = Shop(SMALL, 0)
    fresh, advanced = (chance(shop, minds_at(shop, stage=s), "accessory") for s in (0.0, 1.0))

    assert advanced > 5 * fresh


def test_satiation_and_repetition_wear_off_the_interest():
    shop = Shop(SMALL, 0)
    fresh = minds_at(shop)

    assert chance(shop, fresh._replace(clicks=np.full_like(fresh.clicks, 4)), "purpose") < 0.75 * chance(
        shop, fresh, "purpose"
    )
    again = shop.click_probability(fresh._replace(taken=np.full_like(fresh.taken, 17)))
    first = shop.click_probability(fresh)
    assert (again[:, 17] < 0.4 * first[:, 17]).all()
    assert np.array_equal(np.delete(again, 17, axis=1), np.delete(first, 17, axis=1))


def test_baits_are_clicked_more_and_drive_shoppers_away():
    shop = Shop(SMALL, 0)
    mind = shop.mind

    assert mind.bait > 0
    after_bait, after_solid = (shop.leave_probability(np.array(mind.mood_depth * d * 3)) for d in (-0.7, 0.6))
    assert after_bait > 1.3 * after_solid


def test_a_deep_page_of_the_purpose_is_what_moves_the_stage():
    shop = Shop(
        ShopSettings(items=200, shoppers=400, mind=Mind(base=30.0)), 0
    )  # everything looked at is clicked
    turn = shop.next_turn()
    before = shop.stage[turn.shopper].copy()
    deep = np.array(
        [
            np.flatnonzero((shop.goods.category == p) & turn.available)[
                shop.goods.depth[(shop.goods.category == p) & turn.available].argmax()
            ]
            for p in shop.purpose[turn.shopper]
        ]
    )
    outcome = shop.show(turn, deep[:, None])

    assert outcome.clicked.all()
    gain = shop.stage[turn.shopper] - before
    assert gain == pytest.approx(np.minimum(1 - before, 0.4 * shop.goods.depth[deep]))


# -- policies --------------------------------------------------------------------------------------------------


def test_top_takes_the_best_of_what_is_there():
    score = np.array([[1.0, 5.0, 3.0, 4.0]])

    assert top(score, np.array([True, False, True, True]), 2).tolist() == [[3, 2]]
    assert top(score, np.array([True, False, False, True]), 3).tolist() == [[3, 0, -1]]


def test_the_history_shows_what_a_visit_is_for(planner):
    """After the opening views, the purpose can be read off in more than nine visits of ten, stage within .1."""
    shop = Shop(ShopSettings(), 0)
    right, stage_error = [], []
    for _ in range(60):
        turn = shop.next_turn()
        told, true = infer_minds(shop, turn), shop.minds(turn.shopper)
        right.append(told.purpose == true.purpose)
        stage_error.append(np.abs(told.stage - true.stage)[right[-1]])
        shop.show(turn, planner.recommend(shop, turn, SLATE))

    assert np.concatenate(right).mean() > 0.9
    assert np.concatenate(stage_error).mean() < 0.1


@pytest.mark.slow
def test_policies_stand_in_their_order_with_room_between(planner):
    """random < popularity < greedy oracle < planning oracle, by seven standard errors each (seed 0, 30,000 decisions);
    and the history tells at least four fifths of what the planning oracle knows."""
    means, errors = [], []
    settings = ShopSettings()
    for policy in (Random(0), Popularity(settings.items), GreedyOracle(), HistoryOracle(planner), planner):
        shop, _ = days_under(policy, 30_000, settings, seed=0)
        over = whole(shop.visits())
        means.append(over.reward.mean())
        errors.append(over.reward.std() / len(over.reward) ** 0.5)
    random, popularity, greedy, history, planning = means

    assert popularity > random + 7 * np.hypot(errors[0], errors[1])
    assert greedy > popularity + 7 * np.hypot(errors[1], errors[2])
    assert planning > 1.1 * greedy
    assert history > random + 0.8 * (planning - random)


def test_popularity_counts_what_it_was_told_and_forgets():
    policy = Popularity(5, half_life_h=1.0)

    def viewed(item, times, at_h):
        n = np.zeros(times, dtype=np.int32)
        policy.observe(Events(n + at_h * HOUR_MS + 1, n, n, n.astype(np.uint8), n + item, n - 1, n - 1))

    viewed(2, 8, 0)
    viewed(4, 3, 2)  # by then the 8 are worth 2
    turn = Shop(ShopSettings(items=40, shoppers=2), 0).next_turn()._replace(available=np.ones(5, dtype=bool))

    assert policy.recommend(None, turn, 2)[0].tolist() == [4, 2]


# -- the feed, and wrong use -----------------------------------------------------------------------------------


def test_the_feed_tells_the_same_story_as_the_turns():
    shop = Shop(SMALL, 3)
    feed = Feed(shop, partitions=3)
    offsets = {p: [] for p in range(3)}
    names = {"decision": 0, "click": 0}
    decided = {}
    for turn, slates, outcome in play(shop, Popularity(SMALL.items), SLATE, 1500):
        columns = feed.columns(
            turn, slates, np.full(slates.shape, 0.5), outcome, policy_version=9, epsilon=0.1
        )
        for p in offsets:
            offsets[p] += columns.offset[columns.partition == p].tolist()
        decisions = np.flatnonzero(columns.kind == Kind.DECISION)
        assert len(decisions) == len(turn.shopper)
        for row, slate in zip(decisions, slates, strict=True):
            shown = columns.item[columns.item_bounds[row] : columns.item_bounds[row + 1]]
            assert shown.tolist() == (slate + 1).tolist()
            decided[int(columns.id[row])] = (int(columns.user[row]), set(shown.tolist()))
        for row in np.flatnonzero(columns.recommendation):
            user, shown = decided[int(columns.recommendation[row])]
            assert user == columns.user[row]
            assert columns.item[columns.item_bounds[row]] in shown
            names["click"] += EVENT_NAMES[columns.name[row]] == "select_item"
        newest = columns.history_item[columns.history_bounds[1:][decisions] - 1]
        assert np.array_equal(newest, turn.history.item[:, 0] + 1)

    assert all(o == list(range(len(o))) for o in offsets.values())
    assert names["click"] > 30


def test_wrong_use_names_the_value_and_the_range():
    with pytest.raises(ShopError, match=r"shoppers must be within 1\.\.1000000, not 0"):
        ShopSettings(shoppers=0)
    with pytest.raises(ShopError, match="categories must be even"):
        ShopSettings(categories=7)
    shop = Shop(ShopSettings(items=40, shoppers=3), 0)
    turns = [shop.next_turn(limit=1) for _ in range(3)]
    with pytest.raises(ShopError, match="every shopper waits"):
        shop.next_turn()
    with pytest.raises(ShopError, match=r"slates must be \[1, K\], not \[2, 4\]"):
        shop.show(turns[0], np.zeros((2, 4), dtype=int))
    with pytest.raises(ShopError, match=r"-1\.\.39, not 40"):
        shop.show(turns[0], np.array([[40]]))
