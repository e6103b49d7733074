"""A double DQN as a plain eager loop: the product's network, one loss, arrays for a replay memory. Run by
`benchmarks.updates`."""

from __future__ import annotations

import copy

import torch
from torch.nn import functional

from benchmarks.peers.stored import STATE, QOfAll, asked, columns, tell


def main() -> None:
    """van Hasselt et al. 2016, Huber loss, Adam, Polyak's mean as target."""
    wanted = asked()
    stored = columns(wanted.file)
    online = QOfAll(int(stored.pop("items"))).to(wanted.device)
    target = copy.deepcopy(online).requires_grad_(False)
    optimiser = torch.optim.Adam(online.parameters(), lr=1e-3)
    count = len(stored["action"])

    def update() -> None:
        where = torch.randint(count, (wanted.batch,))
        batch = {name: column[where].to(wanted.device) for name, column in stored.items()}
        state = [batch[name] for name in STATE]
        following = [batch[f"next_{name}"] for name in STATE]
        # Q of all items for the arg max alone: elsewhere of one item each, as its author would
        q = online.at(batch["action"], *state)
        with torch.no_grad():
            later = target.at(online(*following).argmax(dim=1), *following)
        loss = functional.huber_loss(q, batch["reward"] + batch["discount"] * later)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        with torch.no_grad():
            for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
                mine.lerp_(theirs, 0.005)

    tell(wanted, update, torch.__version__)


if __name__ == "__main__":
    main()
