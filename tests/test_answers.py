"""What items answer to: compiled loops say what plain ones do, and the mode is the mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner import answer_fit, answers, co_views
from learner.answer_fit import SPREADS, Looks, Pairs, carried, pairs_of, settle
from learner.answers import READ, Table, check_pairs, looks_of, no_pairs, pulls_by_tensors, pulls_of
from learner.co_views import PRIOR, CoViews
from learner.recall import NEAR, Recall, RecallFit, compile_recall
from learner.stacking import Stack, StackFit

ITEMS = 40


def table(seed, rows=15):
    """Sources with neighbours at random, some of them fewer."""
    rng = np.random.default_rng(seed)
    source = np.append(0, np.sort(rng.choice(np.arange(1, ITEMS), rows - 1, replace=False))).astype(np.int32)
    near = np.array([rng.choice(np.arange(1, ITEMS), NEAR, replace=False) for _ in source], np.int32)
    near[:, -1] *= rng.random(rows) < 0.5
    near[0] = 0
    return Table(source, near, (rng.normal(size=near.shape) * (near > 0)).astype(np.float32))


def histories(seed, count, length=20):
    rng = np.random.default_rng(seed)
    item = rng.integers(1, ITEMS, (count, length)).astype(np.int32)
    item[rng.random(item.shape) < 0.2] = 0  # unknown items, and padding
    item[0] = 0
    return item


def shares(history):
    """√share of each item of one history."""
    real = history[history > 0].tolist()
    return {i: (real.count(i) / len(real)) ** 0.5 for i in set(real)}


def added(pairs, history):
    """[ITEMS] what a history adds to each item's log-odds: its READ newest distinct items do."""
    out = np.zeros(ITEMS)
    counted = list(dict.fromkeys(history[history > 0].tolist()))[:READ]
    for row, source in enumerate(pairs.source.tolist()):
        root = shares(history)[source] if source in counted else 0.0
        for to, answer in zip(pairs.near[row].tolist(), pairs.answer[row].tolist(), strict=True):
            out[to] += answer * root
    out[0] = 0.0
    return out


def test_looks_are_the_newest_distinct_items_and_their_shares():
    item = histories(1, 50, length=60)
    look, root = looks_of(item)
    assert root.dtype == np.float16
    for row, got, size in zip(item, look, root, strict=True):
        distinct = list(dict.fromkeys(row[row > 0].tolist()))[:READ]
        assert got[got > 0].tolist() == distinct
        share = shares(row)
        assert size[: len(distinct)].tolist() == pytest.approx([share[i] for i in distinct], abs=1e-3)
        assert not size[len(distinct) :].any()


@pytest.mark.parametrize("length", [3, 20, 60])
@pytest.mark.parametrize("pulled", [pulls_of, pulls_by_tensors])
def test_a_history_adds_its_items_answers_to_what_is_near_them(pulled, length):
    pairs, item = table(2), torch.from_numpy(histories(3, 30, length)).long()
    row, pull = pulled(*map(torch.from_numpy, pairs), item)
    sums = torch.zeros(30, ITEMS).scatter_add_(1, row, pull)
    assert not pull[row == 0].any()
    for got, history in zip(sums, item.numpy(), strict=True):
        np.testing.assert_allclose(got, added(pairs, history), atol=1e-5)


def test_among_rows_that_are_not_all_items_only_these_are_pulled():
    pairs, item = table(4), torch.from_numpy(histories(5, 30)).long()
    ids = torch.tensor([0, 2, 3, 7, 11, 12, 30, 39])
    pulls = pulls_of(*map(torch.from_numpy, pairs), item, ids)
    every = np.array([added(pairs, history) for history in item.numpy()])
    at = torch.arange(len(ids)).expand(30, -1)
    np.testing.assert_allclose(pulls.at(at)[:, 1:], every[:, ids[1:]], atol=1e-5)
    np.testing.assert_allclose(pulls.rows(slice(3, 9)).at(at[3:9])[:, 1:], every[3:9, ids[1:]], atol=1e-5)


