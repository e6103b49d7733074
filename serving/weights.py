"""Follows the weight store: a new version is loaded, checked and put in place by swapping one reference."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, TypeVar

from learner.policy import Policy, PolicyDamaged, use_threads
from learner.weights import Manifest, WeightsDamaged, WeightsError, WeightStore
from serving import metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")

_REST: Final = 4.0  # times as long as a piece of work on a new version took
_PAUSE: Final = 10.0  # times the CPU time of taking a version, until the next one is looked for
_LONGEST_PAUSE_S: Final = 5.0
_LONGEST_REST_S: Final = 0.1
_COMPLAIN_S: Final = 30.0  # between two lines about a store that cannot be read


class Served(NamedTuple):
    """One version, ready to answer."""

    manifest: Manifest
    policy: Policy


class WeightsFollower:
    """`served` is what to answer with now; a thread of its own keeps it up to date.

    A version that is damaged or gives non-finite values is refused, once for each time that the label comes to name it,
    and the one in use stays. A store that cannot be read changes nothing either, and is tried again. Whoever answers
    reads `served` once, and so answers from one version.
    """

    def __init__(
        self,
        url: str,
        label: str,
        network: Literal["online", "target"],
        poll_s: float,
        remembered: int | None = None,
    ) -> None:
        """remembered: newest entries of each user's history that this server has itself; None: requests bring them."""
        self.served: Served | None = None
        self._remembered = remembered
        self.label: Final = label
        self.network: Final = network
        self._store = WeightStore(url)
        self._poll_s = poll_s
        # None: what is in use, if anything, is from before the store was emptied
        self._taken: int | None = None
        self._refused: int | None = None
        self._failures = 0  # in a row
        self._said: tuple[type[Exception] | None, float] = None, 0.0  # what was complained of last, and when
        self._worked_s = 0.0  # CPU time of taking the last version
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)

    def start(self) -> None:
        """Take what is there now, then follow."""
        self.look()
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """End the thread, or leave it behind after that time, where the store does not answer; harmless twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def look(self) -> None:
        """Ask the store once; swap if its label names another version. Never raises for what a store may do."""
        version = None
        try:
            version = self._store.latest(self.label)
            if version != self._refused:
                self._refused = None  # whoever labels it again wants it tried again
            if version is None:  # a store that was emptied begins anew, with numbers that were given before
                self._taken = None
            # not only upwards: whoever moves the label back wants the older version served
            elif version not in (self._taken, self._refused):
                self._take(version)
            self._failures = 0
        except Exception as error:  # whatever a store's driver may raise: this thread must go on
            if version is not None and isinstance(error, WeightsDamaged | PolicyDamaged):
                self._refuse(version, error)
            else:
                self._put_off(error)

    def _refuse(self, version: int, error: Exception) -> None:
        self._refused, self._failures = version, 0
        metrics.WEIGHTS_REFUSED.labels("damaged" if isinstance(error, WeightsDamaged) else "probe").inc()
        logger.error("weights refused, version %s stays in use: %s", self._in_use, error)

    def _put_off(self, error: Exception) -> None:
        """It is tried again, the seldomer the longer it lasts; one line about it now and then."""
        metrics.WEIGHTS_REFUSED.labels("store").inc()
        self._failures += 1
        kind, now = type(error), time.monotonic()
        said, said_s = self._said
        if kind is said and now - said_s < _COMPLAIN_S:
            return
        self._said = kind, now
        foreseen = isinstance(error, WeightsError | OSError)
        trouble = "weight store cannot be read, version %s stays in use: %s"
        logger.warning(trouble, self._in_use, error, exc_info=None if foreseen else error)

    @property
    def _in_use(self) -> int | None:
        return self.served.manifest.version if self.served else None

    def _take(self, version: int) -> None:
        before = self.served.policy if self.served else None
        self._worked_s = 0.0
        weights = self._gently(lambda: self._store.load(version))
        policy = self._gently(lambda: Policy.from_weights(weights, self.network, before))
        self._timed(policy.check)
        first = self.served is None
        self.served, self._taken = Served(weights.manifest, policy), version
        metrics.WEIGHTS_SWAPPED.inc()
        metrics.POLICY_VERSION.set(version)
        metrics.POLICY_PUBLISHED.set(weights.manifest.published_ms / 1000)
        metrics.POLICY_EVENTS.set(weights.manifest.events_through_ms / 1000)
        metrics.POLICY_ITEMS.set(policy.items)
        if first:
            logger.info("weights: version %d, %d items; served from now on", version, policy.items)
        read, remembered = policy.history_length, self._remembered
        if remembered is not None and remembered < read and (before is None or before.history_length != read):
            logger.warning(
                "these weights read the newest %d entries of a history, and this server remembers %d of each user: "
                "start it with --history-length %d, or let requests bring histories as long",
                *(read, remembered, read),
            )

    def _gently(self, do: Callable[[], T]) -> T:
        """Do it; while something is served already, then rest several times as long as it took.

        Answers need the same cores and the same GIL: all at once, each new version would hold up those that are
        due meanwhile, one in a hundred.
        """
        began = time.monotonic()
        done = self._timed(do)
        if self.served is not None:
            self._stop.wait(min(_REST * (time.monotonic() - began), _LONGEST_REST_S))
        return done

    def _timed(self, do: Callable[[], T]) -> T:
        began_s = time.thread_time()
        done = do()
        self._worked_s += time.thread_time() - began_s
        return done

    def _run(self) -> None:
        use_threads(1)  # the probe's product is to leave the other cores to answers
        while not self._stop.wait(max(self._poll_s, self._pause_s())):
            self._worked_s = 0.0
            self.look()

    def _pause_s(self) -> float:
        """Taking versions costs a tenth of a core at most; a store that fails is asked half as often each time."""
        failing_s = self._poll_s * 2.0 ** min(self._failures - 1, 30) if self._failures else 0.0
        return min(max(_PAUSE * self._worked_s, failing_s), _LONGEST_PAUSE_S)
