"""Off-policy estimators: what a policy would have earned, told from decisions that another one took. Pure functions.

In decision t the behaviour policy filled slot k by a_k ~ mu(. | x, a_1 .. a_{k-1}), the logged propensity, and the slot
earned r_k. The target policy would have drawn it from pi(. | x, a_1 .. a_{k-1}). With one slot all of this is the
contextual bandit of the textbooks, and w = pi / mu.

What weights a slot's reward gets depends on what it may depend on, the *slate model*:

    standard   on the whole slate                   w_k = prod over all j of pi_j / mu_j
    cascade    on the slots up to k, not on later   w_k = prod over j <= k of pi_j / mu_j
    slotwise   as in cascade, and another question is asked: what would pi earn in one slot, with the slots before
               it as they were logged?              w_k = pi_k / mu_k

(SIPS and RIPS of McInerney et al. 2020.) q(x, a) is a model of the reward, v its mean under pi; b_k is the weight
of what came before slot k: in the cascade w_{k-1}, else 1. With sums over k, means over t:

    IPS         mean of sum w_k r_k
    SNIPS       sum over k of (sum_t w_k r_k / sum_t w_k), where every decision has slot k
    DM          mean of v
    DR          mean of sum w_k (r_k - q_k) + b_k v_k
    SNDR        as DR, w and b each divided by its mean over t
    switch-DR   as DR, but where a weight is above tau the model stands

IPS: Horvitz & Thompson 1952. SNIPS: Swaminathan & Joachims 2015. DM, DR: Dudik et al. 2011 and 2014; for slates, as a
recursion over the slots: Kiyohara et al. 2022 (after Jiang & Li 2016). Switch-DR: Wang et al. 2017. SNDR, and all of
them for one slot, as in obp (Saito et al. 2020): `python -m benchmarks.ope_peer` compares.

In the cascade q_k and v_k count what slot k and all later ones earn (the tail follows pi); else that slot alone. In
the standard model the slate's v stands in slot 1, and is 0 in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

SlateModel = Literal["cascade", "standard", "slotwise"]
SLATE_MODELS: Final[tuple[SlateModel, ...]] = get_args(SlateModel)
ALWAYS: Final = float("inf")  # the tau of a switch that is never made: DR itself
NEVER: Final = -1.0  # the tau of one that is always made: DM itself


class PropensityError(ValueError):
    """A propensity that is no probability, or a target's chance that is none; the message names the first."""


class Rounds(NamedTuple):
    """T decisions of up to K slots; slots that a decision does not have are zero in everything."""

    slate: SlateModel
    shown: Mask  # [T, K] the decision has this slot
    ratio: Floats  # [T, K] pi / mu of the slot alone
    reward: Floats  # [T, K] r
    weight: Floats  # [T, K] w, of the slot's reward
    before: Floats  # [T, K] b, of the model's word on the slot
    q_shown: Floats  # [T, K] q, of what was shown
    q_target: Floats  # [T, K] v, what the model expects of the target


def ratios(target: Floats, propensity: Floats, shown: Mask) -> Floats:
    """[T, K] pi / mu of what was shown; 0 where `shown` is False.

    target, propensity: [T, K] probabilities of what is in the slot, given the slots before it.
    Raises: PropensityError unless 0 < mu <= 1 and 0 <= pi <= 1 wherever something was shown.
    """
    for name, p, low in (("propensity", propensity, 5e-324), ("chance under the target", target, 0.0)):
        bad = shown & ~((p >= low) & (p <= 1.0 + 1e-9))
        if bad.any():
            t, k = (int(i[0]) for i in np.nonzero(bad))
            bound = "0 < p <= 1" if low else "0 <= p <= 1"
            raise PropensityError(f"decision {t}, slot {k}: {name} is {p[t, k]}; it must be {bound}")
    return np.divide(target, propensity, out=np.zeros(shown.shape), where=shown)


