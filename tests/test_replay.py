"""The replay buffer against a plain dict, and its promises one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import replay as module
from learner.checkpoint import KEEP, Checkpoints
from learner.replay import _USED, Replay, ReplayError, empty_batch
from streaming.transitions import Amendments, Joined, Rejects, States, Transitions

H = 2
GAMMA = np.float32(0.5)  # a power of two: n-step returns below are exact

# --- building joined batches -----------------------------------------------------------------------------


@dataclass
class Step:
    """One completed step, as the joiner would hand it over: rewards[i] is that of slots[i]."""

    offset: int
    rewards: list[float]
    following: int | None = None  # offset of the next step; None: the session ended
    partition: int = 0
    slots: list[int] | None = None
    organic: bool = False

    @property
    def key(self):
        return self.partition, self.offset

    @property
    def next_key(self):
        return None if self.following is None else (self.partition, self.following)


def state_of(key):
    """A state that no other step has: (item, name, age_s, value), each [H], and its time."""
    partition, offset = key
    item = np.array([offset % 1000 + 1, partition + 1], np.int32)
    return (
        item,
        np.array([4, 0], np.uint8),
        item.astype(np.float32) / 2,
        item.astype(np.float32) / 4,
        offset * 1000,
    )


def joined(steps=(), amendments=()):
    """steps: Steps; amendments: (partition, offset, slot, reward)."""
    keys = list(dict.fromkeys(key for step in steps for key in (step.key, step.next_key) if key))
    columns = [state_of(key) for key in keys]
    states = States(
        np.array([partition for partition, _ in keys], np.int32),
        np.array([offset for _, offset in keys], np.int64),
        np.array([column[4] for column in columns], np.int64),
        *(
            np.array([column[i] for column in columns], dtype).reshape(-1, H)
            for i, dtype in enumerate((np.int32, np.uint8, np.float32, np.float32))
        ),
    )
    rows = [
        (step, slot, reward)
        for step in steps
        for slot, reward in zip(step.slots or range(len(step.rewards)), step.rewards, strict=True)
    ]
    transitions = Transitions(
        np.array([step.partition for step, _, _ in rows], np.int32),
        np.array([step.offset for step, _, _ in rows], np.int64),
        np.array([slot for _, slot, _ in rows], np.int16),
        np.array([keys.index(step.key) for step, _, _ in rows], np.int32),
        np.array([keys.index(step.next_key) if step.next_key else -1 for step, _, _ in rows], np.int32),
        np.array([action_of(step.key, slot) for step, slot, _ in rows], np.int32),
        np.array([reward for _, _, reward in rows], np.float32),
        np.array([GAMMA if step.next_key else 0 for step, _, _ in rows], np.float32),
        np.array([math.nan if step.organic else 1 / (slot + 2) for step, slot, _ in rows], np.float32),
        np.array([step.organic for step, _, _ in rows], np.bool_),
        np.array([-1 if step.organic else step.offset % 3 for step, _, _ in rows], np.int64),
    )
    dtypes = (np.int32, np.int64, np.int16, np.float32)
    columns = list(zip(*amendments, strict=True)) or [(), (), (), ()]
    amended = Amendments(*(np.array(c, dtype) for c, dtype in zip(columns, dtypes, strict=True)))
    return Joined(states, transitions, amended, Rejects(np.zeros(0, np.int64), np.zeros(0, np.uint8)))


def action_of(key, slot):
    return key[0] * 10_000 + key[1] % 1000 * 10 + slot + 1


def everything(replay, n_step=1, gamma=None, unaided=0):
    """{sequence number: row of a batch} of all transitions kept, by sampling them one by one."""
    head = replay.inserted
    sequence = np.arange(head - len(replay), head)
    batch = empty_batch(len(sequence), H)
    batch.index[:] = sequence
    module._gather(replay._store, n_step, unaided, -1.0 if gamma is None else gamma, batch)
    return batch


# --- the model: a dict, everything recomputed from scratch ---------------------------------------------


@dataclass
class Model:
    """Steps by identity; what no kept transition can reach is forgotten, found by walking, not by counting."""

    capacity: int
    steps: dict = field(default_factory=dict)  # key -> {"next", "slots": {slot: reward}, "complete", ...}
    ring: list = field(default_factory=list)  # (key, slot), oldest first
    inserted: int = 0
    duplicates: int = 0
    amended: int = 0
    missed: int = 0

    def insert(self, steps, amendments):
        for step in steps:
            known = self.steps.get(step.key)
            if known and known["complete"]:
                self.duplicates += len(step.rewards)
                continue
            entry = self.steps.setdefault(step.key, {})
            entry.update(complete=True, next=step.next_key, rewards={}, organic=step.organic)
            if step.next_key:
                self.steps.setdefault(step.next_key, {"complete": False, "next": None, "rewards": {}})
            for slot, reward in zip(step.slots or range(len(step.rewards)), step.rewards, strict=True):
                entry["rewards"][slot] = np.float64(np.float32(reward))
                self.ring.append((step.key, slot))
                self.ring = self.ring[-self.capacity :]
                self.inserted += 1
            self.forget()
        for partition, offset, slot, reward in amendments:
            entry = self.steps.get((partition, offset))
            if entry is None or not entry["complete"] or slot not in entry["rewards"]:
                self.missed += 1
                continue
            entry["rewards"][slot] += np.float64(np.float32(reward))
            self.amended += 1

    def forget(self):
        reached, todo = set(), [key for key, _ in self.ring]
        while todo:
            key = todo.pop()
            if key not in reached:
                reached.add(key)
                todo += [self.steps[key]["next"]] if self.steps[key]["next"] else []
        self.steps = {key: entry for key, entry in self.steps.items() if key in reached}

    def returns(self, key, slot, n_step, gamma, unaided):
        """(n-step reward, discount, key of the state to bootstrap from)."""
        reward, discount = self.steps[key]["rewards"][slot], 1.0
        for n in range(n_step + unaided):
            entry = self.steps[key]
            if n >= n_step and not entry.get("organic"):
                break
            if n > 0:
                if not entry["complete"]:
                    return reward, discount, key
                reward += discount * sum(entry["rewards"].values())
            if entry["next"] is None:
                return reward, 0.0, None
            discount *= gamma
            key = entry["next"]
        return reward, discount, key


def assert_same(replay, model, n_step, gamma, unaided):
    """Every kept transition, in every column, and the counters."""
    batch = everything(replay, n_step, gamma, unaided)
    assert len(replay) == len(model.ring)
    for b, (key, slot) in enumerate(model.ring):
        reward, discount, last = model.returns(key, slot, n_step, gamma, unaided)
        entry = model.steps[key]
        assert batch.action[b] == action_of(key, slot)
        assert batch.reward[b] == np.float32(reward)
        assert batch.slot_reward[b] == np.float32(entry["rewards"][slot])
        assert batch.step_reward[b] == np.float32(sum(entry["rewards"].values()))
        assert batch.discount[b] == np.float32(discount)
        assert (batch.slot[b], batch.slots[b]) == (slot, len(entry["rewards"]))
        assert batch.organic[b] == entry["organic"]
        assert np.isnan(batch.propensity[b]) == entry["organic"]
        assert batch.policy_version[b] == (-1 if entry["organic"] else key[1] % 3)
        assert_state(batch.state, batch.timestamp_ms, b, key)
        assert_state(batch.next_state, batch.next_timestamp_ms, b, last)
    counters = replay.counters()
    assert counters == {
        "inserted": model.inserted,
        "kept": len(model.ring),
        "steps": len(model.steps),
        "duplicates": model.duplicates,
        "amended": model.amended,
        "missed": model.missed,
    }


def assert_state(histories, timestamp_ms, b, key):
    *expected, time = state_of(key) if key else (*[np.zeros(H)] * 4, 0)
    for actual, column in zip(histories, expected, strict=True):
        np.testing.assert_array_equal(actual[b], column)
    assert timestamp_ms[b] == time


def assert_sound(replay):
    """What is kept up to date equals what is worked out from scratch."""
    token, parts = replay.snapshot()
    again = Replay(replay.capacity, H, prioritised=replay.prioritised, segment=replay._segment)
    assert again.restore(parts) == 1
    np.testing.assert_array_equal(again._store.tree, replay._store.tree)
    assert references(again) == references(replay)
    assert token > 0


def references(replay):
    steps = replay._store.steps[: replay._store.cursor[_USED]]
    return [
        (int(slot), int(steps["key"][slot]), int(steps["refs"][slot]))
        for slot in np.flatnonzero(steps["key"] >= 0)
    ]


# Chains as a joiner makes them, and what a joiner never would: repeats, unknown steps, gaps in slots.
rewards = st.integers(-8, 8).map(float)
steps = st.builds(
    Step,
    offset=st.integers(0, 9),
    rewards=st.lists(rewards, min_size=1, max_size=4),
    following=st.none() | st.integers(1, 6),
    partition=st.integers(0, 1),
    organic=st.booleans(),
).map(
    lambda step: Step(
        step.offset,
        step.rewards,
        step.following and step.offset + step.following,
        step.partition,
        [2 * i for i in range(len(step.rewards))] if step.partition else None,
        step.organic,
    )
)
# Of a step that is partly gone the buffer no longer knows which slots it had between those that it gave.
amendments = st.tuples(st.just(0), st.integers(0, 12), st.integers(0, 6), rewards) | st.tuples(
    st.just(1), st.integers(0, 12), st.sampled_from([0, 2, 4, 6]), rewards
)
operations = st.lists(st.tuples(st.lists(steps, max_size=4), st.lists(amendments, max_size=4)), max_size=12)


@settings(max_examples=300, deadline=None)
@given(operations, st.integers(4, 20), st.integers(1, 5), st.sampled_from([0, 0, 1, 3, 100]), st.data())
def test_the_buffer_equals_a_plain_dict_for_any_n(script, capacity, n_step, unaided, data):
    replay, model = Replay(capacity, H, segment=4), Model(capacity)
    restart_at = data.draw(st.integers(0, 12))
    for i, (new, changes) in enumerate(script):
        if i == restart_at:
            _, parts = replay.snapshot()
            replay = Replay(capacity, H, segment=4)
            replay.restore(parts)
        replay.insert(joined(separated(new), changes))
        model.insert(separated(new), changes)
    assert_same(replay, model, n_step, 0.5, unaided)
    if len(replay):
        assert_sound(replay)


def separated(new):
    """Without two runs of one step side by side, which would read as one run."""
    return [step for i, step in enumerate(new) if i == 0 or step.key != new[i - 1].key]


@settings(max_examples=60, deadline=None)
@given(operations, st.integers(4, 20), st.integers(4, 20), st.sampled_from([2, 4, 8192]))
def test_another_capacity_and_segment_keep_the_newest_that_fit(script, before, after, segment):
    replay = Replay(before, H, segment=4)
    for new, changes in script:
        replay.insert(joined(separated(new), changes))
    _, parts = replay.snapshot()
    moved = Replay(after, H, segment=segment)
    moved.restore(parts)
    kept = min(len(replay), after)
    assert len(moved) == kept
    if kept:
        whole, rest = everything(replay, 3), everything(moved, 3)
        cut = len(replay) - kept
        # but for the slates: slots of a step that were cut off are no longer in them
        for old, new in zip((*whole.state, *whole[2:-3]), (*rest.state, *rest[2:-3]), strict=True):
            np.testing.assert_array_equal(old[cut:], new)
        assert_sound(moved)


# --- promises one by one ---------------------------------------------------------------------------------


def test_one_step_gives_its_own_reward_and_the_next_state():
    replay = Replay(10, H)
    assert replay.insert(joined([Step(1, [3.0, 4.0], following=2)])) == 2
    batch = everything(replay)
    assert batch.reward.tolist() == [3, 4]
    assert batch.discount.tolist() == [0.5, 0.5]
    np.testing.assert_array_equal(batch.next_state.item[0], state_of((0, 2))[0])


def test_n_steps_add_all_that_the_next_steps_earned():
    replay = Replay(10, H)
    replay.insert(joined([Step(1, [1.0, 2.0], following=2), Step(2, [4.0, 8.0], following=3)]))
    batch = everything(replay, n_step=2)
    assert batch.reward.tolist() == [1 + 0.5 * 12, 2 + 0.5 * 12, 4, 8]
    assert batch.discount.tolist() == [0.25, 0.25, 0.5, 0.5]
    assert batch.slot_reward.tolist() == [1, 2, 4, 8]


def test_a_return_goes_on_through_steps_taken_unaided_to_the_next_that_was_shown_something():
    replay = Replay(10, H)
    replay.insert(
        joined(
            [
                Step(1, [1.0], following=2),
                Step(2, [2.0], following=3, organic=True),
                Step(3, [4.0], following=4, organic=True),
                Step(4, [8.0], following=5),
                Step(5, [16.0], following=6, organic=True),
            ]
        )
    )
    batch = everything(replay, unaided=100)
    assert batch.reward.tolist() == [1 + 1 + 1, 2 + 2, 4, 8 + 8, 16]
    assert batch.discount.tolist() == [0.125, 0.25, 0.5, 0.25, 0.5]
    for b, last in enumerate([4, 4, 4, 6, 6]):  # of the sixth nothing is known yet
        np.testing.assert_array_equal(batch.next_state.item[b], state_of((0, last))[0])
    assert everything(replay, unaided=1).reward.tolist() == [1 + 1, 2 + 2, 4, 8 + 8, 16]
    assert everything(replay, n_step=2, unaided=100).reward.tolist() == [3, 4, 12, 16, 16]


def test_it_never_bootstraps_past_the_end_of_a_session():
    replay = Replay(10, H)
    replay.insert(joined([Step(1, [1.0], following=2), Step(2, [4.0])]))
    batch = everything(replay, n_step=5)
    assert batch.reward.tolist() == [3, 4]
    assert batch.discount.tolist() == [0, 0]
    assert not batch.next_state.item.any()


def test_a_reward_that_comes_later_is_in_every_return_that_it_belongs_to():
    replay = Replay(10, H)
    replay.insert(joined([Step(1, [0.0], following=2), Step(2, [0.0, 0.0], following=3)]))
    replay.insert(joined(amendments=[(0, 2, 1, 8.0)]))
    batch = everything(replay, n_step=2)
    assert batch.reward.tolist() == [4, 0, 8]
    replay.insert(joined(amendments=[(0, 2, 1, -8.0)]))
    assert everything(replay, n_step=2).reward.tolist() == [0, 0, 0]


def test_contents_are_what_is_kept_in_order_with_rewards_as_amended():
    replay = Replay(3, H)
    replay.insert(joined([Step(7, [1.0, 2.0], 9, partition=5)]))
    replay.insert(joined([Step(9, [4.0, 8.0], partition=5, slots=[0, 3], organic=True)], [(5, 7, 1, 0.5)]))
    held = replay.contents()
    assert list(zip(held.partition, held.offset, held.slot, strict=True)) == [(5, 7, 1), (5, 9, 0), (5, 9, 3)]
    assert held.action.tolist() == [action_of((5, 7), 1), action_of((5, 9), 0), action_of((5, 9), 3)]
    assert held.reward.tolist() == [2.5, 4.0, 8.0]
    assert held.discount.tolist() == [GAMMA, 0, 0]
    assert held.next_offset.tolist() == [9, -1, -1]
    assert held.organic.tolist() == [False, True, True]
    assert held.policy_version.tolist() == [7 % 3, -1, -1]


def test_inserting_again_adds_nothing_and_is_counted():
    replay = Replay(10, H)
    batch = joined([Step(1, [1.0, 2.0], following=2)])
    assert replay.insert(batch) == 2
    assert replay.insert(batch) == 0
    assert replay.counters()["duplicates"] == 2
    assert len(replay) == replay.inserted == 2


def test_another_gamma_replaces_every_discount_above_0():
    replay = Replay(10, H)
    replay.insert(joined([Step(1, [1.0], following=2), Step(2, [4.0])]))
    batch = everything(replay, n_step=1, gamma=0.25)
    assert batch.discount.tolist() == [0.25, 0]


def test_memory_stays_flat_while_the_stream_goes_on():
    replay = Replay(20, H)
    nbytes = []
    for offset in range(3000):
        replay.insert(joined([Step(offset, [1.0, 1.0], following=offset + 1)]))
        nbytes.append(replay.nbytes)
    assert replay.counters()["steps"] == 11
    assert nbytes[0] < nbytes[30] == nbytes[-1]


def test_it_grows_while_many_steps_are_kept():
    replay, model = Replay(64, H, segment=4, reserve=4), Model(64)
    for offset in range(60):
        new = [Step(offset, [float(offset % 7)], following=offset + 1)]
        replay.insert(joined(new))
        model.insert(new, [])
    assert_same(replay, model, 3, 0.5, 0)


@pytest.mark.parametrize("prioritised", [True, False])
def test_every_transition_is_drawn_alike_at_first(prioritised):
    replay = Replay(16, H, prioritised=prioritised)
    replay.insert(joined([Step(offset, [0.0, 0.0]) for offset in range(8)]))
    rng = np.random.default_rng(1)
    drawn = np.concatenate([replay.sample(16, rng).index for _ in range(500)])
    counts = np.bincount(drawn, minlength=16)
    # 8,000 draws, 500 for each: five standard deviations of an unstratified count
    assert abs(counts - 500).max() < 5 * math.sqrt(500)
    assert (replay.sample(16, rng).weight == 1).all()


def test_transitions_are_drawn_in_proportion_to_their_priorities_and_weighted_back():
    replay = Replay(4, H, alpha=1.0)
    replay.insert(joined([Step(offset, [0.0]) for offset in range(4)]))
    priority = np.array([1.0, 2.0, 3.0, 4.0]) - module.PRIORITY_FLOOR
    assert replay.update_priorities(np.arange(4), priority) == 4
    rng = np.random.default_rng(2)
    batches = [replay.sample(4, rng, beta=1.0) for _ in range(5000)]
    counts = np.bincount(np.concatenate([batch.index for batch in batches]), minlength=4)
    np.testing.assert_allclose(counts / 20_000, [0.1, 0.2, 0.3, 0.4], atol=0.01)
    for batch in batches[:50]:
        weight = 1.0 / (batch.index + 1)
        np.testing.assert_allclose(batch.weight, weight / weight.max(), rtol=1e-6)


def test_alpha_bends_priorities_and_beta_0_weighs_all_alike():
    replay = Replay(2, H, alpha=0.5)
    replay.insert(joined([Step(1, [0.0]), Step(2, [0.0])]))
    replay.update_priorities(np.array([0, 1]), module.PRIORITY_FLOOR - np.array([1.0, 4.0]))
    half = len(replay._store.tree) // 2
    np.testing.assert_allclose(replay._store.tree[half : half + 2], [1, 2])
    assert (replay.sample(2, np.random.default_rng(0), beta=0.0).weight == 1).all()


def chosen_and_not(share=0.5, **more):
    """Rows 0..31 of slates of two, of which offset 3's (rows 6, 7) had a choice, and 32, 33 went somewhere unaided."""
    replay = Replay(64, H, alpha=0.0, chosen_share=share, **more)
    replay.insert(joined([Step(offset, [0.0, float(offset == 3)]) for offset in range(16)]))
    replay.insert(joined([Step(offset, [1.0], organic=True) for offset in (90, 91)]))
    return replay


