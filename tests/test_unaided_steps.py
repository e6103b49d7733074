"""Where users go unaided between slates, what is to come is not worth a slate that nobody is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.agent import Agent
from learner.agent_settings import AgentSettings
from learner.replay import Histories, Replay
from streaming.rewards import CODES
from streaming.transitions import Amendments, Joined, Rejects, States, Transitions

H = 8
ITEMS = 6
GAMMA = 0.9


def visits(unaided: int, count: int = 1500) -> Joined:
    """Each slate, of one item, is chosen from every second time, and earns 1 then; so many steps without a
    recommender follow, which earn nothing; and every tenth time the visit ends."""
    draw = np.random.default_rng(0)
    histories, rows = [], []
    for _ in range(count):
        past: list[tuple[int, int]] = []
        while True:
            for n in range(unaided + 1):
                item, organic = int(draw.integers(1, ITEMS + 1)), n > 0
                chosen = organic or draw.random() < 0.5
                rows.append([len(histories), item, float(chosen and not organic), GAMMA, organic])
                histories.append(past[:H])
                past = [(item, CODES["view_item" if organic else "select_item"]), *past] if chosen else past
            if draw.random() < 0.1:
                break
        rows[-1][3] = 0.0
    item, name = np.zeros((len(histories), H), np.int32), np.zeros((len(histories), H), np.uint8)
    for i, history in enumerate(histories):
        for h, (what, how) in enumerate(history):
            item[i, h], name[i, h] = what, how
    n = len(rows)
    offset, action, reward, discount, organic = (np.array(column) for column in zip(*rows, strict=True))
    return Joined(
        States(np.zeros(n, np.int32), offset, offset * 1000, item, name, 10.0 * (item > 0).astype(np.float32),
               np.zeros((n, H), np.float32)),
        Transitions(np.zeros(n, np.int32), offset, np.zeros(n, np.int16), offset.astype(np.int32),
                    np.where(discount > 0, offset + 1, -1).astype(np.int32), action.astype(np.int32),
                    reward.astype(np.float32), discount.astype(np.float32),
                    np.where(organic, np.nan, 0.5).astype(np.float32), organic.astype(np.bool_),
                    np.where(organic, -1, 1).astype(np.int64)),
        Amendments(*(np.zeros(0, dtype) for dtype in (np.int32, np.int64, np.int16, np.float32))),
        Rejects(np.zeros(0, np.int64), np.zeros(0, np.uint8)),
    )  # fmt: skip


@pytest.mark.parametrize("unaided", [0, 3])
def test_what_is_promised_is_what_comes_however_much_users_do_unaided(unaided):
    joined = visits(unaided)
    t, returns = joined.transitions, np.zeros(len(joined.transitions.reward) + 1)
    for i in reversed(range(len(t.reward))):
        returns[i] = t.reward[i] + t.discount[i] * returns[i + 1]
    agent = Agent(
        AgentSettings(
            dim=8, hidden=16, vector_dim=1, batch_size=64, history_length=H, n_step=1, gamma=GAMMA,
            target_tau=0.05, value_rate=8.0, value_settle=0, stack=False, recall=False,
        ),
        seed=1,
    )  # fmt: skip
    agent.grow(ITEMS)
    replay, draw = Replay(100_000, H, prioritised=False), np.random.default_rng(1)
    replay.insert(joined)
    for _ in range(1000):
        batch = replay.sample(64, draw, n_step=1, gamma=GAMMA, unaided=agent.unaided)
        agent.update(batch, len(replay))
    shown = np.flatnonzero(~t.organic)[:1500]
    states = agent._state(Histories(*(getattr(joined.states, name)[shown] for name in Histories._fields)))
    with torch.no_grad():
        keys = agent.all_keys(agent.target)
        q = agent.target.q_all(agent.target.queries(states, keys), keys) * agent.unit
    promised = q.numpy()[np.arange(len(shown)), t.action[shown]].mean()
    assert promised == pytest.approx(returns[shown].mean(), rel=0.15)


def test_in_a_log_without_slates_returns_end_where_they_end():
    agent = Agent(AgentSettings(vector_dim=1), seed=1)
    assert agent.unaided == 0