def rounds(
    slate: SlateModel,
    ratio: Floats,
    shown: Mask,
    reward: Floats,
    q_shown: Floats | None = None,
    q_target: Floats | None = None,
) -> Rounds:
    """The decisions as a slate model weights them. ratio: [T, K] from `ratios`; q None: no model, all zero."""
    shown_q, target_q = (np.zeros(shown.shape) if q is None else q * shown for q in (q_shown, q_target))
    before = shown.astype(np.float64)
    weight: Floats = ratio
    if slate == "standard":
        weight = np.where(shown, ratio, 1.0).prod(axis=1, keepdims=True) * shown
    elif slate == "cascade":
        weight = np.cumprod(ratio, axis=1).astype(np.float64)
        before[:, 1:] *= weight[:, :-1]
    return Rounds(slate, shown, ratio * shown, reward * shown, weight * shown, before, shown_q, target_q)


def clipped(given: Rounds, most: float) -> Rounds:
    """No weight above `most`: less variance, and a bias towards nothing (IPS) or towards the model (DR)."""
    return given._replace(weight=np.minimum(given.weight, most), before=np.minimum(given.before, most))


def switched(given: Rounds, tau: float) -> Rounds:
    """Weights above tau count nothing: there the model's word stands, in a cascade for all later slots too."""
    keeps = given.weight <= tau
    if given.slate != "cascade":
        return given._replace(weight=given.weight * keeps)
    keeps = np.logical_and.accumulate(keeps, axis=1)
    before = given.before.copy()
    before[:, 1:] *= keeps[:, :-1]
    return given._replace(weight=given.weight * keeps, before=before)


class Sums(NamedTuple):
    """All that the estimators need to know of some decisions; sums of disjoint sets add up. Axis 0, of length G, goes
    over groups of decisions (of users, for the intervals)."""

    decisions: Floats  # [G]
    slots: Floats  # [G, K] decisions that have slot k
    reward: Floats  # [G, K] sum r
    weight: Floats  # [G, K] sum w
    square: Floats  # [G, K] sum w^2
    ratio: Floats  # [G, K] sum pi / mu
    weighted: Floats  # [G, K] sum w r
    residual: Floats  # [G, K] sum w (r - q)
    before: Floats  # [G, K] sum b
    model: Floats  # [G, K] sum b v
    squared: Floats  # [G] sum (sum over k of w r)^2
    direct: Floats  # [G] sum v
    switched: Floats  # [G, S] sum of switch-DR's terms, for each tau


def no_sums(groups: int, slots: int, taus: int) -> Sums:
    """Of nothing."""
    one, wide = (groups,), (groups, slots)
    shapes = {"decisions": one, "squared": one, "direct": one, "switched": (groups, taus)}
    return Sums(*(np.zeros(shapes.get(name, wide)) for name in Sums._fields))


def sums(given: Rounds, group: Ints, groups: int, clip: float = ALWAYS, taus: Sequence[float] = ()) -> Sums:
    """The decisions summed by group. group: [T], 0 .. groups - 1. clip: weights above it are clipped, but those that
    switch-DR sees."""
    used = clipped(given, clip)
    by_slot = {
        "slots": used.shown,
        "reward": used.reward,
        "weight": used.weight,
        "square": used.weight**2,
        "ratio": given.ratio,
        "weighted": used.weight * used.reward,
        "residual": used.weight * (used.reward - used.q_shown),
        "before": used.before,
        "model": used.before * used.q_target,
    }
    by_tau = np.zeros((len(group), len(taus)))
    for i, tau in enumerate(taus):
        by_tau[:, i] = _switch_terms(given, tau)
    return Sums(
        decisions=np.bincount(group, minlength=groups).astype(np.float64),
        squared=_grouped(by_slot["weighted"].sum(axis=1) ** 2, group, groups),
        direct=_grouped(_switch_terms(given, NEVER), group, groups),
        switched=_grouped(by_tau, group, groups),
        **{name: _grouped(columns, group, groups) for name, columns in by_slot.items()},
    )


