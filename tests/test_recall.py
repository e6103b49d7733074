"""What is remembered of where users went: by the definition, and worth what it is worth for what comes next."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner import recall
from learner.agent import Agent
from learner.agent_settings import AgentSettings
from learner.co_views import WALKED, CoViews
from learner.entries import KINDS, PLACE_BOUNDS, PLACES
from learner.networks import score_all, score_at
from learner.recall import READ, SCALE, Recall, RecallFit, newest_entries
from learner.replay import Histories
from streaming.transitions import Amendments, Joined, Rejects, States, Transitions
from tests.test_agent import ITEMS, batch, new_agent, trained

H = 10
FIRST_PLACES = (0, *PLACE_BOUNDS)
SETTINGS = AgentSettings(history_length=H, vector_dim=2, dim=8, hidden=8, batch_size=16)


def went(histories, item):
    """Steps to items [T], unaided, from histories [T, H]."""
    n = len(item)
    histories, zeros = np.asarray(histories, np.int32), np.zeros(n, np.int64)
    at = np.arange(n, dtype=np.int32)
    name = (2 * (histories > 0)).astype(np.uint8)
    age_s = np.where(histories > 0, 30.0, 0.0).astype(np.float32)
    return Joined(
        States(zeros.astype(np.int32), zeros, zeros, histories, name, age_s, np.zeros_like(age_s)),
        Transitions(
            *(zeros.astype(np.int32), zeros, zeros.astype(np.int16), at, at, np.asarray(item, np.int32)),
            *(np.full(n, x, np.float32) for x in (0.1, 0.9, 0.1)),
            np.ones(n, np.bool_),
            zeros,
        ),
        Amendments(*(np.zeros(0, kind) for kind in (np.int32, np.int64, np.int16, np.float32))),
        Rejects(np.zeros(0, np.int64), np.zeros(0, np.uint8)),
    )


def history(*items):
    """[H], newest first."""
    return [*items, *[0] * (H - len(items))]


def memory_of(items):
    """With room for so many."""
    memory = Recall(KINDS, FIRST_PLACES)
    memory.led, memory.walk = torch.zeros(items, WALKED, dtype=torch.int32), torch.zeros(items, WALKED)
    return memory


def dense(recalled, which, items):
    """[B, items] of all rows."""
    return torch.zeros(len(recalled.row), items).scatter_add(1, recalled.row, getattr(recalled, which))


def test_what_is_recalled_is_what_the_definition_says():
    rng = np.random.default_rng(0)
    memory = memory_of(30)
    memory.led.copy_(torch.from_numpy(rng.integers(0, 30, (30, WALKED))).sort(dim=1, descending=True).values)
    memory.walk.copy_(torch.from_numpy(rng.random((30, WALKED))) * (memory.led > 0))
    memory.again.copy_(torch.from_numpy(rng.random(KINDS)))
    memory.place.copy_(torch.from_numpy(rng.random(PLACES)))
    memory.often.fill_(0.4)
    memory.pull.copy_(torch.from_numpy(rng.random(READ)))
    memory.walk[0] = memory.led[0] = 0
    item, kinds = (
        torch.from_numpy(rng.integers(0, 13, (5, 2 * H))),
        torch.from_numpy(rng.integers(0, KINDS, (5, 2 * H))),
    )
    item[:, 5] = 31  # of which nothing is remembered
    places = torch.tensor([sum(bound <= h for bound in PLACE_BOUNDS) for h in range(2 * H)])
    ways, back = np.zeros((2, 5, 32))
    for b in range(5):
        history, i = item[b].tolist(), 0
        for h, which in enumerate(history):
            if not which or which in history[:h]:
                continue
            size = memory.again[kinds[b, h]] + memory.place[places[i]] + 0.4 * np.log(history.count(which))
            back[b, which] = np.exp(float(size))
            if i < READ and which < 30:
                for to, walk in zip(memory.led[which].tolist(), memory.walk[which].tolist(), strict=True):
                    ways[b, to] += np.exp(float(memory.pull[i])) * walk
            i += 1
        assert i > READ
    expected = {"ways": np.log1p(SCALE * ways), "whole": np.log1p(SCALE * (ways + back))}
    one = memory.recalled(item, kinds, places, None)
    other = memory.recalled(item, kinds, places, None, memory.weights)  # as where gradients are wanted
    ids = torch.unique(torch.cat((item.flatten(), torch.tensor([0, 3, 29, 17]))))  # some rows alone
    at = torch.from_numpy(rng.integers(1, 30, (5, 4)))
    for which, wanted in expected.items():
        for found in (one, other):
            np.testing.assert_allclose(dense(found, which, 32)[:, 1:], wanted[:, 1:], rtol=1e-4, atol=1e-5)
        some = dense(memory.recalled(item, kinds, places, ids), which, len(ids))
        np.testing.assert_allclose(some[:, 1:], wanted[:, ids[1:]], rtol=1e-4, atol=1e-5)
    for row in (*one.row.tolist(), *other.row.tolist()):
        assert len(met := [i for i in row if i]) == len(set(met))
    torch.testing.assert_close(one.ways_at(at), dense(one, "ways", 32).gather(1, at))
    torch.testing.assert_close(one.ways_at(Elsewhere(at)), one.ways_at(at))
    led = memory.leads_to(item)
    for b in range(5):
        assert set(led[b].tolist()) | {0} == {int(i) for i in np.flatnonzero(ways[b])} | {0}


def test_items_whose_hashes_are_one_are_told_apart():
    memory = memory_of(5000)
    asked = torch.tensor([history(*(7 + 1024 * n for n in range(4)))])
    memory.led[7, :3] = torch.tensor([7 + 1024, 7 + 4096, 9])
    memory.walk[7, :3] = torch.tensor([0.5, 0.3, 0.1])
    places = torch.tensor([sum(bound <= h for bound in PLACE_BOUNDS) for h in range(H)])
    for weights in (None, memory.weights):
        recalled = memory.recalled(asked, torch.zeros_like(asked), places, None, weights)
        back = memory.place.exp()[places[:4]]
        masses = {7 + 1024 * n: float(back[n]) + (0.5 if n == 1 else 0.0) for n in range(4)}
        masses |= {7 + 4096: 0.3, 9: 0.1}
        found = {
            row: whole
            for row, whole in zip(*(x[0].tolist() for x in (recalled.row, recalled.whole)), strict=True)
            if row
        }
        assert found == pytest.approx({row: np.log1p(SCALE * mass) for row, mass in masses.items()}, rel=1e-4)


def test_it_begins_as_the_rule_that_it_is_made_of():
    fit, rng = RecallFit(memory := Recall(KINDS, FIRST_PLACES)), np.random.default_rng(0)
    rule = CoViews()
    rule.grow(40)
    for _ in range(20):
        histories, items = rng.integers(0, 40, (5, H)).astype(np.int32), rng.integers(1, 40, 5)
        fit.observe(histories, items)
        rule.observe(histories, items)
    for start in range(
        0, 40, 4
    ):  # walks are as they were when somebody came by last: now all are as they are
        changed = np.arange(start, start + 4)
        to, walk = rule.walks(changed)
        memory.led[changed], memory.walk[changed] = torch.from_numpy(to), torch.from_numpy(walk)
    asked = np.array([history(7, 3), history(5), history(9, 9, 4, 9)], np.int32)
    item = torch.from_numpy(asked.astype(np.int64))
    places = torch.tensor([sum(bound <= h for bound in PLACE_BOUNDS) for h in range(H)])
    found = dense(memory.recalled(item, torch.zeros_like(item), places, None), "whole", 40)
    np.testing.assert_allclose(found[:, 1:], np.log1p(SCALE * rule.walk_scores(asked, 40))[:, 1:], rtol=1e-4)


def test_walks_from_what_a_step_changes_are_as_co_views_have_them_after_it():
    fit, rng = RecallFit(memory := Recall(KINDS, FIRST_PLACES)), np.random.default_rng(0)
    assert not memory.has_any
    beside = CoViews()
    beside.grow(60)
    for _ in range(30):
        histories, items = rng.integers(0, 60, (5, H)).astype(np.int32), rng.integers(1, 60, 5)
        fit.observe(histories, items)
        changed = beside.observe(histories, items)
        assert set(items) <= set(changed)
        to, walk = beside.walks(changed)
        np.testing.assert_array_equal(memory.led[changed], to)
        np.testing.assert_array_equal(memory.walk[changed], walk)
    assert memory.has_any
    assert beside.observe(np.array([[7, 0, 9, 7]], np.int32), np.array([8])).tolist() == [7, 8, 9]


def circles(rng, n, others=0):
    """Steps in a hundred circles of five items, each new to its user; with `others`, as many to any item at all."""
    histories, items = [], []
    for _ in range(n):
        circle, at = int(rng.integers(100)), int(rng.integers(5))
        last = [5 * circle + (at + k) % 5 + 1 for k in range(3)]
        histories.append(history(*last[1::-1]))
        items.append(last[2] if rng.random() >= others else int(rng.integers(1, 501)))
    return went(histories, items)


def hit_rate(agent, rng):
    """Of the ten first by the next-item head, as the network stands."""
    test = circles(rng, 300)
    states = agent._state(Histories(*(getattr(test.states, name) for name in Histories._fields)))
    with torch.no_grad():
        keys = agent.online.keys(agent.items)
        scores = agent.online.next_all(agent.online.queries(states, keys), keys)
    scores[:, 0] = -torch.inf
    first = scores.topk(10, dim=1).indices
    return float(
        (first == torch.from_numpy(test.transitions.action.astype(np.int64))[:, None])
        .any(dim=1)
        .float()
        .mean()
    )


def learnt(settings, steps, others=0.0, seed=0):
    """An agent that saw so many steps in circles in blocks of a hundred, and whose network learnt nothing of them."""
    rng = np.random.default_rng(seed)
    agent = Agent(settings, seed=seed)
    agent.grow(500)
    agent.updates = 1  # else nothing is learnt before
    for _ in range(steps // 100):
        agent.foretell(circles(rng, 100, others))
    return agent, rng


@pytest.mark.parametrize("exact_items", [AgentSettings.exact_items, 1])
def test_where_others_went_is_foretold_after_a_few_steps_each(exact_items):
    settings = replace(SETTINGS, exact_items=exact_items, candidates=100)
    agent, rng = learnt(settings, 3000)  # six of each item
    assert hit_rate(agent, rng) > 0.9
    without, rng = learnt(replace(settings, recall=False), 3000)
    assert hit_rate(without, rng) < 0.1


def test_a_memory_does_not_vouch_for_itself():
    """Where steps lead anywhere, co-views tell nothing; of what was learnt already they seem to tell all."""
    agent, _ = learnt(SETTINGS, 3000, others=1.0)
    rng = np.random.default_rng(5)
    vouching = Agent(SETTINGS, seed=0)
    vouching.grow(500)
    vouching.updates = 1
    steps = circles(rng, 100, others=1.0)
    for _ in range(30):
        vouching.foretell(steps)
    honest, vain = (
        float(each.online.recall.pull[0] + each.online.recall.power) for each in (agent, vouching)
    )
    assert honest < -1.0
    assert vain > 1.0


def test_slots_of_slates_are_not_remembered():
    agent = new_agent(SETTINGS)
    agent.grow(500)
    steps = circles(np.random.default_rng(0), 50)
    steps.transitions.organic[:] = False
    agent.foretell(steps)
    assert not agent.online.recall.has_any


def test_what_users_come_back_to_is_told_from_what_they_leave():
    rng = np.random.default_rng(1)
    agent = Agent(SETTINGS, seed=0)
    agent.grow(500)
    agent.updates = 1
    for _ in range(30):
        items = rng.integers(1, 501, (100, 3))
        agent.foretell(
            went([history(*row) for row in items], items[np.arange(100), rng.integers(3, size=100)])
        )
    memory = agent.online.recall
    back = (memory.again.max() + memory.place[:3].min()).exp()
    assert float(memory.power.exp() * torch.log1p(SCALE * back)) > 5.0  # of 500 items, for one of three


def test_q_leans_on_it_by_the_prior():
    agent = trained(range(4), new_agent(replace(SETTINGS, vector_dim=4)))
    agent.foretell(went([history(1, 2)] * 3, [3, 4, 5]))
    network = agent.online
    network.recall.pull.fill_(0.7)
    network.trust.data.fill_(0.6)
    state = agent._state(batch(9).state)
    with torch.no_grad():
        keys = agent.online.keys(agent.items)
        queries = network.queries(state, keys)
        ids = torch.arange(ITEMS + 1).expand(len(state.item), -1)
        z = network.parts_at(queries, keys, ids)[0]
        recalled = dense(queries.choice.recalled, "ways", ITEMS + 1)
        assert recalled.abs().sum() > 0
        network.recall.led = network.recall.led[:1]
        before = network.parts_at(network.queries(state, keys), keys, ids)[0]
    torch.testing.assert_close(z[:, 1:], (before + network.trust * recalled)[:, 1:])


def test_it_stands_in_for_choices_until_there_are_some():
    agent = Agent(SETTINGS, seed=0)
    agent.grow(ITEMS)
    trained(range(2), agent)
    assert float(agent.online.trust) > 0.25
    for before, choices, share in ((1, 100, 0.5), (1, 900, 0.1), (9001, 9901, 0.0)):
        told = went([history(1, 2)] * 900, [3] * 900)
        told.transitions.organic[: choices - before + 1] = False
        told.transitions.reward[choices - before :] = 0.0
        agent._choices = before
        agent.foretell(told)
        prior = agent.online.prior.item()
        trained(range(2, 3), agent)
        assert float(agent.online.trust) == pytest.approx(prior * share)
        again = Agent(SETTINGS, seed=5)
        again.restore(agent.state())
        assert again._choices == choices


def test_it_is_not_looked_up_once_there_are_many_choices(monkeypatch):
    agent = Agent(replace(SETTINGS, stack=True), seed=0)
    agent.grow(ITEMS)
    agent.foretell(went([history(1, 2)] * 3, [3, 4, 5]))
    agent._choices = 9900
    trained(range(2), agent)
    assert float(agent.target.trust) > 0.0
    agent._choices += 1
    monkeypatch.setattr(Recall, "recalled", None)
    trained(range(2, 4), agent)
    assert float(agent.online.trust) == float(agent.target.trust) == 0.0
    told = went([history(1, 2)] * 3, [3, 4, 5])
    told.transitions.organic[:] = False
    agent.foretell(told)
    assert agent._stack.slots == 3


def test_servers_need_not_know_where_others_went_once_choices_say_more():
    agent = trained(range(4), new_agent(SETTINGS))
    agent.foretell(went([history(1, 2)] * 3, [3, 4, 5]))
    assert len(agent.tensors()["both.recall.led"]) == len(agent.online.recall.led) > 1
    agent._choices = 10**6
    trained(range(4, 5), agent)
    for name in ("led", "walk"):
        assert len(agent.tensors()[f"both.recall.{name}"]) == 1
        assert len(agent.state()[f"recall.{name}"]) > 1


def test_an_agent_restored_remembers_as_if_it_had_never_stopped():
    first, rng = learnt(SETTINGS, 500)
    again = Agent(SETTINGS, seed=99)
    again.restore(first.state())
    more = circles(rng, 200)
    for agent in (first, again):
        agent.foretell(more)
    one, other = first.state(), again.state()
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert one["recall.counters"][0] > 4


def test_of_many_steps_at_once_a_part_is_learnt_from_and_all_are_remembered(monkeypatch):
    seen = []
    monkeypatch.setattr(recall.RecallFit, "learn", lambda self, organic, *_: seen.append(len(organic)))
    agent, rng = learnt(SETTINGS, 100)
    agent.foretell(circles(rng, 2500))
    assert seen == [128, 128, 113]
    totals = agent._recall._co_views.state()["total"]
    assert totals.sum() == pytest.approx(2600 * (1.5 * 1.7), rel=1e-3)


def test_once_there_have_been_many_blocks_few_steps_are_not_learnt_from_each_time():
    agent, rng = learnt(SETTINGS, 200)
    agent._recall.blocks = recall.YOUNG
    for _ in range(11):
        agent.foretell(circles(rng, 100))
    assert agent._recall.blocks == recall.YOUNG + 1
    agent.foretell(circles(rng, 100))
    assert agent._recall.blocks == recall.YOUNG + 1


def test_whoever_is_given_the_weights_changes_nothing_of_what_is_remembered():
    agent, _ = learnt(SETTINGS, 500)
    before = agent.state()
    agent.tensors()
    after = agent.state()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def test_without_it_nothing_is_kept():
    agent = trained(range(2), new_agent(replace(SETTINGS, vector_dim=4, recall=False)))
    agent.foretell(went([history(1, 2)], [3]))
    trained(range(2, 4), agent)
    assert not agent.online.recall.has_any
    assert agent.tensors()["both.recall.led"].shape == (1, WALKED)
    again = Agent(agent.settings, seed=9)
    again.restore(agent.state())
    again.update(batch(5))


def test_scores_of_all_items_and_of_some_agree_with_and_without_gradients():
    agent, rng = learnt(SETTINGS, 1000)
    told = circles(rng, 16)
    network = agent.online
    network.trust.data.fill_(0.7)
    network.copy.data.normal_()
    state = agent._state(Histories(*(getattr(told.states, name) for name in Histories._fields)))
    keys = network.keys(agent.items)
    queries = network.queries(state, keys)
    ids = torch.arange(501).expand(16, -1)
    some = score_at(queries.choice, keys.choice, keys.category, ids)
    every = score_all(queries.choice, keys.choice, keys.category)
    assert every.requires_grad
    torch.testing.assert_close(every[:, 1:], some[:, 1:])
    with torch.no_grad():
        queries = network.queries(state, keys)
        torch.testing.assert_close(score_all(queries.choice, keys.choice, keys.category), every.detach())
    assert float((every - every.mean()).detach().abs().max()) > 0.1
    every[:, 1:].sum().backward()
    assert network.trust.grad is None


def test_entries_are_counted_on_the_processor_as_elsewhere():
    item = torch.from_numpy(np.random.default_rng(0).integers(0, 5, (50, 9)))
    newest, often = newest_entries(item)
    elsewhere = newest_entries(Elsewhere(item))
    assert torch.equal(newest, elsewhere[0])
    torch.testing.assert_close(often * newest, elsewhere[1] * newest)


class Elsewhere:
    """A tensor that says it is on another device."""

    def __init__(self, tensor):
        self._tensor, self.device = tensor, torch.device("meta")

    def __getattr__(self, name):
        return getattr(self._tensor, name)

    def __gt__(self, other):
        return self._tensor > other

    @classmethod
    def __torch_function__(cls, what, types, args=(), kwargs=None):
        return what(*(a._tensor if isinstance(a, cls) else a for a in args), **(kwargs or {}))
