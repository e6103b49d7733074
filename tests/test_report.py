"""The demo's arithmetic, against visits made by hand: pairs, intervals, the gap, the verdict; and what is written."""

import json
import math

import numpy as np
import pytest

from simulator import report
from simulator.contest import Rivals
from simulator.figures import compare, mean_interval, over_seeds, ratio_interval, same_visits
from simulator.freshness import Freshness, FreshnessProbe
from simulator.shop import HOUR_MS, ShopSettings, Visits

OPENED_MS = 1_767_571_200_000


def visits(reward, shopper=None, start_h=None, clicks=1):
    """One visit for each reward: ten pages of six items; its shopper's number is its own unless given."""
    n = len(reward)
    shopper = np.arange(n) if shopper is None else np.asarray(shopper)
    number = np.array([(shopper[:i] == who).sum() for i, who in enumerate(shopper)])
    start_h = np.zeros(n) if start_h is None else np.asarray(start_h)
    counts = np.full(n, 10), np.full(n, 60), np.full(n, clicks), np.zeros(n), np.zeros(n), np.zeros(n)
    order = np.lexsort((number, shopper))
    return Visits(
        *(
            np.asarray(column)[order]
            for column in (
                shopper.astype(np.int32),
                number.astype(np.int32),
                (OPENED_MS + start_h * HOUR_MS).astype(np.int64),
                *(c.astype(np.int64) for c in counts),
                np.asarray(reward, dtype=np.float64),
            )
        )
    )


def found(seed=1, **changes):
    """A run of 40 visits, four an hour, in which learned gets two thirds of the way; the exam is its second half."""
    start_h = np.arange(40) / 4
    luck = np.random.default_rng(seed).normal(0, 0.2, 40)
    accounts = {
        "random": visits(1.0 + luck, start_h=start_h),
        "popularity": visits(2.0 + luck, start_h=start_h),
        "learned": visits(3.0 + luck + 0.1 * np.random.default_rng(9).normal(size=40), start_h=start_h),
        "oracle": visits(4.0 + luck, start_h=start_h),
    }
    fields = {
        "seed": seed,
        "accounts": accounts,
        "opened_ms": OPENED_MS,
        "exam_ms": OPENED_MS + 5 * HOUR_MS,
        "reached_ms": OPENED_MS + 11 * HOUR_MS,
        "explored": 0.05,
        "freshness": Freshness(0.8, 1.9, 2.5, 100, 0),
        "recommendations": 400,
        "unanswered": 0,
        "records": 900,
        "learnt_from": 900,
        "transitions": 2400,
        "updates": 240,
        "updates_left": 3,
        "policy_version": 17,
        "cpu_s": {"simulator": 1.0, "serving": 2.0, "learner": 3.0},
        "wall_s": 60.0,
        "log": "sqlite:///log.db",
    }
    return report.Findings(**fields | changes)


def test_a_mean_over_shoppers_who_came_once_has_the_textbook_interval():
    reward = np.array([1.0, 2.0, 3.0, 6.0])
    mean, low, high = mean_interval(visits(reward))
    half = 3.182 * reward.std(ddof=1) / 2  # t s / sqrt(n)
    assert (mean, low, high) == pytest.approx((3.0, 3.0 - half, 3.0 + half))


@pytest.mark.parametrize(("seeds", "t"), [(2, 12.706), (10, 2.262), (11, 2.228), (20, 2.093), (31, 2.042)])
def test_a_mean_over_seeds_has_students_interval_however_many_they_are(seeds, t):
    values = np.arange(seeds) % 2
    mean, low, high = over_seeds(values.tolist())
    half = t * values.std(ddof=1) / math.sqrt(seeds)
    assert (mean, low, high) == pytest.approx((values.mean(), mean - half, mean + half), abs=1e-3)


def test_visits_of_one_shopper_count_as_one_witness():
    alike = visits([0.0, 0.0, 4.0, 4.0], shopper=[0, 0, 1, 1])
    apart = visits([0.0, 0.0, 4.0, 4.0])
    assert mean_interval(alike).mean == mean_interval(apart).mean == 2.0
    assert mean_interval(alike) == pytest.approx(mean_interval(visits([0.0, 4.0])))
    assert mean_interval(alike).high > mean_interval(apart).high > 2.0


