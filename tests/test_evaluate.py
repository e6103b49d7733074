"""`learner evaluate`: right where the arithmetic can be done by hand or by enumeration, and clear where it cannot."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from learner.__main__ import main
from learner.estimators import Sums, no_sums
from learner.evaluate import TRIES, evaluate, read
from learner.evaluate_report import GROUPS, Report, as_json, as_text, chosen
from learner.evaluation import EvaluateConfig, NothingToEvaluate, group_of, uniform_chance
from learner.policy import Candidate, Entry, Policy
from learner.weights import WeightsMissing, WeightStore
from streaming.join_settings import JoinSettings
from streaming.log import LogUnavailable, OffsetOutOfRange, open_log
from streaming.rewards import RewardTable
from streaming.schemas import Codec
from tests.rows import START_MS
from tests.serving_process import publish
from tests.test_audit import Stalling
from tests.test_audit import shop as shop  # a fixture

ITEMS = [f"item-{i}" for i in range(9)]
CLICKS = RewardTable.parse("select_item=1,purchase=10")
JOIN = JoinSettings(rewards=CLICKS)


class Storefront:
    """Writes decisions and what came of them, a second apart."""

    def __init__(self, url: str, topic: str = "events") -> None:
        self.log, self.codec, self.topic = open_log(url), Codec(), topic
        self.log.create_topic(topic, 2)
        self.producer, self.count = self.log.producer(), 0

    def decide(
        self, slate, user="ann", epsilon=0.5, history=(), candidates=None, at_s=None, name=None
    ) -> str:
        """slate: (item, propensity) of each slot; history: oldest first. Returns the recommendation_id."""
        self.count += 1
        name = name or f"r{self.count}"
        record = {
            "recommendation_id": name,
            "user_id": user,
            "timestamp": self.now_ms(at_s),
            "history": [
                {"item_id": e.item_id, "name": e.name, "timestamp": e.timestamp_ms, "value": e.value}
                for e in history
            ],
            "slate": [{"item_id": item, "propensity": p} for item, p in slate],
            "epsilon": epsilon,
            "candidates": candidates and [c._asdict() for c in candidates],
        }
        self.producer.send(self.topic, user.encode(), self.codec.encode_decision(record))
        return name

    def deed(self, name, item, of, user="ann", at_s=None) -> None:
        self.count += 1
        record = {
            "event_id": f"e{self.count}",
            "name": name,
            "user_id": user,
            "timestamp": self.now_ms(at_s),
            "items": [{"item_id": item}],
            "recommendation_id": of,
        }
        self.producer.send(self.topic, user.encode(), self.codec.encode_event(record))

    def now_ms(self, at_s=None):
        return START_MS + round(1000 * (self.count if at_s is None else at_s))

    def report(self, **more) -> Report:
        self.producer.flush()
        config = EvaluateConfig(**{"topic": self.topic, "policies": ("logging", "uniform"), **more})
        return evaluate(self.log, self.codec, config, JOIN)

    def close(self) -> None:
        self.producer.close()
        self.log.close()


@pytest.fixture
def front(tmp_path):
    front = Storefront(f"sqlite:///{tmp_path / 'log.db'}")
    yield front
    front.close()


def estimates(report: Report, name: str) -> dict[str, float]:
    (policy,) = [p for p in report.policies if p.name.startswith(name)]
    return {method: found.value for method, found in policy.estimates.items()}


def told(capsys, *flags: str) -> tuple[int, str, str]:
    """The command's exit status, what it said to stdout, and to stderr."""
    status = main(["evaluate", *flags])
    said = capsys.readouterr()
    return status, said.out, said.err


# --- by hand -------------------------------------------------------------------------------------------------


def two_items(front: Storefront) -> None:
    """Half explored: the best of two items is shown with 3/4. Of four decisions two are clicked."""
    for user, item, clicked in (
        ("ann", "a", True),
        ("bob", "b", True),
        ("cid", "a", False),
        ("dan", "a", False),
    ):
        name = front.decide([(item, 0.75 if item == "a" else 0.25)], user)
        if clicked:
            front.deed("select_item", item, name, user)


