"""The agent: the same batches give the same weights, also after a restart, and growing keeps what was learnt."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from learner.agent import Agent
from learner.agent_settings import AgentSettings
from learner.entries import entries_of
from learner.known_items import MEETINGS
from learner.networks import (
    MAX_SLOTS,
    SMALLEST,
    SUM_SCALE,
    _price_features,
    first_rows,
    score_all,
)
from learner.objective import Objective
from learner.replay import empty_batch
from tests.serving_process import VIEWS

SETTINGS = AgentSettings(
    dim=8, hidden=8, history_length=4, vector_dim=2, batch_size=16, target_tau=0.0, target_sync_updates=3
)
ITEMS = 12


def batch(seed, items=ITEMS):
    rng = np.random.default_rng(seed)
    out = empty_batch(16, 4)
    for state in (out.state, out.next_state):
        state.item[:] = rng.integers(0, items + 1, (16, 4))
        state.name[:] = rng.integers(0, 5, (16, 4))
        state.age_s[:] = rng.exponential(100.0, (16, 4))
    out.slate[:, :3] = rng.integers(1, items + 1, (16, 3))
    out.slate_slot[:, :3] = np.arange(3)
    out.slate_reward[:, :3] = rng.random((16, 3)) < 0.3
    out.action[:], out.slot_reward[:] = out.slate[:, 0], out.slate_reward[:, 0]
    out.reward[:] = out.slot_reward
    out.discount[:], out.weight[:], out.slots[:] = 0.9, 1.0, 3
    out.organic[:4] = True
    return out


def new_agent(settings=SETTINGS):
    agent = Agent(settings, seed=1)
    agent.grow(ITEMS)
    return agent


def trained(seeds, agent=None):
    agent = agent or new_agent()
    for seed in seeds:
        agent.update(batch(seed))
    return agent


def assert_same(one, other):
    one, other = one.state(), other.state()
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_the_same_seed_and_batches_give_the_same_weights_bit_for_bit():
    assert_same(trained(range(5)), trained(range(5)))


def test_an_agent_restored_goes_on_as_if_it_had_never_stopped():
    again = Agent(SETTINGS, seed=99)
    again.restore(trained(range(4)).state())
    assert_same(trained(range(4, 8), again), trained(range(8)))


@pytest.mark.parametrize("exact_items", [100, 1])
def test_what_comes_after_a_restart_is_met_as_it_would_have_been_without(exact_items):
    agents = [trained(range(20), new_agent(replace(SETTINGS, exact_items=exact_items))) for _ in range(2)]
    again = Agent(agents[0].settings, seed=99)
    again.restore(agents[0].state())
    agents[0] = again
    for agent in agents:
        agent.grow(20)  # within the room that there is
        for seed in range(20, 24):
            agent.update(batch(seed, items=20), kept=40)
    assert_same(*agents)


def test_new_items_are_learnt_of_from_their_first_batch_on():
    """Not as if they had been there, unseen, since there was room for them."""
    young, old = new_agent(), trained(range(20))
    for agent in (young, old):
        agent.grow(20)
        agent.update(batch(1, items=20))
    told = [agent.state()["response.information"][ITEMS + 1 :, 0].sum() for agent in (young, old)]
    assert told[1] > 0.3 * told[0]


def test_slates_may_be_longer_than_places_are_told_apart():
    agent = trained(range(3))
    agent.slots = 40.0
    agent.grow(60)
    agent.update(batch(3))
    keys = agent.online.keys(agent.items)
    queries = agent.online.queries(agent._state(batch(0).state), keys)
    ids, slot = torch.full((16, 2), 5), torch.tensor([MAX_SLOTS - 1, MAX_SLOTS + 8])
    with torch.no_grad():
        chance = agent.online.chance_at(queries, keys, ids, slot)
    assert torch.equal(chance[:, 0], chance[:, 1])


def test_a_slate_counts_for_one_in_how_long_they_are_however_many_slots_it_has():
    """Half of the slates have one slot and half twelve, of which one in thirteen transitions is of the former; those of
    two slots are drawn ten times as often as they should be, and weighed back."""
    agent, told, rng = new_agent(), batch(0), np.random.default_rng(0)
    for _ in range(3000):
        told.organic[:] = np.arange(16) > 2  # few rows tell of slates
        told.slots[:] = np.where(told.organic, 1, rng.choice([1, 12, 2], 16, p=[1 / 33, 12 / 33, 20 / 33]))
        told.weight[:] = np.where(told.slots == 2, 0.1, 1.0)
        agent._rows(told, 1.0)
    assert agent.slots == pytest.approx((1 + 12 + 2) / 3, abs=0.5)
    again = Agent(SETTINGS)
    again.restore(agent.state())
    for each in (agent, again):
        each._rows(told, 1.0)
    assert again.slots == agent.slots
    again.restore({**agent.state(), "slots": np.array([7.0])})  # as they were kept before
    assert again.slots == 7.0
    again._rows(told, 1.0)
    assert 6.9 < again.slots < 7.1


def test_slots_after_an_unknown_item_are_learnt_from():
    agent, told = new_agent(), batch(0)
    told.slate[:] = told.slate_reward[:] = 0
    told.slate[:, :4], told.slate_slot[:, :4] = [3, 0, 0, 7], np.arange(4)
    told.slate_reward[:, 3] = 1.0
    rows = agent._rows(told, 1.0)
    assert rows.slate[0].tolist() == [3, 0, 0, 7]
    assert rows.present[0].tolist() == [True, False, False, True]
    assert rows.slot[0].tolist() == [0, 1, 2, 3]
    assert rows.slate_reward[0, 3] == 1.0 / agent.unit
    assert rows.each[0].tolist() == [0.5, 0.0, 0.0, 0.5]
    told.slate[:] = 0  # of nothing that is known
    assert agent._rows(told, 1.0).slate.shape == (16, 1)


def test_no_single_record_makes_what_is_learnt_overflow():
    agent, odd = new_agent(), batch(0)
    agent.items.vector[3] = torch.tensor([3e38, -3e38])
    odd.state.value[:] = odd.next_state.value[:] = 3e38
    for seed in range(20):
        last = agent.update(odd if seed == 5 else batch(seed))
        assert np.isfinite(last.loss)
    assert all(np.isfinite(value).all() for value in agent.state().values())
    assert last.loss < 100


def test_one_absurd_reward_does_not_drown_what_is_learnt_and_a_new_currency_gets_through():
    def earning(seed, better=7.0, **odd):
        """Items of the upper half earn so much; an odd one in one slot."""
        made = batch(seed)
        made.slate_reward[:] = np.where(made.slate > 5, better, 1.0) * (made.slate_reward > 0)
        made.slate_reward[0, 0] = odd.get("slot", made.slate_reward[0, 0])
        made.slot_reward[:] = made.reward[:] = made.slate_reward[:, 0]
        return made

    agent = new_agent()
    for seed in range(300):
        agent.update(earning(seed))
    before = agent.unit
    for seed in range(300, 320):  # it may be drawn more than once
        agent.update(earning(seed, slot=1e8) if seed % 10 == 0 else earning(seed))
    assert before < agent.unit < 2 * before
    for seed in range(320, 900):
        agent.update(earning(seed, better=7e6))
    assert agent.unit > 1e6


def test_growing_keeps_what_was_learnt():
    agent = trained(range(4))
    before = agent.tensors()
    agent.grow(3000)
    for name, tensor in agent.tensors().items():
        kept = tensor[: len(before[name])] if tensor.ndim and len(tensor) != len(before[name]) else tensor
        assert torch.equal(kept, before[name]), name


def test_the_target_follows_only_at_a_sync():
    agent = trained(range(2))
    assert not torch.equal(agent.online.query.weight, agent.target.query.weight)
    agent.update(batch(2))
    assert torch.equal(agent.online.query.weight, agent.target.query.weight)
    assert agent.last_target_sync_update == 3


def test_the_target_follows_a_little_at_each_update_after_the_mean_of_the_first():
    agent, weights = new_agent(replace(SETTINGS, target_tau=0.25)), []
    for seed in range(6):
        before = agent.target.query.weight.clone()
        agent.update(batch(seed))
        weights.append(agent.online.query.weight.detach().clone())
        mean = torch.stack(weights).mean(dim=0) if seed < 4 else 0.75 * before + 0.25 * weights[-1]
        torch.testing.assert_close(agent.target.query.weight, mean)
    assert agent.last_target_sync_update == agent.updates == 6


def test_only_the_ids_of_items_that_a_vector_describes_are_drawn_to_zero():
    agent = new_agent(replace(SETTINGS, weight_decay=1.0, learning_rate=0.01))
    agent.items.vector[:5] = 1.0
    agent._describe()
    with torch.no_grad():
        agent.online.tower.id.weight.fill_(1.0)
    before = {name: p.detach().clone() for name, p in agent.online.named_parameters()}
    agent._decay()
    for name, parameter in agent.online.named_parameters():
        if name == "tower.id.weight":
            torch.testing.assert_close(parameter[:5], torch.full_like(parameter[:5], 0.99))
            assert torch.equal(parameter[5:], before[name][5:])
        else:
            assert torch.equal(parameter, before[name]), name


def test_ids_start_apart_where_no_vector_tells_them_apart_and_at_zero_where_one_does():
    agent = new_agent()
    agent.items.vector[2] = 1.0
    agent._describe()
    for network in (agent.online, agent.target):
        rows = network.tower.id.weight.detach()
        assert not rows[2].any()
        assert torch.cdist(rows[[1, 3, 4]], rows[[1, 3, 4]]).fill_diagonal_(1.0).min() > 0.1
        assert not rows[:, -1].any()  # no item is better liked than others before anything is known
    agent.items.seen[5:7] = True  # were learnt of, the one often enough to have a row of its own
    agent.meet(np.repeat(5, MEETINGS))
    agent.items.vector[5:7] = 1.0
    agent._describe()
    assert agent.online.tower.id.weight[5].abs().sum() > 0
    assert not agent.online.tower.id.weight[6].any()


def catalog(rows, vector=None):
    """Which knows item 1 alone, and what it says of it."""
    known, vectors = np.arange(rows) == 1, np.zeros((rows, 2), np.float32)
    vectors[1:2] = 0.0 if vector is None else vector
    hashes, yes = np.zeros(rows, np.uint64), np.ones(rows, np.bool_)
    price = np.full(rows, np.nan, np.float32)
    return SimpleNamespace(
        **{"category": hashes, "brand": hashes, "price": price, "in_stock": yes, "gone": ~yes},
        **{"known": known, "recorded": known, "vector": vectors},
    )


def described(agent, *ids):
    """A request says what these items are."""
    items = catalog(len(ids))
    items.known, items.vector = np.zeros(len(ids), np.bool_), np.ones((len(ids), 2), np.float32)
    agent.describe(np.array(ids), items)


@pytest.mark.parametrize("exact_items", [100, 1])
def test_an_item_described_after_it_was_learnt_of_goes_on_after_a_restart_as_if_there_had_been_none(
    exact_items,
):
    def first():
        agent = new_agent(replace(SETTINGS, exact_items=exact_items, candidates=1, target_tau=0.1))
        agent.set_catalog(catalog(ITEMS + 1))
        agent.meet(np.repeat([5, 6], [1, MEETINGS]))
        trained(range(10), agent)
        described(agent, 5, 6, 5)
        return trained(range(10, 12), agent)

    unbroken, again = first(), Agent(first().settings, seed=99)
    again.restore(first().state())
    again.set_catalog(catalog(ITEMS + 1))  # as the learner does after a restart
    for agent in (unbroken, again):
        agent.meet(np.array([5, 5]))
        trained(range(12, 20), agent)
    assert_same(again, unbroken)


@pytest.mark.parametrize("exact_items", [100, 1])
@pytest.mark.parametrize("by_catalog", [True, False])
def test_what_was_learnt_of_an_items_id_goes_when_it_becomes_described_and_not_again(by_catalog, exact_items):
    agent = new_agent(replace(SETTINGS, exact_items=exact_items, candidates=1, target_tau=0.1))
    agent.set_catalog(catalog(ITEMS + 1))
    trained(range(10), agent)
    before = {name: value for name, value in agent.state().items() if name.endswith("tower.id.weight")}
    assert all(value[1].any() for value in before.values() if value.ndim)
    if by_catalog:
        agent.set_catalog(catalog(ITEMS + 1, vector=1.0))
    else:
        agent.items.vector[1] = 1.0
        agent._describe(torch.tensor([1]))
    now = agent.state()
    for name, value in before.items():  # both networks, and Adam's moments
        if value.ndim:
            assert not now[name][1].any()
            np.testing.assert_array_equal(now[name][2:], value[2:])
    trained(range(10, 13), agent)
    assert not agent.online.tower.id.weight[1].any()
    assert not agent.items.seen[1]
    with torch.no_grad():
        agent.online.tower.id.weight[1] = 0.5
    agent.set_catalog(catalog(ITEMS + 1, vector=2.0))  # it was described before
    assert (agent.online.tower.id.weight[1] == 0.5).all()


def test_rows_that_lie_behind_are_drawn_to_zero_for_as_long_only_as_a_vector_described_them():
    agent = new_agent(replace(FEW, weight_decay=1.0, learning_rate=0.01))
    agent.grow(300)
    trained(range(3), agent)
    agent.meet(np.repeat(250, MEETINGS))
    agent.items.seen[250] = True
    lies = agent._at[250].item()
    row = agent.online.tower.id.weight[250].detach().clone()
    trained(range(3, 20), agent)
    assert agent._at[250] == lies  # no update has read it
    described(agent, 250)
    assert torch.equal(agent.online.tower.id.weight[250], row)
    trained(range(20, 22), agent)
    agent._catch_up()
    torch.testing.assert_close(agent.online.tower.id.weight[250], row * 0.99**2)


def test_what_ids_start_from_does_not_depend_on_when_room_was_made_for_them():
    at_once, bit_by_bit = new_agent(), new_agent()
    at_once.grow(5000)
    for items in (1500, 2100):
        bit_by_bit.grow(items)
    again = new_agent()
    again.restore(bit_by_bit.state())
    for agent in (bit_by_bit, again):
        agent.grow(5000)
        assert_same(agent, at_once)
    torch.testing.assert_close(first_rows(0, 3000, 8)[1000:2500], first_rows(1000, 2500, 8))


def test_only_items_that_a_vector_describes_are_now_and_then_treated_as_new():
    agent = new_agent(replace(SETTINGS, forget=1.0))
    assert not agent._forgotten().any()
    agent.items.vector[[2, 5]] = 1.0
    agent._describe()
    assert torch.nonzero(agent._forgotten()).flatten().tolist() == [2, 5]


def test_returns_and_rewards_do_not_bend_the_encoder_or_the_items():
    light = trained(range(4), new_agent(replace(SETTINGS, td_weight=0.1, reward_weight=0.1)))
    heavy = trained(range(4), new_agent(replace(SETTINGS, td_weight=50.0, reward_weight=0.0)))
    for name, parameter in light.online.named_parameters():
        if name.startswith(("encoder.", "tower.", "organic_key.", "copy.", "alike.")):
            assert torch.equal(parameter, heavy.online.get_parameter(name)), name
    assert not torch.equal(light.online.query.weight, heavy.online.query.weight)


def test_values_are_read_from_states_and_items_however_large_their_vectors_have_grown():
    agent = trained(range(4), new_agent(replace(SETTINGS, centred=True)))
    network, known = agent.online, agent.online.response
    known.state_scale.fill_(1.0)  # larger than the least that counts
    known.item_scale.fill_(1.0)
    state = agent._state(batch(9).state)

    def said():
        network.look()
        keys = network.keys(agent.items)
        queries = network.queries(state, keys)
        return keys.gain, queries.gain, queries.unchosen

    keys, queries, unchosen = said()
    forward = network.encoder.forward
    network.encoder.forward = lambda *told: (3.0 * forward(*told)[0], *forward(*told)[1:])
    with torch.no_grad():
        known.state_mean *= 3.0
        known.state_scale *= 3.0
    for now, before in zip(said(), (keys, queries, unchosen), strict=True):
        torch.testing.assert_close(now, before)
    with torch.no_grad():
        for grown in network.tower.parameters():
            grown *= 2.0
        known.item_mean *= 2.0
        known.item_scale *= 2.0
    torch.testing.assert_close(said()[0], keys)


@pytest.mark.parametrize("exact_items", [1, 1000])
def test_how_items_answer_to_being_shown_is_learnt_of_those_that_were(exact_items):
    agent = new_agent(replace(SETTINGS, exact_items=exact_items, candidates=1))
    agent.grow(300)
    slates = batch(1, items=ITEMS - 1)
    slates.slate[slates.slate > 0] += 200  # others than histories hold
    slates.slate_reward[slates.slate == 202] = 1.0
    for _ in range(20):
        agent.update(slates, kept=1000)
    own = agent.online.response.own
    assert own[202, -1] == own[:, -1].max() > 0
    shown = np.unique(slates.slate[~slates.organic])
    assert torch.nonzero(own.any(dim=1)).flatten().tolist() == shown[shown > 0].tolist()


def test_that_unaided_choices_earn_otherwise_says_nothing_of_the_items_they_went_to():
    agent = new_agent()
    for seed in range(300):
        told = batch(seed)
        told.organic[:] = np.arange(16) < 14  # nearly all, and they went to a few items
        told.slate[:14, 1:], told.slate[:14, 0] = 0, 1 + np.arange(14) % 3
        told.slate_reward[:14], told.slate_reward[14:] = 0.0, told.slate_reward[14:] > 0
        told.action[:], told.slot_reward[:] = told.slate[:, 0], told.slate_reward[:, 0]
        told.reward[:], told.discount[:], told.slots[:14] = told.slot_reward, 0.0, 1
        agent.update(told)
    with torch.no_grad():
        keys = agent.online.keys(agent.items)
        queries = agent.online.queries(agent._state(batch(99).state), keys)
        earns = agent.online.parts_at(queries, keys, torch.arange(1, ITEMS + 1).expand(16, -1))[1]
    assert (earns - 1).abs().max() < 0.15  # a click earns one, whatever it is on


def test_what_an_entry_does_to_choice_beside_interest_takes_many_clicks_to_say():
    few, many = new_agent(), new_agent()
    for _ in range(300):
        few.update(batch(1))
        many.update(batch(1), kept=300 * 16)
    pulls = [agent.online.response.copy.abs().max() for agent in (few, many)]
    assert 0 < 5 * pulls[0] < pulls[1], pulls


def test_scores_at_items_are_those_of_the_whole_shelf():
    agent = trained(range(3))
    with torch.no_grad():
        keys = agent.online.keys(agent.items)
        queries = agent.online.queries(agent._state(batch(9).state), keys)
        ids = torch.tensor([[1, 5, 7]]).expand(16, 3)
        q = agent.online.q_all(queries, keys)
        torch.testing.assert_close(agent.online.q_at(queries, keys, ids), q.gather(1, ids))
        assert score_all(queries.choice, keys.choice, keys.category).shape == (16, ITEMS + 1)


def test_maximising_over_candidates_is_maximising_over_the_catalog_where_they_are_all_of_it():
    settings = replace(SETTINGS, forget=0.0)
    exact = trained(range(3), new_agent(settings))
    # 300 draws of 13 rows leave none out, bar one time in a billion
    drawn = trained(range(3), new_agent(replace(settings, exact_items=1, candidates=300)))
    for name, parameter in exact.online.named_parameters():
        torch.testing.assert_close(drawn.online.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)


def test_few_candidates_still_hold_the_batch_and_teach_the_same_actions():
    agent = trained(range(3), new_agent(replace(SETTINGS, exact_items=1, candidates=1)))
    batch_items = np.unique(batch(0).slate)
    table = agent.online.tower.id.weight.detach()
    assert (table[batch_items[batch_items > 0]].abs().sum(dim=1) > 0).all()


def test_without_a_future_only_what_a_choice_earns_at_once_counts():
    agent = new_agent(replace(SETTINGS, gamma=0.0))
    for seed in range(5):
        told = batch(seed)
        told.discount[:] = 0.0
        done = agent.update(told)
        assert np.isfinite(done.loss)
        assert "td" not in done.losses
    with torch.no_grad():
        keys = agent.online.keys(agent.items)
        queries = agent.online.queries(agent._state(batch(9).state), keys)
        ids = torch.tensor([[1, 5, 7]]).expand(16, 3)
        choice, reward, _ = agent.online.parts_at(queries, keys, ids)
        torch.testing.assert_close(agent.online.q_at(queries, keys, ids), torch.sigmoid(choice) * reward)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("slots", "quantiles"), [(1, 1), (3, 1), (3, 5)])
def test_the_next_value_is_the_best_slate_of_the_network_that_chooses_by_the_one_that_judges(
    double, slots, quantiles
):
    settings = replace(
        SETTINGS, double=double, slate_size=slots, target_sync_updates=100, quantiles=quantiles
    )
    agent = trained(range(3), new_agent(settings))
    with torch.no_grad():  # networks that disagree
        for network, seed in ((agent.online, 1), (agent.target, 2)):
            for name, parameter in network.named_parameters():
                if name not in VIEWS:  # these are of a size
                    noise = torch.Generator().manual_seed(seed)
                    parameter += 0.5 * torch.randn(parameter.shape, generator=noise)
    told = batch(7)
    told.discount[:4] = 0.0
    rows = agent._rows(told, 1.0)
    values = agent._objective.next_value(rows, agent._objective.keys(rows, agent.items), agent.items)
    agree = 0
    with torch.no_grad():
        q = {}
        for network in (agent.online, agent.target):
            keys = network.keys(agent.items)
            queries = network.queries(agent._state(told.next_state), keys)
            p = score_all(queries.choice, keys.choice, keys.category)
            q[network] = (
                0.97 * queries.unchosen,
                network.advantage_all(queries, keys),
                p,
                network.gain_all(queries, keys),
            )
        chooser = q[agent.online if double else agent.target][1]
        unchosen, judge, log_odds, gain = q[agent.target]
        place = [
            0.0,
            *agent.target.position[1:slots].tolist(),
        ]  # what is shown further down is looked at less
        for b in range(16):
            best = sorted(range(1, ITEMS + 1), key=lambda i, b=b: -float(chooser[b, i]))[:slots]
            odds = [float(log_odds[b, i]) + place[k] for k, i in enumerate(best)]
            worth = [float(gain[b, i]) / (1 + np.exp(-at)) for i, at in zip(best, odds, strict=True)]
            expected = [float(x) + sum(worth) for x in unchosen[b]] if b >= 4 else [0.0] * quantiles
            assert values[b].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-5)  # of float32
            agree += best == sorted(range(1, ITEMS + 1), key=lambda i, b=b: -float(judge[b, i]))[:slots]
    assert (agree == 16) is not double


FEW = replace(SETTINGS, exact_items=1, candidates=1, target_tau=0.1)


def test_an_agent_of_a_large_catalog_restored_goes_on_as_if_it_had_never_stopped():
    first = trained(range(4), new_agent(FEW))
    first.tensors()  # as for a server: changes nothing
    again = Agent(FEW, seed=99)
    again.restore(first.state())
    assert_same(trained(range(4, 8), again), trained(range(8), new_agent(FEW)))


def test_a_server_is_told_of_rows_that_no_update_has_read_for_long_as_they_would_be():
    agent = new_agent(FEW)
    agent.grow(5000)  # the one candidate drawn at random is none of ours
    trained(range(2), agent)
    clicked = int(batch(1).slate[0, 0])
    for seed in range(100):  # none of which names that item
        told = batch(seed)
        for part in (told.slate, told.state.item, told.next_state.item):
            part[part == clicked] = clicked % ITEMS + 1
        agent.update(told)
    lies = agent.target.tower.id.weight[clicked] - agent.online.tower.id.weight[clicked]
    tensors = agent.tensors()
    follows = tensors["target.tower.id.weight"][clicked] - tensors["online.tower.id.weight"][clicked]
    assert follows.norm() < 0.1 * lies.norm()
    assert lies.norm() > 1e-4


def test_keys_of_all_items_are_as_they_would_be_were_each_caught_up():
    agent = trained(range(60), new_agent(FEW))
    before = agent.state()
    told = [agent.all_keys(network) for network in (agent.online, agent.target)]
    after = agent.state()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    stale = agent.online.keys(agent.items)
    agent._catch_up()
    for network, keys in zip((agent.online, agent.target), told, strict=True):
        for mine, now in zip(keys, network.keys(agent.items), strict=True):
            torch.testing.assert_close(mine, now)
    assert not torch.allclose(stale.choice, told[0].choice, atol=1e-4)


def test_sums_over_a_sample_of_items_are_on_average_those_over_all():
    agent = new_agent(replace(FEW, candidates=7))
    agent.grow(29)
    worth = torch.linspace(0.0, 3.0, 30).exp()
    named, sums = torch.tensor([[4, 9], [9, 29]]), []
    for _ in range(4000):
        ids, stands_for = agent._sample(named, torch.tensor([2]))
        assert ids.unique().tolist() == ids.tolist()
        assert not stands_for[torch.searchsorted(ids, torch.tensor([0, 2, 4, 9, 29]))].any()
        sums.append(float((worth[ids] * stands_for.exp()).sum()))
    error = np.std(sums) / len(sums) ** 0.5
    assert np.mean(sums) == pytest.approx(float(worth.sum()), abs=4 * error)
    assert error < 0.02 * float(worth.sum())


@pytest.mark.parametrize("exact_items", [1000, 1])
def test_how_likely_items_are_next_is_learnt_alike_from_a_sample_of_them(exact_items):
    """Every other step goes to one item, which all batches name, the others anywhere."""
    few = replace(SETTINGS, exact_items=exact_items, candidates=20, learning_rate=0.02, recall=False)
    agent, rng = Agent(few, seed=1), np.random.default_rng(0)
    agent.grow(200)
    for seed in range(400):
        told = unaided_only(seed)
        told.state.item[:] = told.next_state.item[:] = 0
        told.slate[:, 0] = told.action[:] = np.where(np.arange(16) % 2, 1, rng.integers(2, 201, 16))
        agent.update(told)
    keys = agent.all_keys(agent.online)
    with torch.no_grad():
        queries = agent.online.queries(agent._state(told.state), keys)
        chances = agent.online.next_all(queries, keys).softmax(dim=1).mean(dim=0)
    assert float(chances[1]) == pytest.approx(0.5, abs=0.1)


def test_with_nothing_on_offer_there_is_nothing_to_be_conservative_about():
    agent = new_agent(replace(SETTINGS, cql_weight=1.0))
    agent._known.on_offer[:] = False
    without = agent.update(batch(0))
    assert "conservative" not in without.losses
    assert np.isfinite(without.loss)
    agent._known.on_offer[1:] = True
    assert agent.update(batch(1)).losses["conservative"] > 0.0


def test_a_large_catalog_that_is_small_after_a_restart_stands_where_it_stood():
    agent = trained(range(5), new_agent(FEW))
    told = agent.tensors()
    again = Agent(replace(FEW, exact_items=100), seed=99)
    again.restore(agent.state())
    again.grow(2000)
    again._catch_up()
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor[: len(told[name])] if tensor.ndim else tensor, told[name]), name
    trained(range(5, 7), again)


@pytest.mark.parametrize("features", ["vector", "category", "brand"])
def test_an_item_that_features_speak_for_has_a_row_of_its_own_once_it_was_met_often_enough(features):
    agent, told = new_agent(), batch(1)
    for column in (agent.items.vector, agent.items.category, agent.items.brand):
        column[:] = 0
    agent.items.price[:] = 0.5  # says nothing of what it is
    getattr(agent.items, features)[1:] = 1
    getattr(agent.items, features)[4] = 0
    agent._describe()
    told.slate[:], told.state.item[:] = 0, 0
    told.slate[:, :3], told.action[:], told.state.item[:, :2] = [2, 3, 4], 2, [5, 4]
    agent.meet(np.repeat([2, 3, 5], MEETINGS - 1))
    agent.update(told)
    # drawn from replay however often, it was met no oftener; what nothing describes has nothing else to be known by
    assert torch.nonzero(agent.items.seen).flatten().tolist() == [4]
    agent.meet(np.array([2, 5, 1]))
    again = Agent(SETTINGS, seed=3)
    again.restore(agent.state())
    for each in (agent, again):
        each.update(told)
        assert torch.nonzero(each.items.seen).flatten().tolist() == [2, 4, 5]
    for each in (agent, again):
        each.meet(np.array([3]))
        each.grow(5000)
        each.update(told)
        assert torch.nonzero(each.items.seen).flatten().tolist() == [2, 3, 4, 5]


def test_an_item_never_seen_scores_by_its_features_as_its_like_do():
    class Catalog:
        category = np.array([0, *([7] * 6), *([9] * 6)], np.uint64)
        brand = np.zeros(13, np.uint64)
        price = np.full(13, 10.0, np.float32)
        in_stock = known = recorded = np.arange(13) > 0
        gone = np.zeros(13, np.bool_)
        vector = np.zeros((13, 2), np.float32)

    agent = new_agent(replace(SETTINGS, learning_rate=0.02, weight_decay=0.0))
    agent.set_catalog(Catalog())
    for seed in range(80):
        told = batch(seed)
        told.organic[:] = False
        # items 6 and 12 are never shown; what is of category 7 is always clicked, the rest never
        told.slate[:, :3] = np.random.default_rng(seed).choice([1, 2, 3, 4, 5, 7, 8, 9, 10, 11], (16, 3))
        told.slate_reward[:, :3] = told.slate[:, :3] < 6
        told.action[:], told.slot_reward[:] = told.slate[:, 0], told.slate_reward[:, 0]
        told.reward[:] = told.slot_reward
        for state in (told.state, told.next_state):
            state.item[np.isin(state.item, (6, 12))] = 1
        agent.update(told)
    assert not agent.items.seen[[6, 12]].any()
    with torch.no_grad():
        keys = agent.online.keys(agent.items)
        queries = agent.online.queries(agent._state(batch(99).state), keys)
        ids = torch.tensor([[6, 12]]).expand(16, 2)
        p = torch.sigmoid(agent.online.parts_at(queries, keys, ids)[0]).mean(dim=0)
    assert p[0] > 0.7
    assert p[1] < 0.3


def test_items_that_nobody_went_to_yet_are_as_likely_next_as_those_somebody_did_once():
    """Where every item is gone to once and never again, all of a category are alike."""
    agent = new_agent(replace(SETTINGS, learning_rate=0.02))
    agent.grow(400)
    agent.items.category[1:] = 7
    for seed in range(60):
        told = batch(seed)
        told.organic[:] = True
        told.slate[:], told.state.item[:], told.next_state.item[:] = 0, 0, 0
        told.slate[:, 0] = told.action[:] = 1 + (np.arange(16) + 16 * seed) % 200  # of ids 201 to 400 none
        if seed < 13:
            agent.meet(told.action[: 200 - 16 * seed])  # once each
        agent.update(told)
    with torch.no_grad():
        keys = agent.online.keys(agent.items)
        queries = agent.online.queries(agent._state(batch(99).state), keys)
        scores = agent.online.next_all(queries, keys).mean(dim=0)
    assert scores[1:201].mean().item() == pytest.approx(scores[201:401].mean().item(), abs=0.1)


def dearer(told, times):
    told.slate_reward[:] *= times
    told.slot_reward[:], told.reward[:] = told.slot_reward * times, told.reward * times
    return told


@pytest.mark.parametrize("quantiles", [1, 5])
def test_in_another_currency_it_learns_the_same_to_the_last_bit_and_says_it_in_that_currency(quantiles):
    settings = replace(SETTINGS, quantiles=quantiles, cql_weight=0.1)
    here, there = new_agent(settings), new_agent(settings)
    for seed in range(8):
        uneven = batch(seed)
        uneven.slate_reward[:] *= 1 + uneven.slate % 3
        uneven.reward[:] = uneven.slot_reward[:] = uneven.slate_reward[:, 0]
        ours = here.update(uneven)
        theirs = there.update(dearer(uneven, 1024.0))
        np.testing.assert_array_equal(ours.td_error, theirs.td_error)
        assert theirs.mean_q == 1024 * ours.mean_q
        assert ours.loss == theirs.loss
    valued = {f"{head}.{kind}" for head in ("query", "unchosen.2", "hint") for kind in ("weight", "bias")}
    ours, theirs = here.tensors(), there.tensors()
    for name in ours:
        times = 1024.0 if name.split(".", 1)[1] in valued else 1.0
        assert torch.equal(times * ours[name], theirs[name]), name


def test_one_unit_of_value_is_what_a_choice_earns_on_average():
    agent = trained(range(40), new_agent(replace(SETTINGS, learning_rate=1e-6)))
    assert agent.unit == 1.0
    for seed in range(40, 80):
        agent.update(dearer(batch(seed), 4.0))
    assert agent.unit == pytest.approx(2.5)


def test_what_was_learnt_is_restated_when_the_unit_moves():
    agent = trained(range(3))
    q = agent._rows(batch(9), 1.0)

    def said():
        with torch.no_grad():
            keys = agent.online.keys(agent.items)
            return agent.unit * agent.online.q_all(agent.online.queries(q.state, keys), keys)

    before, unaided, unit = said(), agent.unit * agent._objective.unaided.clone(), agent.unit
    agent._look_unit(dearer(batch(9), 50.0))
    assert agent.unit > 5 * unit
    torch.testing.assert_close(said(), before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(agent.unit * agent._objective.unaided, unaided)


def test_quantiles_tell_a_gamble_from_a_sure_thing():
    """Users of item 1 come to earn 0 or 4, those of item 2 always 2: the mean is the same."""
    settings = replace(
        SETTINGS,
        quantiles=10,
        quantile_delta=0.1,
        learning_rate=0.01,
        td_weight=1.0,
        gamma=0.9,
        target_tau=0.01,
    )
    agent = new_agent(settings)
    rng = np.random.default_rng(0)
    told = batch(0)
    told.state.name[:], told.state.item[:], told.state.age_s[:] = 0, 0, 0.0
    told.state.name[:, 0], told.state.item[:, 0] = 1, 1 + np.arange(16) % 2
    told.slate_reward[:], told.slot_reward[:], told.organic[:], told.discount[:] = 0.0, 0.0, False, 0.0
    sure = np.arange(16) % 2 == 1
    for _ in range(1000):
        told.reward[:] = np.where(sure, 2.0, 4.0 * (rng.random(16) < 0.5))
        agent.update(told)
    with torch.no_grad():
        queries = agent.online.queries(agent._state(told.state), agent.online.keys(agent.items))
    gamble, certain = 0.9 * queries.unchosen[0].sort().values, 0.9 * queries.unchosen[1].sort().values
    assert certain[1:9].tolist() == pytest.approx([2.0] * 8, abs=0.4)  # the outermost are slow to come in
    assert gamble[:3].tolist() == pytest.approx([0.0] * 3, abs=0.5)
    assert gamble[7:].tolist() == pytest.approx([4.0] * 3, abs=0.5)


def priced(price):
    class Catalog:
        category = brand = np.zeros(13, np.uint64)
        in_stock = known = recorded = np.arange(13) > 0
        gone = np.zeros(13, np.bool_)
        vector = np.zeros((13, 2), np.float32)

    Catalog.price = np.array([np.nan, np.nan, *price], np.float32)
    return Catalog()


def test_dear_is_dear_in_any_currency():
    price = np.array([3, 5, 8, 12, 20, 35, 60, 90, 150, 400, 900])
    euros, yen = new_agent(), new_agent()
    euros.set_catalog(priced(price))
    yen.set_catalog(priced(165 * price))
    levels, theirs = (_price_features(agent.items.price)[2:] for agent in (euros, yen))
    assert levels[:, 1].tolist() == pytest.approx(theirs[:, 1].tolist(), abs=0.15)  # log(1 + x) is not log(x)
    assert levels[0, 1] < -1 < 1 < levels[-1, 1]
    assert _price_features(euros.items.price)[:2].tolist() == [[0.0] * 4] * 2  # unknown
    again = Agent(SETTINGS, seed=5)
    again.restore(yen.state())
    assert_same(again, yen)


def test_one_price_for_all_or_none_at_all_tells_nothing():
    agent = new_agent()
    agent.set_catalog(priced([np.nan] * 11))
    assert not _price_features(agent.items.price).any()
    agent.set_catalog(priced([7.0] * 11))
    assert _price_features(agent.items.price)[2:, 1:].abs().max() < 1e-5


def test_where_requests_bring_their_candidates_so_many_are_on_offer_next():
    agent = new_agent()
    everything = agent._known.on_offer
    agent.look_at_offers(10, [])
    assert agent.offers == 0
    assert agent._offer(everything, 5) is None
    agent.look_at_offers(30, [4] * 15 + [6] * 15)
    assert agent.offers == 5
    drawn = agent._offer(everything, 4000)
    some = torch.zeros(4000, len(everything)).scatter_(1, drawn, 1.0)
    assert some.sum(dim=1).tolist() == [5] * 4000
    often = some.mean(dim=0)
    assert often[0] == 0  # the unknown item is never on offer
    assert often[1:].tolist() == pytest.approx([5 / ITEMS] * ITEMS, abs=0.04)
    agent.look_at_offers(30, [1000] * 30)  # more than there are: all of them
    assert agent._offer(everything, 5) is None
    again = Agent(SETTINGS, seed=5)
    again.restore(agent.state())
    assert again.offers == agent.offers
    agent.look_at_offers(2000, [])  # a shop that sends none any more
    assert agent.offers == 0


def test_heads_of_value_learn_so_many_times_as_fast():
    agent = new_agent(replace(SETTINGS, learning_rate=1e-4, value_rate=7.0, centred=True))
    before = copy.deepcopy(agent.online)
    agent.update(batch(1))
    pairs = zip(agent.online.named_parameters(), before.parameters(), strict=True)
    # Adam's first step is as far as its rate, however steep it is there
    far = {name: (new - old).abs().max().item() for (name, new), old in pairs}
    heads = {name for name in far if name.split(".")[0] in ("query", "key", "unchosen")}
    moved = {name for name, step in far.items() if step > 0} - {"trust"}  # which no gradient moves
    hint = {"hint.weight", "hint.bias"}  # it is so flat there that Adam's ε counts
    assert moved > heads | hint
    assert all(6e-4 < far[name] < 7e-4 for name in hint)
    for name in moved - hint:
        assert far[name] == pytest.approx(7e-4 if name in heads else 1e-4, rel=0.02), name


def test_heads_of_value_settle_and_the_rest_does_not():
    def moved(updates, **changes):
        agent = trained(range(3), new_agent(replace(SETTINGS, learning_rate=1e-6, **changes)))
        agent.updates = updates
        before = copy.deepcopy(agent.online)
        told = batch(9)
        agent.update(told)
        pairs = zip(agent.online.named_parameters(), before.parameters(), strict=True)
        far = {name: (new - old).abs().max().item() for (name, new), old in pairs}
        return far["unchosen.2.bias"], far["encoder.out.bias"]

    (head, rest), *later = (moved(n) for n in (0, 900, 10**7))
    for (slower, same), share in zip(later, (0.5, 1 / 16), strict=True):
        assert slower == pytest.approx(share * head, rel=0.05)
        assert same == pytest.approx(rest, rel=0.05)
    assert moved(10**7, value_settle=0)[0] == pytest.approx(head, rel=0.05)


@pytest.mark.parametrize(
    ("gamma", "n_step", "steps"),
    [(0.97, 0, 3), (0.0, 0, 1), (0.975, 0, 5), (0.99, 0, 10), (0.999, 0, 10), (0.97, 7, 7), (0.97, 99, 99)],
)
def test_returns_are_counted_over_the_more_steps_the_further_ahead_counts(gamma, n_step, steps):
    assert AgentSettings(gamma=gamma, n_step=n_step).steps == steps


@pytest.mark.parametrize(
    ("gamma", "length", "entries"),
    [
        (0.97, 0, 32),
        (0.0, 0, 32),
        (0.98, 0, 64),
        (0.99, 0, 96),
        (0.999, 0, 160),
        (0.999, 8, 8),
        (0.97, 500, 500),
    ],
)
def test_states_reach_back_as_far_as_what_is_to_come_reaches_ahead(gamma, length, entries):
    settings = AgentSettings(gamma=gamma, history_length=length)
    assert settings.entries == settings.network.history_length == entries


def test_what_is_to_come_depends_on_how_much_there_has_been_not_on_what_share_it_was():
    agent = new_agent()
    short, long = (batch(3).state for _ in range(2))
    for state, entries in ((short, 2), (long, 4)):
        state.item[:], state.name[:], state.age_s[:] = 5, 1, 10.0
        state.name[:, entries:], state.item[:, entries:] = 0, 0
    with torch.no_grad():
        keys = agent.online.keys(agent.items)
        sums = [
            agent.online.encoder(tensors, entries_of(tensors), keys.tower, tensors.item)[2]
            for tensors in map(agent._state, (short, long))
        ]
    d = SETTINGS.dim
    torch.testing.assert_close(sums[1][:, : d + 1], 2 * sums[0][:, : d + 1])
    torch.testing.assert_close(sums[0][:, :d] * SUM_SCALE, 2 * keys.tower[5].expand(16, -1))


def test_a_weight_on_their_length_keeps_states_vectors_short():
    """All users are alike, so that what is chosen says nothing of states."""

    def length(weight):
        agent = new_agent(replace(SETTINGS, learning_rate=0.01, length_weight=weight))
        for seed in range(300):
            told = batch(seed)
            told.state.item[:], told.state.name[:], told.state.age_s[:] = 3, 1, 10.0
            agent.update(told, kept=1000)
        state = agent._state(told.state)
        with torch.no_grad():
            keys = agent.online.keys(agent.items)
            return float(
                agent.online.encoder(state, entries_of(state), keys.tower, state.item)[0].norm(dim=1).mean()
            )

    assert length(0.1) < 0.5 * length(0.0)


def unaided_only(seed):
    """Users who are shown nothing, and earn and go on to earn now this, now that, whatever they go to."""
    out = batch(seed)
    out.slate[:, 1:] = 0
    out.slate_reward[:] = 0.0
    out.slate_reward[:, 0] = out.slot_reward[:] = np.random.default_rng(seed).choice([0.5, 1.5], 16)
    out.reward[:] = 3 * out.slot_reward
    out.organic[:], out.slots[:] = True, 0
    return out


@pytest.mark.parametrize("centred", [True, False])
def test_a_log_without_slates_does_not_tell_how_much_better_a_choice_is_than_none(centred):
    """m is what unaided steps earn, else nothing; g, as V0 might be as well what it is said to be, is 0."""
    agent = new_agent(replace(SETTINGS, learning_rate=0.003, target_tau=0.02, centred=centred))
    for seed in range(1500):
        agent.update(unaided_only(seed), kept=10_000)
    with torch.no_grad():
        keys = agent.target.keys(agent.items)
        queries = agent.target.queries(agent._state(batch(0).state), keys)
        ids = torch.arange(1, ITEMS + 1).expand(16, -1)
        _, reward, continuation = agent.target.parts_at(queries, keys, ids)
        value = agent.target.value(queries)
    assert float(reward.mean()) == pytest.approx(1.0, abs=0.2)
    assert float(continuation.mean()) == pytest.approx(0.0, abs=0.3)
    assert float(value.mean()) > 3.0  # of returns of three times what a step earns, at discounts of 0.9


def mean_value(agent):
    """Of some states, where nothing is chosen."""
    with torch.no_grad():
        queries = agent.online.queries(agent._state(batch(0).state), agent.online.keys(agent.items))
        return agent.online.value(queries).mean().item()


def test_values_do_not_jump_when_the_first_slate_comes():
    agent = new_agent(replace(SETTINGS, learning_rate=0.003, target_tau=0.02))
    for seed in range(300):
        agent.update(unaided_only(seed), kept=1000)
    before = mean_value(agent)
    first = unaided_only(300)
    first.organic[0], first.slots[0] = False, 1
    agent.update(first, kept=1000)
    agent.update(unaided_only(301), kept=1000)
    assert mean_value(agent) == pytest.approx(before, rel=0.05)


def test_what_was_learnt_from_centred_vectors_is_not_read_as_they_are():
    with pytest.raises(ValueError, match="centred"):
        Agent(replace(SETTINGS, centred=False)).restore(trained(range(3)).state())
    Agent(replace(SETTINGS, centred=True)).restore(trained(range(3)).state())


def test_without_dueling_no_state_is_worth_more_than_another_where_nothing_is_chosen():
    agent = trained(range(30), new_agent(replace(SETTINGS, dueling=False, target_tau=0.25)))
    for network in (agent.online, agent.target):
        with torch.no_grad():
            queries = network.queries(agent._state(batch(99).state), network.keys(agent.items))
        assert network.value(queries).unique().numel() == 1


def test_without_dueling_states_are_worth_on_average_what_they_are_with_it():
    def value(dueling):
        agent = new_agent(replace(SETTINGS, learning_rate=0.003, target_tau=0.02, dueling=dueling))
        for seed in range(300):
            agent.update(unaided_only(seed), kept=10_000)
        return mean_value(agent)

    assert value(False) == pytest.approx(value(True), rel=0.1)


@pytest.mark.parametrize("before", [True, False])
def test_values_of_states_learnt_with_dueling_are_not_taken_over_without_nor_the_other_way(before):
    state = trained(range(3), new_agent(replace(SETTINGS, dueling=before))).state()
    Agent(replace(SETTINGS, dueling=before)).restore(state)
    with pytest.raises(ValueError, match="dueling is o"):
        Agent(replace(SETTINGS, dueling=not before)).restore(state)


def test_the_target_network_reads_by_moments_that_follow_as_it_does():
    agent = trained(range(3), new_agent(replace(SETTINGS, target_tau=0.25)))
    known, online, target = agent.online.response, agent.online, agent.target
    for seed in range(3, 6):
        before = [target.state_mean.clone(), target.item_scale.clone()]
        seen = [known.state_mean.clone(), known.item_scale.clamp(min=SMALLEST).clone()]
        agent.update(batch(seed))
        for was, now, of, mine in zip(
            before,
            (target.state_mean, target.item_scale),
            seen,
            (online.state_mean, online.item_scale),
            strict=True,
        ):
            torch.testing.assert_close(mine, of)
            share = 0.25 if seed > 3 else 1 / (seed + 1)
            torch.testing.assert_close(now, torch.lerp(was, of, share))
    assert not torch.equal(online.state_mean, target.state_mean)


def telling(seed):
    """Two kinds of users, whom their histories do not tell apart: the one is shown what it nearly always chooses and
    goes on to earn 2, the other what it seldom chooses and goes on to earn nothing. What is chosen changes nothing."""
    rng = np.random.default_rng(seed)
    out = empty_batch(16, 4)
    lucky = rng.random(16) < 0.5
    out.slate[:, 0] = out.action[:] = np.where(lucky, 1, 2)
    chosen = rng.random(16) < np.where(lucky, 0.8, 0.2)
    out.slate_reward[:, 0] = out.slot_reward[:] = chosen
    out.reward[:] = chosen + 0.97 * 2.0 * lucky
    out.discount[:], out.weight[:], out.slots[:] = 0.0, 1.0, 1
    return out


@pytest.mark.parametrize("told", [True, False])
def test_what_choosing_does_is_told_apart_from_who_chooses(told, monkeypatch):
    if not told:
        monkeypatch.setattr(Objective, "_likelier", lambda self, *read: torch.zeros(16, 1))
    agent = new_agent(replace(SETTINGS, learning_rate=0.005, target_tau=0.05, td_weight=1.0, centred=True))
    for seed in range(800):
        agent.update(telling(seed), kept=1000)
    with torch.no_grad():
        keys = agent.target.keys(agent.items)
        queries = agent.target.queries(agent._state(telling(0).state), keys)
        continuation = agent.target.parts_at(queries, keys, torch.tensor([[1, 2]]).expand(16, 2))[2][0]
    # of those who chose nothing most are of the second kind: beside them, whoever chose the first item does well
    assert (abs(float(continuation[0])) < 0.5) is told
    assert (abs(float(continuation.mean())) < 0.4) is told