@pytest.mark.parametrize("shoppers", [2, 3, 5, 30])
def test_few_shoppers_have_an_interval_that_holds_the_truth_as_often_as_many(shoppers):
    rng, held = np.random.default_rng(1), 0
    for _ in range(1000):
        _, low, high = mean_interval(visits(rng.normal(3.0, 1.0, shoppers)))
        held += low <= 3.0 <= high
    assert 930 <= held <= 970  # 95 % of 1,000, give or take three sigma


def test_one_shopper_and_none_have_no_interval_and_beat_nobody():
    one, none = mean_interval(visits([5.0, 9.0], shopper=[7, 7])), mean_interval(visits([]))
    assert (one.mean, math.isnan(one.low), math.isnan(one.high)) == (7.0, True, True)
    assert all(map(math.isnan, none))
    assert "not better than popularity" in report.verdict(17, 2400, one)


def test_the_interval_of_a_ratio_covers_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(5)
    who = np.repeat(np.arange(200), 3)
    covered = 0
    for _ in range(400):
        shopper = rng.normal(1.0, 0.5, 200)[who]  # visits of one shopper are alike
        covered += (lambda i: i.low <= 0.5 <= i.high)(
            ratio_interval(shopper + rng.normal(0, 1, 600), np.full(600, 2.0), who)
        )
    assert 0.92 <= covered / 400 <= 0.98


def test_a_constant_lead_has_no_interval_for_luck_is_common():
    reward = np.array([1.0, 9.0, 4.0])
    paired = {
        "random": visits(reward),
        "popularity": visits(reward + 1),
        "learned": visits(reward + 3),
        "oracle": visits(reward + 4),
    }
    compared = compare(paired)
    assert compared.gain == pytest.approx((2.0, 2.0, 2.0))
    assert compared.gap_closed == pytest.approx((0.75, 0.75, 0.75))
    assert compared.policies["learned"].reward_per_visit == pytest.approx(14 / 3 + 3)
    assert compared.policies["learned"].ctr == pytest.approx(1 / 60)
    assert (compared.visits, compared.shoppers) == (3, 3)


def test_visits_pair_up_by_shopper_and_number_and_those_not_over_everywhere_are_left_out():
    accounts = {
        "a": visits([1.0, 2.0, 3.0, 4.0], shopper=[7, 7, 8, 9], start_h=[0, 5, 1, 2]),
        "b": visits([30.0, 20.0, 10.0], shopper=[8, 7, 7], start_h=[1, 0, 5]),  # 9 still looks around
    }
    paired = same_visits(accounts, OPENED_MS, OPENED_MS + 5 * HOUR_MS)  # bar what began at the end
    assert paired["a"].reward.tolist() == [1.0, 3.0]
    assert paired["b"].reward.tolist() == [20.0, 30.0]


def test_rivals_meet_the_same_shoppers_at_the_same_times():
    settings = ShopSettings(items=60, shoppers=100)
    rivals = Rivals(settings, seed=3, slate_size=4, plan_decisions=500)
    rivals.start()
    end_ms = settings.start_ms + 4 * HOUR_MS
    accounts = rivals.finish(end_ms, waiting=lambda: None)
    rivals.close()
    begun = {name: v.start_ms < end_ms - HOUR_MS for name, v in accounts.items()}
    keys = {
        name: np.stack([v.shopper, v.visit, v.start_ms])[:, begun[name]].tolist()
        for name, v in accounts.items()
    }
    assert set(keys) == {"random", "popularity", "oracle"}
    assert len(keys["random"][0]) > 20
    assert keys["random"] == keys["popularity"] == keys["oracle"]


def test_what_goes_wrong_among_the_rivals_is_raised_where_it_is_asked_for():
    rivals = Rivals(ShopSettings(items=60, shoppers=100), seed=3, slate_size=-1)
    rivals.start()
    with pytest.raises(ValueError):  # noqa: PT011 (numpy's)
        rivals.finish(2**62, waiting=lambda: None)


def test_a_report_compares_the_exam_only_and_tells_what_was_earned_before():
    made = report.report(found())
    assert made["exam"]["visits"] == 20
    assert made["gap_closed"] == pytest.approx(2 / 3, abs=0.05)
    low, high = made["learned_minus_popularity_ci95"]
    assert 0.8 < low < made["learned_minus_popularity"] < high < 1.2
    assert set(made["policies"]) == {"random", "popularity", "learned", "oracle"}
    assert all({"ctr", "reward_per_visit", "ci95"} <= set(p) for p in made["policies"].values())
    assert made["while_learning"]["policies"]["oracle"]["reward_per_visit"] == pytest.approx(4.0, abs=0.2)
    assert sum(point["visits"] for point in made["curve"]) == 40
    assert (made["ok"], made["why"]) == (True, "")