def test_it_says_what_the_arithmetic_says(front):
    two_items(front)
    report = front.report()
    assert (report.decisions, report.slots, report.users) == (4, 4, 4)
    assert estimates(report, "logging") == {"mean": 0.5}
    found = estimates(report, "uniform")
    # weights 2/3, 2, 2/3, 2/3; the first two were clicked
    assert found["IPS"] == pytest.approx((2 / 3 + 2) / 4)
    assert found["SNIPS"] == pytest.approx((2 / 3 + 2) / 4)
    assert found["DM"] == 0.0  # a model that has seen nothing yet
    assert found["DR"] == pytest.approx(found["IPS"])
    (_, uniform) = report.policies
    assert uniform.effective == pytest.approx([4**2 / (3 * (2 / 3) ** 2 + 2**2)])
    assert uniform.largest == pytest.approx(2)
    assert uniform.gains["IPS"].value == pytest.approx((2 / 3 + 2) / 4 - 0.5)


def test_on_either_log_it_says_the_same(log_url, topic):
    front = Storefront(log_url, topic)
    two_items(front)
    assert estimates(front.report(), "uniform")["IPS"] == pytest.approx((2 / 3 + 2) / 4)
    front.close()


def test_purchases_of_the_next_day_count_and_a_resent_decision_does_not(front):
    two_items(front)
    front.decide([("a", 0.75)], "ann", name="r1")
    for hour in range(1, 20):  # so that the clock is believed
        front.deed("search", "a", None, f"user-{hour}", at_s=3600 * hour)
    front.deed("purchase", "a", "r1", at_s=19 * 3600)
    report = front.report()
    assert estimates(report, "logging")["mean"] == pytest.approx((2 + 10) / 4)
    assert report.left_out.repeated_or_late == 1
    assert estimates(report, "uniform")["IPS"] == pytest.approx((2 / 3 * 11 + 2) / 4)


def test_clipped_weights_are_counted_with_what_they_lose(front):
    two_items(front)
    (_, uniform) = front.report(clip=1.0).policies
    assert uniform.estimates["IPS"].value == pytest.approx((2 / 3 + 1) / 4)
    assert uniform.clipped is not None
    assert uniform.clipped.weights == 1
    assert uniform.clipped[2:] == pytest.approx(
        (1 / 4, 2 / 4, 1 / 4)
    )  # of 4 weights; of their sum; what is cut
    assert uniform.mean_ratio.value == pytest.approx(1.0)
    text = as_text(front.report(clip=1.0))
    assert "clipped at 1: 1 of 4 weights (25.00%), 25.00% of their sum" in text


def test_only_the_first_slots_may_be_judged(front):
    for user in "abcd":
        name = front.decide([("a", 1 / 2), ("b", 1.0)], user, epsilon=1.0)
        front.deed("select_item", "b", name, user)
    assert estimates(front.report(), "logging")["mean"] == 1.0
    assert estimates(front.report(slots=1), "logging")["mean"] == 0.0


def test_decisions_can_be_taken_from_a_span_of_event_time(front):
    two_items(front)  # at seconds 1, 3, 5 and 6
    report = front.report(since=START_MS + 3000, until=START_MS + 6000)
    assert (report.decisions, report.left_out.other_times) == (2, 2)
    assert (report.from_ms, report.to_ms) == (START_MS + 3000, START_MS + 5000)


def test_a_decision_that_shows_no_candidate_of_its_own_is_left_out(front):
    two_items(front)
    offered = [Candidate("a"), Candidate("new")]
    front.decide([("a", 0.5)], "eve", candidates=offered)
    front.decide([("b", 0.5)], "fay", candidates=offered)
    report = front.report()
    assert (report.decisions, report.left_out.not_a_candidate) == (5, 1)
    assert "1 of an item that is no candidate" in as_text(report)


def test_a_share_of_the_users_may_be_judged(front):
    for n in range(300):
        front.decide([("a", 0.5)], f"user-{n % 100}", epsilon=1.0)
    report = front.report(users_share=0.25)
    assert 30 < report.decisions < 120
    assert report.decisions % 3 == 0  # all of a user's, or none
    assert report.left_out.other_users == 300 - report.decisions


