"""What the joiner promises, one promise at a time. Times are seconds after START_MS; offsets count records from 0."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming import join_tables
from streaming.columns import Reason
from streaming.join_settings import BORNE_OUT, JUMP, STEPS_PER_USER, WAITS_PER_USER
from streaming.joiner import Joiner, JoinerError, JoinSettings
from streaming.plain_joiner import PlainJoiner
from streaming.rewards import CODES, RewardTable
from tests.joins import DEEP, Learner, output, states
from tests.rows import Row, bad, columns, decision, event, logged, ms
from tests.test_joiner_reference import Stream

HOUR, DAY = 3600, 86_400
MINUTE_WAIT = JoinSettings(overtake_wait_s=60, watermark_delay_s=0)
PROMPT = JoinSettings(watermark_delay_s=0)  # the watermark is the newest record's time


def pressed(at: float, count: int = 1, user: str = "zoe") -> list[Row]:
    """Somebody else's records, which do nothing but let time pass."""
    return [event("search", at=at, user=user) for _ in range(count)]


# --- one decision, one transition for each slot ------------------------------------------------------------


def test_a_decision_gives_one_transition_for_each_slot_once_the_next_one_comes():
    learner = Learner().push(decision("r1", 7, 8, 9, at=0))
    assert not learner.transitions
    learner.push(decision("r2", 5, at=10))
    given = list(learner.transitions.values())
    assert [(t.offset, t.slot, t.action) for t in given] == [(0, 0, 7), (0, 1, 8), (0, 2, 9)]
    assert [t.reward for t in given] == [0, 0, 0]
    assert {learner.discount(0), learner.next_offset(0)} == {0.9, 1}


def test_slots_of_a_step_share_one_state_and_one_next_state():
    joined = Joiner(partitions=[0]).push(
        columns(logged([decision("r1", 7, 8, at=0), decision("r2", 5, at=10)]))
    )
    assert len(joined.states.offset) == 2
    assert joined.transitions.state.tolist() == [0, 0]
    assert joined.transitions.next_state.tolist() == [1, 1]


def test_a_transition_carries_what_the_behaviour_policy_did():
    learner = Learner().push(decision("r1", 7, at=0, policy_version=42), decision("r2", 5, at=10))
    t = learner.transitions[0, 0, 0]
    assert (t.propensity, t.policy_version, t.organic) == (0.5, 42, False)


def test_the_state_is_the_history_that_was_served_newest_first():
    seen = [(1, "view_item", -30), (2, "add_to_cart", -20)]
    learner = Learner().push(
        decision("r1", 7, at=0, history=seen), decision("r2", 5, at=10, history=[(7, "search", 1)])
    )
    t = learner.transitions[0, 0, 0]
    assert t.state.timestamp_ms == ms(0)
    assert t.state.rows == ((2, CODES["add_to_cart"], 20.0, 0.0), (1, CODES["view_item"], 30.0, 0.0))
    assert t.next_state.rows == ((7, CODES["search"], 9.0, 0.0),)


def test_only_the_newest_entries_of_a_long_history_count():
    seen = [(item, "view_item", item) for item in range(1, 6)]
    learner = Learner(JoinSettings(history_length=2))
    learner.push(decision("r1", 7, at=10, history=seen), decision("r2", 5, at=20))
    assert [row[0] for row in learner.transitions[0, 0, 0].state.rows] == [5, 4]


def test_users_do_not_complete_each_others_steps():
    learner = Learner().push(decision("r1", 7, at=0, user="ann"), decision("r2", 8, at=1, user="bob"))
    assert not learner.transitions
    learner.push(decision("r3", 9, at=2, user="ann"))
    assert learner.offsets() == [0]
    assert learner.next_offset(0) == 2


def test_partitions_do_not_touch_even_for_one_user():
    learner = Learner(partitions=[0, 1])
    learner.push(decision("r1", 7, at=0, partition=0), decision("r2", 8, at=1, partition=1))
    learner.push(
        event("purchase", 7, at=2, partition=1, recommendation="r1"), decision("r3", 7, at=3, partition=0)
    )
    assert learner.offsets(0) == [0]
    assert learner.reward(0) == 0
    assert learner.offsets(1) == []


def test_bad_rows_are_stepped_over():
    learner = Learner().push(decision("r1", 7, at=0), bad(), decision("r2", 8, at=1), bad())
    assert learner.offsets() == [0]
    assert (learner.next_offset(0), learner.count("bad")) == (2, 2)


# --- rewards, in time and later ----------------------------------------------------------------------------


def test_a_reward_that_comes_in_time_is_in_the_transition():
    learner = Learner().push(
        decision("r1", 7, 8, at=0),
        event("select_item", 8, at=5, recommendation="r1"),
        decision("r2", 5, at=10),
    )
    assert learner.reward_of(0) == [0, 1]
    assert learner.amended == 0


def test_a_later_reward_amends_the_transition_in_place():
    learner = Learner().push(decision("r1", 7, 8, at=0), decision("r2", 5, at=10))
    assert learner.reward_of(0) == [0, 0]
    learner.push(event("purchase", 8, at=20, recommendation="r1"))
    assert learner.reward_of(0) == [0, 10]
    assert (learner.amended, learner.count("transitions")) == (1, 2)


def test_rewards_add_up():
    learner = Learner().push(
        decision("r1", 7, at=0), event("select_item", 7, at=1), event("add_to_cart", 7, at=2)
    )
    learner.push(decision("r2", 5, at=10), event("purchase", 7, at=20))
    assert learner.reward(0) == 1 + 2 + 10


def test_an_event_amends_once_however_often_it_is_sent():
    bought = event("purchase", 7, at=20, id="order1")
    learner = Learner().push(decision("r1", 7, at=0), decision("r2", 5, at=10), bought, bought).push(bought)
    assert learner.restarted().push(bought).reward(0) == 10
    assert (learner.amended, learner.count("duplicates")) == (1, 3)


def test_a_purchase_tomorrow_still_counts():
    learner = Learner().push(decision("r1", 7, at=0)).advance(ms(23 * HOUR))
    assert learner.reward(0) == 0
    assert learner.push(event("purchase", 7, at=23 * HOUR, recommendation="r1")).reward(0) == 10


def test_a_purchase_after_the_window_does_not_count():
    learner = Learner(JoinSettings(overtake_wait_s=0)).push(decision("r1", 7, at=0)).advance(ms(25 * HOUR))
    learner.push(event("purchase", 7, at=25 * HOUR, recommendation="r1")).advance(ms(25 * HOUR + 10))
    assert learner.reward(0) == 0


