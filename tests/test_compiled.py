"""What a server computes is what the network that was trained says: the compiled Q against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.co_views import WALKED
from learner.compiled import CompiledQ
from learner.entries import AGE_BOUNDS_S, NAMES, StateTensors
from learner.networks import (
    NO_PRICE,
    ItemTensors,
    NetworkSettings,
    QNetwork,
    Shelf,
)
from learner.offered import AS_CATALOGUED, CompiledTower, Offered
from learner.policy import Policy, PolicyDamaged
from learner.recall import NEAR, Weights
from learner.replay import Histories
from learner.weights import WeightStore
from tests.serving_process import agent, publish

ITEMS = 12
SHAPES = [
    NetworkSettings(history_length=5, vector_dim=3),
    NetworkSettings(history_length=5, vector_dim=3, stack=False),
    NetworkSettings(dim=6, channels=3, hidden=5, value_dim=2, history_length=4, vector_dim=3, gamma=0.5),
    NetworkSettings(dim=6, channels=3, hidden=5, quantiles=4, history_length=4, vector_dim=3),
]


def network(shape: NetworkSettings, seed: int) -> tuple[QNetwork, ItemTensors]:
    """A network in which no parameter is zero, and a catalog with known and new items; all of a size that occurs, since
    float32 tells log-odds of thousands no better than to a hundredth."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = QNetwork(shape, ITEMS + 1)
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn(parameter.shape) * (shape.dim**-0.5 if parameter.ndim > 1 else 1.0)
        for values in (
            *made.response.buffers(),
            *((made.stack.weights, made.stack.level, made.stack.slope) if shape.stack else ()),
        ):
            values += 0.3 * torch.rand(values.shape)
        if shape.stack:
            made.stack.source = torch.arange(0, ITEMS, 2, dtype=torch.int32)
            rows = len(made.stack.source)
            made.stack.near = torch.randint(0, ITEMS + 1, (rows, NEAR), dtype=torch.int32)
            made.stack.near[0] = 0
            made.stack.answer = torch.randn(rows, NEAR) * (made.stack.near > 0)
        made.recall.led, made.recall.walk = (
            torch.zeros(ITEMS - 1, WALKED, dtype=t) for t in (torch.int32, torch.float32)
        )
        for name in ("walk", *Weights._fields):
            getattr(made.recall, name).copy_(torch.rand(getattr(made.recall, name).shape))
        made.recall.led.copy_(torch.randint(0, ITEMS + 1, made.recall.led.shape))
        made.recall.led[0] = 0
        made.recall.walk *= made.recall.led > 0
        vector = torch.randn(ITEMS + 1, shape.vector_dim)
    n = ITEMS + 1
    return made, ItemTensors(
        torch.arange(n) % 4,
        torch.arange(n) % 3,
        torch.cat((torch.full((1,), NO_PRICE), torch.linspace(-3, 3, ITEMS))),
        vector,
        torch.arange(n) % 2 == 0,
    )


ENTRY = st.tuples(
    st.integers(0, ITEMS),
    st.integers(1, NAMES - 1),
    st.sampled_from([0.0, *AGE_BOUNDS_S, 14.99, 1e7]),
    st.sampled_from([0.0, 2.5, -3.0, 1e6]),
)