def test_what_was_not_explored_is_left_out_and_counted(front):
    two_items(front)
    front.decide([("a", 1.0)], "eve", epsilon=0.0)
    report = front.report()
    assert (report.decisions, report.left_out.not_explored) == (4, 1)
    assert "1 not explored" in as_text(report)


# --- as a server would ---------------------------------------------------------------------------------------


def serve(front: Storefront, policy: Policy, decisions: int, epsilon: float, inline: bool = False) -> None:
    """What a server with this policy would have logged, by its own code; every third slate is clicked somewhere."""
    rng = np.random.default_rng(0)
    for n in range(decisions):
        user = f"user-{n % 23}"
        past = [
            Entry(
                str(rng.choice(ITEMS)),
                str(rng.choice(["view_item", "purchase", "select_item"])),
                front.now_ms() - 9,
            )
            for _ in range(rng.integers(0, 5))
        ]
        bought = {e.item_id for e in past if e.name == "purchase"}
        states = policy.encode([past], [front.now_ms(front.count + 1)])
        if inline:
            offered = [Candidate(i, price=float(rng.integers(9))) for i in rng.permutation(ITEMS)[:5]]
            offered.append(Candidate(f"news-{n}", category="news"))
            eligible = np.array([c.item_id not in bought for c in offered])
            shown = policy.recommend_candidates(states, offered, 3, epsilon, rng, eligible)
            names = [offered[i].item_id for i in shown.ids.tolist()]
        else:
            offered, eligible = None, policy.on_offer.copy()
            eligible[policy.ids(sorted(bought))] = False
            (shown,) = policy.recommend(states, 3, epsilon, rng, eligible)
            names = [policy.item_id(i) for i in shown.ids.tolist()]
        slate = list(zip(names, shown.propensity.tolist(), strict=True))
        made = front.decide(slate, user, epsilon, past, offered)
        if n % 3 == 0:
            front.deed("select_item", names[n % 2], made, user)


@pytest.fixture
def store(tmp_path):
    return WeightStore(f"{tmp_path}/weights")


@pytest.mark.parametrize("inline", [False, True], ids=["catalog", "candidates"])
@pytest.mark.parametrize("slate", ["cascade", "standard", "slotwise"])
def test_a_version_judged_by_the_log_that_it_wrote_earned_what_was_earned(front, store, inline, slate):
    policy = Policy.from_weights(store.load(publish(store, ITEMS)))
    serve(front, policy, 120, 0.3, inline)
    report = front.report(policies=("logging", "weights"), weights=store.url, epsilon=0.3, slate=slate)
    (logging, weights) = report.policies
    earned = logging.estimates["mean"].value
    assert earned == pytest.approx(40 / 120)
    assert weights.name == "weights:1"
    assert weights.largest == pytest.approx(1.0, abs=1e-4)  # propensities travelled as float32
    assert weights.effective == pytest.approx([120] * 3, rel=1e-4)
    for method in ("IPS", "SNIPS"):
        assert weights.estimates[method].value == pytest.approx(earned, abs=1e-4)
    assert report.could_show == pytest.approx(1.0, abs=1e-3)
    assert not [note for note in report.notes() if "weights" in note]


def test_another_epsilon_is_another_policy(front, store):
    policy = Policy.from_weights(store.load(publish(store, ITEMS)))
    serve(front, policy, 120, 0.3)
    config = {"policies": ("weights", "uniform"), "weights": store.url, "slots": 1}
    by_epsilon = {
        epsilon: estimates(front.report(epsilon=epsilon, **config), "weights")["IPS"]
        for epsilon in (0.0, 0.5, 1.0)
    }
    # the value of an ε-greedy policy's first slot is linear in ε
    assert by_epsilon[0.5] == pytest.approx((by_epsilon[0.0] + by_epsilon[1.0]) / 2)
    assert by_epsilon[1.0] == pytest.approx(estimates(front.report(**config), "uniform")["IPS"])
    assert abs(by_epsilon[0.0] - by_epsilon[1.0]) > 0.01