def test_a_run_too_short_to_compare_anything_says_so():
    with pytest.raises(ValueError, match="--minutes"):
        report.report(found(exam_ms=OPENED_MS + 10 * HOUR_MS))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"policy_version": 0}, "no weights ever reached"),
        ({"transitions": 0}, "made no transition"),
    ],
)
def test_a_loop_that_learnt_nothing_is_not_ok_whatever_it_earned(changes, why):
    made = report.report(found(**changes))
    assert not made["ok"]
    assert why in made["why"]


def test_a_lead_within_luck_is_no_lead():
    run = found()
    accounts = dict(run.accounts)
    accounts["learned"] = accounts["popularity"]._replace(
        reward=accounts["popularity"].reward + np.tile([1.0, -0.9], 20)
    )
    made = report.report(run._replace(accounts=accounts))
    assert made["learned_minus_popularity"] > 0
    assert "not better than popularity" in made["why"]


def test_several_seeds_are_averaged_with_students_interval_and_one_failure_fails_all():
    runs = [report.report(found(seed)) for seed in (1, 2, 3)]
    made = report.summary(runs)
    gaps = [run["gap_closed"] for run in runs]
    half = 4.303 * np.std(gaps, ddof=1) / math.sqrt(3)
    assert made["gap_closed_ci95"] == pytest.approx([np.mean(gaps) - half, np.mean(gaps) + half])
    assert made["seeds"] == [1, 2, 3]
    assert made["ok"]
    assert over_seeds(gaps) == pytest.approx((made["gap_closed"], *made["gap_closed_ci95"]))
    assert report.summary([*runs, report.report(found(4, policy_version=0))])["why"].startswith(
        "seed 4: no weights"
    )


def test_words_name_every_policy_with_its_figures():
    made = report.report(found())
    text = report.words(made, "folder")
    for name, policy in made["policies"].items():
        (line,) = [x for x in text.splitlines() if x.strip().startswith(f"{name}  ")]
        assert f"{policy['reward_per_visit']:.2f}" in line
    assert f"gap closed: {made['gap_closed']:.2f}" in text
    assert "p50 0.80 s, p99 1.90 s" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "starved" not in text


@pytest.mark.parametrize(("updates_left", "share"), [(60, "80 %"), (2160, "10 %")])
def test_words_say_where_a_slow_machine_left_no_time_to_learn(updates_left, share):
    starved = report.report(found(2, updates_left=updates_left))
    several = report.summary([report.report(found()), starved])
    for made, whose in ((starved, ""), (several, " (worst seed)")):
        text = report.words(made, "folder")
        assert f"{share} of the updates that its settings allow{whose}. " in text
        assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_json_and_picture_are_written(tmp_path, seeds):
    runs = [report.report(found(seed, freshness=Freshness(*[math.nan] * 3, 0, 0))) for seed in seeds]
    report.write(tmp_path, runs[0] if len(runs) == 1 else report.summary(runs))

    def no_constants(name):
        raise AssertionError(f"{name} is no JSON")

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=no_constants)
    assert read["freshness_s"]["p50"] is None
    assert read["gap_closed"] == pytest.approx(2 / 3, abs=0.05)
    picture = (tmp_path / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_freshness_waits_for_every_partition():
    probe = FreshnessProbe()
    probe.mark({0: 10, 1: 5}, now_s=1.0)
    probe.look({0: 99}, now_s=1.5)
    probe.look({0: 99, 1: 4}, now_s=2.0)
    assert probe.waiting == 1
    probe.look({0: 99, 1: 5}, now_s=4.0)
    assert probe.found(now_s=9.0) == Freshness(3.0, 3.0, 3.0, 1, 0)


def test_events_never_learnt_from_count_with_the_time_waited():
    probe = FreshnessProbe()
    probe.mark({0: 1}, now_s=0.0)
    probe.mark({0: 2}, now_s=1.0)
    probe.look({0: 1}, now_s=1.0)
    assert probe.found(now_s=11.0) == Freshness(5.5, pytest.approx(9.91), 10.0, 2, 1)
    assert math.isnan(FreshnessProbe().found(0.0).p50)
