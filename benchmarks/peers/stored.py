"""What the peers of `benchmarks.updates` share: the transitions that it stored for them, and the product's network."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from learner.entries import StateTensors
from learner.networks import ItemTensors, Keys, NetworkSettings, QNetwork, Queries, unknown_items

STATE: Final = StateTensors._fields
WARM_UP: Final = 5  # updates before what is timed


def asked() -> Namespace:
    """What `benchmarks.updates` wants: FILE --batch B --updates N --threads N --device D."""
    parser = ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    return wanted


def columns(file: str) -> dict[str, Tensor]:
    """M transitions: STATE and next_STATE fields [M, H]; action, reward, discount [M]; items: their count."""
    with np.load(file) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


class QOfAll(nn.Module):
    """The product's network as a textbook has it: a state in, Q of all items out."""

    def __init__(self, items: int) -> None:
        super().__init__()
        settings = NetworkSettings()
        self.network = QNetwork(settings, items)
        known = unknown_items(items, settings.vector_dim)._replace(seen=torch.ones(items, dtype=torch.bool))
        for name, column in known._asdict().items():
            self.register_buffer(f"of_items_{name}", column)

    def forward(self, item: Tensor, name: Tensor, age_s: Tensor, value: Tensor) -> Tensor:
        """[B, H] each; returns [B, N]."""
        return self.network.q_all(*self._read(item, name, age_s, value))

    def at(self, action: Tensor, item: Tensor, name: Tensor, age_s: Tensor, value: Tensor) -> Tensor:
        """Q of one action each, [B]: action [B], the others as in `forward`."""
        return self.network.q_at(*self._read(item, name, age_s, value), action.unsqueeze(1)).squeeze(1)

    def _read(self, item: Tensor, name: Tensor, age_s: Tensor, value: Tensor) -> tuple[Queries, Keys]:
        items = ItemTensors(*(getattr(self, f"of_items_{field}") for field in ItemTensors._fields))
        keys = self.network.keys(items)
        state = StateTensors(item.long(), name.long(), age_s, value)
        return self.network.queries(state, keys), keys


def timed(update: Callable[[], object], count: int, device: str) -> list[float]:
    """Seconds of each update."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        update()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def tell(wanted: Namespace, update: Callable[[], object], version: str) -> None:
    """Time the updates, and print what came of it as JSON."""
    seconds = timed(update, WARM_UP + wanted.updates, wanted.device)
    print(json.dumps({"seconds": seconds[WARM_UP:], "version": version}))