def test_a_chosen_version_is_judged_beside_the_newest(front, store):
    for seed in (1, 2):
        publish(store, ITEMS, seed)
    serve(front, Policy.from_weights(store.load(2)), 60, 0.3)
    found = front.report(policies=("weights:1", "weights"), weights=store.url, epsilon=0.3).policies
    assert [p.name for p in found] == ["weights:1", "weights:2"]
    assert found[1].largest == pytest.approx(1.0, abs=1e-4)
    assert found[0].largest > 2


def positions(front: Storefront) -> dict[int, int]:
    """Where the log ends now."""
    front.producer.flush()
    return {partition: bounds.high for partition, bounds in front.log.bounds(front.topic).items()}


def test_decisions_that_a_version_was_learnt_from_are_told_and_left_out_where_that_is_asked_for(front, store):
    policy = Policy.from_weights(store.load(publish(store, ITEMS)))
    for seed, decisions in (
        (1, 40),
        (2, 20),
        (3, 60),
    ):  # versions 2, 3 and 4 know what was decided before them
        serve(front, policy, decisions, 0.3)
        publish(store, ITEMS, seed, positions=positions(front))
    serve(front, policy, 30, 0.3)
    config = {"weights": store.url, "policies": ("weights:1", "weights:3", "weights:2")}
    report = front.report(**config)
    assert report.decisions == 150
    assert report.has_read == {"weights:1": 0, "weights:3": 60, "weights:2": 40}
    notes = "\n".join(report.notes())
    assert "weights:3: it was learnt from 60 of these 150 decisions" in notes
    assert "weights:1: it was learnt" not in notes
    assert as_json(report)["has_read"]["weights:2"] == 40

    unseen = front.report(**config, unseen=True)
    assert (unseen.decisions, unseen.left_out.learnt_from) == (90, 60)
    assert not [note for note in unseen.notes() if "learnt from" in note]
    assert "left out: 60 learnt from" in as_text(unseen)

    publish(store, ITEMS, 4, positions=positions(front))
    with pytest.raises(NothingToEvaluate, match=r"none of 150 decisions is unseen.*judge an older one"):
        front.report(weights=store.url, policies=("weights",), unseen=True)
    assert front.report(policies=("uniform",), unseen=True).decisions == 150


def test_items_that_a_version_does_not_know_are_none_that_it_could_have_shown(front, store):
    """What it draws at random it draws from those that it knows."""
    whole = Policy.from_weights(store.load(publish(store, ITEMS)))
    few = WeightStore(f"{store.url}-few")
    publish(few, ITEMS[:3])
    rng = np.random.default_rng(3)
    for n in range(900):
        item = ITEMS[rng.integers(len(ITEMS))]
        name = front.decide([(item, 1 / len(ITEMS))], f"user-{n}", 1.0)
        if item in ITEMS[:3]:
            front.deed("select_item", item, name, f"user-{n}")
    assert len(whole.on_offer) == len(ITEMS) + 1
    found = estimates(front.report(policies=("weights",), weights=few.url, epsilon=0.5), "weights")
    for method in ("SNIPS", "DR", "SNDR"):  # whatever it shows is clicked
        assert found[method] == pytest.approx(1.0, abs=0.05)
    assert found["IPS"] == pytest.approx(1.0, abs=0.2)


def test_popularity_counts_as_a_server_does_whatever_the_learners_rewards_are(front):
    for _ in range(60):
        front.deed("select_item", "b", "")
    for _ in range(300):
        front.deed("view_item", "a", "")
    for n in range(200):
        name = front.decide([("ab"[n % 2], 0.5)], epsilon=1.0)
        if n % 2:
            front.deed("view_item", "b", name)
    front.producer.flush()
    config = EvaluateConfig(topic=front.topic, policies=("popularity",), epsilon=0.0)
    report = evaluate(front.log, front.codec, config, JoinSettings(rewards=RewardTable.parse("view_item=1")))
    assert estimates(report, "popularity")["SNIPS"] == pytest.approx(1.0)  # it shows b