def drawn_from(replay, size=32, batches=600):
    rng = np.random.default_rng(3)
    found = [replay.sample(size, rng, beta=1.0) for _ in range(batches)]
    return np.concatenate([each.index for each in found]), found


def test_steps_with_a_choice_are_drawn_oftener_all_their_rows_and_weighted_back():
    index, batches = drawn_from(chosen_and_not())
    counts = np.bincount(index, minlength=34)
    np.testing.assert_allclose(counts[[6, 7]].sum() / len(index), 0.5, atol=0.02)
    others = np.delete(counts, [6, 7])
    np.testing.assert_allclose(others / len(index), 0.5 / 32, atol=0.004)
    for batch in batches[:20]:
        each = batch.weight / np.where(np.isin(batch.index, [6, 7]), 1.0, 15.0)
        np.testing.assert_allclose(each, each[0], rtol=1e-6)


def test_where_choices_are_many_or_uniform_draws_are_asked_for_all_are_drawn_alike():
    replay = Replay(64, H, alpha=0.0, chosen_share=0.25)
    replay.insert(joined([Step(offset, [float(offset % 2), 0.0]) for offset in range(16)]))
    assert (replay.sample(16, np.random.default_rng(0)).weight == 1).all()
    uniform, _ = drawn_from(chosen_and_not(prioritised=False))
    assert np.isin(uniform, [6, 7]).mean() < 0.08