def test_ways_that_count_for_nothing_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made, items = network(SHAPES[0], 1)
    made.trust.data.zero_()
    states = Histories(
        np.full((1, 5), 3, np.int32), np.ones((1, 5), np.uint8), *np.zeros((2, 1, 5), np.float32)
    )
    tensors = StateTensors(*(torch.from_numpy(c.astype(t)) for c, t in zip(states, "llff", strict=True)))
    with torch.inference_mode():
        keys = made.keys(items)
        expected = made.q_all(made.queries(tensors, keys), keys)
        monkeypatch.setattr(made.recall, "merged", None)
        compiled = CompiledQ(made, made.shelf(items))
        torch.testing.assert_close(compiled.q(states), expected, rtol=3e-5, atol=3e-4)
        assert compiled.parts_among(states, made.shelf(items), torch.arange(ITEMS + 1))[0].isfinite().all()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SHAPES), st.integers(0, 5), st.lists(st.lists(ENTRY, max_size=5), min_size=1, max_size=4)
)
def test_the_compiled_q_is_the_networks(
    shape: NetworkSettings, seed: int, users: list[list[tuple[int, int, float, float]]]
) -> None:
    made, items = network(shape, seed)
    size = (len(users), shape.history_length)
    columns = (np.zeros(size, np.int32), np.zeros(size, np.uint8), np.zeros(size, np.float32))
    states = Histories(*columns, np.zeros(size, np.float32))
    for b, entries in enumerate(users):
        for h, entry in enumerate(entries[: shape.history_length]):
            for column, x in zip(states, entry, strict=True):
                column[b, h] = x
    with torch.inference_mode():
        keys = made.keys(items)
        tensors = StateTensors(*(torch.from_numpy(c.astype(t)) for c, t in zip(states, "llff", strict=True)))
        expected = made.q_all(made.queries(tensors, keys), keys).numpy()
        compiled = CompiledQ(made, made.shelf(items))
        q = compiled.q(states).numpy()
        among = torch.tensor([5, 0, 7, 5, 2])  # a candidate may be named twice, or unknown
        of_all = (part[:, among] for part in compiled.parts(states)[:2])
        of_some = compiled.parts_among(states, Shelf(*(c[among] for c in made.shelf(items))), among)
        known = among > 0
        for some, each in zip(of_some[:2], of_all, strict=True):
            torch.testing.assert_close(some[:, known], each[:, known], rtol=3e-5, atol=3e-4)
    np.testing.assert_allclose(q, expected, rtol=3e-5, atol=3e-5 * max(1.0, float(np.abs(expected).max())))


OFFERED = st.tuples(
    st.integers(0, ITEMS),
    st.sampled_from([AS_CATALOGUED, 0, 1, 2]),
    st.sampled_from([AS_CATALOGUED, 0, 1, 2]),
    st.sampled_from([np.nan, NO_PRICE, -3.0, 0.0, 0.7]),
    st.lists(st.sampled_from([0.0, 0.5, -1.0, 99.0]), min_size=3, max_size=3),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 5), st.lists(OFFERED, min_size=1, max_size=6), st.booleans())
def test_items_that_come_with_features_are_what_the_network_makes_of_them(
    shape: NetworkSettings,
    seed: int,
    told: list[tuple[int, int, int, float, list[float], bool]],
    slopes: bool,
) -> None:
    made, items = network(shape, seed)
    if not slopes:
        made.stack.slope.zero_()
    kinds = (np.int64, np.int64, np.int64, np.float32, np.float32, np.bool_)
    columns = zip(*told, strict=True)
    offered = Offered(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))
    row, category, brand, price, vector, has_vector = map(torch.from_numpy, offered)
    catalog = ItemTensors(*(column[row] for column in items))
    expected = ItemTensors(
        torch.where(category == AS_CATALOGUED, catalog.category, category),
        torch.where(brand == AS_CATALOGUED, catalog.brand, brand),
        torch.where(price.isnan(), catalog.price, price),
        torch.where(has_vector.unsqueeze(1), vector, catalog.vector),
        catalog.seen,
    )
    with torch.inference_mode():
        shelf = CompiledTower(made, items).shelf(offered)
        for mine, theirs in zip(shelf, made.shelf_with(expected, row), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_a_version_that_would_serve_otherwise_than_it_was_trained_is_refused(tmp_path: object) -> None:
    store = WeightStore(f"{tmp_path}/weights")
    version = publish(store, [f"item-{i}" for i in range(ITEMS)], made=agent(ITEMS))
    policy = Policy.from_weights(store.load(version))
    policy.check()
    last = policy._network.unchosen[2]
    last.bias = torch.nn.Parameter(last.bias + 1.0)  # the network moves on; what was compiled of it does not
    with pytest.raises(PolicyDamaged, match="differ from the network's by"):
        policy.check()
    last.bias = torch.nn.Parameter(last.bias - 1.0)
    policy.check()
    dense = policy._network.tower.dense
    dense.bias = torch.nn.Parameter(dense.bias + 1.0)  # of which all that the catalog has was made long ago
    with pytest.raises(PolicyDamaged, match="differ from the network's by"):
        policy.check()


@pytest.mark.parametrize(
    "wrong", [{"dim": 0}, {"history_length": 1_000_001}, {"quantiles": -1}, {"gamma": 1.0}]
)
def test_a_network_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=f"network setting {next(iter(wrong))}="):
        NetworkSettings(**wrong)
    NetworkSettings(centred=False, recall=False, stack=False, dueling=False, gamma=0.0)