@pytest.mark.parametrize("slots", [2, 500])  # searched for, and known by number
def test_the_looks_that_have_an_answer_to_a_slots_item(slots):
    pairs, item = table(6), histories(7, slots)
    item[0, 0] = ITEMS + 5  # beyond the table
    shown = np.random.default_rng(8).integers(1, ITEMS, slots).astype(np.int32)
    looks, _ = looks_of(item)
    got = pairs_of(pairs, shown, looks)
    assert (got > 0).any() == (slots > 2)
    for t, e in np.ndindex(got.shape):
        row, place = divmod(int(got[t, e]), NEAR)
        here = np.flatnonzero(pairs.source == looks[t, e]) if looks[t, e] else []
        expected = [int(r) for r in here if shown[t] in pairs.near[r]]
        assert ([row] if got[t, e] else []) == expected
        if got[t, e]:
            assert pairs.near[row, place] == shown[t]


def test_what_is_known_of_pairs_goes_over_to_where_they_stand_now():
    old, new = table(9), table(10, rows=30)
    got = carried(old, new.source, new.near)
    known = {
        (int(s), int(to)): float(a)
        for s, row, each in zip(old.source, old.near, old.answer, strict=True)
        for to, a in zip(row, each, strict=True)
        if to
    }
    expected = [
        [known.get((int(s), int(to)), 0.0) for to in row] for s, row in zip(new.source, new.near, strict=True)
    ]
    assert got.any()
    np.testing.assert_array_equal(got, np.array(expected, np.float32))
    assert not carried(no_pairs(), new.source, new.near).any()


def test_coordinate_descent_comes_to_the_mode():
    rng = np.random.default_rng(11)
    slots, pairs, width = 3000, 12, 0.3
    pair = np.sort(rng.integers(0, pairs, 5000))
    slot = rng.integers(0, slots, 5000)
    look = rng.random(5000)
    rest = rng.normal(-1, 1, slots)
    every = np.zeros((slots, pairs))
    np.add.at(every, (slot, pair), look)
    chosen = rng.random(slots) < 1 / (1 + np.exp(-(rest + every @ rng.normal(size=pairs))))
    start = rng.normal(size=pairs)
    log_odds = rest + every @ start
    found = settle(pair, look, log_odds, chosen, slot, start, width, 60)
    p = 1 / (1 + np.exp(-(rest + every @ found.answer)))
    np.testing.assert_allclose(every.T @ (chosen - p) - found.answer / width, 0.0, atol=1e-3)
    np.testing.assert_allclose(log_odds, rest + every @ found.answer, atol=1e-9)  # moved along
    assert start @ start != pytest.approx(found.answer @ found.answer)


def test_what_is_near_is_what_is_gone_to_at_the_same_time_for_how_often_it_is_gone_to():
    views, rng = CoViews(), np.random.default_rng(12)
    views.grow(ITEMS)
    history = np.where(rng.random((3000, 3)) < 0.4, 1, rng.integers(1, ITEMS, (3000, 3))).astype(np.int32)
    to = np.where(rng.random(3000) < 0.5, history[:, 0] % (ITEMS - 1) + 1, rng.integers(1, ITEMS, 3000))
    views.observe(history, to.astype(np.int32))
    near = views.nearest(np.arange(1, ITEMS), NEAR)
    state = views.state()
    for item, row in zip(range(1, ITEMS), near, strict=True):
        others, count = state["id"][item], state["count"][item]
        cosine = count / np.sqrt(state["total"][others] + PRIOR)
        best = sorted(((c, int(o)) for c, o in zip(cosine, others, strict=True) if o), reverse=True)
        assert row[0] == item
        assert [o for c, o in best[: NEAR - 1]] == row[1:].tolist()
    # everybody goes to 1: counted it is the neighbour of most, and yet the nearest of few
    assert (state["id"][2:ITEMS, : NEAR - 1] == 1).any(axis=1).mean() > 0.9
    assert (near[:, 1] == 1).mean() < 0.1


def test_of_items_that_nothing_is_remembered_of_only_they_themselves_are_near():
    memory = RecallFit(Recall(1, [0]))
    memory.observe(np.array([[1, 2]], np.int32), np.array([3]))
    near = memory.nearest(np.array([0, 3, 900], np.int32))
    assert near[2].tolist() == [900, *[0] * (NEAR - 1)]
    assert near[1, 0] == 3
    assert set(near[1, 1:].tolist()) == {0, 1, 2}