def test_a_choice_that_comes_later_counts_and_one_that_is_taken_back_does_not():
    replay = chosen_and_not()
    replay.insert(joined(amendments=[(0, 3, 1, -1.0), (0, 5, 1, 2.0)]))
    index, _ = drawn_from(replay)
    np.testing.assert_allclose(np.isin(index, [10, 11]).mean(), 0.5, atol=0.02)
    assert np.isin(index, [6, 7]).mean() < 0.1


def test_how_many_choices_are_kept_is_known_after_rows_have_gone_and_after_a_restart():
    replay = Replay(8, H, alpha=0.0, chosen_share=0.25)
    for start in range(0, 30, 3):
        steps = [Step(start + n, [float(n == 1), 0.0]) for n in range(3)]
        replay.insert(joined(steps, amendments=[(0, start - 1, 0, 1.0)] if start % 2 else ()))
        kept = everything(replay)
        assert replay.chosen == ((kept.step_reward != 0) & ~kept.organic).sum()
    again = Replay(8, H, alpha=0.0, chosen_share=0.25)
    again.restore(replay.snapshot()[1])
    assert again._store.chosen.tolist() == replay._store.chosen.tolist()


def test_new_and_amended_transitions_get_the_highest_priority():
    replay = Replay(8, H, alpha=1.0)
    replay.insert(joined([Step(1, [0.0, 0.0])]))
    replay.update_priorities(np.array([0, 1]), np.array([9.0, 0.0]) - [module.PRIORITY_FLOOR, 0.0])
    replay.insert(joined([Step(2, [0.0])], amendments=[(0, 1, 1, 5.0)]))
    half = len(replay._store.tree) // 2
    np.testing.assert_allclose(replay._store.tree[half : half + 4], [9, 9, 9, 0])


