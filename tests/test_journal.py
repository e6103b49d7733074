"""The journal tells in order what was told to a partition, and survives a checkpoint."""

import pytest

from learner.checkpoint import decode, encode
from learner.journal import MOST_GAPS, Gap, Journal, Room, Told, Unknown
from streaming.join_settings import JoinSettings
from streaming.rewards import RewardTable

ONE = JoinSettings(gamma=0.5)
TWO = JoinSettings(rewards=RewardTable.parse("purchase=3+0.25*value"))


def restored(journal: Journal) -> Journal:
    other = Journal()
    other.restore(decode(encode(journal.state())))
    return other


@pytest.fixture
def journal() -> Journal:
    journal = Journal()
    journal.begin({0: 10, 1: 0}, ONE, 100)
    return journal


def test_a_partition_begins_with_its_settings(journal):
    assert journal.told(0) == [Told(10, None, ONE)]
    assert (journal.began, journal.whole_from) == ({0: 10, 1: 0}, {0: 10, 1: 0})


def test_the_same_settings_again_are_no_news(journal):
    journal.begin({0: 50, 1: 60}, ONE, 100)
    assert journal.told(0) == [Told(10, None, ONE)]
    assert journal.began == {0: 10, 1: 0}


def test_times_and_settings_stay_in_order_even_at_one_offset(journal):
    journal.let_pass(0, 20, 1000)
    journal.begin({0: 20, 1: 0}, TWO, 100)
    journal.let_pass(0, 20, 2000)
    told = [Told(10, None, ONE), Told(20, 1000, None), Told(20, None, TWO), Told(20, 2000, None)]
    assert journal.told(0) == told
    assert restored(journal).told(0) == told


def test_of_times_that_only_went_on_with_no_record_in_between_the_last_stays(journal):
    for at_ms in (1000, 2000, 3000):
        journal.let_pass(1, 7, at_ms, since_ms=at_ms - 1000)
    journal.let_pass(1, 8, 4000, since_ms=3000)
    assert journal.told(1)[1:] == [Told(7, 3000, None), Told(8, 4000, None)]


def test_of_a_long_silence_there_is_a_word_for_each_stretch_that_is_no_jump(journal):
    hour_ms = 3_600_000
    for at_ms in range(1000, 5 * hour_ms // 2 + 1, 1000):
        journal.let_pass(1, 7, at_ms, since_ms=at_ms - 1000)
    told = [Told(7, at_ms, None) for at_ms in (hour_ms, 2 * hour_ms, 5 * hour_ms // 2)]
    assert journal.told(1)[1:] == restored(journal).told(1)[1:] == told


def test_times_that_changed_more_than_how_far_it_is_all_stay(journal):
    journal.let_pass(1, 7, 1000, since_ms=0)
    journal.let_pass(1, 7, 2000)
    journal.let_pass(1, 7, 3000, since_ms=2000)
    assert journal.told(1)[1:] == [Told(7, at_ms, None) for at_ms in (1000, 2000, 3000)]


def test_times_of_a_journal_of_before_all_stay(journal):
    journal.let_pass(1, 7, 1000, since_ms=0)
    state = journal.state()
    state["times"] = {partition: table[:, :3] for partition, table in state["times"].items()}
    other = Journal()
    other.restore(decode(encode(state)))
    other.let_pass(1, 7, 2000, since_ms=1000)
    assert other.told(1)[1:] == [Told(7, 1000, None), Told(7, 2000, None)]


def test_a_partition_added_later_begins_with_what_holds_then(journal):
    journal.begin({0: 30, 1: 30, 2: 5}, TWO, 100)
    assert journal.told(2) == [Told(5, None, TWO)]
    assert journal.told(1) == [Told(0, None, ONE), Told(30, None, TWO)]


def test_how_many_items_there_could_be_is_noted_where_it_changes(journal):
    journal.begin({0: 30, 1: 40}, ONE, 100)
    journal.begin({0: 50, 1: 60}, ONE, 200)
    for each in (journal, restored(journal)):
        assert each.rooms == {0: [Room(10, 100), Room(50, 200)], 1: [Room(0, 100), Room(60, 200)]}


def test_it_stays_small_and_says_from_where_it_is_whole():
    journal = Journal(most_times=3)
    journal.begin({0: 10}, ONE, 100)
    for offset in range(20, 25):
        journal.let_pass(0, offset, offset * 1000)
    assert [told.offset for told in journal.told(0)] == [10, 22, 23, 24]
    assert restored(journal).whole_from == {0: 21}


def test_what_was_stepped_over_is_kept_and_counted_and_the_newest_are_named(journal):
    for start in range(0, 5 * MOST_GAPS, 5):
        journal.step_over(1, 1000 + start, 1002 + start)
    other = restored(journal)
    assert other.stepped_over == {1: 2 * MOST_GAPS}
    journal.step_over(1, 9000, 9500)
    other = restored(journal)
    assert other.stepped_over == {1: 2 * MOST_GAPS + 500}
    assert len(other.gaps[1]) == MOST_GAPS
    assert other.gaps[1][-1] == Gap(9000, 9500)
    assert other.began == {0: 10, 1: 0}


def test_where_nothing_was_read_yet_a_gap_is_a_later_beginning(journal):
    journal.step_over(0, 10, 40)
    assert (journal.began[0], journal.whole_from[0]) == (40, 40)


def test_a_journal_of_before_gaps_were_noted_has_none(journal):
    state = journal.state()
    del state["gaps"], state["stepped_over"]
    other = Journal()
    other.restore(decode(encode(state)))
    assert (other.gaps, other.stepped_over) == ({}, {})


def test_a_restored_journal_goes_on_as_if_nothing_had_happened(journal):
    journal.let_pass(0, 20, 1000)
    other = restored(journal)
    for one in (journal, other):
        one.begin({0: 20, 1: 3}, ONE, 100)
        one.let_pass(0, 20, 1500)
    assert encode(other.state()) == encode(journal.state())


def test_what_was_of_no_known_schema_is_remembered_until_it_is_known_and_through_a_restart():
    journal, known = Journal(), set[bytes]()
    journal.begin({0: 0, 1: 0}, JoinSettings(), 100)
    assert not journal.lacks_schemas
    journal.unread(b"frame", 0, 5)
    journal.unread(b"frame", 0, 7)
    journal.unread(b"frame", 1, 2)
    journal.read(0, 9, known.__contains__)
    known.add(b"frame")
    journal.read(0, 11, known.__contains__)  # a batch of partition 0 only
    journal.unread(b"frame", 0, 20)  # started without the schema
    again = restored(journal)
    for each in (journal, again):
        assert each.unknown(0) == [Unknown(b"frame", 0, 5, 11), Unknown(b"frame", 0, 20, -1)]
        assert each.unknown(1) == [Unknown(b"frame", 1, 2, -1)]
        assert each.lacks_schemas


def test_garbage_that_looks_like_frames_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("learner.journal.MOST_UNKNOWN", 3)
    journal = Journal()
    journal.begin({0: 0}, JoinSettings(), 100)
    for number in range(10):
        journal.unread(b"frame%d" % number, 0, number)
    assert [each.start for each in journal.unknown(0)] == [7, 8, 9]
    for number in range(10):
        journal.unread(b"other", 0, 100 + 2 * number)
        journal.read(0, 101 + 2 * number, lambda frame: True)
    assert len(journal.unknown(0)) == 3