def test_items_out_of_stock_are_none_that_a_policy_would_show(front, store):
    policy = Policy.from_weights(store.load(publish(store, ITEMS)))
    front.log.create_topic("catalog", 1, compacted=True)
    for item in ITEMS[:4]:
        gone = front.codec.encode_item({"item_id": item, "in_stock": False})
        front.producer.send("catalog", item.encode(), gone)
    policy.on_offer[policy.ids(ITEMS[:4])] = False
    serve(front, policy, 60, 0.3)
    (weights,) = front.report(policies=("weights",), weights=store.url, epsilon=0.3).policies
    assert weights.largest == pytest.approx(1.0, abs=1e-4)


def test_popularity_is_judged_by_what_came_before(front, monkeypatch):
    """All click b, whatever they are shown: after a batch it is the best seller, before the first item known was."""
    for n in range(40):
        name = front.decide([("ab"[n % 2], 0.5)], f"user-{n}", epsilon=1.0)
        front.deed("select_item", "b", name if n % 2 else None, f"user-{n}")
    monkeypatch.setattr("learner.evaluate.FIRST_RECORDS", 80)
    at_once = front.report(policies=("popularity",), epsilon=0.0)
    assert estimates(at_once, "popularity")["SNIPS"] == 0.0
    monkeypatch.setattr("learner.evaluate.FIRST_RECORDS", 8)
    assert estimates(front.report(policies=("popularity",), epsilon=0.0), "popularity")["SNIPS"] >= 0.8


def test_the_order_of_a_log_does_not_tell_popularity_what_comes_next_in_it(tmp_path):
    """Nobody has gone to anything yet: of two logs, each beginning with another of two items, it fits one."""
    first = []
    for order in ("ab", "ba"):
        front = Storefront(f"sqlite:///{tmp_path / order}.db")
        for item in order:
            front.decide([(item, 0.5)], epsilon=1.0)
        (popularity,) = front.report(policies=("popularity",), epsilon=0.0, until=START_MS + 1500).policies
        first.append(popularity.mean_ratio.value)
        front.close()
    assert sorted(first) == pytest.approx([0.0, 2.0])


# --- parts ---------------------------------------------------------------------------------------------------


def test_the_uniform_chance_is_read_from_propensities():
    """Of 5 items, ε = .5, best or drawn; where the log does not tell, by how many items we think there were."""
    drawn, best = 0.5 / 5, 0.5 / 5 + 0.5
    p = np.array([[drawn, 0.5 / 4], [best, 0.5 / 4 + 0.5], [0.7, 0.7], [1.0, 1.0]])
    epsilon = np.array([[0.5], [0.5], [0.0], [0.0]])
    left = np.array([[6, 5], [6, 5], [4, 3], [4, 3]])
    chance, told = uniform_chance(p, epsilon, left)
    assert chance == pytest.approx(np.array([[1 / 5, 1 / 4], [1 / 5, 1 / 4], [1 / 4, 1 / 3], [1 / 4, 1 / 3]]))
    assert told.tolist() == [[True, True], [True, True], [False, False], [False, False]]


def test_the_uniform_chance_of_a_large_catalog_survives_float32():
    left = np.array([[100_000]])
    for p in (0.05 / 90_000, 0.05 / 90_000 + 0.95):
        epsilon = np.array([[np.float32(0.05)]], np.float64)
        chance, _ = uniform_chance(np.array([[np.float32(p)]], np.float64), epsilon, left)
        assert 1 / 120_000 < chance[0, 0] < 1 / 80_000


def test_users_are_dealt_out_evenly_whatever_partition_they_are_in():
    users = np.arange(10_000, dtype=np.uint64) * np.uint64(GROUPS)  # alike in all their low digits
    counts = np.bincount(group_of(users), minlength=GROUPS)
    assert counts.min() > 0
    assert counts.max() < 3 * counts.mean()


def by_tau(values, noise, seed=0) -> Sums:
    """Sums in which switch-DR has these values, each with this noise."""
    rng = np.random.default_rng(seed)
    n, taus = 100, len(values)
    each = np.array(values) + rng.normal(size=(n, taus)) * np.array(noise)
    return no_sums(n, 1, taus)._replace(decisions=np.ones(n), switched=each)


