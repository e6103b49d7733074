"""The agent's settings: how it learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from learner.networks import MAX_SLOTS, NetworkSettings

MAX_STEPS: Final = 100  # of n-step returns
USUAL_STEPS: Final = 10  # of those at most, where nobody says
ENTRIES: Final = 32  # of a state, and so many times as many where far ahead counts, likewise
MOST_TIMES: Final = 5


def _setting(default: float | int | bool, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class AgentSettings:
    """How the agent learns."""

    gamma: float = _setting(0.97, "discount for each further step; 0..1, 1 excluded")
    n_step: int = _setting(
        0,
        "steps of reward counted before bootstrapping; 0: 0.003 / (1 - gamma)^2, at most 10; 0..100",
    )
    unaided_steps: int = _setting(
        100,
        "more steps at most that are counted through what users do unaided, before bootstrapping; 0..1000",
    )
    batch_size: int = _setting(128, "transitions in one update; 1..65536")
    double: bool = _setting(
        True,
        "next items are chosen by the online network and valued by the target network (double DQN); "
        "else both by the target network (DQN)",
    )
    learning_rate: float = _setting(0.002, "of Adam; > 0")
    value_rate: float = _setting(
        4.0, "times --learning-rate, at first, for the heads of reward and of what is to come; 0.001..1000"
    )
    value_settle: int = _setting(
        300,
        "updates after which --value-rate is down to .71 of itself: it falls as 1 / sqrt(1 + updates / this), to a "
        "sixteenth; 0: it stays; 0..1e9",
    )
    target_tau: float = _setting(
        0.005, "share of the way that the target network goes to the online one at each update; 0..1, 0: none"
    )
    target_sync_updates: int = _setting(200, "updates between target syncs, where --target-tau is 0; >= 1")
    slate_size: int = _setting(
        0,
        "slots counted in the value of the next state; 1: the best alone; 0: as many as shown lately; 0..32",
    )
    sqn_weight: float = _setting(1.0, "weight of the next-item loss; >= 0")
    reward_weight: float = _setting(0.1, "weight of the loss on what a choice earns; >= 0")
    quantiles: int = _setting(
        1,
        "of the distribution of what is to come, learnt by quantile regression (QR-DQN); 1: its mean; 1..200",
    )
    td_weight: float = _setting(0.1, "weight of the temporal-difference loss; >= 0")
    length_weight: float = _setting(
        0.001, "weight of the squared length of states' vectors, so that none grows for nothing; >= 0, 0: off"
    )
    cql_weight: float = _setting(0.0, "weight of the conservative loss; >= 0, 0: off")
    huber_delta: float = _setting(
        20.0, "error beyond which losses grow linearly; in units of what a choice earns on average, > 0"
    )
    quantile_delta: float = _setting(1.0, "the same of quantiles, where there are more than one; > 0")
    weight_decay: float = _setting(
        1.0, "decoupled, of what ids add to their features, of items that a vector describes; 0..1"
    )
    forget: float = _setting(
        0.3, "share of the items that features speak for treated as new in each update; 0..1"
    )
    exact_items: int = _setting(
        20_000, "catalogs up to this size are maximised over exactly, larger ones over candidates; >= 1"
    )
    candidates: int = _setting(
        4096, "random candidates beside the batch's own items, in larger catalogs; >= 1"
    )
    dim: int = _setting(32, "size of item vectors; 1..1024")
    hidden: int = _setting(64, "size of hidden layers; 1..4096")
    centred: bool = _setting(
        True,
        "heads of value read vectors centred and of unit size, and what a slate's chance tells of its user is "
        "set apart from what choosing does; for far horizons",
    )
    recall: bool = _setting(
        True, "remember where users went from each item, beside what the network learns of it"
    )
    stack: bool = _setting(
        True, "set choice right by what came of it as it was foretold, before anything was learnt of it"
    )
    dueling: bool = _setting(
        True,
        "what is to come if nothing is chosen is learnt of each state, beside what choosing adds; without, it is one "
        "number for all states",
    )
    history_length: int = _setting(
        0, "newest history entries in a state; 0: about 1 / (1 - gamma), in 32s, at most 160; 0..1000"
    )
    vector_dim: int = _setting(32, "dense catalog features used; 1..256")
    graphs: bool = _setting(
        True, "on a GPU, updates of catalogs up to --exact-items are launched as one CUDA graph"
    )

    def __post_init__(self) -> None:
        bounds = {
            "gamma": (0.0, 0.999999),
            "n_step": (0, MAX_STEPS),
            "unaided_steps": (0, 10 * MAX_STEPS),
            "batch_size": (1, 65536),
            "learning_rate": (1e-9, 1.0),
            "value_rate": (1e-3, 1e3),
            "value_settle": (0, 10**9),
            "target_tau": (0, 1),
            "target_sync_updates": (1, 10**9),
            "slate_size": (0, MAX_SLOTS),
            "sqn_weight": (0, 1e6),
            "reward_weight": (0, 1e6),
            "quantiles": (1, 200),
            "td_weight": (0, 1e6),
            "length_weight": (0, 1e6),
            "cql_weight": (0, 1e6),
            "huber_delta": (1e-6, 1e6),
            "quantile_delta": (1e-6, 1e6),
            "weight_decay": (0, 1),
            "forget": (0, 1),
            "exact_items": (1, 10**7),
            "candidates": (1, 10**6),
            "dim": (1, 1024),
            "hidden": (1, 4096),
            "history_length": (0, 1000),
            "vector_dim": (1, 256),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}={value}: must be in {low}..{high}")

    @property
    def steps(self) -> int:
        """Of reward before bootstrapping. The further ahead counts, the more bootstraps news would have to go through,
        each of which waits for the target network to follow; but each reward that is counted brings its luck along.
        """
        return self.n_step or min(max(1, round(0.003 / (1.0 - self.gamma) ** 2)), USUAL_STEPS)

    @property
    def entries(self) -> int:
        """Of the history in a state. What a visit has used up is told by all of it, and counts where what is to come
        does: over 1 / (1 - γ) steps."""
        times = round(1.0 / (1.0 - self.gamma) / ENTRIES)
        return self.history_length or ENTRIES * min(max(1, times), MOST_TIMES)

    @property
    def network(self) -> NetworkSettings:
        """The shape of the network."""
        return NetworkSettings(
            dim=self.dim,
            hidden=self.hidden,
            history_length=self.entries,
            vector_dim=self.vector_dim,
            quantiles=self.quantiles,
            gamma=self.gamma,
            centred=self.centred,
            recall=self.recall,
            stack=self.stack,
            dueling=self.dueling,
        )