def test_each_item_of_an_event_finds_its_own_cause():
    learner = Learner().push(
        decision("r1", 7, 8, at=0),
        decision("r2", 9, at=10),
        event("purchase", 8, 9, at=20),
        decision("r3", 5, at=30),
    )
    assert learner.reward_of(0) == [0, 10]
    assert learner.reward_of(1) == [10]


def test_an_item_bought_twice_in_one_event_counts_twice():
    learner = Learner().push(decision("r1", 7, at=0), event("purchase", 7, 7, at=5), decision("r2", 5, at=10))
    assert learner.reward(0) == 20


def test_the_reward_table_weighs_price_times_quantity():
    learner = Learner(JoinSettings(rewards=RewardTable.parse("purchase=10+0.1*value")))
    learner.push(decision("r1", 7, at=0), event("purchase", (7, 3, 20.0), at=5), decision("r2", 5, at=10))
    assert learner.reward(0) == 10 + 0.1 * 60


def test_the_value_of_an_event_is_shared_among_items_without_a_price():
    learner = Learner(JoinSettings(rewards=RewardTable.parse("purchase=0+1*value")))
    bought = event("purchase", 7, (8, 1, 5.0), at=5, value=30.0)
    learner.push(decision("r1", 7, 8, at=0), bought, decision("r2", 5, at=10))
    assert learner.reward_of(0) == [15, 5]


def test_names_outside_the_table_earn_nothing():
    learner = Learner().push(
        decision("r1", 7, at=0), event("begin_checkout", 7, at=5), decision("r2", 5, at=10)
    )
    assert learner.reward(0) == 0


def test_events_may_be_about_no_item():
    learner = Learner().push(
        decision("r1", 7, at=0), event("purchase", at=5, value=9), decision("r2", 5, at=10)
    )
    assert learner.reward(0) == 0
    assert learner.count("events") == 1


# --- attribution -------------------------------------------------------------------------------------------


def test_without_an_id_the_newest_decision_that_showed_the_item_is_the_cause():
    learner = Learner().push(
        decision("r1", 7, at=0), decision("r2", 7, at=10), decision("r3", 9, at=20), event("purchase", 7, at=30),
        decision("r4", 5, at=40),
    )  # fmt: skip
    assert [learner.reward(offset) for offset in (0, 1, 2)] == [0, 10, 0]


def test_with_an_id_that_decision_is_the_cause_though_a_newer_one_showed_the_item():
    learner = Learner().push(decision("r1", 7, at=0), decision("r2", 7, at=10))
    learner.push(event("purchase", 7, at=30, recommendation="r1"), decision("r3", 5, at=40))
    assert [learner.reward(offset) for offset in (0, 1)] == [10, 0]
    assert (learner.count("attributed_by_id"), learner.count("attributed_by_item")) == (1, 0)


def test_an_item_that_the_named_decision_did_not_show_is_attributed_by_item():
    learner = Learner().push(decision("r1", 7, at=0), decision("r2", 8, at=10))
    learner.push(event("purchase", 7, 8, at=30, recommendation="r2"), decision("r3", 5, at=40))
    assert [learner.reward(offset) for offset in (0, 1)] == [10, 10]


def test_a_decision_cannot_cause_what_came_before_it():
    learner = Learner().push(
        decision("r1", 7, at=10), event("add_to_cart", 7, at=5), decision("r2", 5, at=20)
    )
    assert learner.reward(0) == 0


def test_unless_the_event_names_it_since_clocks_differ():
    learner = Learner().push(decision("r1", 7, at=10), event("add_to_cart", 7, at=5, recommendation="r1"))
    assert learner.push(decision("r2", 5, at=20)).reward(0) == 2


def test_another_users_decision_is_no_cause():
    learner = Learner().push(decision("r1", 7, at=0, user="ann"))
    learner.push(
        event("purchase", 7, at=5, user="bob", recommendation="r1"), decision("r2", 5, at=10, user="ann")
    )
    assert learner.reward(0) == 0


def test_item_0_is_nobodys_item():
    learner = Learner().push(decision("r1", 0, 7, at=0), event("purchase", 0, at=5, recommendation="r1"))
    assert learner.push(decision("r2", 5, at=10)).reward_of(0) == [0, 0]
    assert learner.count("unattributed") == 1


# --- taking back -------------------------------------------------------------------------------------------


def test_a_refund_takes_back_what_its_purchase_gave():
    learner = Learner().push(decision("r1", 7, at=0), event("purchase", 7, at=5), decision("r2", 7, at=10))
    assert learner.reward(0) == 10
    assert learner.push(event("refund", 7, at=20)).reward(0) == 0


def test_a_refund_goes_to_the_decision_that_sold_though_a_newer_one_showed_the_item():
    learner = Learner().push(decision("r1", 7, at=0), event("purchase", 7, at=5), decision("r2", 7, at=10))
    learner.push(event("refund", 7, at=20), decision("r3", 5, at=30))
    assert [learner.reward(offset) for offset in (0, 2)] == [0, 0]


def test_a_second_refund_of_one_purchase_takes_nothing():
    learner = Learner().push(decision("r1", 7, at=0), event("purchase", 7, at=5), decision("r2", 9, at=10))
    learner.push(event("refund", 7, at=20), event("refund", 7, at=21)).advance(ms(200))
    assert learner.reward(0) == 0
    assert learner.count("unattributed") == 1


def test_a_refund_that_overtakes_its_purchase_waits_for_it():
    learner = Learner().push(decision("r1", 7, at=0), event("refund", 7, at=6), event("purchase", 7, at=5))
    assert learner.push(decision("r2", 5, at=10)).reward(0) == 0
    assert learner.count("overtaken") == 1


def test_taking_out_of_the_cart_takes_back_putting_in():
    learner = Learner().push(
        decision("r1", 7, at=0), event("add_to_cart", 7, at=5), event("remove_from_cart", 7, at=6)
    )
    assert learner.push(decision("r2", 5, at=10)).reward(0) == 0


def test_taking_out_what_was_never_put_in_costs_nothing():
    learner = Learner().push(
        decision("r1", 7, at=0), event("remove_from_cart", 7, at=6), decision("r2", 5, at=10)
    )
    assert learner.advance(ms(200)).reward(0) == 0


# --- events that overtake their decision -------------------------------------------------------------------


def test_an_event_that_overtakes_its_decision_waits_for_it():
    learner = Learner().push(event("select_item", 7, at=6, recommendation="r1"))
    assert learner.push(decision("r1", 7, at=5), decision("r2", 5, at=10)).reward(0 + 1) == 1
    assert learner.organic() == []
    assert (learner.count("overtaken"), learner.count("attributed_by_id")) == (1, 1)


