"""What came of an evaluation: sums over groups of users, and what they say, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from learner.estimators import (
    ALWAYS,
    Estimator,
    Ints,
    Rounds,
    Sums,
    added,
    dm,
    dr,
    effective_rewards,
    effective_sample_size,
    ips,
    logged,
    mean_ratio,
    no_sums,
    sndr,
    snips,
    sums,
    switch_dr,
    total,
)
from learner.intervals import Interval, interval

GROUPS: Final = 200  # of users, for the intervals
TAUS: Final = (
    ALWAYS,
    1000.0,
    500.0,
    200.0,
    100.0,
    50.0,
    20.0,
    10.0,
    5.0,
    2.0,
    1.0,
)  # that switch-DR may choose from
HEAVY: Final = (10.0, 100.0, 1000.0)  # weights above these are counted
SLACK: Final = 0.01  # by which chances and propensities may differ in the mean, whatever their interval says
FEW_REWARDS: Final = 10  # likewise: effective rewards
FEW: Final = 100  # effective decisions; below, an estimate is not to be relied on,
# nor below this, where weights leave less than half of the log: there 120 were too few for intervals, and 240 enough
FEW_LEFT: Final = 200


class Settings(Protocol):
    """What this module reads of `learner.evaluation.EvaluateConfig`."""

    @property
    def slate(self) -> str: ...
    @property
    def slots(self) -> int: ...
    @property
    def clip(self) -> float | None: ...
    @property
    def switch(self) -> float | None: ...


class Heavy(NamedTuple):
    """Weights above a bound."""

    above: float
    weights: int
    share: float  # of all weights, by number
    mass: float  # share of the sum of all weights that is in these
    excess: float  # share of that sum that lies above the bound: what clipping there takes away


@dataclass
class PolicyReport:
    """One policy."""

    name: str
    epsilon: float | None  # None: as logged
    estimates: dict[str, Interval]  # by estimator; reward a decision
    gains: dict[str, Interval]  # the same less what the logging policy earned; paired
    mean_ratio: Interval | None = None
    effective: list[float] = field(default_factory=list)  # decisions that the weights of each slot are worth
    effective_rewards: float = 0.0  # decisions that earned something, as many as IPS leans on
    largest: float = 1.0  # weight
    heavy: list[Heavy] = field(default_factory=list)
    clipped: Heavy | None = None
    switched: Heavy | None = None  # at switch-DR's tau


class Account:
    """One policy's sums, as decisions come."""

    def __init__(self, config: Settings, epsilon: float | None) -> None:
        self._epsilon = epsilon
        self._clip = ALWAYS if config.clip is None else config.clip
        self._taus = TAUS if config.switch is None else (config.switch,)
        self._sums = no_sums(GROUPS, config.slots, len(self._taus))
        bounds = {*HEAVY, self._clip, *self._taus}
        self._bounds = np.array(sorted(bounds))
        self._heavy = np.zeros((len(bounds), 3))  # count, sum, sum of what is above
        self._mass = self._largest = 0.0

    def add(self, given: Rounds, group: Ints) -> None:
        """These decisions, of these groups."""
        self._sums = added(self._sums, sums(given, group, GROUPS, self._clip, self._taus))
        weight = np.sort(given.weight[given.shown])
        if not len(weight):
            return
        self._largest = max(self._largest, float(weight[-1]))
        self._mass += float(weight.sum())
        first = np.searchsorted(weight, self._bounds, side="right")
        count = len(weight) - first
        above = np.append(0.0, np.cumsum(weight[::-1]))[count]
        excess = above - np.where(np.isfinite(self._bounds), self._bounds, 0.0) * count
        self._heavy += np.stack((count, above, excess), axis=1)

    def report(self, name: str) -> PolicyReport:
        """What the sums say."""
        s = self._sums
        if self._epsilon is None:
            mean = interval(s, logged)
            return PolicyReport(name, None, {"mean": mean}, {})
        whole, which = total(s), chosen(s, self._taus)
        methods: dict[str, Estimator] = {
            "IPS": ips,
            "SNIPS": snips,
            "DM": dm,
            "DR": dr,
            "SNDR": sndr,
            "switch-DR": switch_dr(which),
        }
        return PolicyReport(
            name,
            self._epsilon,
            {method: interval(s, estimate) for method, estimate in methods.items()},
            {method: interval(s, _gain(estimate)) for method, estimate in methods.items()},
            interval(s, mean_ratio),
            effective_sample_size(whole)[0, whole.slots[0] > 0].tolist(),
            float(effective_rewards(whole)[0]),
            self._largest,
            [self._above(bound) for bound in HEAVY],
            None if self._clip == ALWAYS else self._above(self._clip),
            self._above(self._taus[which]),
        )

    def _above(self, bound: float) -> Heavy:
        count, above, excess = self._heavy[self._bounds.tolist().index(bound)].tolist()
        weights, mass = float(self._sums.slots.sum()), self._mass or 1.0
        return Heavy(bound, round(count), count / weights, above / mass, excess / mass)