def test_switch_dr_takes_the_smallest_tau_that_the_noise_of_larger_ones_allows():
    taus = (np.inf, 100.0, 10.0, 1.0)
    assert chosen(by_tau([1, 1, 1, 1], [9, 5, 3, 1]), taus) == 3
    assert chosen(by_tau([1, 1, 1, 4], [1, 0.9, 0.8, 0.1]), taus) == 2  # the last one is biased, plainly
    assert chosen(by_tau([1, 5, 1, 1], [0.1, 0.1, 0.1, 0.1]), taus) == 0


# --- what cannot be said -------------------------------------------------------------------------------------


def test_without_a_decision_it_says_what_there_is(front):
    front.deed("search", "a", None)
    with pytest.raises(NothingToEvaluate, match=r"'events' holds no decision, in 1 records"):
        front.report()


def test_an_empty_topic_is_no_error_of_its_own(front):
    with pytest.raises(NothingToEvaluate, match=r"holds no decision, in 0 records"):
        front.report()


@pytest.mark.parametrize("p", [0.0, 1.5])
def test_propensities_that_are_none_are_named(front, p):
    front.decide([("a", p)])
    with pytest.raises(NothingToEvaluate, match=r"1 have a propensity that is not within 0 < p <= 1"):
        front.report()
    two_items(front)
    report = front.report()
    assert report.bad == {"BAD_PROPENSITY": 1}
    assert "1 records unreadable (BAD_PROPENSITY)" in as_text(report)


def test_a_log_that_was_never_explored_tells_nothing(front):
    front.decide([("a", 1.0)], epsilon=0.0)
    with pytest.raises(NothingToEvaluate, match="none of 1 decisions was explored"):
        front.report()


def test_a_share_without_users_is_named(front):
    two_items(front)
    with pytest.raises(
        NothingToEvaluate, match="none of 4 decisions is of the users that --users-share 1e-06"
    ):
        front.report(users_share=1e-6)


def test_decisions_that_show_no_candidate_of_their_own_are_named(front):
    front.decide([("b", 0.5)], candidates=[Candidate("a"), Candidate("new")])
    with pytest.raises(
        NothingToEvaluate, match="none of 1 decisions shows items of its own candidates alone"
    ):
        front.report()


def test_a_span_without_decisions_is_named(front):
    two_items(front)
    with pytest.raises(
        NothingToEvaluate, match=r"none of 4 decisions in 'events' is within --since and --until"
    ):
        front.report(until=START_MS)


def test_a_store_without_weights_is_named(front, store):
    two_items(front)
    with pytest.raises(WeightsMissing, match=r"no version labelled 'stable'.*leave `weights` out"):
        front.report(policies=("weights",), weights=store.url)
    publish(store, ITEMS)
    with pytest.raises(WeightsMissing, match="version 7"):
        front.report(policies=("weights:7",), weights=store.url)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--policies", "unifrom"), "no such policy 'unifrom'; did you mean 'uniform'?"),
        (("--slate", "cascad"), "no such choice 'cascad'; did you mean 'cascade'?"),
        (("--epsilon", "2"), "epsilon must be within 0..1, not 2.0"),
        (("--clip", "0"), "clip must be > 0, not 0.0"),
        (("--slots", "0"), "slots must be within 1..64, not 0"),
        (("--users-share", "0"), "users_share must be above 0 and at most 1, not 0.0"),
        (("--since", "yesterday"), "--since: Invalid isoformat string: 'yesterday'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", *flags])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_where_weights_leave_little_of_a_log_that_is_said(front, store):
    publish(store, ITEMS[:3])
    for n in range(450):
        front.decide([(ITEMS[n % 3], 1 / 3)], f"user-{n}", 1.0)
    config = {"policies": ("weights",), "weights": store.url, "slots": 1}
    greedy, mixed = front.report(epsilon=0.0, **config), front.report(epsilon=0.5, **config)
    assert 100 < greedy.policies[0].effective[0] < 200 < mixed.policies[0].effective[0]
    assert "weights are worth fewer than 200 decisions" in " ".join(greedy.notes())
    assert "decisions: it differs" not in " ".join(mixed.notes())


