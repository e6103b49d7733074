"""What items answer to, learnt from what came of the slots: see learner.answers for what an answer is.

The mode of the posterior is found by coordinate descent, each answer by Newton's step of its own (Friedman, Hastie &
Tibshirani 2010): a slot reads few of them, and two of them are seldom read together. The prior's τ² goes by expectation
maximisation, a step a fit. Between fits answers follow each slot by a step of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from learner.answers import Floats, Ints, Table, compile_answers, looks_of, no_pairs, row_of
from learner.recall import NEAR
from streaming.jit import jit

FEW: Final = 8  # slots, below which a pair has no answer, and an item no level: there may be very many
SPREADS: Final = (1e-4, 0.2)  # within which τ² is, log-odds squared
FIRST_SPREAD: Final = 0.1  # before anything is known
_SWEEPS: Final = 3  # over the answers in each fit to the rest
_FURTHEST: Final = 1.0  # that any moves in one step of the descent, log-odds
_FURTHEST_BETWEEN: Final = 2.0  # and between fits

Doubles = npt.NDArray[np.float64]
Nearest = Callable[[Ints], Ints]  # ids [R] → [R, NEAR] that are near each, 0 where there are no more


class Looks(NamedTuple):
    """Of T slots, which item each showed, and what the histories hold, [T, READ]. See `looks_of`."""

    item: npt.NDArray[np.integer]
    look: Ints
    root: npt.NDArray[np.float16]


class Pairs(NamedTuple):
    """Looks that have an answer to their slot's item, [E], ascending by pair."""

    pair: npt.NDArray[np.int64]
    root: Doubles  # √share
    slot: npt.NDArray[np.int64]

    @classmethod
    def of(cls, table: Table, looks: Looks) -> Pairs:
        """Of these slots; pairs are indices of the table's answers, all in a row."""
        pair = pairs_of(table, looks.item.astype(np.int32), looks.look)
        slot, place = np.nonzero(pair)
        order = np.argsort(pair[slot, place], kind="stable")
        slot, place = slot[order], place[order]
        return cls(pair[slot, place].astype(np.int64), looks.root[slot, place].astype(np.float64), slot)

    def sums(self, answer: npt.NDArray[np.floating], slots: int) -> Doubles:
        """What the answers come to for each slot, [slots]. answer: of all pairs."""
        return sums(self.slot, answer.flat[self.pair] * self.root, slots)


class Entered(NamedTuple):
    """Pairs that were seen often enough, numbered 0..Q - 1, and what is known of them."""

    pairs: Pairs
    place: npt.NDArray[np.int64]  # [Q] where in the table each is
    answer: Doubles  # [Q]


class Settled(NamedTuple):
    """Where coordinate descent came to."""

    answer: Doubles  # [Q]
    information: Doubles  # [Q] Fisher's


class AnswerFit:
    """Learns a table of answers.

    A fit is `enter`, `settle` (again and again, beside whatever else is fitted), `keep`; between fits `follow`. What is
    learnt is `table`: `enter` and `restore` put another in its place, `keep` and `follow` change its answers.
    """

    def __init__(self, nearest: Nearest | None) -> None:
        """nearest: what is near items; None: nobody knows, and there are no answers."""
        self._nearest = nearest
        self.table = no_pairs()
        self.spread = FIRST_SPREAD  # τ²
        self.information = np.zeros(self.table.near.shape, np.float32)  # Fisher's, of each answer

    def enter(self, looks: Looks) -> Entered:
        """Have the table hold the pairs of what is near by now, with what is known of them, for items of which any was
        seen often enough among these slots."""
        if self._nearest is None:
            none = Pairs.of(no_pairs(), Looks(looks.item[:0], looks.look[:0], looks.root[:0]))
            return Entered(none, np.zeros(0, np.int64), np.zeros(0))
        looked = np.bincount(looks.look.ravel(), minlength=1) >= FEW
        looked[0] = True
        source = np.flatnonzero(looked).astype(np.int32)
        near = self._nearest(source)
        near[0] = 0
        pairs = Pairs.of(Table(source, near, np.zeros(near.shape, np.float32)), looks)
        often = np.bincount(pairs.pair, minlength=near.size) >= FEW
        rows = np.flatnonzero(often.reshape(near.shape).any(axis=1))
        rows = np.append(0, rows[rows > 0])
        number, mine = np.cumsum(often) - 1, often[pairs.pair]
        source, near = source[rows], near[rows]
        self.table = Table(source, near, carried(self.table, source, near))
        place = np.flatnonzero(often.reshape(-1, near.shape[1])[rows])
        numbered = Pairs(number[pairs.pair[mine]], pairs.root[mine], pairs.slot[mine])
        return Entered(numbered, place, self.table.answer.flat[place].astype(np.float64))

    def settle(self, entered: Entered, log_odds: Doubles, chosen: npt.NDArray[np.bool_]) -> Settled:
        """The mode of what was entered, all else as it is. log_odds: [T] with the answers in it."""
        pairs = entered.pairs
        entries = pairs.pair, pairs.root, log_odds, chosen, pairs.slot
        return settle(*entries, entered.answer, self.spread, _SWEEPS)

    def keep(self, entered: Entered, settled: Settled) -> None:
        """What was found for what was entered; the rest answers to nothing."""
        answer, information = settled
        self.table.answer[:] = 0.0
        self.table.answer.flat[entered.place] = answer
        self.information = np.zeros(self.table.answer.shape, np.float32)
        self.information.flat[entered.place] = information
        if len(answer):
            spread = float((answer**2 + 1.0 / (information + 1.0 / self.spread)).mean())
            self.spread = min(max(spread, SPREADS[0]), SPREADS[1])

    def follow(self, pairs: Pairs, error: Doubles, variance: Doubles) -> bool:
        """A step of these pairs' answers; whether there were any. error: [T] what came less its chance; variance: [T]
        of what comes at that chance."""
        known, of = np.unique(pairs.pair, return_inverse=True)
        if not len(known):
            return False
        self.information.flat[known] += sums(of, variance[pairs.slot] * pairs.root**2, len(known))
        slope = sums(of, error[pairs.slot] * pairs.root, len(known))
        step = slope / (self.information.flat[known] + 1.0 / self.spread)
        self.table.answer.flat[known] += np.clip(step, -_FURTHEST_BETWEEN, _FURTHEST_BETWEEN)
        return True

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, exactly. Copies."""
        table = {name: column.copy() for name, column in self.table._asdict().items()}
        return {"spread": np.array([self.spread]), "told": self.information.copy(), **table}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go back to what `state` gave."""
        self.spread = float(state["spread"][0])
        if self._nearest is not None:
            self.information = state["told"].copy()
            self.table = Table(*(state[name].copy() for name in Table._fields))


