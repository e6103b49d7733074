"""What the server remembers of the log by itself: each user's latest history and purchases, and what is popular.

Numba arrays of fixed size per user, least recently active users forgotten first, so that memory is known beforehand
(`bytes_per_user`) and flat. Pages that no user has touched yet cost nothing.
"""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from streaming.columns import Columns, Kind
from streaming.interning import MISSING, HashMap, map_get, map_new, map_put, map_remove
from streaming.jit import jit
from streaming.rewards import CODES, EVENT_NAMES, HISTORY_NAMES, RewardTable

KEEPS: Final = np.isin(np.arange(len(EVENT_NAMES)), [CODES[name] for name in HISTORY_NAMES])
_EVENT: Final = int(Kind.EVENT)
_PURCHASE: Final = CODES["purchase"]
_REFUND: Final = CODES["refund"]
_TOO_LARGE: Final = 1e100  # popularity is rescaled before it leaves the range of a float
LEAST_HALF_LIFE: Final = 0.01  # events; with each, popularity grows by 2 ** 100, and stays within that range


class History(NamedTuple):
    """One user's entries, oldest first."""

    item: npt.NDArray[np.int32]  # [L] ids of the server's own vocabulary
    name: npt.NDArray[np.uint8]  # [L] event-name codes
    timestamp_ms: npt.NDArray[np.int64]  # [L]
    value: npt.NDArray[np.float32]  # [L] price x quantity, 0 where unknown


class _Users(NamedTuple):
    """U users of H history entries and B purchases; both are rings."""

    slot_of: HashMap  # user hash → slot
    owner: npt.NDArray[np.uint64]  # [U] user hash
    newer: npt.NDArray[np.int32]  # [U] list by last activity; -1 at its end
    older: npt.NDArray[np.int32]  # [U]
    ends: npt.NDArray[np.int64]  # [4] newest slot, oldest slot, slots taken, users forgotten so far
    written: npt.NDArray[np.int64]  # [U] history entries ever written; the next goes to written % H
    event: npt.NDArray[np.uint64]  # [U, H] event_id hash of the entry: a resent event is recognised by it
    item: npt.NDArray[np.int32]  # [U, H]
    name: npt.NDArray[np.uint8]  # [U, H]
    timestamp_ms: npt.NDArray[np.int64]  # [U, H]
    value: npt.NDArray[np.float32]  # [U, H]
    passed_ms: npt.NDArray[np.int64]  # [U] event time up to which a full ring was left behind
    bought: npt.NDArray[np.int32]  # [U, B] 0: free
    bought_ms: npt.NDArray[np.int64]  # [U, B] event time
    purchases: npt.NDArray[np.int64]  # [U] ever written; the next goes to purchases % B


class _Events(NamedTuple):
    """The columns that matter here; see streaming.columns.Columns."""

    kind: npt.NDArray[np.uint8]
    id: npt.NDArray[np.uint64]
    user: npt.NDArray[np.uint64]
    timestamp_ms: npt.NDArray[np.int64]
    logged_ms: npt.NDArray[np.int64]
    name: npt.NDArray[np.uint8]
    value: npt.NDArray[np.float64]
    item_bounds: npt.NDArray[np.int64]
    item: npt.NDArray[np.int32]
    quantity: npt.NDArray[np.int32]
    price: npt.NDArray[np.float64]


