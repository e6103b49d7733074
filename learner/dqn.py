"""The losses, one function per equation. B rows of a batch, N items, K slots.

Targets never carry a gradient; each loss is per row, and `weighted_mean` weighs it by importance (Schaul et al.
2016, section 3.4).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def best_items(q: Tensor, on_offer: Tensor, slots: int) -> Tensor:
    """The `slots` best next actions, [B, K] ids: with q of the online network the arg max of double DQN (van Hasselt et
    al. 2016, equation 4), with the target network's that of DQN (Mnih et al. 2015).

    q: [B, N]; on_offer: [N] or [B, N] bool, at least `slots` of them. The mask touches the selection only:
    -inf in an evaluated value would make -inf * 0 = NaN of an ended session.
    """
    masked = q.masked_fill(~on_offer, -torch.inf)
    if slots == 1:
        return masked.argmax(dim=1, keepdim=True)
    return masked.topk(min(slots, masked.shape[1]), dim=1).indices


def slate_value(value: Tensor, advantage: Tensor) -> Tensor:
    """V(s') = V0 + Σ_k A(s', a_k): value of a slate of these slots (Ie et al. 2019, equation 15, top-k slate); of
    each of M quantiles of V0, [B, M].

    value: [B, M]; advantage: [B, K], of the target network at the online network's choice. With K = 1 it is
    Q_target(s', argmax_a Q_online(s', a)).
    """
    return value + advantage.sum(dim=1, keepdim=True)


def n_step_target(reward: Tensor, discount: Tensor, next_value: Tensor) -> Tensor:
    """y = R + Γ V(s'), each its own (Sutton & Barto 2018, equation 7.1; Γ = gamma**n, or 0 after the last)."""
    return reward + discount * next_value


def continuation_target(target: Tensor, slot_reward: Tensor, gamma: float) -> Tensor:
    """What the target says of the time after this slot, each its own: (y - r) / γ."""
    return (target - slot_reward) / gamma


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Σ w x / B: rows outside of a loss have weight 0, so that each row pulls as hard as it would alone."""
    return (values * weight).sum() / len(values)


def huber(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    """Squared error / 2 within delta, linear beyond, each its own (Mnih et al. 2015's clipping, for delta = 1)."""
    return functional.huber_loss(prediction, target, reduction="none", delta=delta)


def quantile_huber(prediction: Tensor, target: Tensor, delta: float) -> Tensor:
    """The loss of QR-DQN (Dabney et al. 2018, equations 9 and 10), times δ: mean over predictions and targets of

        2 |τ_i - [target_j < prediction_i]| Huber(target_j - prediction_i)        τ_i = (i + 1/2) / N

    [B]. One prediction and one target: `huber`. prediction: [B, N]; target: [B, M].
    """
    n = prediction.shape[1]
    tau = (torch.arange(n, device=prediction.device) + 0.5) / n
    theirs, mine = target.unsqueeze(1), prediction.unsqueeze(2)
    tilt = 2 * (tau.unsqueeze(1) - (theirs < mine).float()).abs()  # [B, N, M]
    return (tilt * huber(mine.expand_as(tilt), theirs.expand_as(tilt), delta)).mean(dim=(1, 2))


def choice_loss(log_odds: Tensor, chosen: Tensor) -> Tensor:
    """-log P(chosen | shown), [B]: the choice model by maximum likelihood. log_odds: [B]; chosen: [B] bool."""
    return functional.binary_cross_entropy_with_logits(log_odds, chosen.float(), reduction="none")


def next_item_loss(logits: Tensor, action: Tensor) -> Tensor:
    """-log softmax(logits)[action], [B]: SQN's supervised head (Xin et al. 2020, equation 3). logits: [B, N]."""
    return functional.cross_entropy(logits, action, reduction="none")


def conservative_loss(q_all: Tensor, q_action: Tensor, on_offer: Tensor) -> Tensor:
    """logsumexp_a Q(s, a) - Q(s, action), [B]: CQL(H) (Kumar et al. 2020, equation 4). q_all: [B, N]."""
    return torch.logsumexp(q_all.masked_fill(~on_offer, -torch.inf), dim=1) - q_action
