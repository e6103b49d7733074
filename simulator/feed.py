"""The short way from a shop to a learner in one process: turns become columns without a log, a codec or a server.

    columns = feed.columns(turn, slates, propensity, outcome)
    replay.insert(joiner.push(columns))

The columns are what the decoder would make of the records that the policy server and the storefront write,
in the same order. Item row r of the catalog has vocabulary id r + 1 (`Vocabulary.intern` of shop.item_ids in order).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from simulator.draws import keys
from simulator.shop import Events, Ints, Outcome, Rows, Shop, Turn
from streaming.columns import Columns, Kind

_USER, _DECISION, _EVENT = 1, 2, 3


class Feed:
    """Makes columns with ids, partitions and offsets of their own; one for each shop."""

    def __init__(self, shop: Shop, partitions: int = 1) -> None:
        self._price = shop.goods.price
        self._offsets = np.zeros(partitions, dtype=np.int64)
        self._events = 0

    def columns(
        self,
        turn: Turn,
        slates: npt.NDArray[np.integer],
        propensity: npt.NDArray[np.floating],
        outcome: Outcome,
        policy_version: int = 0,
        epsilon: float = 0.0,
    ) -> Columns:
        """All records of one turn in log order: what happened before, the decisions, what came of them.

        slates, propensity: [B, K]; slots that are -1 are left out.
        """
        before = self._event_rows(turn.events)
        decided = self._decision_rows(turn, np.asarray(slates, dtype=np.int32), propensity)
        after = self._event_rows(outcome.events)
        parts = [np.concatenate(column) for column in zip(before, decided, after, strict=True)]
        (kind, row_id, user, when, name, recommended, items, item, chance, price, entries, *past) = parts
        n = len(kind)
        partition = (user % np.uint64(len(self._offsets))).astype(np.int32)
        is_decision = kind == Kind.DECISION
        return Columns(
            kind=kind.astype(np.uint8),
            reason=np.zeros(n, dtype=np.uint8),
            partition=partition,
            offset=self._take_offsets(partition),
            id=row_id,
            user=user,
            timestamp_ms=when,
            logged_ms=np.zeros(n, dtype=np.int64),
            name=name,
            recommendation=recommended,
            value=np.full(n, np.nan),
            epsilon=np.where(is_decision, epsilon, 0.0).astype(np.float32),
            policy_version=np.where(is_decision, policy_version, 0).astype(np.int64),
            misplaced=np.zeros(n, dtype=np.bool_),
            candidates=np.zeros(n, dtype=np.bool_),
            item_bounds=np.append(0, np.cumsum(items)),
            item=item,
            quantity=np.ones(len(item), dtype=np.int32),
            price=price,
            propensity=chance,
            history_bounds=np.append(0, np.cumsum(entries)),
            history_item=past[0],
            history_name=past[1],
            history_timestamp_ms=past[2],
            history_value=past[3],
        )

    def _event_rows(self, events: Events) -> tuple[npt.NDArray[np.generic], ...]:
        n = len(events)
        number = self._events + np.arange(n)
        self._events += n
        recommended = np.where(events.decision >= 0, keys(_DECISION, events.decision), np.uint64(0))
        nothing = np.zeros(0, dtype=np.int64)
        return (
            np.full(n, Kind.EVENT, dtype=np.int64),
            keys(_EVENT, number)[:n],
            keys(_USER, events.shopper)[:n],
            events.timestamp_ms,
            events.name,
            recommended[:n],
            np.ones(n, dtype=np.int64),
            events.item + np.int32(1),
            np.full(n, np.nan, dtype=np.float32),
            self._price[events.item],
            np.zeros(n, dtype=np.int64),
            nothing.astype(np.int32),
            nothing.astype(np.uint8),
            nothing,
            nothing.astype(np.float32),
        )

    def _decision_rows(
        self, turn: Turn, slates: Rows, propensity: npt.NDArray[np.floating]
    ) -> tuple[npt.NDArray[np.generic], ...]:
        n, past = len(turn.shopper), turn.history
        shown = slates >= 0
        known = past.item >= 0
        oldest_first = known[:, ::-1]
        return (
            np.full(n, Kind.DECISION, dtype=np.int64),
            keys(_DECISION, turn.decision),
            keys(_USER, turn.shopper),
            turn.timestamp_ms,
            np.zeros(n, dtype=np.uint8),
            np.zeros(n, dtype=np.uint64),
            shown.sum(axis=1),
            slates[shown] + np.int32(1),
            propensity[shown].astype(np.float32),
            np.full(int(shown.sum()), np.nan),
            known.sum(axis=1),
            past.item[:, ::-1][oldest_first] + np.int32(1),
            past.name[:, ::-1][oldest_first],
            past.timestamp_ms[:, ::-1][oldest_first],
            past.value[:, ::-1][oldest_first],
        )

    def _take_offsets(self, partition: npt.NDArray[np.int32]) -> Ints:
        """[N] the next offsets of each row's partition."""
        offset = np.zeros(len(partition), dtype=np.int64)
        for p in range(len(self._offsets)):
            mine = partition == p
            count = int(mine.sum())
            offset[mine] = self._offsets[p] + np.arange(count)
            self._offsets[p] += count
        return offset
