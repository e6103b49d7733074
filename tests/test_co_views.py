"""The table of co-views against a plain one, and within its bounds."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from learner import co_views
from learner.co_views import BACKWARDS, OWN, PRIOR, WINDOW, CoViews

ONE = np.float32(1)


class PlainCoViews:
    """By the definition, with all neighbours kept; in float32 but for totals, as it is there."""

    def __init__(self):
        self.count, self.total = {}, {}

    def observe(self, history, item):
        """history: newest first, 0 unknown or padding."""
        if not item:
            return
        recent = list(dict.fromkeys(i for i in history if i))[:WINDOW]
        for place, before in enumerate(recent):
            if before != item:
                weight = ONE / np.float32(place + 1)
                for a, b, w in ((before, item, weight), (item, before, BACKWARDS * weight)):
                    near = self.count.setdefault(a, {})
                    near[b] = near.get(b, np.float32(0)) + w
                    self.total[a] = self.total.get(a, 0.0) + float(w)

    def scores(self, history, items):
        out = np.zeros(items, np.float32)
        for place, item in enumerate(dict.fromkeys(i for i in history if i)):
            near = ONE / np.float32(place + 1)
            each = near / np.float32(self.total.get(item, 0.0) + float(PRIOR))
            for other, count in self.count.get(item, {}).items():
                out[other] += each * count
            out[item] += OWN[0] * near + OWN[1]
        return out

    def walk(self, a, items):
        """In float64, which rounds otherwise."""
        out = np.zeros(items)
        for b, count in self.count.get(a, {}).items():
            chance = count / (self.total[a] + PRIOR)
            out[b] += chance
            for c, further in self.count[b].items():
                if c != a:
                    out[c] += co_views.HOP * chance * further / (self.total[b] + PRIOR)
        return out

    def walk_scores(self, history, items):
        out = np.zeros(items)
        for place, item in enumerate(dict.fromkeys(i for i in history if i)):
            out += self.walk(item, items) / (place + 1)
            out[item] += OWN[0] / (place + 1) + OWN[1]
        return out


HISTORY = st.lists(st.integers(0, 8), min_size=9, max_size=9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(HISTORY, st.integers(0, 8)), min_size=1, max_size=40), HISTORY)
def test_scores_are_those_of_a_plain_table(steps, asked):
    plain, table = PlainCoViews(), CoViews()
    table.grow(9)
    histories = np.array([history for history, _ in steps], np.int32)
    table.observe(histories, np.array([item for _, item in steps]))
    for history, item in steps:
        plain.observe(history, item)
    expected = plain.scores(asked, 9)
    assert table.scores(np.array([asked], np.int32), 9)[0].tolist() == expected.tolist()
    assert expected[0] == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(HISTORY, st.integers(0, 8)), min_size=1, max_size=40))
def test_walks_lead_in_one_step_or_two_to_where_a_plain_table_says(steps):
    plain, table = PlainCoViews(), CoViews()
    table.grow(9)
    for history, item in steps:
        plain.observe(history, item)
        table.observe(np.array([history], np.int32), np.array([item]))
    to, weight = table.walks(np.arange(9))
    for a in range(9):
        expected = plain.walk(a, 9)
        led = to[a] > 0
        assert sorted(to[a, led].tolist()) == np.flatnonzero(expected).tolist()
        np.testing.assert_allclose(weight[a, led], expected[to[a, led]], rtol=1e-5)
        assert (np.diff(weight[a]) <= 0).all()
        assert not weight[a, ~led].any()


def test_scores_by_walks_are_sums_over_the_history():
    plain, table = PlainCoViews(), CoViews()
    table.grow(9)
    rng = np.random.default_rng(0)
    for _ in range(40):
        history, item = rng.integers(0, 9, 9).astype(np.int32), int(rng.integers(1, 9))
        plain.observe(history.tolist(), item)
        table.observe(history[None], np.array([item]))
    asked = [3, 0, 5, 3, 2, 0, 0, 0, 0]
    said = table.walk_scores(np.array([asked], np.int32), 9)[0]
    np.testing.assert_allclose(said, plain.walk_scores(asked, 9), rtol=1e-5)


def test_of_many_places_the_heaviest_are_kept():
    table = CoViews()
    table.grow(200)
    for item in range(2, 60):  # the later, the oftener
        table.observe(np.full((item, 1), 1, np.int32), np.full(item, item))
    to, weight = table.walks(np.array([1]))
    assert to[0].tolist() == list(range(59, 59 - co_views.WALKED, -1))
    assert (weight > 0).all()


def test_what_is_seen_together_most_stays_when_there_is_no_more_room(monkeypatch):
    monkeypatch.setattr(co_views, "NEIGHBOURS", 4)
    table = CoViews()
    table.grow(1000)
    rng = np.random.default_rng(0)
    for i in range(2000):  # every second step from item 1 to 2 or 3, the others to one of a thousand
        item = 2 + i % 4 // 2 if i % 2 else int(rng.integers(4, 1000))
        table.observe(np.array([[1]], np.int32), np.array([item]))
    score = table.scores(np.array([[1]], np.int32), 1000)[0]
    score[1] = 0  # itself
    assert set(np.argsort(-score)[:2].tolist()) == {2, 3}
    assert np.count_nonzero(score) <= 4


def test_in_a_log_however_long_steps_go_on_counting():
    table, count = CoViews(), 1 << 24  # float32 has no number that is one more
    table.grow(3)
    there, steps = np.array([[1]], np.int32), 1 << 22
    table.observe(there, np.array([2]))
    state = table.state()
    factor = np.float32(count) / state["count"][1, 0]
    table.restore({"id": state["id"], "count": factor * state["count"], "total": factor * state["total"]})
    before = table.walks(np.array([1, 2]))[1]
    table.observe(np.repeat(there, steps, axis=0), np.full(steps, 2))  # nobody goes anywhere else
    np.testing.assert_allclose(table.walks(np.array([1, 2]))[1], before, rtol=0.01)
    assert table.state()["count"].max() <= co_views.MOST
    table.grow(4)
    table.observe(np.repeat(there, 1 << 18, axis=0), np.full(1 << 18, 3))
    score = table.scores(there, 4)[0]
    assert 0.4 < score[3] < 0.7  # what has come lately counts


def test_room_grows_and_what_is_known_stays():
    table = CoViews()
    table.grow(3)
    table.observe(np.array([[1]], np.int32), np.array([2]))
    before = table.scores(np.array([[1]], np.int32), 3)
    table.grow(5000)
    after = table.scores(np.array([[1, 4999]], np.int32), 5000)
    assert after[0, :3].tolist() == before[0].tolist()
    assert after[0, 4999] > 0