def test_priorities_of_transitions_that_are_gone_are_passed_over():
    replay = Replay(2, H)
    replay.insert(joined([Step(offset, [0.0]) for offset in range(5)]))
    before = replay._store.tree.copy()
    assert replay.update_priorities(np.array([0, 1, 2, 99]), np.ones(4)) == 0
    np.testing.assert_array_equal(replay._store.tree, before)
    assert replay.update_priorities(np.array([2, 3]), np.ones(2)) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_priority_that_is_no_number_is_refused(bad):
    replay = Replay(2, H)
    replay.insert(joined([Step(1, [0.0])]))
    with pytest.raises(ReplayError, match="finite"):
        replay.update_priorities(np.array([0]), np.array([bad]))


def test_too_few_transitions_says_how_many_there_are():
    replay = Replay(10, H)
    replay.insert(joined([Step(1, [1.0, 2.0])]))
    with pytest.raises(ReplayError, match="asked for 3 transitions, have 2; wait"):
        replay.sample(3, np.random.default_rng(0))


def test_the_same_seed_draws_the_same_batch_into_the_arrays_that_were_given():
    replay = Replay(100, H)
    replay.insert(joined([Step(offset, [1.0], following=offset + 1) for offset in range(50)]))
    out = empty_batch(8, H)
    first = replay.sample(8, np.random.default_rng(3), n_step=2)
    assert replay.sample(8, np.random.default_rng(3), n_step=2, out=out) is out
    for a, b in zip(
        (*first.state, *first.next_state, *first[2:]), (*out.state, *out.next_state, *out[2:]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ReplayError, match="out holds"):
        replay.sample(9, np.random.default_rng(3), out=out)


def broken(**changes):
    batch = joined([Step(1, [1.0, 2.0], following=2)])
    transitions = batch.transitions._replace(**changes)
    return batch._replace(transitions=transitions)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (broken(slot=np.array([1, 0], np.int16)), "transition 1: the slots of a step must ascend"),
        (broken(state=np.array([0, 1], np.int32)), "transition 1: its state row is that of another step"),
        (broken(state=np.array([0, 9], np.int32)), "transition 1: state or next_state is no row"),
        (broken(next_state=np.array([9, 9], np.int32)), "transition 0: state or next_state is no row"),
        (
            broken(next_state=np.array([-1, -1], np.int32)),
            "transition 0: a discount above 0 needs a next_state",
        ),
        (broken(reward=np.array([math.nan, 0], np.float32)), "transition 0: reward must be finite"),
        (broken(discount=np.array([2, 2], np.float32)), "transition 0: reward must be finite and discount"),
        (joined(amendments=[(0, 1, 0, math.inf)]), "amendment 0: reward must be finite"),
        (joined([Step(1 << 48, [1.0])]), "states row 0: partition must be in"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused_whole(batch, message):
    replay = Replay(10, H)
    with pytest.raises(ReplayError, match=message):
        replay.insert(batch)
    assert replay.counters()["steps"] == len(replay) == 0


def test_histories_of_another_length_are_refused():
    with pytest.raises(ReplayError, match="states of 2 entries for a replay of 3"):
        Replay(10, 3).insert(joined([Step(1, [1.0])]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 1}, "capacity must be"),
        ({"segment": 0}, "segment must be"),
        ({"history_length": 0}, "history_length"),
        ({"alpha": 2.0}, "alpha"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ReplayError, match=message):
        Replay(**({"capacity": 10, "history_length": H} | arguments))


# --- checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prioritised", [True, False])
def test_a_restored_buffer_goes_on_exactly_as_the_other_one_would(prioritised, tmp_path):
    replay = Replay(50, H, prioritised=prioritised)
    rng = np.random.default_rng(4)

    def play(buffer, start, rng):
        rewards = []
        for offset in range(start, start + 40):
            buffer.insert(joined([Step(offset, [1.0, 2.0], following=offset + 1)], [(0, offset - 3, 1, 4.0)]))
            batch = buffer.sample(2, rng, n_step=3)
            buffer.update_priorities(batch.index, batch.reward.astype(np.float64))
            rewards.append(batch.reward.tolist() + batch.weight.tolist() + batch.index.tolist())
        return rewards

    play(replay, 0, rng)
    _, parts = replay.snapshot()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(parts, {"rng": rng.bit_generator.state})
    unbroken = play(replay, 40, rng)

    found = Checkpoints(tmp_path).load()
    again, rng = Replay(50, H, prioritised=prioritised), np.random.default_rng()
    again.restore(found.parts)
    rng.bit_generator.state = found.meta["rng"]
    assert play(again, 40, rng) == unbroken


def test_a_snapshot_copies_only_what_changed_and_a_failed_one_is_made_up_for(tmp_path):
    replay, checkpoints = Replay(64, H, segment=4), Checkpoints(tmp_path)
    token = 0
    for offset in range(30):
        replay.insert(
            joined([Step(offset, [float(offset)], following=offset + 1)], [(0, offset - 20, 0, 1.0)])
        )
        if offset % 5 == 4:
            newer, parts = replay.snapshot(token)
            if offset in (14, 24):
                continue  # this one could not be written
            checkpoints.save(parts, {})
            token = newer
            again = Replay(64, H, segment=4)
            again.restore(Checkpoints(tmp_path).load().parts)
            for a, b in zip(everything(again, 3)[2:], everything(replay, 3)[2:], strict=True):
                np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(again._store.tree, replay._store.tree)
    _, parts = replay.snapshot(token)
    fresh = {name for name, part in parts.items() if part is not KEEP}
    assert fresh == {"replay/state"}


def test_after_a_restore_only_what_changed_since_is_written_again(tmp_path):
    replay = Replay(64, H, prioritised=False, segment=4)
    replay.insert(joined([Step(offset, [1.0], following=offset + 1) for offset in range(20)]))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(replay.snapshot()[1], {})
    again = Replay(64, H, prioritised=False, segment=4)
    token = again.restore(Checkpoints(tmp_path).load().parts)
    again.insert(joined(amendments=[(0, 0, 0, 1.0)]))
    _, parts = again.snapshot(token)
    fresh = {name for name, part in parts.items() if part is not KEEP}
    assert fresh == {"replay/state", "replay/chain-000000", "replay/rewards-000000"}


def test_switching_priorities_on_after_a_restart_starts_with_equal_ones():
    replay = Replay(8, H, prioritised=False)
    replay.insert(joined([Step(offset, [1.0]) for offset in range(5)]))
    again = Replay(8, H, prioritised=True)
    assert again.restore(replay.snapshot()[1]) == 0  # all of it must be written again
    half = len(again._store.tree) // 2
    assert again._store.tree[half : half + 8].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


def test_a_checkpoint_of_another_history_length_says_what_to_do():
    _, parts = Replay(8, H).snapshot()
    with pytest.raises(ReplayError, match="start with --history-length 2"):
        Replay(8, 3).restore(parts)
