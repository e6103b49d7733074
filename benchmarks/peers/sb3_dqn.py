"""The DQN of Stable-Baselines3 in the Gymnasium shop. Run by `benchmarks.dqn_peers --peers PYTHON`."""

from __future__ import annotations

from typing import Any

import stable_baselines3  # type: ignore[import-not-found]
import torch
from stable_baselines3.common.callbacks import BaseCallback  # type: ignore[import-not-found]

from benchmarks.shop_visits import Exam, Metered, Task, opened

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tuned": {
        "learning_rate": 1e-3,
        "gamma": 0.9,
        "batch_size": 64,
        "train_freq": 4,
        "target_update_interval": 1280,
        "exploration_fraction": 0.3,
        "exploration_final_eps": 0.1,
        "n_steps": 3,
    },
}


class Look(BaseCallback):  # type: ignore[misc]
    """Lets the exam look at every step."""

    def __init__(self, exam: Exam) -> None:
        super().__init__()
        self.exam, self.over = exam, False

    def _on_step(self) -> bool:
        self.over = self.exam.look()
        return not self.over


def main() -> None:
    task = Task.received()
    torch.set_num_threads(1)
    metered = Metered(opened(task.shop, flat=True))
    settings = {"buffer_size": 100_000, **VARIANTS[task.variant]}  # the default's 1,000,000 would take 7 GB
    model = stable_baselines3.DQN("MlpPolicy", metered, seed=task.seed, device="cpu", **settings)
    look = Look(Exam(task, metered, lambda seen: int(model.predict(seen, deterministic=True)[0])))
    model.learn(task.interactions, callback=look)
    while not look.over:  # in pieces: exploration is planned for so many steps, and must not begin anew
        model.learn(task.interactions, callback=look, reset_num_timesteps=False)
    look.exam.send("stable-baselines3", stable_baselines3.__version__)


if __name__ == "__main__":
    main()
