"""What requests have told of items that were shown: features that no catalog has, nor perhaps the weights in use.

A user's history is of little use to a policy that knows none of its items. Where every page brings new ones (news,
videos, offers) the items that a user has just gone to are those that the next version of the weights will know; until
then they are known by the features that they were shown with.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from learner.policy import Candidate


class Described:
    """The newest items described, the longest not heard of go first. Threads may share one."""

    def __init__(self, most: int) -> None:
        self._most = most
        # the newest last; a plain dict looks for its first item past all that were ever deleted before it
        self._items: OrderedDict[str, Candidate] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, shown: Iterable[Candidate]) -> None:
        """Items that a request described; those of which it said nothing stay as they were."""
        with self._lock:
            for candidate in shown:
                if candidate.says_something:
                    # a vector takes a tenth of a list's memory
                    told = candidate._replace(vector=np.asarray(candidate.vector, np.float32))
                    # never taken out in between: who asks meanwhile is to get the one or the other
                    if not _same(told, self._items.get(candidate.item_id)):
                        self._items[candidate.item_id] = told
                    self._items.move_to_end(candidate.item_id)
            while len(self._items) > self._most:
                self._items.popitem(last=False)

    def get(self, item_id: str) -> Candidate | None:
        """As it was described last, one object until that changes; None where it was not, or long ago."""
        return self._items.get(item_id)

    def __len__(self) -> int:
        return len(self._items)


def _same(told: Candidate, known: Candidate | None) -> bool:
    return known is not None and told[:-1] == known[:-1] and np.array_equal(told.vector, known.vector)