def test_a_policy_that_shows_what_could_not_be_shown_is_doubted(front, store):
    """The log's server did not know the items that the weights that are judged like best."""
    policy = Policy.from_weights(store.load(publish(store, ITEMS)))
    best = np.argsort(policy.q(policy.encode([[]], [0]))[0, 1:])[::-1]
    few = WeightStore(f"{store.url}-few")
    known = [ITEMS[i] for i in best[4:]]
    serve(front, Policy.from_weights(few.load(publish(few, known))), 300, 1.0)
    report = front.report(policies=("weights",), weights=store.url, epsilon=0.0, slots=1)
    notes = " ".join(report.notes())
    assert "the propensities say that 0.5" in notes
    assert "the propensities, in the mean, and not 1 times" in notes
    assert "weights are worth fewer than 100 decisions" in notes


def test_rare_rewards_that_decide_are_doubted(front):
    for n in range(400):
        name = front.decide([("ab"[n % 2], 0.5)], f"user-{n}", epsilon=1.0)
        front.deed("purchase" if n in (7, 42, 300) else "search", "ab"[n % 2], name, f"user-{n}")
    report = front.report()
    assert report.policies[1].effective == [400]
    assert "uniform: its estimates rest on 3.0 effective rewards" in " ".join(report.notes())


# --- shown ---------------------------------------------------------------------------------------------------


def test_the_command_tells_people_and_programs_the_same(capsys, front, store, tmp_path):
    policy = Policy.from_weights(store.load(publish(store, ITEMS)))
    serve(front, policy, 60, 0.3)
    front.producer.flush()
    flags = ("--log", front.log.url, "--weights", store.url, "--rewards", "select_item=1")
    status, text, _ = told(capsys, *flags)
    assert status == 0
    assert "60 decisions of about 23 users" in text
    for word in ("logging", "uniform", "popularity ε=0.05", "weights:1 ε=0.05", "SNIPS", "SNDR", "switch-DR"):
        assert word in text
    status, written, _ = told(capsys, *flags, "--json")
    whole = json.loads(written)
    assert [p["name"] for p in whole["policies"]] == ["logging", "uniform", "popularity", "weights:1"]
    ips = whole["policies"][3]["estimates"]["IPS"]
    assert f"{ips['value']:.4f}  {ips['low']:.4f} to {ips['high']:.4f}" in text
    assert whole["policies"][3]["gains"]["IPS"]["value"] == pytest.approx(ips["value"] - 1 / 3)


def test_what_went_wrong_is_one_line_and_status_1(capsys, front):
    assert told(capsys, "--log", front.log.url, "--policies", "uniform")[0] == 1
    front.decide([("a", 1.0)], epsilon=0.0)
    front.producer.flush()
    status, out, err = told(capsys, "--log", front.log.url, "--policies", "uniform")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("learner evaluate: none of 1 decisions was explored")
    status, _, err = told(capsys, "--log", front.log.url, "--topic", "nothing")
    assert status == 1
    assert "nothing" in err


def test_a_log_whose_end_does_not_come_is_no_estimate(front):
    two_items(front)
    front.producer.flush()
    config = EvaluateConfig(topic=front.topic, policies=("logging",))
    assert evaluate(Stalling(front.log, 6), front.codec, config, JOIN).decisions == 4
    with pytest.raises(
        LogUnavailable, match=r"the end of topic 'events' could not be read: nothing came in 60 s"
    ):
        evaluate(Stalling(front.log, 3), front.codec, config, JOIN)


def test_numbers_that_are_none_are_null_in_json(front):
    two_items(front)
    whole = as_json(front.report(policies=("popularity",), epsilon=0.0))
    text = json.dumps(whole, allow_nan=False)
    assert "Infinity" not in text
    one_user = as_json(front.report(since=START_MS + 5500))
    assert one_user["policies"][0]["estimates"]["mean"]["low"] is None


# --- a whole log ---------------------------------------------------------------------------------------------