class UserState:
    """The users' histories and purchases, and item popularity; one thread absorbs, others ask."""

    def __init__(
        self,
        max_users: int,
        history_length: int,
        bought_length: int,
        popularity_half_life: float,
        rewards: RewardTable,
    ) -> None:
        """bought_length: purchases remembered per user. popularity_half_life: in events; counted in events rather
        than in time, so that neither a wild clock nor a log replayed faster than life can distort it."""
        self._users = _new_users(max_users, history_length, bought_length)
        self._weight = np.maximum(rewards.columns()[0], 0.0)  # a refund makes an item no less popular
        self._popularity = np.zeros(1024)
        self._scale = np.array([1.0, 2.0 ** (1.0 / popularity_half_life)])
        self._lock = threading.Lock()

    @property
    def bytes_per_user(self) -> int:
        """Memory that one user takes, hash table included."""
        users = self._users
        arrays = [array for array in users if isinstance(array, np.ndarray) and array is not users.ends]
        table = users.slot_of.keys.nbytes + users.slot_of.values.nbytes
        return (sum(array.nbytes for array in arrays) + table) // len(users.owner)

    @property
    def known(self) -> int:
        """Users remembered now."""
        return int(self._users.ends[2])

    @property
    def forgotten(self) -> int:
        """Users given up so far to make room for others."""
        return int(self._users.ends[3])

    def absorb(self, columns: Columns, vocabulary_size: int) -> None:
        """Take in decoded records in log order; decisions and bad rows are skipped, resent events count once.

        An event that is older than all that a full history holds is skipped, too: it may have been there and left, as
        where a log is imported again. How old it is, is told by the log's own time as well, which no user's clock can
        lead into the future.
        """
        with self._lock:
            if vocabulary_size >= len(self._popularity):
                self._popularity = np.append(self._popularity, np.zeros(vocabulary_size + 1))
            _absorb(self._users, self._popularity, self._scale, self._weight, _events(columns))

    def history(self, user: int) -> History:
        """The user's entries, oldest first; empty for one who is not known. user: hash of the user_id."""
        with self._lock:
            return _history(self._users, np.uint64(user))

    def bought(self, user: int, since_ms: int) -> npt.NDArray[np.int32]:
        """Items that the user bought at or after `since_ms` and did not return."""
        with self._lock:
            return _bought(self._users, np.uint64(user), since_ms)

    def popularity(self, items: int) -> npt.NDArray[np.float64]:
        """Decayed sum of reward weights for items 0 .. `items`, [items + 1], relative to each other only."""
        scores = np.zeros(items + 1)
        with self._lock:
            known = self._popularity[: items + 1]
            scores[: len(known)] = known / self._scale[0]
        return scores


def _new_users(users: int, history: int, bought: int) -> _Users:
    # np.zeros, not full or empty: untouched pages of it take no memory
    return _Users(
        slot_of=map_new(users),
        owner=np.zeros(users, np.uint64),
        newer=np.zeros(users, np.int32),
        older=np.zeros(users, np.int32),
        ends=np.array([-1, -1, 0, 0], np.int64),
        written=np.zeros(users, np.int64),
        event=np.zeros((users, history), np.uint64),
        item=np.zeros((users, history), np.int32),
        name=np.zeros((users, history), np.uint8),
        timestamp_ms=np.zeros((users, history), np.int64),
        value=np.zeros((users, history), np.float32),
        passed_ms=np.zeros(users, np.int64),
        bought=np.zeros((users, bought), np.int32),
        bought_ms=np.zeros((users, bought), np.int64),
        purchases=np.zeros(users, np.int64),
    )


def _events(columns: Columns) -> _Events:
    return _Events(*(getattr(columns, name) for name in _Events._fields))


@jit
def _absorb(
    users: _Users,
    popularity: npt.NDArray[np.float64],
    scale: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    events: _Events,
) -> None:
    keeps = KEEPS
    for i in range(len(events.kind)):
        name = events.name[i]
        begin, end = events.item_bounds[i], events.item_bounds[i + 1]
        if events.kind[i] != _EVENT or not keeps[name] or begin == end:
            continue
        slot = _touch(users, events.user[i])
        if _resent(users, slot, events.id[i]) or _passed(users, slot, events.timestamp_ms[i]):
            continue
        scale[0] *= scale[1]
        if scale[0] > _TOO_LARGE:
            popularity /= scale[0]
            scale[0] = 1.0
        share = events.value[i] / (end - begin)
        for j in range(begin, end):
            item, price = events.item[j], events.price[j]
            worth = share if np.isnan(price) else events.quantity[j] * price
            _append(users, slot, events, i, item, 0.0 if np.isnan(worth) else worth)
            popularity[item] += weight[name] * scale[0]
            if name == _PURCHASE:
                _buy(users, slot, item, events.timestamp_ms[i])
            elif name == _REFUND:
                _give_back(users, slot, item)