def _switch_terms(given: Rounds, tau: float) -> Floats:
    """[T] what switch-DR says of each decision."""
    s = switched(given, tau)
    return (s.weight * (s.reward - s.q_shown) + s.before * s.q_target).sum(axis=1)


def _grouped(columns: npt.NDArray[np.generic], group: Ints, groups: int) -> Floats:
    """[T, ...] -> [groups, ...]"""
    out = np.zeros((groups, *columns.shape[1:]))
    np.add.at(out, group, columns)
    return out


def added(a: Sums, b: Sums) -> Sums:
    """Of both sets of decisions, group by group."""
    return Sums(*(x + y for x, y in zip(a, b, strict=True)))


def total(given: Sums) -> Sums:
    """All groups as one."""
    return Sums(*(column.sum(axis=0, keepdims=True) for column in given))


def without_each(given: Sums) -> Sums:
    """Group g of the result is all groups but g; groups without a decision are left out."""
    there = given.decisions > 0
    return Sums(*(_others(column[there]) for column in given))


def _others(column: Floats) -> Floats:
    """[G, ...] the sum of all rows but this one. Not total - row: what is 0 must come out 0."""
    out = np.zeros_like(column)
    out[1:] += np.cumsum(column[:-1], axis=0)
    out[:-1] += np.cumsum(column[:0:-1], axis=0)[::-1]
    return out


# --- estimates: Sums [G] -> [G], reward of a decision ----------------------------------------------------------------

Estimator = Callable[[Sums], Floats]


def logged(s: Sums) -> Floats:
    """What the behaviour policy earned: the mean reward of a decision."""
    return s.reward.sum(axis=1) / s.decisions


def ips(s: Sums) -> Floats:
    """Inverse propensity scoring: unbiased, of large variance."""
    return s.weighted.sum(axis=1) / s.decisions


def snips(s: Sums) -> Floats:
    """Self-normalised IPS: a bias of order 1/T, far less variance. NaN where a slot has no weight at all."""
    return (
        np.where(s.slots > 0, s.slots * _share(s.weighted, s.weight, np.nan), 0.0).sum(axis=1) / s.decisions
    )


def dm(s: Sums) -> Floats:
    """Direct method: as good as the model."""
    return s.direct / s.decisions


def dr(s: Sums) -> Floats:
    """Doubly robust: unbiased as IPS is, with the variance of what the model leaves unexplained."""
    return (s.residual + s.model).sum(axis=1) / s.decisions


def sndr(s: Sums) -> Floats:
    """Self-normalised DR. Where there is no weight the model's word stands."""
    terms = _share(s.residual, s.weight, 0.0) + _share(s.model, s.before, 0.0)
    return (s.slots * terms).sum(axis=1) / s.decisions


def switch_dr(which: int) -> Estimator:
    """Switch-DR by the tau of this number among those that the sums were made with."""
    return lambda s: s.switched[:, which] / s.decisions


def mean_ratio(s: Sums) -> Floats:
    """[G] mean of pi / mu over slots: 1, but for chance, where the target shows only what could have been shown."""
    return s.ratio.sum(axis=1) / s.slots.sum(axis=1)


def effective_sample_size(s: Sums) -> Floats:
    """[G, K] decisions that the weights of each slot are worth: (sum w)^2 / sum w^2 (Kish 1965); 0 without weight."""
    return _share(s.weight**2, s.square, 0.0)


def effective_rewards(s: Sums) -> Floats:
    """[G] decisions that earned something, as many as IPS leans on: (sum w r)^2 / sum (w r)^2; 0 where none did.

    Where a purchase is rare, and shown by luck alone what the target would show, it may be one or two, however many
    effective decisions there are; no interval can know of those that did not happen.
    """
    return _share(s.weighted.sum(axis=1) ** 2, s.squared, 0.0)


def _share(above: Floats, below: Floats, nothing: float) -> Floats:
    return np.divide(above, below, out=np.full(above.shape, nothing), where=below > 0)
