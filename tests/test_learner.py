"""The learner's mind: what it becomes depends on the records and their order, not on cuts or restarts."""

import re
from dataclasses import replace

import numpy as np
import pytest

from learner.agent_settings import AgentSettings
from learner.checkpoint import KEEP, decode, encode
from learner.known_items import MEETINGS
from learner.learner import READABLE_FORMATS, CannotContinue, Learner, LearnerSettings
from streaming.chunks import batch_of, rows
from streaming.join_settings import JUMP, JoinSettings
from streaming.log import RecordBatch, open_log
from streaming.schemas import Codec
from tests.shop_log import write_shop

AGENT = AgentSettings(batch_size=32, dim=8, hidden=16, history_length=8)
SETTINGS = LearnerSettings(min_replay=200, updates_high=0.05, replay_capacity=5000)


def new_learner(settings=SETTINGS, agent=AGENT, horizon="session"):
    join = JoinSettings(gamma=agent.gamma, history_length=agent.entries, horizon=horizon)
    learner = Learner(settings, agent, join, Codec(), 2)
    learner.assign({0: 0, 1: 0})
    return learner


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """(events, catalog) of a small shop, each as one batch."""
    log = open_log(f"sqlite:///{tmp_path_factory.mktemp('log') / 'log.db'}")
    write_shop(log, 700, partitions=2, items=60, shoppers=40)
    with_keys = log.reader("catalog", {0: 0}, keys=True)
    catalog = with_keys.poll(100_000, 5.0)
    reader = log.reader("events", {0: 0, 1: 0})
    events = reader.poll(100_000, 5.0)
    for open_thing in (with_keys, reader, log):
        open_thing.close()
    return events, catalog


def feed(learner, events, start=0, stop=None, cut=97):
    """Take rows start..stop in cuts, training after each as far as the band allows."""
    stop = len(events) if stop is None else stop
    while start < stop:
        end = min(start + cut, stop)
        learner.take(rows(events, start, end))
        learner.train(10**9)
        start = end


def memory(learner):
    """All of a learner's memory as bytes that can be compared."""
    _, parts = learner.snapshot()
    return {name: encode(part) for name, part in parts.items()}


def catalog_record(item_id, value):
    return RecordBatch(
        np.zeros(1, np.int32),
        np.zeros(1, np.int64),
        np.zeros(1, np.int64),
        np.frombuffer(value or b"", np.uint8),
        np.array([0, len(value or b"")]),
        np.array([value is None]),
        [item_id.encode()],
    )


def restored(learner, **kwargs):
    _, parts = learner.snapshot()
    assert KEEP not in parts.values()
    other = new_learner(**kwargs)
    other.restore({name: decode(encode(part)) for name, part in parts.items()})
    return other


def test_the_same_records_in_the_same_cuts_give_the_same_weights(records):
    one, two = new_learner(), new_learner()
    for learner in (one, two):
        learner.take_catalog(records[1])
        feed(learner, records[0])
    assert one.agent.updates > 20
    assert memory(one) == memory(two)


@pytest.mark.parametrize("at", [97, 582, 1067])
def test_a_restored_learner_goes_on_as_if_it_had_never_stopped(records, at):
    events, catalog = records
    unbroken = new_learner()
    unbroken.take_catalog(catalog)
    feed(unbroken, events)
    before = new_learner()
    before.take_catalog(catalog)
    feed(before, events, stop=at)
    after = restored(before)
    after.take_catalog(catalog)  # as at every start
    feed(after, events, start=at)
    assert after.agent.updates == unbroken.agent.updates > 20
    assert memory(after) == memory(unbroken)


def test_a_batch_counts_for_its_share_of_replay(records):
    learner = new_learner()
    feed(learner, records[0])
    share = learner.agent.settings.batch_size / len(learner.replay)
    assert share < 0.2
    assert learner.agent.updates * share < learner.agent.state()["response.passes"][0] < learner.agent.updates


def test_a_checkpoint_of_another_version_is_refused():
    _, parts = new_learner().snapshot()
    parts["learner"]["format"] = 3
    reads = re.escape(str(READABLE_FORMATS))
    with pytest.raises(CannotContinue, match=rf"is of format 3, this version reads {reads}; use the version"):
        new_learner().restore(parts)


def test_a_checkpoint_with_states_of_another_length_names_what_asks_for_them():
    near = new_learner(agent=replace(AGENT, history_length=0, gamma=0.97))
    said = r"32 entries, and .*--gamma, asks for 96; start with --history-length 32"
    with pytest.raises(CannotContinue, match=said):
        restored(near, agent=replace(AGENT, history_length=0, gamma=0.99))
    restored(near, agent=replace(AGENT, history_length=32, gamma=0.99))


