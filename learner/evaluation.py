"""Decisions as columns → what other policies would have earned.

    evaluation = Evaluation(config, join_settings, {0: 0})
    evaluation.join(columns)                               # all of them, then
    evaluation.joined(targets, vocabulary, catalog)
    evaluation.judge(columns, candidates)                  # all of them again
    report = evaluation.report()

Two readings, for a reward may come a day after its decision: the first finds out what each earned in the end. In the
second each decision is judged under every target policy, with a reward model that has seen the decisions before it
alone, and goes into sums over groups of users. Memory does not grow with the log, but for what the first one notes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from learner.estimators import SLATE_MODELS, Floats, Ints, Mask, Rounds, SlateModel, ratios, rounds
from learner.evaluate_report import GROUPS, Account, LeftOut, Report
from learner.exploration import EPSILON
from learner.outcomes import Outcomes
from learner.policy import Candidate
from learner.replay import Histories
from learner.reward_model import FEATURES, Model, RewardModel
from learner.slate_chances import Judged, judge
from learner.target_policies import LEAST, LOGGING, Contexts, Learned, Scores, Target, policy_names
from learner.weights import store_url
from streaming.catalog import Catalog
from streaming.columns import Columns, Kind, Reason
from streaming.interning import Vocabulary
from streaming.jit import jit
from streaming.join_settings import JoinSettings
from streaming.rewards import CODES

_SCORES: Final = 1 << 21  # judged at once: bounds memory where there are many items
HISTORY: Final = 32  # entries that the reward model looks at, at least
_PURCHASE: Final = CODES["purchase"]
_REFUND: Final = CODES["refund"]
_NOISE: Final = 1e-6  # of a propensity near 1 that travelled as float32, generously


class NothingToEvaluate(Exception):
    """The log has no decision that tells anything; the message says what it has, and what to do."""


def _setting(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


def moment_ms(text: str) -> int | None:
    """Event time in ms since 1970, of `2026-01-31` or `2026-01-31T18:30`, UTC unless it says otherwise.

    >>> moment_ms("1970-01-02"), moment_ms("1970-01-01T01:00+01:00"), moment_ms("none")
    (86400000, 0, None)
    """
    if text == "none":
        return None
    when = datetime.fromisoformat(text)
    return round((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate."""

    topic: str = _setting("events", "topic with events and decisions")
    catalog_topic: str = _setting("catalog", "topic with the items; it says what is on offer")
    policies: tuple[str, ...] = _setting(
        (LOGGING, "uniform", "popularity", "weights"),
        "what to judge, comma-separated: logging, uniform, popularity, weights, weights:VERSION",
        parse=policy_names,
        metavar="NAME,...",
    )
    weights: str = _setting(".bellwether/weights", "the weight store", metavar="URL", parse=store_url)
    label: str = _setting("stable", "which version the policy `weights` is")
    network: Literal["online", "target"] = _setting(
        "target", "which of a version's two networks, as at a server"
    )
    epsilon: float = _setting(EPSILON, "of popularity and weights: share of slots drawn uniformly; 0..1")
    slate: Literal["cascade", "standard", "slotwise"] = _setting(
        "cascade",
        "what a slot's reward depends on: cascade: on the slots up to it; standard: on the whole slate; slotwise: as "
        "cascade, but judge one slot at a time, those before it as they were logged",
    )
    slots: int = _setting(10, "judge so many slots of each slate, the first ones; slots, 1..64")
    clip: float | None = _setting(None, "clip importance weights above this; > 0")
    switch: float | None = _setting(
        100.0, "weight above which switch-DR believes the model; > 0, or none: chosen by the data (SLOPE)"
    )
    since: int | None = _setting(
        None,
        "judge decisions from this event time on: 2026-01-31T18:30, in UTC",
        parse=moment_ms,
        metavar="TIME",
    )
    until: int | None = _setting(None, "and before this one", parse=moment_ms, metavar="TIME")
    unseen: bool = _setting(
        False,
        "judge only decisions that none of the versions judged has read: what was learnt from them makes estimates too "
        "high",
    )
    users_share: float = _setting(
        1.0,
        "judge decisions of this share of users, drawn by their hash: large logs take less time; > 0, <= 1",
    )
    bought_window_s: float = _setting(
        30 * 86400.0, "an item bought is not recommended again for so long, as at a server; seconds, >= 0"
    )
    popularity_half_life: float = _setting(
        100_000.0, "popularity of an item halves with so many events, as at a server; events, > 0"
    )
    threads: int = _setting(1, "CPU threads of a matrix product; 1..256")

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epsilon", 0, 1),
            ("slots", 1, 64),
            ("bought_window_s", 0, 100 * 365 * 86400),
            ("threads", 1, 256),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be within {low}..{high}, not {getattr(self, name)}")
        if not 0 < self.users_share <= 1:
            raise ValueError(f"users_share must be above 0 and at most 1, not {self.users_share}")
        for name in ("clip", "switch", "popularity_half_life"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be > 0, not {value}")
        if self.slate not in SLATE_MODELS:
            raise ValueError(f"slate must be one of {', '.join(SLATE_MODELS)}, not {self.slate!r}")


class _Decisions(NamedTuple):
    """D decisions that are judged, of one batch."""

    row: Ints  # [D] of the columns
    group: Ints  # [D] of the user
    shown: Mask  # [D, K]
    item: Ints  # [D, K] vocabulary ids
    propensity: Floats  # [D, K]
    reward: Floats  # [D, K]

    def rows(self, which: Any) -> _Decisions:
        return _Decisions(*(column[which] for column in self))


class Evaluation:
    """One evaluation. See above for the order of calls."""

    def __init__(self, config: EvaluateConfig, join: JoinSettings, starts: Mapping[int, int]) -> None:
        """starts: the first offset of each partition."""
        self._config = config
        self._outcomes = Outcomes(join, starts)
        self._model = RewardModel(config.slots)
        self._targets: list[Target] = []
        self._accounts: dict[str, Account] = {}
        self._reference: int | None = None  # number of the target whose Q the reward model reads
        self._versions: list[Learned] = []
        self._has_read: dict[
            str, int
        ] = {}  # decisions judged that the learner of a version had read before it
        self._history_length = HISTORY
        self._vocabulary = Vocabulary()
        self._on_offer: Mask = np.zeros(1, np.bool_)
        self._records = self._judged = self._unsettled = self._slots = 0
        self._bad: Counter[str] = Counter()
        self._left_out = LeftOut()
        self._from_ms, self._to_ms = 2**62, 0
        self._users = np.zeros(1 << 23, np.bool_)
        self._could_show = np.zeros(2)  # sums over decisions: items as the propensities say, and as assumed

    # --- first reading

    def join(self, columns: Columns) -> None:
        """These records next, each partition's in offset order."""
        self._outcomes.take(columns)
        bad = columns.reason[columns.kind == Kind.BAD]
        self._bad.update(Reason(reason).name for reason in bad.tolist())
        self._records += len(columns.kind)

    def joined(self, targets: Sequence[Target], vocabulary: Vocabulary, catalog: Catalog) -> None:
        """That was all; the second reading judges these policies. vocabulary: gets no more items from here on."""
        self._outcomes.end()
        self._targets, self._vocabulary = list(targets), vocabulary
        if LOGGING in self._config.policies:
            self._accounts[LOGGING] = Account(self._config, None)
        self._accounts |= {target.name: Account(self._config, target.epsilon) for target in targets}
        self._versions = [target for target in targets if isinstance(target, Learned)]
        self._has_read = {version.name: 0 for version in self._versions}
        self._reference = self._targets.index(self._versions[0]) if self._versions else None
        self._history_length = max([HISTORY, *(version.policy.history_length for version in self._versions)])
        self._on_offer = ~padded(catalog.gone | (catalog.known & ~catalog.in_stock), len(vocabulary) + 1)
        self._on_offer[0] = False

    # --- second reading

    def judge(self, columns: Columns, candidates: Callable[[int], Sequence[Candidate]]) -> None:
        """These records next. candidates: those that the decision in a row of the columns carries."""
        decisions = self._decisions(columns)
        model = self._model.model(len(self._vocabulary))
        features = np.zeros((*decisions.shown.shape, len(FEATURES)))
        usable = np.ones(len(decisions.row), np.bool_)
        whole = np.flatnonzero(~columns.candidates[decisions.row])
        every = np.arange(len(self._on_offer))
        size = max(1, _SCORES // len(every))
        for start in range(0, len(whole), size):
            block = whole[start : start + size]
            part = decisions.rows(block)
            contexts = Contexts(histories(columns, part.row, self._history_length), None, every)
            features[block] = self._judge(columns, part, contexts, part.item, model)
        for i in np.flatnonzero(columns.candidates[decisions.row]).tolist():
            part = decisions.rows(slice(i, i + 1))
            offered = candidates(int(part.row[0]))
            ids = self._vocabulary.ids([candidate.item_id for candidate in offered])
            is_it = (part.item[:, :, None] == ids) & (ids > 0)  # [1, K, M]
            usable[i] = (is_it.any(axis=2) | ~part.shown).all()
            if usable[i]:
                contexts = Contexts(histories(columns, part.row, self._history_length), offered, ids)
                features[i] = self._judge(columns, part, contexts, is_it.argmax(axis=2), model)
        self._left_out.not_a_candidate += int((~usable).sum())
        self._note(columns, decisions.rows(usable))
        self._model.learn(
            decisions.shown[usable], decisions.item[usable], features[usable], decisions.reward[usable]
        )
        for target in self._targets:
            target.observe(columns)

    def _decisions(self, columns: Columns) -> _Decisions:
        """Those that count, are within the time asked for, and were explored."""
        rows = np.flatnonzero(columns.kind == Kind.DECISION)
        counts = self._outcomes.counts(columns, rows)
        self._left_out.repeated_or_late += int((~counts).sum())
        rows = rows[counts]
        when = columns.timestamp_ms[rows]
        asked = np.ones(len(rows), np.bool_)
        if self._config.since is not None:
            asked &= when >= self._config.since
        if self._config.until is not None:
            asked &= when < self._config.until
        self._left_out.other_times += int((~asked).sum())
        rows = rows[asked]
        drawn = _mixed(columns.user[rows]) % np.uint64(1_000_000) < self._config.users_share * 1e6
        self._left_out.other_users += int((~drawn).sum())
        rows = rows[drawn]
        if self._config.unseen:
            known = np.zeros(len(rows), np.bool_)
            for version in self._versions:
                known |= version.has_read(columns, rows)
            self._left_out.learnt_from += int(known.sum())
            rows = rows[~known]
        shown, item, propensity = slates(columns, rows, self._config.slots)
        explored = ((propensity < 1.0) & shown).any(axis=1)
        self._left_out.not_explored += int((~explored).sum())
        rows, shown, item, propensity = rows[explored], shown[explored], item[explored], propensity[explored]
        reward = self._outcomes.rewards(columns, rows, self._config.slots)
        return _Decisions(rows, group_of(columns.user[rows]), shown, item, propensity, reward * shown)

    def _note(self, columns: Columns, judged: _Decisions) -> None:
        rows = judged.row
        if not len(rows):
            return
        self._judged += len(rows)
        self._slots += int(judged.shown.sum())
        for version in self._versions:
            self._has_read[version.name] += int(version.has_read(columns, rows).sum())
        self._unsettled += int(self._outcomes.unsettled(columns, rows).sum())
        when = columns.timestamp_ms[rows]
        self._from_ms = min(self._from_ms, int(when.min()))
        self._to_ms = max(self._to_ms, int(when.max()))
        self._users[_mixed(columns.user[rows]) % np.uint64(len(self._users))] = True

    def _judge(
        self, columns: Columns, decisions: _Decisions, contexts: Contexts, slate: Ints, model: Model
    ) -> Floats:
        """Judge decisions that chose from the same items; returns [D, K, 3], the model's features of what was shown.

        slate: [D, K] what was shown, as places among the contexts' items.
        """
        given, shown, group = self._config, decisions.shown, decisions.group
        place = np.where(shown, slate, -1)
        could = self._could_be_shown(columns, decisions, contexts)
        _set(could, place)
        uniform = self._uniform(columns, decisions, could)
        scores = [target.scores(contexts) for target in self._targets]
        q = None if self._reference is None else scores[self._reference]
        features = _features(contexts, could, q, model)
        value = np.tensordot(model.coefficient, features, axes=1)  # [D, M]
        if LOGGING in self._accounts:
            as_served = rounds(given.slate, shown.astype(np.float64), shown, decisions.reward)
            self._accounts[LOGGING].add(as_served, group)
        for target, of_items in zip(self._targets, scores, strict=True):
            eligible = could & target.allows(contexts)
            _set(eligible, np.where(target.knows(contexts)[place], place, -1))  # it was on offer then
            drawn = uniform * fewer(could, eligible, place)
            judged = judge(of_items, eligible, value, model.effect, place, drawn, target.epsilon)
            self._accounts[target.name].add(
                as_rounds(given.slate, judged, decisions.propensity, shown, decisions.reward), group
            )
        rows = np.arange(len(place))[:, None]
        return np.stack([feature[rows, np.maximum(place, 0)] for feature in features], axis=2)

    def _could_be_shown(self, columns: Columns, decisions: _Decisions, contexts: Contexts) -> Mask:
        """[D, M] as a server would say: on offer, and not bought lately."""
        items = contexts.items
        # a candidate without an id is one that the catalog says nothing of
        on_offer = self._on_offer[items] | ((items == 0) & (contexts.candidates is not None))
        could = np.repeat(on_offer[None], len(decisions.row), axis=0)
        b, item = bought(columns, decisions.row, round(self._config.bought_window_s * 1000))
        if contexts.candidates is None:
            could[b, item] = False
        else:
            could &= ~np.isin(items, item)
        return could

    def _uniform(self, columns: Columns, decisions: _Decisions, could: Mask) -> Floats:
        left = could.sum(axis=1)[:, None] - np.arange(decisions.shown.shape[1])
        chance, told = uniform_chance(
            decisions.propensity, columns.epsilon[decisions.row].astype(np.float64)[:, None], left
        )
        first = told[:, 0] & decisions.shown[:, 0]
        self._could_show += (1.0 / chance[first, 0]).sum(), left[first, 0].sum()
        return chance * decisions.shown

    # --- the end

    def report(self) -> Report:
        """What came of it. Raises: NothingToEvaluate."""
        counters = self._outcomes.counters()
        if not self._judged:
            raise NothingToEvaluate(self._nothing(counters["decisions"]))
        told, assumed = self._could_show.tolist()
        free = len(self._users) - int(self._users.sum())
        return Report(
            topic=self._config.topic,
            slate=self._config.slate,
            records=self._records,
            bad=dict(self._bad),
            decisions=self._judged,
            slots=self._slots,
            users=round(len(self._users) * np.log(len(self._users) / max(1, free))),
            from_ms=self._from_ms,
            to_ms=self._to_ms,
            unsettled=self._unsettled,
            could_show=told / assumed if assumed else None,
            has_read=self._has_read,
            left_out=self._left_out,
            policies=[account.report(name) for name, account in self._accounts.items()],
        )

    def _nothing(self, decisions: int) -> str:
        """Why there is nothing, and what to do."""
        topic, left_out = self._config.topic, self._left_out
        impossible = self._bad[Reason.BAD_PROPENSITY.name]
        if not decisions and impossible:
            return (
                f"{topic!r} holds no decision that can be used: {impossible:,} have a propensity that is not within "
                "0 < p <= 1; whoever writes them must log the probability of what was shown"
            )
        if not decisions:
            return (
                f"{topic!r} holds no decision, in {self._records:,} records ({sum(self._bad.values()):,} of them "
                "unreadable); they are written by `serving --log`, or by your own server (proto/decision.avsc)"
            )
        if left_out.not_explored:
            return (
                f"none of {left_out.not_explored:,} decisions was explored: every propensity is 1, so that nothing is "
                "known of what was not shown; serve with --epsilon above 0"
            )
        if left_out.learnt_from:
            return (
                f"none of {left_out.learnt_from:,} decisions is unseen: all were read by the learner of the versions "
                "judged; judge an older one (--policies weights:VERSION), or let the log grow"
            )
        if left_out.not_a_candidate:
            return (
                f"none of {left_out.not_a_candidate:,} decisions shows items of its own candidates alone; "
                "whoever writes them must log all that was to choose from (proto/decision.avsc)"
            )
        if left_out.other_users:
            return (
                f"none of {left_out.other_users:,} decisions is of the users that "
                f"--users-share {self._config.users_share:g} draws; judge more of them"
            )
        return (
            f"none of {decisions:,} decisions in {topic!r} is within --since and --until "
            f"({left_out.other_times:,} are at other times)"
        )


# --- one batch -----------------------------------------------------------------------------------------------


def as_rounds(slate: SlateModel, judged: Judged, propensity: Floats, shown: Mask, reward: Floats) -> Rounds:
    """The slates as the estimators want them: which of the model's words stands in which slot is the slate model's."""
    ratio = ratios(judged.chance, propensity, shown)
    q_shown, q_target = judged.own, judged.here
    if slate == "cascade":
        q_target = judged.onward
        q_shown = judged.own.copy()
        q_shown[:, :-1] += judged.onward[:, 1:]
    elif slate == "standard":
        q_target = np.zeros_like(judged.onward)
        q_target[:, 0] = judged.onward[:, 0]
    return rounds(slate, ratio, shown, reward, q_shown, q_target)


def _features(contexts: Contexts, could: Mask, q: Scores | None, model: Model) -> list[Floats]:
    """[D, M] each of the reward model's features. q: [D, M] of the weights that it reads; None: there are none."""
    history, items = contexts.states.item, contexts.items
    seen = np.zeros(could.shape)
    if contexts.candidates is None:
        seen[np.arange(len(history))[:, None], history] = 1.0
    else:
        seen[0, np.isin(items, history)] = 1.0
    advantage = np.zeros(could.shape)
    if q is not None:
        counts = could & (q > LEAST)
        mean = np.where(counts, q, 0.0).sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
        advantage = np.where(q > LEAST, q - mean[:, None], 0.0)
    return [np.broadcast_to(model.rate[items], could.shape), advantage, seen * (items > 0)]


def uniform_chance(propensity: Floats, epsilon: Floats, left: Ints) -> tuple[Floats, Mask]:
    """[D, K] the probability of each one item in a uniform draw from those that were left; and whether the log tells.

    An ε-greedy server logs p = ε u, or p = ε u + 1 - ε where the item is its best; so u = p / ε or (p - 1 + ε) / ε,
    whichever is the likelier, given how many items we think were left. Else u = 1 / left.

    epsilon: [D, 1]; left: [D, K].
    """
    assumed = 1.0 / np.maximum(left, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = propensity / epsilon
        best = np.where(
            propensity - (1.0 - epsilon) > _NOISE, (propensity - (1.0 - epsilon)) / epsilon, np.nan
        )
        found = np.stack((drawn, best))
        found[~((found > 0.0) & (found <= 1.0 + 1e-6))] = np.nan
        apart = np.abs(np.log(found / assumed))
    apart[np.isnan(apart)] = np.inf
    nearer = np.where(apart[1] < apart[0], found[1], found[0])
    told: Mask = np.isfinite(apart.min(axis=0))
    return np.where(told, np.minimum(nearer, 1.0), assumed), told


def fewer(could: Mask, eligible: Mask, place: Ints) -> Floats:
    """[D, K] how many times as probable each one item is, in a uniform draw, where not all that was left could be shown
    by a target. could, eligible: [D, M] what could be shown, and by the target; place: [D, K] what was, -1: no slot."""
    rows = np.arange(len(place))[:, None]
    shown = place >= 0
    taken = np.stack((shown, shown & eligible[rows, np.maximum(place, 0)])).astype(np.int64)
    before = np.cumsum(taken, axis=2) - taken
    left, theirs = np.stack((could.sum(axis=1), eligible.sum(axis=1)))[:, :, None] - before
    return np.maximum(left, 1) / np.maximum(theirs, 1)


def slates(columns: Columns, rows: Ints, slots: int) -> tuple[Mask, Ints, Floats]:
    """What these decisions showed, [R, slots] each: whether there is such a slot, vocabulary id, propensity."""
    first = columns.item_bounds[rows][:, None]
    at = first + np.arange(slots)
    shown = at < columns.item_bounds[rows + 1][:, None]
    at = np.where(shown, at, first)
    item = np.where(shown, columns.item[at], 0).astype(np.int64)
    return shown, item, np.where(shown, columns.propensity[at], 1.0).astype(np.float64)


def histories(columns: Columns, rows: Ints, length: int) -> Histories:
    """The states that these decisions were made in, as the joiner makes them."""
    shape = (len(rows), length)
    out = Histories(
        np.zeros(shape, np.int32),
        np.zeros(shape, np.uint8),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
    )
    end = columns.history_bounds[rows + 1][:, None]
    at = end - 1 - np.arange(length)
    there = at >= columns.history_bounds[rows][:, None]
    at = at[there]
    age_ms = (
        columns.timestamp_ms[rows][:, None].repeat(length, axis=1)[there] - columns.history_timestamp_ms[at]
    )
    out.item[there] = columns.history_item[at]
    out.name[there] = columns.history_name[at]
    out.age_s[there] = np.maximum(age_ms, 0) / 1000.0
    out.value[there] = columns.history_value[at]
    return out


def bought(columns: Columns, rows: Ints, window_ms: int) -> tuple[Ints, Ints]:
    """(index into rows, item) of what the histories say was bought within the window and not returned."""
    if not window_ms:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return _bought(
        rows,
        columns.timestamp_ms,
        columns.history_bounds,
        columns.history_item,
        columns.history_name,
        columns.history_timestamp_ms,
        window_ms,
    )


@jit
def _bought(
    rows: Ints,
    timestamp_ms: Ints,
    bounds: Ints,
    item: npt.NDArray[np.int32],
    name: npt.NDArray[np.uint8],
    when_ms: Ints,
    window_ms: int,
) -> tuple[Ints, Ints]:
    index, found = [np.int64(0) for _ in range(0)], [np.int64(0) for _ in range(0)]
    for i in range(len(rows)):
        begin, end = bounds[rows[i]], bounds[rows[i] + 1]
        for j in range(begin, end):
            if name[j] != _PURCHASE:
                continue
            pieces = 0
            for k in range(begin, end):
                if item[k] == item[j]:
                    pieces += name[k] == _PURCHASE and when_ms[k] >= timestamp_ms[rows[i]] - window_ms
                    pieces -= name[k] == _REFUND
            if pieces > 0:
                index.append(np.int64(i))
                found.append(np.int64(item[j]))
    return np.array(index, np.int64), np.array(found, np.int64)


def group_of(user: npt.NDArray[np.uint64]) -> Ints:
    """[N] the group that each user is in. Not by the hash's own low bits: partitions may go by these."""
    return ((_mixed(user) >> np.uint64(32)) % np.uint64(GROUPS)).astype(np.int64)


def _mixed(user: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = (user ^ (user >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(29))


def _set(mask: Mask, place: Ints) -> None:
    """True where something was shown."""
    b, k = np.nonzero(place >= 0)
    mask[b, place[b, k]] = True


def padded(mask: Mask, size: int) -> Mask:
    """[size] the mask, cut or followed by False."""
    return np.append(mask[:size], np.zeros(max(0, size - len(mask)), np.bool_))
