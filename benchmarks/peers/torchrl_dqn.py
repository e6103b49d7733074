"""The same double DQN by TorchRL: its replay buffer, its DQNLoss, its target updater, the product's network. Run by
`benchmarks.updates --torchrl PYTHON`."""

from __future__ import annotations

import tensordict  # type: ignore[import-not-found]
import torch
import torchrl  # type: ignore[import-not-found]
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer  # type: ignore[import-not-found]
from torchrl.modules import QValueActor  # type: ignore[import-not-found]
from torchrl.objectives import DQNLoss, SoftUpdate  # type: ignore[import-not-found]

from benchmarks.peers.stored import STATE, QOfAll, asked, columns, tell

GAMMA = 0.97**3  # of the steps that are in a reward


def main() -> None:
    """As its tutorials have it."""
    wanted = asked()
    stored = columns(wanted.file)
    items, count = int(stored["items"]), len(stored["action"])
    actor = QValueActor(QOfAll(items), in_keys=list(STATE), action_space="categorical").to(wanted.device)
    loss_of = DQNLoss(
        actor, action_space="categorical", loss_function="smooth_l1", double_dqn=True, delay_value=True
    )
    loss_of.make_value_estimator(gamma=GAMMA)
    updater = SoftUpdate(loss_of, eps=0.995)
    optimiser = torch.optim.Adam(loss_of.parameters(), lr=1e-3)
    over = (stored["discount"] == 0).unsqueeze(1)
    replay = TensorDictReplayBuffer(
        storage=LazyTensorStorage(count, device=wanted.device), batch_size=wanted.batch
    )
    following = {name: stored[f"next_{name}"] for name in STATE}
    following |= {"reward": stored["reward"].unsqueeze(1), "done": over, "terminated": over}
    now = {name: stored[name] for name in STATE} | {"action": stored["action"]}
    replay.extend(tensordict.TensorDict(now | {"next": following}, batch_size=[count]))

    def update() -> None:
        loss = loss_of(replay.sample().to(wanted.device))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        updater.step()

    tell(wanted, update, torchrl.__version__)


if __name__ == "__main__":
    main()
