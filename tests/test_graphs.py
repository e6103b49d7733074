"""On another device than the CPU an agent learns the same, waits once an update, and what it does can be captured."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from learner.agent import Agent
from learner.graphs import CudaCapture, Graphs
from tests.other_device import DEVICE, OtherDevice
from tests.test_agent import FEW, ITEMS, SETTINGS, batch

EXACT = replace(SETTINGS, target_tau=0.01)
SETTLED = 3  # times that it is done without a graph: enough here
VARIANTS = {
    "as it is": EXACT,
    "hard syncs": SETTINGS,
    "samples": FEW,
    "quantiles": replace(EXACT, quantiles=5, slate_size=3),
    "one network": replace(EXACT, double=False, dueling=False, cql_weight=0.5),
    "bare": replace(EXACT, gamma=0.0, stack=False, recall=False, centred=False),
}


@pytest.fixture
def device(monkeypatch):
    """A device of its own, which fused Adam is told it can use."""
    usable = ["cpu", "cuda", DEVICE.type]
    for name in ("torch.optim.adam", "torch.optim.optimizer"):
        module = importlib.import_module(name)
        if hasattr(module, "_get_fused_kernels_supported_devices"):
            monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: usable)
    monkeypatch.setattr("learner.graphs.SETTLED", SETTLED)
    with OtherDevice() as mode:
        yield mode


def made(settings, device="cpu", graphs=None):
    agent = Agent(settings, device, seed=1)
    agent.graphs = graphs
    agent.grow(ITEMS)
    agent.set_catalog(catalog())
    return agent


def catalog(gone=()):
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(ITEMS + 1, 2)).astype(np.float32) * (np.arange(ITEMS + 1) % 3 == 0)[:, None]
    known = np.arange(ITEMS + 1) > 0
    return SimpleNamespace(
        category=rng.integers(0, 3, ITEMS + 1).astype(np.uint64),
        brand=rng.integers(0, 3, ITEMS + 1).astype(np.uint64),
        price=rng.random(ITEMS + 1).astype(np.float32),
        in_stock=np.ones(ITEMS + 1, bool),
        gone=np.isin(np.arange(ITEMS + 1), list(gone)),
        known=known,
        recorded=known,
        vector=vectors,
    )


def learn(agent, seeds, kept=400):
    return [agent.update(batch(seed), kept) for seed in seeds]


def differ(one: dict[str, Any], other: dict[str, Any], rtol=1e-3, atol=1e-5) -> list[str]:
    assert set(one) == set(other)
    return [
        name for name in one if not np.allclose(one[name], other[name], rtol=rtol, atol=atol, equal_nan=True)
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_an_agent_learns_the_same_on_another_device(name, device):
    here, there = made(VARIANTS[name]), made(VARIANTS[name], DEVICE)
    for one, other in zip(learn(here, range(4)), learn(there, range(4)), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        np.testing.assert_allclose(one.td_error, other.td_error, rtol=1e-3, atol=1e-4)
    assert differ(here.state(), there.state()) == []
    assert differ(*({n: t.numpy() for n, t in a.tensors().items()} for a in (here, there))) == []
    again = Agent(VARIANTS[name], DEVICE)
    again.restore(there.state())
    assert differ(again.state(), there.state(), 0, 0) == []
    learn(again, [7]), learn(there, [7])
    assert differ(again.state(), there.state(), 0, 0) == []


def test_what_is_of_two_devices_does_not_mix(device):
    there = torch.ones(3).to(DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)


def test_an_update_waits_for_the_device_once(device):
    there = made(EXACT, DEVICE)
    learn(there, range(3))
    device.waits.clear()
    learn(there, range(3, 8))
    assert device.waits == Counter({"aten._to_copy.default": 5})  # what came of it


@pytest.mark.parametrize("name", ["as it is", "hard syncs", "quantiles", "one network"])
def test_graphs_of_updates_do_what_updates_do(name, device):
    graphs = Graphs(device)
    with_graphs, without = made(VARIANTS[name], DEVICE, graphs), made(VARIANTS[name], DEVICE)
    seeds = range(SETTLED + 5)
    for one, other in zip(learn(with_graphs, seeds), learn(without, seeds), strict=True):
        assert one.loss == other.loss
        assert one.losses == other.losses
        assert (one.td_error == other.td_error).all()
    assert graphs.replayed > 2
    assert differ(with_graphs.state(), without.state(), 0, 0) == []


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="!!! NO GPU WAS TESTED: none is here; a device in software was"
)
@pytest.mark.parametrize("name", VARIANTS)
def test_on_a_gpu_an_agent_learns_what_it_learns_on_the_cpu_and_by_graphs(name, monkeypatch):
    monkeypatch.setattr("learner.graphs.SETTLED", SETTLED)
    here = made(VARIANTS[name])
    there = made(VARIANTS[name], "cuda", Graphs(CudaCapture()))
    for one, other in zip(learn(here, range(12)), learn(there, range(12)), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        np.testing.assert_allclose(one.td_error, other.td_error, rtol=1e-2, atol=1e-3)
    assert differ(here.state(), there.state(), 1e-2, 1e-3) == []
    assert (there.graphs.replayed > 0) is (name != "samples")


def test_where_what_stands_is_elsewhere_or_other_things_are_done_there_is_another_graph(device):
    graphs = Graphs(device)
    pair = made(EXACT, DEVICE, graphs), made(EXACT, DEVICE)
    for agent in pair:
        learn(agent, range(SETTLED + 3))
    assert graphs.replayed == 1  # the first update is like no other: nothing is known
    for agent in pair:
        agent.grow(3 * ITEMS)  # there is room for them
        for seed in (50, 51):
            agent.update(batch(seed, 3 * ITEMS), 400)
    assert graphs.replayed == 3
    for agent in pair:
        agent.grow(2000)  # tables by id are others now
        learn(agent, range(SETTLED))
    assert graphs.replayed == 3
    for agent in pair:
        learn(agent, range(2))
    assert graphs.replayed == 4
    for agent in pair:
        agent.set_catalog(catalog(gone=range(1, ITEMS)))  # in place: a graph reads what is there
        learn(agent, range(2))
    assert graphs.replayed == 6
    for agent in pair:
        agent.restore(agent.state())  # of the same shapes, but elsewhere
        learn(agent, range(SETTLED + 2))
    assert graphs.replayed == 7
    for agent in pair:
        agent.look_at_offers(10, [1] * 10)  # the best of so many candidates are to come
        learn(agent, range(SETTLED + 2))
    assert graphs.replayed == 8
    assert differ(*(agent.state() for agent in pair), 0, 0) == []


class Broken:
    """Takes graphs that do nothing, or none."""

    def __init__(self, refuses):
        self.refuses = refuses

    def aside(self, work):
        return work()

    def graph(self, work):
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        return (lambda: None), torch.zeros(20, device=DEVICE)


@pytest.mark.parametrize(("refuses", "told"), [(True, "not permitted"), (False, "misses up to")])
def test_a_graph_that_cannot_be_taken_or_does_something_else_is_not_used(refuses, told, device, caplog):
    graphs = Graphs(Broken(refuses))
    broken, without = made(EXACT, DEVICE, graphs), made(EXACT, DEVICE)
    if not refuses:
        length = len(without.update(batch(0)).losses) + 3 + 16
        without = made(EXACT, DEVICE)
        graphs._capture.graph = lambda work: ((lambda: None), torch.zeros(length, device=DEVICE))
    for one, other in zip(learn(broken, range(SETTLED + 4)), learn(without, range(SETTLED + 4)), strict=True):
        assert one.loss == other.loss
    assert differ(broken.state(), without.state(), 0, 0) == []
    assert graphs.replayed == 0
    (record,) = [each for each in caplog.records if each.name == "learner.graphs"]
    assert told in record.getMessage()


def test_what_would_be_read_from_the_cpu_cannot_be_captured(device):
    with pytest.raises(RuntimeError, match="reads nothing of the CPU"):
        device.graph(lambda: torch.ones(2).to(DEVICE))
    with pytest.raises(RuntimeError, match="may not wait"):
        device.graph(lambda: torch.ones(2, device=DEVICE) * float(torch.ones(2, device=DEVICE).sum()))


def test_capturing_changes_nothing_and_a_replay_does_all_of_it_with_the_numbers_of_then(device):
    total, step = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
    numbers = [3.0]
    replay, out = device.graph(lambda: total.add_(step * numbers[0]).sum())
    assert total.tolist() == [0.0, 0.0]
    numbers[0] = 7.0
    replay()
    assert total.tolist() == [3.0, 3.0]
    step.fill_(2.0)
    replay()
    assert total.tolist() == [9.0, 9.0]
    assert out.tolist() == 18.0