def test_taking_a_snapshot_changes_nothing(records):
    watched, left_alone = new_learner(), new_learner()
    for start in range(0, 900, 90):
        feed(watched, records[0], start, start + 90, cut=90)
        watched.snapshot()
        feed(left_alone, records[0], start, start + 90, cut=90)
    assert memory(watched) == memory(left_alone)


def test_transitions_do_not_depend_on_how_records_were_cut(records):
    fine, coarse = new_learner(), new_learner()
    for start in range(len(records[0])):
        fine.take(rows(records[0], start, start + 1))
    coarse.take(records[0])
    assert fine.replay.inserted == coarse.replay.inserted > 900
    a, b = fine.snapshot()[1], coarse.snapshot()[1]
    for name in (name for name in a if name.startswith(("joiner", "vocabulary"))):
        assert encode(a[name]) == encode(b[name]), name


@pytest.mark.parametrize("young", [1.0, 3.0])
def test_no_update_is_made_before_min_replay_and_then_as_many_as_the_band_allows(records, young):
    learner = new_learner(replace(SETTINGS, updates_young=young))
    learner.take(rows(records[0], 0, 80))
    assert 0 < learner.replay.inserted < 200
    assert learner.train(10**9) == 0
    learner.take(rows(records[0], 80, len(records[0])))
    chosen = learner.replay.chosen
    assert 100 < chosen < learner.replay.inserted
    extra = round((young - 1) * 100_000 * chosen / (chosen + 40_000))
    due = int(0.05 * (learner.replay.inserted + extra - 200) + 1e-9)
    assert learner.train(10**9) == due > 0
    assert learner.train(10**9) == 0


def test_every_transition_is_a_meeting_with_its_item(records):
    learner = new_learner()
    feed(learner, records[0], stop=60)
    action = learner.replay.contents().action
    times = np.bincount(action, minlength=learner.agent.rows)
    assert learner.agent._known.met[: learner.agent.rows].tolist() == times.clip(max=MEETINGS).tolist()
    assert set(range(1, MEETINGS + 2)) <= set(times)


def test_it_learns_where_nothing_later_counts(records):
    learner = new_learner(agent=replace(AGENT, gamma=0.0))
    feed(learner, records[0])
    assert learner.agent.updates > 0
    assert np.isfinite(learner.last.loss)


def test_reading_waits_below_the_band_and_never_when_training_cannot_go_on(records):
    learner = new_learner(LearnerSettings(min_replay=200, updates_low=0.02, updates_high=0.05))
    assert learner.may_read
    learner.take(records[0])
    assert not learner.may_read
    learner.train(10**9)
    assert learner.may_read


def test_an_item_out_of_stock_is_not_on_offer(records):
    learner = new_learner()
    learner.take_catalog(records[1])
    item = Codec().encode_item({"item_id": learner.vocabulary.item_id(7), "in_stock": False})
    learner.take_catalog(catalog_record(learner.vocabulary.item_id(7), item))
    feed(learner, records[0], stop=300)
    offered = learner.agent.tensors()["catalog.on_offer"].numpy()
    assert (offered[6], offered[7], offered[8]) == (True, False, True)


def test_an_item_that_left_the_catalog_while_the_learner_was_down_is_not_on_offer(records):
    events, catalog = records
    before = new_learner()
    before.take_catalog(catalog)
    feed(before, events, stop=1000)
    after = restored(before)  # and the catalog's topic is empty now
    after.train(1)
    assert not after.agent.tensors()["catalog.on_offer"].numpy()[catalog_ids(before)].any()


@pytest.mark.parametrize(
    "tombstone", [True, False], ids=["its tombstone is left", "all of it was compacted away"]
)
def test_what_an_item_was_is_known_after_a_restart_though_it_has_left_the_catalog(tombstone):
    kept = {"item_id": "kept", "category": "shoes", "price": 9.0, "vector": [1.0]}
    other, gone = kept | {"item_id": "other", "price": 3.0}, kept | {"item_id": "gone", "vector": [1.0, 2.0]}
    stocked = [catalog_record(item["item_id"], Codec().encode_item(item)) for item in (kept, other, gone)]
    left = catalog_record("gone", None)
    before = new_learner()
    for record in (*stocked, left):
        before.take_catalog(record)
    before.train(1)
    after = restored(before)
    for record in (*stocked[:2], *([left] if tombstone else [])):
        after.take_catalog(record)
    after.train(1)
    assert before.agent.items.vector[3, :2].tolist() == [1.0, 2.0]
    for was, now in zip(before.agent.items, after.agent.items, strict=True):
        assert now.equal(was)


def catalog_ids(learner):
    return np.flatnonzero(learner.catalog.known)