def test_it_waits_no_longer_than_the_bound_and_is_then_organic():
    learner = Learner(MINUTE_WAIT).push(event("select_item", 7, at=0, recommendation="r1"), *pressed(at=60))
    assert learner.count("organic_steps") == 0
    learner.push(*pressed(at=61))
    assert (learner.count("organic_steps"), learner.count("waits_expired")) == (1, 1)
    assert learner.advance(ms(HOUR)).organic() == [0]
    assert learner.reward(0) == 1


def test_a_decision_later_than_that_takes_over_the_reward():
    learner = Learner(MINUTE_WAIT).push(event("select_item", 7, at=10, recommendation="r1"), *pressed(at=71))
    assert learner.count("organic_steps") == 1
    learner.push(decision("r1", 7, at=5), decision("r2", 9, at=80))
    assert learner.reward(0) == 0  # the organic step stays, with nothing left
    assert learner.reward(2) == 1
    assert learner.count("rewards_moved") == 1


def test_an_event_that_waited_in_vain_slips_in_where_it_came():
    learner = Learner(MINUTE_WAIT).push(
        event("view_item", 7, at=0, recommendation="lost"), event("view_item", 8, at=5)
    )
    learner.push(*pressed(at=61), event("view_item", 9, at=62))
    assert learner.next_offset(0) == 1  # not the state of its late completion
    assert learner.transitions[0, 0, 0].state.rows == ()


def test_only_so_many_items_of_a_user_wait():
    learner = Learner()
    for n in range(WAITS_PER_USER + 1):
        learner.push(event("add_to_cart", 7, at=n / 100, recommendation="lost"))
    assert learner.count("waits_refused") == 1
    assert learner.count("organic_steps") == 1  # it was taken for what it looked like


def test_nobody_waits_if_none_may():
    learner = Learner(JoinSettings(max_waits=0)).push(event("add_to_cart", 7, at=0, recommendation="r1"))
    assert (learner.count("waits_refused"), learner.count("organic_steps")) == (1, 1)


# --- with no recommender in place --------------------------------------------------------------------------


def test_browsing_gives_organic_transitions():
    learner = Learner().push(
        event("view_item", 7, at=0), event("view_item", 8, at=10), event("view_item", 9, at=20)
    )
    assert learner.organic() == learner.offsets() == [0, 1]
    t = learner.transitions[0, 1, 0]
    assert (t.action, t.organic, t.policy_version) == (8, True, -1)
    assert math.isnan(t.propensity)
    assert t.state.rows == ((7, CODES["view_item"], 10.0, 0.0),)
    assert [row[0] for row in t.next_state.rows] == [8, 7]
    assert (learner.reward(1), learner.discount(1)) == (0.1, 0.9)


def test_what_a_user_went_to_unaided_earns_what_follows():
    learner = Learner().push(
        event("view_item", 7, at=0), event("add_to_cart", 7, at=5), event("view_item", 8, at=10)
    )
    assert learner.reward(0) == 2.1
    assert learner.push(event("purchase", 7, at=20)).reward(0) == 12.1


def test_an_item_bought_out_of_the_blue_is_an_organic_step_too():
    learner = Learner().push(event("purchase", 7, 8, at=0), event("view_item", 9, at=10))
    assert [learner.transitions[0, 0, slot].action for slot in (0, 1)] == [7, 8]
    assert learner.reward_of(0) == [10, 10]


def test_a_move_that_a_decision_explains_is_not_organic():
    learner = Learner().push(decision("r1", 7, at=0), event("view_item", 7, at=5), decision("r2", 5, at=10))
    assert learner.organic() == []
    assert learner.reward(0) == 0.1


def test_going_astray_leaves_the_decision_open():
    learner = Learner().push(decision("r1", 7, at=0), event("view_item", 8, at=5))
    assert learner.offsets() == []
    learner.push(event("select_item", 7, at=8), decision("r2", 5, at=10))
    assert learner.offsets() == [0, 1]
    assert (learner.reward(0), learner.next_offset(0), learner.next_offset(1)) == (1, 3, 3)


# --- sessions ----------------------------------------------------------------------------------------------


def test_a_session_ends_after_30_minutes_of_inactivity():
    learner = Learner().push(decision("r1", 7, at=0)).advance(ms(1800))
    assert learner.offsets() == []
    learner.advance(ms(1801))
    assert (learner.discount(0), learner.next_offset(0)) == (0, None)
    assert learner.count("sessions_ended") == 1


def test_activity_keeps_it_going():
    learner = Learner().push(decision("r1", 7, at=0), event("search", at=1000)).advance(ms(2800))
    assert learner.offsets() == []
    assert learner.advance(ms(2801)).offsets() == [0]


def test_a_record_after_the_gap_opens_a_new_session():
    learner = Learner().push(decision("r1", 7, at=0), decision("r2", 7, at=1801))
    assert (learner.discount(0), learner.next_offset(0)) == (0, None)


def test_a_record_just_within_the_gap_does_not():
    learner = Learner().push(decision("r1", 7, at=0), decision("r2", 7, at=1800))
    assert (learner.discount(0), learner.next_offset(0)) == (0.9, 1)


def test_other_users_records_let_the_session_end():
    learner = Learner(PROMPT).push(decision("r1", 7, at=0), *pressed(at=1801))
    assert learner.discount(0) == 0


def test_a_reward_after_the_sessions_end_still_amends():
    learner = Learner().push(decision("r1", 7, at=0)).advance(ms(2 * HOUR))
    assert learner.push(event("purchase", 7, at=2 * HOUR)).reward(0) == 10


def test_with_the_users_horizon_visits_are_chained():
    learner = Learner(JoinSettings(horizon="user")).push(decision("r1", 7, at=0)).advance(ms(5 * HOUR))
    assert learner.offsets() == []
    learner.push(decision("r2", 7, at=5 * HOUR))
    assert (learner.discount(0), learner.next_offset(0)) == (0.9, 1)


def test_a_visit_that_is_uploaded_hours_later_is_one_visit():
    learner = Learner().push(*pressed(at=0)).advance(ms(5 * HOUR))
    learner.push(decision("r1", 7, at=10), event("select_item", 7, at=20), decision("r2", 5, at=30))
    assert (learner.next_offset(1), learner.reward(1)) == (3, 1)


# --- event time --------------------------------------------------------------------------------------------


