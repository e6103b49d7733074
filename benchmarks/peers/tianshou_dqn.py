"""tianshou's DQN in the Gymnasium shop. Run by `benchmarks.dqn_peers --peers PYTHON`."""

from __future__ import annotations

from typing import Any

import numpy as np
import tianshou  # type: ignore[import-not-found]
import torch
from tianshou.algorithm import DQN  # type: ignore[import-not-found]
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy  # type: ignore[import-not-found]
from tianshou.algorithm.optim import AdamOptimizerFactory  # type: ignore[import-not-found]
from tianshou.data import Collector, VectorReplayBuffer  # type: ignore[import-not-found]
from tianshou.env import DummyVectorEnv  # type: ignore[import-not-found]
from tianshou.trainer import OffPolicyTrainerParams  # type: ignore[import-not-found]
from tianshou.utils.net.common import Net  # type: ignore[import-not-found]

from benchmarks.shop_visits import Exam, Metered, Task, opened

# "defaults": those of the DQN in its README, in one environment
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {
        "lr": 1e-3,
        "gamma": 0.9,
        "n_step": 3,
        "target": 320,
        "epsilon": 0.3,
        "batch": 64,
        "updates": 0.1,
        "hidden": (64, 64),
        "buffer": 20_000,
    },
    "tuned": {
        "lr": 1e-3,
        "gamma": 0.9,
        "n_step": 3,
        "target": 320,
        "epsilon": 0.15,
        "batch": 128,
        "updates": 0.2,
        "hidden": (128,),
        "buffer": 100_000,
    },
}


class Over(Exception):
    """Both looks are taken."""


def main() -> None:
    task = Task.received()
    about = VARIANTS[task.variant]
    torch.set_num_threads(1)
    torch.manual_seed(task.seed)
    np.random.seed(task.seed)
    metered = Metered(opened(task.shop, flat=True))
    space, actions = metered.observation_space, metered.action_space
    net = Net(state_shape=space.shape, action_shape=actions.n, hidden_sizes=about["hidden"])  # type: ignore[attr-defined]
    policy = DiscreteQLearningPolicy(
        model=net,
        action_space=actions,
        observation_space=space,
        eps_training=about["epsilon"],
        eps_inference=0.0,
    )
    algorithm = DQN(
        policy=policy,
        optim=AdamOptimizerFactory(lr=about["lr"]),
        gamma=about["gamma"],
        n_step_return_horizon=about["n_step"],
        target_update_freq=about["target"],
    )
    envs = DummyVectorEnv([lambda: metered])
    envs.seed(task.seed)
    collector = Collector(algorithm, envs, VectorReplayBuffer(about["buffer"], 1), exploration_noise=True)

    def choose(seen: Any) -> int:
        with torch.no_grad():
            return int(net(torch.from_numpy(seen[None]))[0].argmax())

    exam = Exam(task, metered, choose)

    def look(epoch: int, step: int) -> None:
        if exam.look():
            raise Over

    settings = OffPolicyTrainerParams(
        training_collector=collector,
        training_fn=look,
        max_epochs=1_000_000,
        epoch_num_steps=1000,
        collection_step_num_env_steps=10,
        update_step_num_gradient_steps_per_sample=about["updates"],
        batch_size=about["batch"],
        verbose=False,
        show_progress=False,
    )
    try:
        algorithm.run_training(settings)
    except Over:
        exam.send("tianshou", tianshou.__version__)


if __name__ == "__main__":
    main()
