"""The simulated shop as a Gymnasium environment: an episode is a visit, an action the one item shown."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from simulator.gym_shop import ID, ShopEnv, flattened
from simulator.policies import GreedyOracle, Random, Recommender, play
from simulator.shop import CLICK, HOUR_MS, PURCHASE, VIEW, Shop, ShopError, Visits

SMALL: dict[str, Any] = {"items": 60, "categories": 6, "brands": 8, "shoppers": 200}


def visits_under(env: ShopEnv, policy: Recommender, visits: int, seed: int) -> list[float]:
    """What each visit earned."""
    env.reset(seed=seed)
    earned = [0.0]
    while True:
        action = int(policy.recommend(env.shop, env.turn, 1)[0, 0])
        _, reward, terminated, _, _ = env.step(np.int64(action))
        earned[-1] += float(reward)
        if terminated:
            if len(earned) == visits:
                return earned
            env.reset()
            earned.append(0.0)


@pytest.mark.parametrize("flat", [False, True])
def test_gymnasiums_own_check_passes(flat: bool) -> None:
    env = gymnasium.make(f"simulator.gym_shop:{ID}", flat=flat, **SMALL)
    assert env.spec is not None
    assert env.spec.id == ID
    check_env(env.unwrapped)


def story(env: ShopEnv, seed: int, pages: int = 400) -> list[Any]:
    """All that an environment says under actions drawn with the same seed."""
    rng = np.random.default_rng(0)
    told: list[Any] = [env.reset(seed=seed)]
    for _ in range(pages):
        told.append(env.step(rng.integers(SMALL["items"])))
        if told[-1][2]:
            told.append(env.reset())
    return told


def test_the_same_seed_gives_the_same_visits_whatever_came_before_and_another_seed_others() -> None:
    used, fresh = ShopEnv(**SMALL), ShopEnv(**SMALL)
    story(used, seed=3, pages=50)
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    one, again, other = story(used, seed=4), story(fresh, seed=4), story(fresh, seed=5)
    assert before == np.random.get_state()[1].tolist(), "numpy's global state is nobody's business"  # type: ignore[index, union-attr]
    assert str(one) == str(again) != str(other)


def test_the_seed_changes_the_luck_and_the_shop_changes_the_goods() -> None:
    env = ShopEnv(**SMALL, shop=7)
    prices = env.shop.goods.price
    env.reset(seed=1)
    assert (env.shop.goods.price == prices).all()
    assert (ShopEnv(**SMALL, shop=8).shop.goods.price != prices).any()


def test_visits_one_after_another_are_those_that_overlap_in_the_shop() -> None:
    env = ShopEnv(**SMALL)
    visits_under(env, Random(0), 300, seed=1)
    alone = env.shop.visits()
    together = Shop(env.shop.settings, 0, luck=env.shop.luck)
    for _ in play(together, Random(1), 1, 4000):
        pass
    end = alone.start_ms.max() - HOUR_MS
    begun = [
        sorted(zip(v.shopper.tolist(), v.visit.tolist(), v.start_ms.tolist(), strict=True))
        for v in (_until(alone, end), _until(together.visits(), end))
    ]
    assert len(begun[0]) > 200
    assert begun[0] == begun[1]


def _until(visits: Visits, end_ms: int) -> Visits:
    return Visits(*(column[visits.start_ms < end_ms] for column in visits))


def test_a_visits_rewards_add_up_to_what_the_shop_books_for_it() -> None:
    env = ShopEnv(**SMALL)
    earned = visits_under(env, GreedyOracle(), 100, seed=2)
    booked = env.shop.visits()
    assert len(booked.visit) == 100
    assert sum(earned) == pytest.approx(booked.reward.sum())
    assert booked.purchases.sum() > 0, "what is bought hours later is in the reward of the click"
    assert sorted(earned) == pytest.approx(sorted(booked.reward))


@pytest.mark.parametrize("left_after", [1000, 2], ids=["visits to their end", "visits left after two pages"])
def test_an_observation_is_what_was_published_of_the_shopper_newest_first(left_after: int) -> None:
    env, oracle = ShopEnv(**SMALL), GreedyOracle()
    pages = 0
    observation, info = env.reset(seed=3)
    published: dict[int, list[tuple[int, int]]] = {}
    for _ in range(800):
        deeds = info["events"]
        for shopper, item, name in zip(deeds.shopper, deeds.item, deeds.name, strict=True):
            published.setdefault(shopper, []).insert(0, (item + 1, name))
        assert isinstance(observation, dict)
        entries = int((observation["item"] > 0).sum())
        seen = list(zip(observation["item"][:entries], observation["name"][:entries], strict=True))
        assert seen == published.get(info["shopper"], [])[:32]
        assert (observation["item"][entries:] == 0).all()
        assert (np.diff(observation["age_s"][:entries]) >= 0).all()
        if env.in_a_visit and pages < left_after:
            observation, _, _, _, info = env.step(oracle.recommend(env.shop, env.turn, 1)[0, 0])
            pages += 1
            assert set(info["events"].shopper) <= {info["shopper"]}, (
                "others' deeds have their time before a visit"
            )
        else:
            observation, info = env.reset()
            pages = 0
    assert {name for deeds in published.values() for _, name in deeds} >= {VIEW, CLICK, PURCHASE}


def test_who_is_left_in_the_middle_of_a_visit_goes_on_without_being_shown_anything() -> None:
    env, other = ShopEnv(**SMALL), ShopEnv(**SMALL)
    whole = []
    for e in (env, other):
        e.reset(seed=6)
        whole.append(int(e.turn.shopper[0]))
    over = False
    while not over:
        over = other.step(np.int64(0))[2]
    next_one, after_all = env.reset()[1], other.reset()[1]
    assert next_one["shopper"] == after_all["shopper"] != whole[0]
    booked = env.shop.visits()
    assert booked.decisions.sum() > 0
    assert booked.impressions.sum() == 0


def test_who_knows_the_rules_earns_three_times_what_chance_does() -> None:
    """Over 2,000 visits it is 5.6 times; of 200, sums are within a third of their expectation (two sigma)."""
    env = ShopEnv()
    random, oracle = (sum(visits_under(env, policy, 200, seed=5)) for policy in (Random(0), GreedyOracle()))
    assert oracle > 3 * random > 0


def test_one_vector_counts_this_visit_and_earlier_ones_by_item_and_by_category() -> None:
    observation = {
        "item": np.array([2, 2, 1, 3, 0, 0], np.int32),
        "name": np.array([CLICK, VIEW, VIEW, PURCHASE, 0, 0], np.uint8),
        "age_s": np.array([10, 20, 60, 7200, 0, 0], np.float32),
        "value": np.zeros(6, np.float32),
    }
    category = np.array([0, 0, 1])
    vector = flattened(observation, category, 2)
    one = np.log(2) / np.log(7)
    items = [[one, one, 0], [0, one, 0], [0, 0, 0], [0, 0, one]]
    categories = [[np.log(3) / np.log(7), 0], [one, 0], [0, 0], [0, one]]
    month = np.log1p(30 * 86_400)
    more = [4 / 6, np.log1p(60) / month, np.log1p(7200) / month]
    assert vector == pytest.approx(np.concatenate([*items, *categories, more]), abs=1e-6)


def test_wrong_use_says_what_is_wrong() -> None:
    env = ShopEnv(**SMALL)
    with pytest.raises(gymnasium.error.ResetNeeded, match="call reset first"):
        env.step(np.int64(0))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"0\.\.59, not 60"):
        env.step(np.int64(60))
    with pytest.raises(ShopError, match="not between two pages"):
        env.shop.next_page(int(env.turn.shopper[0]))
    with pytest.raises(ShopError, match="items must be within"):
        ShopEnv(items=3)