def test_rows_older_than_the_limit_are_given_back():
    learner = Learner(JoinSettings(late_after_s=100)).push(*pressed(at=1000), decision("r1", 7, at=894))
    assert learner.late == [(0, 1)]  # the watermark is at 995
    assert learner.push(decision("r2", 7, at=895)).late == [(0, 1)]
    assert (learner.count("late"), learner.count("decisions")) == (1, 1)


def test_a_late_row_says_why():
    rows = logged([*pressed(at=1000), bad(), event("search", at=0)])
    late = Joiner(JoinSettings(late_after_s=100), [0]).push(columns(rows)).late
    assert (late.row.tolist(), late.reason.tolist()) == ([2], [Reason.LATE])


def test_the_watermark_stays_behind_the_newest_record():
    learner = Learner()
    assert learner.joiner.watermark_ms(0) is None
    learner.push(*pressed(at=100), *pressed(at=50))
    assert learner.joiner.watermark_ms(0) == ms(95)


def test_a_future_stamped_row_cannot_move_the_clock():
    learner = Learner().push(
        decision("r1", 7, at=0), event("select_item", 7, at=300 * DAY), decision("r2", 5, at=10)
    )
    assert learner.joiner.watermark_ms(0) == ms(5)
    assert (learner.discount(0), learner.next_offset(0)) == (0.9, 2)
    assert (learner.count("future_stamped"), learner.count("late")) == (1, 0)


def test_one_users_broken_clock_cannot_however_long_it_runs():
    learner = Learner().push(*pressed(at=0), *pressed(at=300 * DAY, count=100, user="mallory"))
    assert learner.joiner.watermark_ms(0) == ms(-5)


def test_but_when_all_records_agree_the_time_has_come():
    learner = Learner().push(*pressed(at=0), *pressed(at=5 * DAY, count=JUMP - 1))
    assert learner.joiner.watermark_ms(0) == ms(-5)
    learner.push(*pressed(at=5 * DAY + 1, user="bob"))
    assert learner.joiner.watermark_ms(0) == ms(5 * DAY - 5)
    assert learner.count("clock_jumps") == 1


def test_a_wild_first_clock_is_undone():
    learner = Learner().push(*pressed(at=300 * DAY))
    for n in range(JUMP):
        learner.push(event("search", at=n, user=f"user{n}"))
    assert learner.joiner.watermark_ms(0) == ms(JUMP - 1 - 5)
    assert (learner.count("clock_resets"), learner.count("late")) == (1, JUMP - 1)


def forged(days: float, count: int = 40) -> list[Row]:
    """A run of two users' records, stamped so far ahead that the clock jumps."""
    return [event("search", at=days * DAY + n, user=f"mallory{n % 2}") for n in range(count)]


def crowd(at: float, count: int = 50) -> list[Row]:
    """Records of many users, a second apart."""
    return [event("search", at=at + n, user=f"user{n}") for n in range(count)]


def ahead_by_steps() -> list[Row]:
    """One user's, two days in steps that are each believed."""
    return [event("search", at=at, user="mallory") for at in range(3000, 2 * DAY + 1, 50 * 60 - 120)] + [
        event("search", at=2 * DAY, user="mallory")
    ]


@pytest.mark.parametrize("days", [0.5, 300])
def test_a_jump_is_undone_where_all_records_say_so_however_long_it_was_believed(days):
    learner = Learner().push(*pressed(at=0, count=50), *forged(days))
    assert learner.joiner.watermark_ms(0) == ms(days * DAY + 39 - 5)
    for n in range(JUMP):
        learner.push(event("search", at=100 + n, user=f"user{n}"))
    assert learner.joiner.watermark_ms(0) == ms(100 + JUMP - 1 - 5)
    # less than a day ahead nothing was late even then
    assert (learner.count("clock_resets"), learner.count("late")) == (1, JUMP - 1 if days > 1 else 0)
    learner.push(decision("r1", 7, at=200), event("select_item", 7, at=201, recommendation="r1"))
    learner.push(decision("r2", 7, at=210))
    assert learner.transitions[next(iter(learner.transitions))].reward == 1


def test_a_clock_may_jump_twice_and_be_put_back_at_once():
    learner = Learner().push(*pressed(at=0, count=50), *forged(300), *forged(600))
    assert learner.count("clock_jumps") == 2
    learner.push(*(event("search", at=100 + n, user=f"user{n}") for n in range(JUMP)))
    assert learner.joiner.watermark_ms(0) == ms(100 + JUMP - 1 - 5)


def test_one_user_cannot_undo_a_jump_nor_can_records_between_which_some_agree_with_it():
    learner = Learner().push(*pressed(at=0, count=50), *forged(300))
    learner.push(*(event("search", at=100 + n, user="bob") for n in range(3 * JUMP)))
    for n in range(3 * JUMP):
        if n % (JUMP - 1) == 0:
            learner.push(event("search", at=300 * DAY + 50 + n, user="zoe"))
        learner.push(event("search", at=100 + n, user=f"user{n}"))
    assert learner.count("clock_resets") == 0


@pytest.mark.parametrize("at", [-2 * DAY, 100])  # late even before it jumped; or so long after that
def test_a_jump_stands_whatever_stragglers_say_that_were_late_anyway(at):
    learner = Learner().push(*pressed(at=0, count=50), *forged(300))
    if at > 0:
        for hour in range(28):
            learner.push(event("search", at=300 * DAY + hour * HOUR, user="zoe"))
    learner.push(*(event("search", at=at + n, user=f"user{n}") for n in range(3 * JUMP)))
    assert (learner.count("clock_resets"), learner.count("late")) == (0, 3 * JUMP)


def test_one_user_who_takes_the_clock_on_by_small_steps_is_put_back_too():
    learner = Learner().push(*crowd(0), *ahead_by_steps())
    assert learner.joiner.watermark_ms(0) == ms(2 * DAY - 5)  # each step for itself is nothing unusual
    learner.push(*crowd(100, count=JUMP), decision("r1", 7, at=200), decision("r2", 7, at=210))
    assert learner.joiner.watermark_ms(0) == ms(210 - 5)
    assert (learner.count("clock_resets"), learner.count("late")) == (1, JUMP - 1)


def test_nor_does_it_help_to_go_on_between_the_others():
    steps = ahead_by_steps()
    pairs = zip(steps, crowd(0, count=len(steps)), strict=True)
    learner = Learner().push(*crowd(0), *(row for pair in pairs for row in pair))
    assert learner.count("clock_resets") >= 1
    learner.push(*crowd(100, count=JUMP))
    assert learner.joiner.watermark_ms(0) == ms(100 + JUMP - 1 - 5)