def seen(n, timestamp_ms):
    """An event of one user in eight."""
    user, items = f"u{n % 8}", [{"item_id": "a"}]
    event = {"event_id": f"e{n}", "name": "view_item", "user_id": user, "timestamp": timestamp_ms}
    return Codec().encode_event(event | {"items": items})


def test_a_record_stamped_far_ahead_does_not_tell_how_new_the_weights_are():
    start_ms, years_ms = 1_767_268_800_000, 5 * 365 * 86_400_000
    learner = new_learner()
    learner.take(batch_of([seen(n, start_ms + n) for n in range(JUMP)]))
    assert learner.events_through_ms == start_ms + JUMP - 1
    learner.take(batch_of([seen(100, start_ms + years_ms)], JUMP))
    first_of_another = batch_of([seen(101, start_ms + years_ms)])
    first_of_another.partition[:] = 1
    learner.take(first_of_another)
    assert learner.events_through_ms == start_ms + JUMP - 1
    learner = restored(learner)
    learner.take(batch_of([seen(102, start_ms + 60_000)], JUMP + 1))
    assert learner.meta({}, 0).events_through_ms == start_ms + 60_000


def test_nor_do_many_once_their_partitions_clock_is_put_back():
    start_ms, day_ms = 1_767_268_800_000, 86_400_000
    times = [*range(JUMP), *range(day_ms, day_ms + JUMP)]
    learner = new_learner()
    learner.take(batch_of([seen(n, start_ms + at) for n, at in enumerate(times)]))
    assert learner.events_through_ms == start_ms + day_ms  # so many of several users are believed
    learner.take(batch_of([seen(100 + n, start_ms + 100 + n) for n in range(JUMP)], len(times)))
    assert learner.events_through_ms == start_ms + 100 + JUMP - 1


def test_another_band_counts_from_the_restart_on(records):
    before = new_learner()
    feed(before, records[0], stop=1000)
    after = restored(before, settings=LearnerSettings(min_replay=200, updates_high=5.0))
    assert after.updates_left == 0
    after.take(rows(records[0], 1000, len(records[0])))
    assert (
        after.updates_left
        == 5 * (after.worth - before.worth)
        > 5 * (after.replay.inserted - before.replay.inserted)
    )


def test_a_lower_min_replay_counts_what_there_is_where_nothing_was_learnt_yet(records):
    # a small shop is told to lower --min-replay, and starts the learner again
    before = new_learner(replace(SETTINGS, min_replay=100_000))
    feed(before, records[0])
    assert before.agent.updates == 0
    after = restored(before, settings=SETTINGS)
    new = new_learner()
    new.take(records[0])
    assert after.updates_left == new.updates_left > 0


def test_choices_that_a_smaller_replay_does_not_keep_hold_up_nothing(records):
    before = new_learner()
    feed(before, records[0], stop=1000)
    after = restored(before, settings=replace(SETTINGS, replay_capacity=200))
    assert after.worth < before.worth - 100
    worth = after.worth
    after.take(rows(records[0], 1000, len(records[0])))
    assert after.updates_left == int(0.05 * (after.worth - worth) + 1e-9) > 0


def test_a_checkpoint_of_another_shape_is_refused_by_name(records):
    before = new_learner()
    feed(before, records[0], stop=500)
    wide = AgentSettings(batch_size=32, dim=16, hidden=16, history_length=8)
    with pytest.raises(CannotContinue, match="does not fit these flags"):
        restored(before, agent=wide)


def test_items_beyond_the_bound_are_unknown_and_a_lower_bound_takes_none_back(records):
    before = new_learner(replace(SETTINGS, max_items=20))
    before.take_catalog(records[1])
    feed(before, records[0], stop=500)
    assert (len(before.vocabulary), before.agent.rows) == (20, 21)
    refused = before.vocabulary.refused
    assert refused > 20
    after = restored(before, settings=replace(SETTINGS, max_items=10))
    feed(after, records[0], start=500)
    assert (len(after.vocabulary), after.agent.rows) == (20, 21)
    assert after.vocabulary.refused > refused
    assert after.agent.updates > before.agent.updates


@pytest.mark.parametrize(
    ("setting", "value"),
    [("updates_high", 0.0), ("min_replay", 0), ("max_items", 0), ("priority_beta", 1.5), ("seed", -1)],
)
def test_a_setting_out_of_bounds_is_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=setting):
        LearnerSettings(**{setting: value})


def test_a_band_upside_down_is_refused():
    with pytest.raises(ValueError, match="must not exceed"):
        LearnerSettings(updates_low=2.0, updates_high=1.0)


def test_batches_that_replay_can_never_fill_are_refused():
    with pytest.raises(ValueError, match="batch_size 128 is above replay_capacity 100"):
        Learner(
            replace(SETTINGS, replay_capacity=100),
            AgentSettings(batch_size=128),
            JoinSettings(),
            Codec(),
            None,
        )