def world(seed, count, strength):
    """Slots of which those are likelier to be chosen whose item's neighbour below was looked at; by so much."""
    rng = np.random.default_rng(seed)
    history = histories(seed + 1, count, length=4)
    item = np.where(rng.random(count) < 0.5, history[:, 1] % (ITEMS - 1) + 1, rng.integers(1, ITEMS, count))
    z = rng.normal(-1.5, 0.5, count).astype(np.float32)
    root = np.array([shares(h).get(int(i) - 1 or ITEMS - 1, 0.0) for i, h in zip(item, history, strict=True)])
    chosen = rng.random(count) < 1 / (1 + np.exp(-(z + strength * root)))
    return item.astype(np.int32), z, np.zeros(count, np.float32), chosen, history


def beside(source):
    """Each item, the one above it, and one that means nothing."""
    near = np.zeros((len(source), NEAR), np.int32)
    near[:, 0], near[:, 1] = source, source % (ITEMS - 1) + 1
    near[:, 2] = (source + 6) % (ITEMS - 1) + 1
    return near


def learnt(told, parts=30, nearest=beside):
    fit = StackFit(Stack(ITEMS), nearest)
    for part in zip(*(np.array_split(column, parts) for column in told), strict=True):
        fit.note(*part)
    fit.fit()
    return fit


def test_it_finds_who_answers_to_what():
    fit = learnt(world(13, 60_000, 1.5))
    above, itself, other = (fit.stack.answer[1:-1, m] for m in (1, 0, 2))
    assert float(above.mean()) == pytest.approx(1.5, abs=0.35)  # what is left of it by the prior
    assert abs(float(itself.mean())) < 0.15
    assert abs(float(other.mean())) < 0.15
    assert fit.answers.spread == SPREADS[1]


def test_where_nobody_answers_to_anything_it_finds_next_to_nothing():
    fit = learnt(world(14, 60_000, 0.0), parts=60)
    assert fit.answers.spread < 0.03
    assert float(fit.stack.answer.abs().max()) < 0.4
    assert fit.stack.weights.tolist() == pytest.approx([0.0, 1.0, 0.0], abs=0.1)


def test_a_layer_that_is_not_told_what_is_near_has_no_answers():
    fit = learnt(world(15, 20_000, 1.5), nearest=None)
    assert fit.stack.answers(torch.ones(1, 1, dtype=torch.int64)) is None
    assert len(fit.stack.source) == 1
    fit.restore(learnt(world(15, 20_000, 1.5)).state(ITEMS))  # of one that was
    assert len(fit.stack.source) == 1


def test_only_items_that_somebody_answers_to_have_a_row():
    told = world(19, 3000, 1.0)
    told[0][:] = np.where(told[0] < 20, told[0], 7)  # of the others none is ever shown
    fit = learnt(told)
    assert 10 < len(fit.stack.source) < ITEMS - 5
    assert fit.stack.source[0] == 0
    assert not fit.stack.near[0].any()
    shown = set(told[0].tolist())
    for near in fit.stack.near[1:].tolist():
        assert shown & set(near)


def test_what_is_fitted_is_what_is_read_however_long_histories_are():
    fit = learnt(world(20, 20_000, 1.5))
    item, history = np.arange(30, dtype=np.int32) % (ITEMS - 1) + 1, histories(21, 30, length=60)
    look, root = looks_of(history)
    assert (look > 0).all(axis=1).any()
    noted = Pairs.of(fit.answers.table, Looks(item, look, root)).sums(fit.answers.table.answer, 30)
    read = fit.stack.answers(torch.from_numpy(history).long())
    np.testing.assert_allclose(read.at(torch.from_numpy(item).long().unsqueeze(1))[:, 0], noted, atol=1e-3)
    assert noted.any()