def test_where_somebody_else_is_as_far_it_stands():
    learner = Learner().push(*crowd(0), *ahead_by_steps(), event("search", at=2 * DAY - 60, user="bob"))
    learner.push(*crowd(100, count=3 * JUMP))
    assert (learner.count("clock_resets"), learner.joiner.watermark_ms(0)) == (0, ms(2 * DAY - 5))


def test_who_is_alone_takes_the_clock_along_for_days():
    learner = Learner(PROMPT).push(
        *pressed(at=0), *ahead_by_steps(), decision("r1", 7, at=2 * DAY, user="mallory")
    )
    learner.push(*(event("search", at=2 * DAY + n * 600, user="mallory") for n in range(4)))
    assert learner.push(event("search", at=3 * DAY - 1, user="mallory")).joiner.watermark_ms(0) == ms(
        2 * DAY + 1800
    )
    assert (learner.count("late"), learner.count("future_stamped")) == (0, 1)


def stamped(rows: Sequence[Row], log_s: float | None = None) -> list[Row]:
    """The rows as a log took them in: at `log_s`, or, None, when they say themselves."""
    return [replace(row, logged_ms=row.timestamp_ms if log_s is None else ms(log_s)) for row in rows]


def visits_after_a_quiet_night() -> list[Row]:
    """One look in the evening, and in the morning two visits of a dozen, a minute from look to look."""
    looks = [
        event("view_item", 7, at=8 * HOUR + 60 * n + i, user=f"user{i}") for n in range(12) for i in range(2)
    ]
    return [event("view_item", 7, at=0), *looks, event("search", at=9 * HOUR)]


def ends(learner: Learner) -> list[int]:
    """Offsets of the steps that nothing follows."""
    return sorted(offset for (_, offset, _), slot in learner.transitions.items() if slot.discount == 0)


@pytest.mark.parametrize("log_s", [None, 300 * DAY])  # a live shop's log; a history that was imported later
def test_after_a_quiet_night_visits_are_whole_where_the_log_bears_it_out(log_s):
    learner = Learner().push(*stamped(visits_after_a_quiet_night(), log_s))
    assert ends(learner) == [0, 23, 24]
    assert (learner.count("clock_gaps"), learner.count("future_stamped"), learner.count("clock_jumps")) == (
        1,
        0,
        0,
    )
    # without the log's word sixteen records have to agree first, and end both visits when they do
    learner = Learner().push(*visits_after_a_quiet_night())
    assert ends(learner) != [0, 23, 24]


def test_a_record_ahead_of_the_logs_own_time_cannot_move_the_clock():
    learner = Learner().push(*stamped(crowd(0)), *stamped(forged(8 / 24, count=JUMP - 1), 60))
    assert learner.joiner.watermark_ms(0) == ms(49 - 5)
    assert (learner.count("clock_gaps"), learner.count("future_stamped")) == (0, JUMP - 1)