def test_a_shops_log_of_random_slates_is_judged_right(shop):
    """Uniform slates: `uniform` is what logged, to the last digit, in DR too, whose model is fitted to nothing else."""
    log = open_log(shop)
    config = EvaluateConfig(policies=("logging", "uniform", "popularity"))
    report = evaluate(log, Codec(), config, JoinSettings())
    log.close()
    earned = estimates(report, "logging")["mean"]
    found = estimates(report, "uniform")
    assert report.decisions >= 500
    assert [found[m] for m in ("IPS", "SNIPS", "DR", "SNDR")] == pytest.approx([earned] * 4, abs=0.02)
    assert found["IPS"] == pytest.approx(earned, abs=1e-6)
    (_, uniform, popularity) = report.policies
    assert uniform.estimates["DR"].half < uniform.estimates["IPS"].half
    assert popularity.effective[0] < 60


def test_the_slate_is_joined_as_the_flags_say(shop):
    log = open_log(shop)
    config = EvaluateConfig(policies=("logging",))
    earned = [
        estimates(
            evaluate(log, Codec(), config, replace(JoinSettings(), rewards=RewardTable.parse(table))),
            "logging",
        )
        for table in ("select_item=1", "select_item=2", "begin_checkout=1")
    ]
    log.close()
    assert earned[1]["mean"] == pytest.approx(2 * earned[0]["mean"])
    assert earned[0]["mean"] > 0.02
    assert earned[2]["mean"] == 0.0


def test_what_is_written_meanwhile_waits_for_the_next_time(front):
    two_items(front)
    front.producer.flush()
    bounds = front.log.bounds("events")
    front.decide([("a", 0.75)], "eve")
    front.producer.flush()
    batches = list(read(front.log, "events", bounds, front.log.identity("events")))
    assert sum(map(len, batches)) == 6


def test_batches_grow_so_that_the_model_has_soon_seen_something(front, monkeypatch):
    monkeypatch.setattr("learner.evaluate.FIRST_RECORDS", 8)
    monkeypatch.setattr("learner.evaluate.POLL_RECORDS", 32)
    for n in range(80):
        front.decide([("a", 0.5)], f"user-{n}")
    front.producer.flush()
    batches = read(front.log, "events", front.log.bounds("events"), front.log.identity("events"))
    assert list(map(len, batches)) == [8, 16, 32, 24]


class Forgetful:
    """A log whose beginning retention takes while it is read for the second time."""

    def __init__(self, log, times):
        self._log, self._times, self.readers = log, times, 0

    def __getattr__(self, name):
        return getattr(self._log, name)

    def reader(self, topic, *rest, **more):
        self.readers += topic == "events"
        if self.readers % 2 == 0 and self.readers <= 2 * self._times:
            raise OffsetOutOfRange("offset 0 is gone")
        return self._log.reader(topic, *rest, **more)


def test_where_retention_takes_the_beginning_between_the_readings_it_begins_again(front):
    two_items(front)
    front.producer.flush()
    config = EvaluateConfig(policies=("logging",))
    log = Forgetful(front.log, 1)
    assert evaluate(log, front.codec, config, JOIN).decisions == 4
    assert log.readers == 4
    with pytest.raises(OffsetOutOfRange):
        evaluate(Forgetful(front.log, TRIES), front.codec, config, JOIN)


def test_memory_does_not_grow_with_the_decisions(tmp_path, monkeypatch):
    """But for a bit a record and 16 bytes for what earned something, which are far below what a batch takes."""
    monkeypatch.setattr("learner.evaluate.POLL_RECORDS", 64)
    join = replace(JOIN, attribution_window_s=600, dedup_window_s=300, session_gap_s=300, user_ttl_s=900)

    def peak(decisions: int) -> int:
        front = Storefront(f"sqlite:///{tmp_path / f'{decisions}.db'}")
        for n in range(decisions):
            made = front.decide([("abc"[n % 3], 1 / 3)], f"user-{n % 20}", epsilon=1.0, at_s=20 * n)
            front.deed("select_item", "abc"[n % 3], made, f"user-{n % 20}", at_s=20 * n + 1)
        front.producer.flush()
        tracemalloc.start()
        report = evaluate(front.log, front.codec, EvaluateConfig(policies=("logging", "popularity")), join)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        front.close()
        assert report.decisions == decisions
        return most

    peak(200)  # what is made once
    assert peak(4000) < 1.1 * peak(500)
