"""Chances of an ε-greedy slate, in closed form: of each slot given those before it, and of all that is yet to come.

The target fills slots one by one as `learner.exploration` does: with probability ε uniformly from the items left, else
with the best left. Off-policy estimators ask three things of it, at each slot of a slate that another policy filled:
how probable was what stands there; what does a reward model expect in this slot; and what in all slots from here on.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from learner.exploration import best_ids
from streaming.jit import jit

Floats = npt.NDArray[np.float64]


@jit
def shown_chances(items: int, slots: int, epsilon: float) -> Floats:
    """[slots + 1] probability that the item of rank r (0: the best) is anywhere in the slate; the last entry is that of
    any one item of rank `slots` or below.

    Let b be the rank of the best item left before slot k. All better ones are in the slate, and of those below b a set
    of k - b that was drawn uniformly: no draw prefers one of them to another. So b alone is a state, and the
    chances follow from a sum over its k + 1 values. items >= slots.
    """
    shown = np.zeros(slots + 1)
    at = np.zeros(slots + 1)  # [b] probability of the state
    at[0] = 1.0
    for k in range(slots):
        left = items - k
        after = np.zeros(slots + 1)
        for b in range(k + 1):
            below = items - b - 1  # items of a lower rank than b, k - b of them shown
            best = at[b] * (1.0 - epsilon + epsilon / left)
            shown[b] += best
            if below > 0:
                other = at[b] * epsilon / left * (left - 1) / below
                for r in range(b + 1, slots + 1):
                    shown[r] += other
            after[b] += at[b] * epsilon * (left - 1) / left
            drawn, unseen, following = k - b, below, b + 1
            while unseen > 0 and best > 0.0:  # the next best is the first that was not drawn before
                after[following] += best * (1.0 - drawn / unseen)
                best *= drawn / unseen
                drawn, unseen, following = drawn - 1, unseen - 1, following + 1
        at = after
    return shown


@lru_cache(maxsize=8192)
def chance_table(items: int, slots: int, width: int, epsilon: float) -> Floats:
    """[width, width + 1] row k: `shown_chances` of what is left after k of the slots are filled; its last column is
    that of all ranks from slots - k on. width >= slots."""
    table = np.zeros((width, width + 1))
    for k in range(slots):
        chances = shown_chances(items - k, slots - k, epsilon)
        table[k, : slots - k] = chances[:-1]
        table[k, -1] = chances[-1]
    return table


class Judged(NamedTuple):
    """B logged slates of up to K slots under a target policy; zero where there is no slot."""

    chance: Floats  # [B, K] pi(what is in the slot | the slots before it)
    own: Floats  # [B, K] model's reward of the slot, for what is in it
    here: Floats  # [B, K] the same for what the target would put into it, given the slots before it
    onward: Floats  # [B, K] and that of this slot and all later ones, filled by the target


def judge(
    scores: npt.NDArray[np.floating],
    eligible: npt.NDArray[np.bool_],
    value: Floats,
    effect: Floats,
    slates: npt.NDArray[np.int64],
    uniform: Floats,
    epsilon: float,
) -> Judged:
    """The target policy is ε-greedy by `scores`; the model's reward of item a in slot k is value[a] + effect[k].

    scores, value: [B, M]; eligible: [B, M] what the target might show, is used up; slates: [B, K] items, -1: no slot.
    effect: [K]. uniform: [B, K] probability of each one eligible item, in a uniform draw from those left. What stands
    in a slot and is not eligible has no chance. Where fewer items are eligible than there are slots, the target leaves
    the last ones empty. Of slots behind one that the target could not have filled so, `onward` is not told (0).
    """
    items = eligible.sum(axis=1)
    slots = np.minimum((slates >= 0).sum(axis=1), items)  # that the target fills
    pairs, which = np.unique(np.stack((items, slots), axis=1), axis=0, return_inverse=True)
    width = slates.shape[1]
    tables = np.stack([chance_table(int(n), int(k), width, epsilon) for n, k in pairs])
    order = np.full((len(slates), 2 * width), -1, np.int64)
    for b, (n, k) in enumerate(zip(items.tolist(), slots.tolist(), strict=True)):
        # as many as the slots before may take away, and as many as may then be shown
        most = min(2 * k, n)
        order[b, :most] = best_ids(scores[b], eligible[b], most)
    out = Judged(*(np.zeros(slates.shape) for _ in Judged._fields))
    _judge(order, eligible, value, effect, slates, uniform, epsilon, tables[which.reshape(-1)], *out)
    return out


@jit
def _judge(
    order: npt.NDArray[np.int64],
    eligible: npt.NDArray[np.bool_],
    value: Floats,
    effect: Floats,
    slates: npt.NDArray[np.int64],
    uniform: Floats,
    epsilon: float,
    tables: Floats,
    chance: Floats,
    own: Floats,
    here: Floats,
    onward: Floats,
) -> None:
    """As `judge`. order: [B, >= 2 K] the target's best items, best first, -1 at the end; tables: [B, K, K + 1]."""
    for b in range(len(slates)):
        left, worth = 0, 0.0
        for i in range(eligible.shape[1]):
            if eligible[b, i]:
                left += 1
                worth += value[b, i]
        slots = int((slates[b] >= 0).sum())
        fills = min(slots, left)
        possible = True  # what stands in the slots before: the target might have filled them so
        for k in range(slots):
            best, rank, ahead, top = -1, 0, 0.0, 0.0
            for item in order[b]:
                if item < 0 or (best >= 0 and rank >= fills - k):
                    break
                if eligible[b, item]:
                    best = item if best < 0 else best
                    if rank < fills - k:
                        ahead += tables[b, k, rank] * value[b, item]
                        top += value[b, item]
                    rank += 1
            item = slates[b, k]
            own[b, k] = effect[k] + value[b, item]
            if left > 0:
                here[b, k] = effect[k] + epsilon * worth / left + (1.0 - epsilon) * value[b, best]
                if possible:
                    onward[b, k] = effect[k:fills].sum() + ahead + tables[b, k, -1] * (worth - top)
            if eligible[b, item]:
                chance[b, k] = epsilon * uniform[b, k] + (1.0 - epsilon) * (item == best)
                eligible[b, item] = False
                worth -= value[b, item]
                left -= 1
            else:
                possible = False