def _gain(estimate: Estimator) -> Estimator:
    return lambda s: estimate(s) - logged(s)


def chosen(by_group: Sums, taus: Sequence[float]) -> int:
    """The number of the tau that switch-DR takes. taus: descending.

    SLOPE (Su, Srinath & Krishnamurthy 2020): the smaller tau, the larger the bias and the smaller the variance may be;
    take the last one before an estimate is further from an earlier one than their intervals explain:

        |v_i - v_j| <= c_i + (sqrt 6 - 1) c_j  for all j < i,  c half the interval's width
    """
    found: list[Interval] = []
    for i in range(len(taus)):
        mine = interval(by_group, switch_dr(i))
        if not all(abs(mine.value - v.value) <= mine.half + (math.sqrt(6.0) - 1.0) * v.half for v in found):
            return i - 1
        found.append(mine)
    return len(taus) - 1


# --- all of it -----------------------------------------------------------------------------------------------


@dataclass
class LeftOut:
    """Decisions that are not judged, by cause."""

    repeated_or_late: int = 0  # the learner does not count them either
    other_times: int = 0  # not within --since and --until
    other_users: int = 0  # of users that --users-share leaves out
    learnt_from: int = 0  # by a version that is judged, with --unseen
    not_explored: int = 0  # every propensity is 1: nothing is known of what was not shown
    not_a_candidate: int = 0  # something was shown that is not among the candidates that the decision carries


@dataclass
class Report:
    """The evaluation's result."""

    topic: str
    slate: str
    records: int
    bad: dict[str, int]  # unreadable records, by Reason
    decisions: int  # judged
    slots: int  # of these decisions
    users: int  # of these decisions, about
    from_ms: int  # event time of the first of them ...
    to_ms: int  # ... and of the last
    unsettled: int  # of them are younger than the attribution window
    could_show: (
        float | None
    )  # items that the propensities say could be shown, per item that we think could be
    has_read: dict[str, int] = field(
        default_factory=dict
    )  # by version: how many of them its learner had read before it
    left_out: LeftOut = field(default_factory=LeftOut)
    policies: list[PolicyReport] = field(default_factory=list)
    took_s: float = 0.0

    def notes(self) -> list[str]:
        """What a reader must know before believing the figures."""
        found = []
        if self.unsettled:
            found.append(
                f"{self.unsettled:,} of {self.decisions:,} decisions are younger than the attribution window: what "
                "they earn may not all have come yet, under any policy"
            )
        if self.could_show is not None and abs(self.could_show - 1.0) > 0.02:
            found.append(
                f"the propensities say that {self.could_show:.2f} times as many items could be shown as the catalog "
                "(or the weights) and the histories say: it has changed since, or requests excluded items"
            )
        for name, count in self.has_read.items():
            if count:
                found.append(
                    f"{name}: it was learnt from {count:,} of these {self.decisions:,} decisions, which makes its "
                    "estimates too high; judge those that are later (--unseen), by an older version if there are none"
                )
        for policy in self.policies:
            found += _doubts(policy, self.decisions)
        return found


def _doubts(policy: PolicyReport, decisions: int) -> list[str]:
    found = []
    few = FEW_LEFT if decisions > 2 * FEW_LEFT else FEW
    w = policy.mean_ratio
    if w is not None and abs(w.value - 1.0) > SLACK and not w.low <= 1.0 <= w.high:
        found.append(
            f"{policy.name}: its chances are {w.value:.3g} times ({w.low:.3g} to {w.high:.3g}) the propensities, in "
            "the mean, and not 1 times: what it would show could not always be shown, or propensities are wrong"
        )
    thin = [k for k, n in enumerate(policy.effective) if n < few]
    if thin:
        found.append(
            f"{policy.name}: from slot {thin[0] + 1} on its weights are worth fewer than {few} decisions: it differs "
            "too much from what was served; judge fewer slots (--slots), or read these estimates as guesses"
        )
    elif policy.mean_ratio is not None and policy.effective_rewards < FEW_REWARDS:
        found.append(
            f"{policy.name}: its estimates rest on {policy.effective_rewards:.1f} effective rewards: a few rare ones "
            "decide, and intervals may be too short; judge a longer log, or smaller rewards (--rewards)"
        )
    return found