def pairs_of(table: Table, item: Ints, looks: Ints) -> Ints:
    """Which of the table's numbers each look [T, READ] has for the slot's item [T], as indices of them all in a row,
    [T, READ]; 0: none."""
    out = np.zeros(looks.shape, np.int32)
    row = np.zeros(0, np.int32)
    if looks.size > int(table.source[-1]):  # to know them by number costs less than to search for each
        row = np.zeros(int(table.source[-1]) + 1, np.int32)
        row[table.source] = np.arange(len(table.source))
    _find_pairs(row, table.source, table.near, item, looks, out)
    return out


def carried(old: Table, source: Ints, near: Ints) -> Floats:
    """The answers of an old table to these pairs, [R, NEAR]; 0 where it has none. source, near: see `Table`."""
    out = np.zeros(near.shape, np.float32)
    _carry(*old, source, near, out)
    return out


def settle(
    pair: npt.NDArray[np.int64],
    look: Doubles,
    log_odds: Doubles,
    chosen: npt.NDArray[np.bool_],
    slot: npt.NDArray[np.int64],
    answer: Doubles,
    width: float,
    sweeps: int,
) -> Settled:
    """The mode of Q numbers given the rest. Entries [E], ascending by pair: pair 0..Q - 1 of each, √share, and slot;
    log_odds: [T] with `answer` [Q] in it, moved along; chosen: [T]; width: τ²."""
    ends = np.searchsorted(pair, np.arange(len(answer) + 1))
    found, information = answer.copy(), np.zeros(len(answer))
    _descend(ends, look, slot, chosen, log_odds, found, information, width, sweeps)
    return Settled(found, information)


def sums(of: npt.NDArray[np.intp], values: Doubles, count: int) -> Doubles:
    """Of the values [T], by what each is of, [count]."""
    found: Doubles = np.bincount(of, values, count).astype(np.float64, copy=False)
    return found


def compile_answer_fit() -> None:
    """Have the loops compiled, those that read as well."""
    compile_answers()
    source, near = np.arange(2, dtype=np.int32), np.ones((2, NEAR), np.int32)
    table = Table(source, near, np.zeros(near.shape, np.float32))
    looks, _ = looks_of(np.ones((1, 1), np.int32))
    carried(table, source, near)
    pairs_of(table, source[1:], looks)
    one = np.zeros(1, np.int64)
    settle(one, np.ones(1), np.zeros(1), np.ones(1, np.bool_), one, np.zeros(1), 1.0, 1)


@jit
def _find_pairs(row: Ints, source: Ints, near: Ints, item: Ints, looks: Ints, out: Ints) -> None:
    """row: of each vocabulary id in the table; empty: to be searched for."""
    width = near.shape[1]
    for t in range(len(item)):
        for e in range(looks.shape[1]):
            if looks[t, e] == 0:
                break
            known = looks[t, e] < len(row)
            at = row[looks[t, e]] if known else row_of(source, looks[t, e])
            for m in range(width):
                if near[at, m] == item[t] and item[t] > 0:
                    out[t, e] = at * width + m


@jit
def _carry(
    old_source: Ints, old_near: Ints, old_answer: Floats, source: Ints, near: Ints, out: Floats
) -> None:
    for r in range(1, len(source)):
        at = row_of(old_source, source[r])
        if at == 0:
            continue
        for m in range(near.shape[1]):
            for k in range(old_near.shape[1]):
                if near[r, m] > 0 and old_near[at, k] == near[r, m]:
                    out[r, m] = old_answer[at, k]


@jit
def _descend(
    ends: npt.NDArray[np.int64],
    look: Doubles,
    slot: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.bool_],
    log_odds: Doubles,
    answer: Doubles,
    information: Doubles,
    width: float,
    sweeps: int,
) -> None:
    for _ in range(sweeps):
        for q in range(len(answer)):
            slope, told = -answer[q] / width, 0.0
            for e in range(ends[q], ends[q + 1]):
                p = 1.0 / (1.0 + np.exp(-log_odds[slot[e]]))
                slope += (chosen[slot[e]] - p) * look[e]
                told += p * (1.0 - p) * look[e] * look[e]
            information[q] = told
            step = min(max(slope / (told + 1.0 / width), -_FURTHEST), _FURTHEST)
            answer[q] += step
            for e in range(ends[q], ends[q + 1]):
                log_odds[slot[e]] += step * look[e]