def test_where_the_logs_time_is_as_wrong_the_next_record_puts_the_clock_back():
    learner = Learner().push(*stamped(crowd(0)), decision("r1", 7, at=50))
    learner.push(*stamped(forged(300, count=1)))
    assert (learner.count("clock_gaps"), learner.joiner.watermark_ms(0)) == (1, ms(300 * DAY - 5))
    learner.push(*stamped(crowd(51, count=1)))
    assert (learner.count("clock_resets"), learner.count("late")) == (1, 0)
    assert learner.joiner.watermark_ms(0) == ms(51 - 5)
    for times in (1, 2):  # then the log's time is not believed for a while, for longer each time
        for _ in range(64 * times // 2 - 1):
            learner.push(*stamped([*forged(300, count=1), *crowd(52, count=1)]))
        assert learner.count("clock_gaps") == times
        learner.push(*stamped([*crowd(52, count=2), *forged(300, count=1), *crowd(52, count=1)]))
        assert (learner.count("clock_gaps"), learner.count("clock_resets")) == (times + 1, times + 1)
    assert learner.count("late") == 0


def test_but_not_who_took_it_there_nor_one_straggler_once_many_have_come():
    learner = Learner().push(*stamped([*crowd(0), *pressed(at=300 * DAY, user="bob")]))
    learner.push(*stamped(pressed(at=100, count=JUMP, user="bob")))
    assert learner.count("clock_resets") == 0
    learner.push(*stamped([*crowd(300 * DAY, count=JUMP), event("search", at=101, user="zoe")]))
    assert (learner.count("clock_resets"), learner.count("late")) == (0, JUMP + 1)
    # a run of many still does
    learner.push(*stamped(crowd(102, count=JUMP)))
    assert learner.count("clock_resets") == 1


def test_a_jump_that_many_bear_out_is_beyond_doubt_and_one_between_which_some_do_not_is_not():
    for disputed in (False, True):
        learner = Learner().push(*stamped([*crowd(0), *crowd(2 * DAY, count=BORNE_OUT // 2)]))
        assert learner.joiner.may_be_put_back(0)
        learner.push(*stamped([event("search", at=60, user="zoe")] * disputed))
        learner.push(*stamped(crowd(2 * DAY + 200, count=BORNE_OUT // 2)))
        assert learner.joiner.may_be_put_back(0) == disputed


def test_a_jump_from_outside_is_undone_likewise():
    learner = Learner().push(*crowd(0)).advance(ms(300 * DAY))
    assert learner.joiner.watermark_ms(0) == ms(300 * DAY)
    learner.push(*crowd(100, count=JUMP))
    assert learner.joiner.watermark_ms(0) == ms(100 + JUMP - 1 - 5)


def test_a_jump_that_is_put_back_has_forgotten_no_id():
    learner = Learner().push(
        decision("r1", 7, at=0), event("purchase", 7, at=1, id="once"), decision("r2", 7, at=2)
    )
    learner.push(*crowd(3), *forged(300), *forged(600), *crowd(100, count=JUMP))
    assert learner.count("clock_resets") == 1
    learner.push(event("purchase", 7, at=1, id="once"), decision("r1", 7, at=0))
    assert (learner.reward(0), learner.count("duplicates")) == (10, 2)


def test_who_leads_past_midnight_and_is_put_back_has_forgotten_no_id():
    midnight = DAY - ms(0) // 1000 % DAY
    learner = Learner().push(*crowd(midnight - 5000), decision("r1", 7, at=midnight - 3000))
    learner.push(event("purchase", 7, at=midnight - 2999, id="once"), decision("r2", 7, at=midnight - 2998))
    learner.push(*[event("search", at=midnight + at, user="mallory") for at in range(-2900, 7200, 600)])
    learner.push(*crowd(midnight - 2000, count=JUMP))
    assert learner.count("clock_resets") == 1
    learner.push(*crowd(midnight - 30, count=60))
    learner.push(event("purchase", 7, at=midnight - 2999, id="once"))
    assert (learner.reward(50), learner.count("duplicates")) == (10, 1)
    learner.push(*[event("search", at=midnight + at, user=f"user{at % 7}") for at in range(0, 2 * DAY, 1700)])
    learner.push(
        event("search", at=midnight + 2 * DAY, user="once more", id="once")
    )  # a window later, it is anew
    assert learner.count("duplicates") == 1


def test_clocks_are_doubted_until_they_settle_and_while_they_may_be_put_back():
    learner = Learner().push(*crowd(0, count=JUMP - 1))
    assert learner.joiner.may_be_put_back(0)
    assert not learner.push(*crowd(50)).joiner.may_be_put_back(0)
    assert learner.push(*ahead_by_steps()).joiner.may_be_put_back(0)
    assert not learner.push(event("search", at=2 * DAY, user="bob")).joiner.may_be_put_back(0)
    assert learner.push(*forged(300)).joiner.may_be_put_back(0)


def test_an_idle_partition_is_advanced_from_outside_and_never_back():
    learner = Learner(partitions=[0, 1]).push(decision("r1", 7, at=0), decision("r2", 7, at=0, partition=1))
    learner.advance(ms(HOUR), partition=0)
    assert learner.offsets(0) == [0]
    assert learner.offsets(1) == []
    learner.advance(ms(10), partition=0)
    assert learner.joiner.watermark_ms(0) == ms(HOUR)


def test_event_time_may_run_faster_than_the_wall_clock():
    visits = [decision(f"r{n}", 7, at=n * HOUR / 2, user=f"user{n % 3}") for n in range(5000)]  # 104 days
    learner = Learner(PROMPT).push(*visits)
    assert len(learner.offsets()) == 5000 - 2  # 90 minutes between a user's visits: each ends before the next
    assert {learner.discount(offset) for offset in learner.offsets()} == {0}


# --- duplicates --------------------------------------------------------------------------------------------


def test_a_decision_that_comes_twice_opens_one_step():
    learner = Learner().push(decision("r1", 7, at=0), decision("r1", 7, at=0), decision("r2", 5, at=10))
    assert learner.offsets() == [0]
    assert learner.next_offset(0) == 2


def test_ids_belong_to_their_user_and_their_kind():
    learner = Learner().push(
        event("add_to_cart", 7, at=0, id="x", user="ann"), event("add_to_cart", 7, at=0, id="x", user="bob"),
        decision("x", 7, at=1, user="ann"),
    )  # fmt: skip
    assert learner.count("duplicates") == 0


def test_a_duplicate_is_no_activity():
    same = event("search", at=0, id="x")
    learner = Learner().push(decision("r1", 7, at=0), same, *pressed(at=1790), same).advance(ms(1801))
    assert learner.offsets() == [0]


def test_ids_are_known_for_the_window_at_least_and_not_for_ever():
    once = event("search", at=0, id="x")
    learner = Learner(JoinSettings(dedup_window_s=100)).push(once).advance(ms(99)).push(once)
    assert learner.count("duplicates") == 1
    learner.advance(ms(300)).push(once)
    assert learner.count("duplicates") == 1


@pytest.mark.parametrize("window_s", [DAY - 60, DAY // 2, 600, 3 * DAY])
@pytest.mark.parametrize("lacks", [(), ("dedup_ms", "others_ms", "lead_user")])  # as states of before do
def test_no_id_is_forgotten_for_a_window_of_another_length(window_s, lacks):
    learner = Learner().push(
        decision("r1", 7, at=0), event("purchase", 7, at=1, id="once"), decision("r2", 7, at=2)
    )
    learner.settings = JoinSettings(dedup_window_s=window_s)
    learner.restarted(*lacks).push(*pressed(at=60), event("purchase", 7, at=1, id="once"))
    assert (learner.reward(0), learner.count("duplicates")) == (10, 1)
    learner.push(*(event("search", at=n * 3000, user=f"u{n % 2}") for n in range(1, 180)))  # six days
    learner.push(event("purchase", 7, at=6 * DAY, id="once"))
    assert learner.count("duplicates") == 1  # as it is by now, after twice the window


@pytest.mark.parametrize(
    "now", [JoinSettings(session_gap_s=60), JoinSettings(session_gap_s=60, user_ttl_s=300)]
)
@pytest.mark.parametrize("before", [JoinSettings(horizon="user"), JoinSettings(session_gap_s=5 * HOUR)])
def test_a_visit_that_is_open_ends_by_the_gap_as_it_is_now(before, now):
    learner = Learner(before).push(*crowd(0, count=10), decision("r1", 7, at=20))
    learner.settings = now
    learner.restarted().push(*pressed(at=100))
    assert learner.discount(10) == 0


@pytest.mark.parametrize("now", [JoinSettings(max_steps=128), JoinSettings(max_slots=4096)])
def test_bounds_that_were_lowered_let_go_of_any_number_of_open_steps_at_once(now):
    before, users, slots = Joiner(JoinSettings(), [0]), 4500, 60
    rows = logged(decision(f"r{n}", *range(1, slots + 1), at=n / 100, user=f"u{n}") for n in range(users + 1))
    before.push(columns(rows[:-1]))
    joiner = Joiner(now)
    joiner.restore(0, before.state(0))
    joined = joiner.push(columns(rows[-1:]))
    gone = joiner.counters()["steps_closed_early"]
    assert gone == users + 1 - min(now.max_steps, now.max_slots // slots)
    assert joined.transitions.offset.tolist() == [n for n in range(gone) for _ in range(slots)]
    assert joined.states.offset.tolist() == list(range(gone))


@pytest.mark.parametrize(
    ("now", "at"), [(JoinSettings(session_gap_s=60), 1000), (JoinSettings(user_ttl_s=1800), 1900)]
)
def test_what_shorter_settings_make_due_is_done_once_the_clock_moves_as_the_reference_does(now, at):
    searches = [event("search", at=at + ahead, user="bob") for ahead in (0, -1, 10)]
    rows = logged([decision("r1", 7, at=0), *searches])
    before, reference = Joiner(JoinSettings(), [0]), PlainJoiner(JoinSettings(), [0])
    before.push(columns(rows[:2]))
    reference.push(rows[:2])
    joiner = Joiner(now)
    joiner.restore(0, before.state(0))
    reference.partitions[0].adopt(now)
    for row in rows[2:]:
        joiner.push(columns([row]))
        reference.push([row])
        assert joiner.counters() == reference.counters()


def test_a_clock_that_another_user_bore_out_is_not_put_back_by_one_record():
    learner = Learner(JoinSettings(max_jump_s=50, late_after_s=40))
    seen = [
        ("ann", 0),
        ("ann", 1000),
        ("ann", 1045),
        ("ann", 1095),
        ("ann", 1140),
        ("bob", 1135),
        ("cat", 1080),
    ]
    rows = [replace(event("search", at=at, user=user), logged_ms=ms(at)) for user, at in seen]
    learner.push(*rows)
    assert (learner.count("clock_gaps"), learner.count("clock_resets")) == (1, 0)
    assert learner.late == [(0, 6)]


def test_too_many_ids_cut_the_window_short_and_say_so():
    learner = Learner(JoinSettings(max_ids=10))
    learner.push(*[event("search", at=n, id=f"e{n}") for n in range(11)])
    assert learner.count("dedup_cut_short") == 1
    assert len(learner.joiner.state(0)["ids_a"]) + len(learner.joiner.state(0)["ids_b"]) == 11
    learner.push(event("search", at=20, id="e10"), event("search", at=20, id="e0"))
    assert learner.count("duplicates") == 2


# --- bounds ------------------------------------------------------------------------------------------------


def test_users_are_forgotten_by_age():
    learner = Learner(JoinSettings(user_ttl_s=2 * DAY)).push(
        decision("r1", 7, at=0), event("search", at=0, user="bob")
    )
    assert learner.advance(ms(2 * DAY)).joiner.users() == 2
    assert learner.advance(ms(2 * DAY + 1)).joiner.users() == 0
    assert learner.count("users_expired") == 2


def test_the_stalest_makes_room_for_one_user_too_many_and_its_step_ends():
    learner = Learner(JoinSettings(max_users=8))
    learner.push(*[decision(f"r{n}", 7, at=n, user=f"user{n}") for n in range(8)])
    assert (learner.joiner.users(), learner.offsets()) == (8, [])
    learner.push(decision("r8", 7, at=8, user="user8"))
    assert (learner.joiner.users(), learner.offsets(), learner.discount(0)) == (8, [0], 0)
    assert (learner.count("users_evicted"), learner.count("steps_closed_early")) == (1, 1)


def test_an_evicted_user_starts_anew():
    learner = Learner(JoinSettings(max_users=8)).push(event("view_item", 7, at=0, user="user0"))
    learner.push(*[event("search", at=n, user=f"user{n}") for n in range(1, 9)])
    learner.push(event("view_item", 8, at=10, user="user0"), event("view_item", 9, at=11, user="user0"))
    assert learner.transitions[0, 9, 0].state.rows == ()


def test_the_oldest_step_makes_room_for_one_too_many():
    learner = Learner(JoinSettings(max_steps=128))
    learner.push(*[decision(f"r{n}", 7, at=n, user=f"user{n}") for n in range(128)])
    assert learner.offsets() == []
    learner.push(decision("r128", 7, at=128, user="user128"))
    assert (learner.offsets(), learner.discount(0)) == ([0], 0)
    assert learner.count("steps_evicted") == 1


@pytest.mark.parametrize(("steps", "cut_short"), [(STEPS_PER_USER, 0), (STEPS_PER_USER + 1, 3)])
def test_a_deed_whose_decision_is_not_among_its_users_newest_steps_is_counted(steps, cut_short):
    """The purchase looks for it by id, in vain waits for it, and looks for it by item; the refund does that at once."""
    rows = [decision(f"r{n}", 7 if n == 0 else 8, at=n) for n in range(steps)]
    rows.append(event("purchase", 7, at=300, recommendation="r0"))
    rows.append(event("refund", 7, at=301))
    rows.append(event("add_to_cart", 0, at=302))  # the unknown item: nobody looks for it
    rows = logged([*rows, *pressed(at=400)])
    reference = PlainJoiner(PROMPT, [0])
    reference.push(rows)
    learner = Learner(PROMPT).push(*rows)
    assert learner.joiner.counters() == reference.counters()
    assert learner.count("searches_cut_short") == cut_short
    assert learner.count("organic_steps") == (1 if cut_short else 0)


def test_memory_does_not_grow_with_the_stream():
    learner = Learner(JoinSettings(max_users=64, max_steps=256, max_slots=4096, max_ids=100))

    def flood(start: int) -> int:
        rows = [decision(f"r{n}", *range(1, 11), at=n, user=f"user{n}") for n in range(start, start + 2000)]
        for i in range(0, 2000, 100):
            learner.push(*rows[i : i + 100])
        return learner.joiner.nbytes()

    first = flood(0)
    assert flood(2000) == flood(4000) == first


def test_a_user_is_of_the_same_size_however_much_they_do():
    learner = Learner(JoinSettings(history_length=4))
    learner.push(*[event("view_item", n % 5 + 1, at=n) for n in range(50)])
    assert learner.joiner.state(0)["seen_item"].shape == (1, 4)
    assert [row[0] for row in learner.transitions[0, 48, 0].state.rows] == [3, 2, 1, 5]


def test_users_in_the_wrong_partition_are_counted_and_joined():
    misplaced = [replace(decision(id, 7, at=0), misplaced=True) for id in ("r1", "r2")]
    learner = Learner().push(*misplaced)
    assert learner.count("misplaced") == 2
    assert learner.offsets() == [0]


# --- any cuts, any restarts --------------------------------------------------------------------------------


def stream(seed: int, length: int) -> list[Row]:
    shop = Stream(random.Random(seed), 2)
    return [shop.row() for _ in range(length)]


def given_in(rows: list[Row], cuts: list[int], restart_after: int = -1) -> tuple[object, ...]:
    """All that pushes cut there give, with one restart at most: in order for each partition, and the state after."""
    joiner = Joiner(partitions=[0, 1])
    got: dict[int, list[object]] = {0: [], 1: []}
    edges = [0, *sorted(cuts), len(rows)]
    for i in range(len(edges) - 1):
        part = rows[edges[i] : edges[i + 1]]
        out = output(joiner.push(columns(part)), part)
        for records in (out.transitions, out.amendments, out.late):
            for record in records:
                got[record[0]].append(record)
        if i == restart_after:
            fresh = Joiner()
            for partition in (1, 0):
                fresh.restore(partition, through_npz(joiner.state(partition)))
            joiner = fresh
    kept = [(k, v.tolist()) for p in (0, 1) for k, v in sorted(joiner.state(p).items())]
    return [sorted(map(repr, got[p])) for p in (0, 1)], repr(kept), joiner.counters()


def through_npz(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a checkpoint makes of it."""
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    with np.load(file, allow_pickle=False) as loaded:
        return dict(loaded)


@given(st.integers(0, 10**6), st.lists(st.integers(0, 80), max_size=6))
@settings(max_examples=40 * DEEP, deadline=None)
def test_what_a_push_gives_does_not_depend_on_the_cuts(seed, cuts):
    rows = stream(seed, 80)
    assert given_in(rows, cuts) == given_in(rows, [])


@given(st.integers(0, 10**6), st.integers(0, 80))
@settings(max_examples=40 * DEEP, deadline=None)
def test_a_joiner_restored_at_any_point_goes_on_as_if_nothing_had_happened(seed, at):
    rows = stream(seed, 80)
    assert given_in(rows, [at], restart_after=0) == given_in(rows, [])


def test_a_state_is_a_copy():
    learner = Learner().push(decision("r1", 7, at=0))
    before = learner.joiner.state(0)
    kept = {name: array.copy() for name, array in before.items()}
    learner.push(decision("r2", 7, at=10), *[event("view_item", 7, at=n, user=f"user{n}") for n in range(50)])
    assert all(np.array_equal(before[name], kept[name]) for name in kept)


def test_what_was_given_is_not_overwritten_by_the_next_push():
    joiner = Joiner(partitions=[0])
    rows = logged([decision("r1", 7, at=0), event("view_item", 8, at=1), decision("r2", 7, at=2000)])
    first = joiner.push(columns(rows[:1])), joiner.push(columns(rows[1:2])), joiner.advance(0, ms(1900))
    kept = repr(first)
    joiner.push(columns(rows[2:]))
    joiner.advance(0, ms(9000))
    assert repr(first) == kept


def test_a_restored_state_is_what_it_was():
    learner = Learner().push(*[decision(f"r{n}", 7, 8, at=n, user=f"user{n % 5}") for n in range(40)])
    state = learner.joiner.state(0)
    again = learner.restarted().joiner.state(0)
    assert state.keys() == again.keys()
    assert all(np.array_equal(state[name], again[name]) for name in state)


def worked_out(pieces):
    return {name: piece() for name, piece in pieces.items()}


def test_pieces_worked_out_later_are_those_of_the_moment_they_were_asked_for():
    learner = Learner().push(*[decision(f"r{n}", 7, 8, at=n, user=f"user{n % 5}") for n in range(40)])
    asked, now = learner.joiner.pieces(0), worked_out(learner.joiner.pieces(0))
    learner.push(*[decision(f"s{n}", 9, at=50 + n, user=f"user{n % 7}") for n in range(200)])
    later = worked_out(asked)
    assert later.keys() == now.keys()
    for name, piece in now.items():
        assert all(np.array_equal(array, later[name][field]) for field, array in piece.items()), name


def test_steps_that_nobody_touches_stay_the_same_pieces(monkeypatch):
    monkeypatch.setattr(join_tables, "SEGMENTS", {"steps": 8, "slots": 16})
    learner = Learner().push(*[decision(f"r{n}", 7, 8, at=n, user=f"user{n}") for n in range(100)])
    before = worked_out(learner.joiner.pieces(0))
    learner.push(event("select_item", 8, at=101, user="user50"), decision("s", 9, at=102))
    after = worked_out(learner.joiner.pieces(0))
    changed = {
        name
        for name, piece in after.items()
        if name not in before
        or any(not np.array_equal(array, before[name][field]) for field, array in piece.items())
    }
    assert len(after) > 2 * 100 / 8
    assert changed == {"", "/steps-00000012", "/slots-00000006", "/slots-00000012"}
    kept = learner.joiner.state(0)
    again = learner.restarted().joiner.state(0)
    assert all(np.array_equal(kept[name], again[name]) for name in kept)
    assert len(kept["steps.offset"]) == 101


def test_a_partition_that_is_dropped_is_forgotten():
    learner = Learner().push(decision("r1", 7, at=0))
    learner.joiner.drop(0)
    assert learner.joiner.partitions == []
    learner.joiner.assign([0, 3])
    assert learner.push(decision("r2", 7, at=10)).offsets() == []
    assert learner.joiner.partitions == [0, 3]


def test_assigning_again_keeps_what_is_known():
    learner = Learner().push(decision("r1", 7, at=0))
    learner.joiner.assign([0])
    assert learner.push(decision("r2", 7, at=10)).offsets() == [0]


# --- wrong use, and odd input ------------------------------------------------------------------------------


def test_a_partition_that_was_not_assigned_is_an_error_that_names_it():
    with pytest.raises(JoinerError, match=r"partition 5 is not assigned, only \[0\]"):
        Learner().push(decision("r1", 7, at=0, partition=5))


def test_a_state_of_other_settings_is_refused():
    state = Learner().push(*[decision(f"r{n}", 7, at=n, user=f"user{n}") for n in range(9)]).joiner.state(0)
    with pytest.raises(JoinerError, match="histories of 32 entries, history_length is 4; set it back"):
        Joiner(JoinSettings(history_length=4)).restore(0, state)
    with pytest.raises(JoinerError, match="9 users, max_users is 8; raise it"):
        Joiner(JoinSettings(max_users=8)).restore(0, state)
    with pytest.raises(JoinerError, match="partition 0"):
        Joiner().restore(0, {})


@pytest.mark.parametrize(
    "wrong", [{"gamma": 1.1}, {"horizon": "day"}, {"session_gap_s": 0}, {"max_users": 7}, {"user_ttl_s": 60}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        JoinSettings(**wrong)


def test_columns_may_be_read_only_and_strided():
    rows = logged([decision("r1", 7, 8, at=0), event("select_item", 8, at=5), decision("r2", 5, at=10)])
    odd = columns(rows)
    for array in odd:
        array.flags.writeable = False
    odd = odd._replace(item=np.repeat(odd.item, 2)[::2], timestamp_ms=odd.timestamp_ms.astype(np.float64))
    joined = Joiner(partitions=[0]).push(odd)
    assert joined.transitions.reward.tolist() == [0, 1]


def test_an_empty_push_gives_nothing():
    joined = Joiner(partitions=[0]).push(columns([]))
    assert len(joined.transitions.offset) == len(joined.amendments.offset) == len(states(joined.states)) == 0


def test_a_slate_and_an_event_may_be_as_large_as_the_contract_allows():
    items = range(1, 1001)
    learner = Learner().push(
        decision("r1", *items, at=0), event("purchase", *items, at=5), decision("r2", 5, at=10)
    )
    assert learner.reward_of(0) == [10] * 1000
    learner.push(event("purchase", *range(2001, 3001), at=20), event("view_item", 4000, at=30))
    assert len(learner.reward_of(3)) == 1000