def as_json(report: Report) -> dict[str, Any]:
    """All of it, as JSON values; what is not a number is null."""
    whole: dict[str, Any] = {**asdict(report), "notes": report.notes()}
    whole["policies"] = [_policy_json(policy) for policy in report.policies]
    whole["took_s"] = round(report.took_s, 3)
    plain: dict[str, Any] = _finite(whole)
    return plain


def _policy_json(policy: PolicyReport) -> dict[str, Any]:
    whole: dict[str, Any] = {**vars(policy)}
    for name in ("estimates", "gains"):
        whole[name] = {method: found._asdict() for method, found in whole[name].items()}
    whole["heavy"] = [heavy._asdict() for heavy in policy.heavy]
    for name in ("mean_ratio", "clipped", "switched"):
        whole[name] = None if whole[name] is None else whole[name]._asdict()
    return whole


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(report: Report) -> str:
    """For people."""
    slots = report.slots / report.decisions
    return "\n".join(
        [
            f"topic {report.topic!r}: {report.decisions:,} decisions of about {report.users:,} users, "
            f"{_when(report.from_ms)} to {_when(report.to_ms)} UTC, {slots:.3g} slots each; slate model "
            f"{report.slate}",
            *_left_out(report),
            "",
            *_table(report),
            "",
            *(line for policy in report.policies for line in _weights(policy, report.slots)),
            *(f"note: {note}" for note in report.notes()),
            f"{report.records:,} records, read twice in {report.took_s:.1f} s",
        ]
    )


def _when(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")


_CAUSES: Final = {
    "repeated_or_late": "repeated or late",
    "other_times": "at other times",
    "other_users": "of other users",
    "learnt_from": "learnt from",
    "not_explored": "not explored (every propensity is 1)",
    "not_a_candidate": "of an item that is no candidate",
}


def _left_out(report: Report) -> list[str]:
    causes = [f"{count:,} {_CAUSES[name]}" for name, count in vars(report.left_out).items() if count]
    bad = [f"{count:,} records unreadable ({reason})" for reason, count in report.bad.items()]
    return [f"left out: {', '.join(causes + bad)}"] if causes or bad else []


def _table(report: Report) -> list[str]:
    head = ["policy", "estimator", "per decision", "95 % interval", "over logging", "95 % interval"]
    lines = [head]
    for policy in report.policies:
        name = policy.name if policy.epsilon in (None, 1.0) else f"{policy.name} ε={policy.epsilon:g}"
        for method, value in policy.estimates.items():
            gain = policy.gains.get(method)
            more = ["", ""] if gain is None else [_number(gain.value, "+"), _between(gain, "+")]
            lines.append([name, method, _number(value.value), _between(value), *more])
            name = ""
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    sides = [str.ljust, str.ljust, str.rjust, str.ljust, str.rjust, str.ljust]
    return [
        "  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if math.isfinite(value) else "none"


def _between(found: Interval, sign: str = "") -> str:
    if not math.isfinite(found.low):
        return "none"
    return f"{_number(found.low, sign)} to {_number(found.high, sign)}"


def _weights(policy: PolicyReport, weights: int) -> list[str]:
    if policy.mean_ratio is None:
        return []
    first, last = policy.effective[0], [n for n in policy.effective if n] or [0.0]
    w = policy.mean_ratio
    effective = f"{first:,.0f} effective decisions in slot 1, {last[-1]:,.0f} in the last one; "
    effective += f"{policy.effective_rewards:,.0f} effective rewards"
    lines = [
        f"{policy.name}: weights of mean {w.value:.3g} ({_between(w)}), the largest {policy.largest:,.3g}; {effective}"
    ]
    if policy.clipped is not None:
        c = policy.clipped
        lines.append(
            f"  clipped at {c.above:g}: {c.weights:,} of {weights:,} weights ({c.share:.2%}), "
            f"{c.excess:.2%} of their sum"
        )
    else:
        above = ", ".join(
            f"{h.weights:,} above {h.above:g} ({h.mass:.1%} of the sum)" for h in policy.heavy if h.weights
        )
        lines.append(f"  none clipped; {above or 'none above 10'}")
    if policy.switched is not None:
        s = policy.switched
        lines.append(
            f"  switch-DR: the model stands above {s.above:g}: {s.weights:,} weights, {s.mass:.1%} of the sum"
        )
    return lines