def test_pairs_that_are_entered_are_read_as_the_tables_are():
    fit = learnt(world(24, 20_000, 1.5)).answers
    item, history = np.arange(3000, dtype=np.int32) % (ITEMS - 1) + 1, histories(25, 3000, length=9)
    looks = Looks(item, *looks_of(history))
    entered = fit.enter(looks)
    answer = np.random.default_rng(26).normal(size=len(entered.place))
    fit.table.answer[:] = 0.0
    fit.table.answer.flat[entered.place] = answer
    read = Pairs.of(fit.table, looks).sums(fit.table.answer, len(item))
    np.testing.assert_allclose(entered.pairs.sums(answer, len(item)), read, atol=1e-5)
    assert np.count_nonzero(read) > 1000


def test_pairs_that_were_hardly_seen_have_no_answer_yet():
    told = world(16, 20_000, 1.5)
    told[0][told[0] == 9] = 10
    told[0][:5], told[4][:5], told[3][:5] = 9, 8, True
    fit = learnt(told)
    row = int(np.flatnonzero(fit.stack.source.numpy() == 8)[0])
    assert fit.stack.near[row, 1] == 9
    assert float(fit.stack.answer[row, 1]) == 0.0


def test_between_fits_answers_follow_each_slot():
    fit = learnt(world(17, 20_000, 0.5))
    before, told = fit.stack.answer.clone(), fit.answers.information.copy()
    lucky = 10
    fit.note(
        np.full(lucky, 9, np.int32),
        np.full(lucky, -1.5, np.float32),
        np.zeros(lucky, np.float32),
        np.ones(lucky, np.bool_),
        np.full((lucky, 1), 8, np.int32),
    )
    assert fit.fitted == 20_000
    row = int(np.flatnonzero(fit.stack.source.numpy() == 8)[0])
    moved = torch.nonzero(fit.stack.answer != before).tolist()
    assert moved == [[row, 1]]
    first = float(fit.stack.answer[row, 1] - before[row, 1])
    assert first > 0
    # what the slots told is told: the next ones move it less than their error alone would have them
    p = 1 / (1 + np.exp(1.5 - float(before[row, 1])))
    assert float(fit.answers.information[row, 1]) > told[row, 1] + 5 * p * (1 - p)


def test_restored_it_goes_on_as_if_it_had_never_stopped():
    parts = list(zip(*(np.array_split(column, 20) for column in world(18, 12_000, 1.0)), strict=True))
    first = StackFit(Stack(ITEMS), beside)
    for part in parts[:11]:
        first.note(*part)
    again = StackFit(Stack(64), beside)
    again.restore(first.state(ITEMS))
    assert first.stack.answer.any()
    for part in parts[11:]:
        first.note(*part)
        again.note(*part)
    for name, value in first.state(ITEMS).items():
        np.testing.assert_array_equal(value, again.state(ITEMS)[name], err_msg=name)
    assert torch.equal(first.stack.answer, again.stack.answer)


@pytest.mark.parametrize(
    "damaged",
    [
        lambda t: t._replace(near=t.near[:3]),
        lambda t: t._replace(answer=t.answer[:, :2]),
        lambda t: t._replace(source=t.source[1:], near=t.near[1:], answer=t.answer[1:]),
        lambda t: t._replace(source=t.source[::-1].copy()),
        lambda t: t._replace(near=t.near + ITEMS),
        lambda t: t._replace(near=t.near - 1),
    ],
)
def test_a_damaged_table_is_refused(damaged):
    check_pairs(table(22), ITEMS)
    check_pairs(no_pairs(), 1)
    with pytest.raises(ValueError, match="what items answer to"):
        check_pairs(damaged(table(22)), ITEMS)


def test_all_loops_are_compiled_ahead():
    answer_fit.compile_answer_fit()
    compile_recall()
    loops = (
        *(answers._spread, answers._look),
        *(answer_fit._find_pairs, answer_fit._carry, answer_fit._descend),
    )
    before = [len(loop.signatures) for loop in (*loops, co_views._find_nearest)]
    memory = RecallFit(Recall(1, [0]))
    told = world(23, 3000, 1.0)
    memory.observe(told[4], told[0])
    fit = learnt(told, nearest=memory.nearest)
    fit.stack.answers(torch.from_numpy(told[4]).long())
    assert fit.stack.answer.any()
    assert [len(loop.signatures) for loop in (*loops, co_views._find_nearest)] == before
