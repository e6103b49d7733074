"""The DQN of Stable-Baselines3 on CartPole. Run by `benchmarks.cartpole --peers PYTHON`; it knows nothing of ours.

PYTHON benchmarks/peers/sb3_cartpole.py defaults|zoo SEED STEPS
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import gymnasium
import torch
from stable_baselines3 import DQN, __version__  # type: ignore[import-not-found]
from stable_baselines3.common.evaluation import evaluate_policy  # type: ignore[import-not-found]
from stable_baselines3.common.monitor import Monitor  # type: ignore[import-not-found]

# RL Baselines3 Zoo, hyperparams/dqn.yml
ZOO: dict[str, Any] = {
    "learning_rate": 2.3e-3,
    "batch_size": 64,
    "buffer_size": 100_000,
    "learning_starts": 1000,
    "gamma": 0.99,
    "target_update_interval": 10,
    "train_freq": 256,
    "gradient_steps": 128,
    "exploration_fraction": 0.16,
    "exploration_final_eps": 0.04,
    "policy_kwargs": {"net_arch": [256, 256]},
}


def main(variant: str, seed: str, steps: str) -> None:
    """Learn, judge, print."""
    torch.set_num_threads(1)
    env = Monitor(gymnasium.make("CartPole-v1"))
    model = DQN("MlpPolicy", env, seed=int(seed), device="cpu", **(ZOO if variant == "zoo" else {}))
    began = time.process_time()
    model.learn(int(steps))
    cpu_s = time.process_time() - began
    fresh = Monitor(gymnasium.make("CartPole-v1"))
    fresh.reset(seed=1_000_000 + int(seed))
    score, _ = evaluate_policy(model, fresh, n_eval_episodes=100, deterministic=True)
    print(json.dumps({"score": float(score), "cpu_s": cpu_s, "version": __version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