@jit
def _touch(users: _Users, user: np.uint64) -> int:
    """The user's slot, now the most recently active one; the stalest user's where there is no free one."""
    slot = int(map_get(users.slot_of, user))
    if slot != MISSING:
        if slot != users.ends[0]:
            _unlink(users, slot)
            _link_newest(users, slot)
        return slot
    if users.ends[2] < len(users.owner):
        slot = int(users.ends[2])
        users.ends[2] += 1
    else:
        slot = int(users.ends[1])
        _unlink(users, slot)
        map_remove(users.slot_of, users.owner[slot])
        users.ends[3] += 1
        users.event[slot] = 0
        users.bought[slot] = 0
    users.written[slot] = 0
    users.passed_ms[slot] = 0
    users.purchases[slot] = 0
    users.owner[slot] = user
    map_put(users.slot_of, user, slot)
    _link_newest(users, slot)
    return slot


@jit
def _link_newest(users: _Users, slot: int) -> None:
    newest = users.ends[0]
    users.newer[slot] = -1
    users.older[slot] = newest
    if newest >= 0:
        users.newer[newest] = slot
    else:
        users.ends[1] = slot
    users.ends[0] = slot


@jit
def _unlink(users: _Users, slot: int) -> None:
    newer, older = users.newer[slot], users.older[slot]
    if newer >= 0:
        users.older[newer] = older
    else:
        users.ends[0] = older
    if older >= 0:
        users.newer[older] = newer
    else:
        users.ends[1] = newer


@jit
def _resent(users: _Users, slot: int, event: np.uint64) -> bool:
    for h in range(users.event.shape[1]):  # noqa: SIM110 (any() is slower under numba)
        if users.event[slot, h] == event:
            return True
    return False


@jit
def _passed(users: _Users, slot: int, timestamp_ms: int) -> bool:
    """Whether an event of that time may have left already. Many at one time, a large basket, are all taken."""
    newest = (users.written[slot] - 1) % users.event.shape[1]
    return bool(timestamp_ms <= users.passed_ms[slot] and timestamp_ms < users.timestamp_ms[slot, newest])


@jit
def _append(users: _Users, slot: int, events: _Events, row: int, item: int, value: float) -> None:
    room = users.event.shape[1]
    h = users.written[slot] % room
    left_ms = users.timestamp_ms[slot, h] if users.written[slot] >= room else 0
    users.event[slot, h] = events.id[row]
    users.item[slot, h] = item
    users.name[slot, h] = events.name[row]
    users.timestamp_ms[slot, h] = events.timestamp_ms[row]
    users.value[slot, h] = value
    users.written[slot] += 1
    if users.written[slot] >= room:
        oldest_ms = users.timestamp_ms[slot, users.written[slot] % room]
        passed_ms = min(max(left_ms, oldest_ms - 1), events.logged_ms[row])
        users.passed_ms[slot] = max(users.passed_ms[slot], passed_ms)


@jit
def _buy(users: _Users, slot: int, item: int, timestamp_ms: int) -> None:
    b = users.purchases[slot] % users.bought.shape[1]
    users.bought[slot, b] = item
    users.bought_ms[slot, b] = timestamp_ms
    users.purchases[slot] += 1


@jit
def _give_back(users: _Users, slot: int, item: int) -> None:
    for b in range(users.bought.shape[1]):
        if users.bought[slot, b] == item:
            users.bought[slot, b] = 0
            return


@jit
def _history(users: _Users, user: np.uint64) -> History:
    room = users.event.shape[1]
    slot = int(map_get(users.slot_of, user))
    written = users.written[slot] if slot != MISSING else 0
    length = min(written, room)
    item = np.empty(length, np.int32)
    name = np.empty(length, np.uint8)
    timestamp_ms = np.empty(length, np.int64)
    value = np.empty(length, np.float32)
    for i in range(length):
        h = (written - length + i) % room
        item[i] = users.item[slot, h]
        name[i] = users.name[slot, h]
        timestamp_ms[i] = users.timestamp_ms[slot, h]
        value[i] = users.value[slot, h]
    return History(item, name, timestamp_ms, value)


@jit
def _bought(users: _Users, user: np.uint64, since_ms: int) -> npt.NDArray[np.int32]:
    slot = int(map_get(users.slot_of, user))
    items = np.empty(users.bought.shape[1], np.int32)
    n = 0
    if slot != MISSING:
        for b in range(len(items)):
            if users.bought[slot, b] != 0 and users.bought_ms[slot, b] >= since_ms:
                items[n] = users.bought[slot, b]
                n += 1
    return items[:n]
