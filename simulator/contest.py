"""The other policies of a contest: each serves its own copy of the shop, in process, over the same days."""

from __future__ import annotations

import threading
from collections.abc import Callable

from simulator.policies import PlanningOracle, Popularity, Random, Recommender
from simulator.shop import Shop, ShopSettings, Visits


class Player:
    """One policy and the shop that it serves."""

    def __init__(self, shop: Shop, policy: Recommender, slate_size: int) -> None:
        self._shop, self._policy, self._slate_size = shop, policy, slate_size
        self._reached_ms = 0
        self.visits: Visits = shop.visits()  # those that are over; replaced whole, so any thread may read it

    def play_until(self, event_ms: int, stop: threading.Event) -> None:
        """Serve whole turns until this event time is reached, or `stop`."""
        while self._reached_ms < event_ms and not stop.is_set():
            turn = self._shop.next_turn()
            self._policy.observe(turn.events)
            outcome = self._shop.show(turn, self._policy.recommend(self._shop, turn, self._slate_size))
            self._policy.observe(outcome.events)
            self._reached_ms = int(turn.timestamp_ms.max())
        self.visits = self._shop.visits()


class Rivals:
    """Random, popularity and the planning oracle, kept up with a leader's event time by a thread."""

    def __init__(
        self, settings: ShopSettings, seed: int, slate_size: int, plan_decisions: int = 16_000
    ) -> None:
        """plan_decisions: in each round of the oracle's planning."""
        self._plan_decisions = plan_decisions
        self._settings, self._seed, self._slate_size = settings, seed, slate_size
        self._players: dict[str, Player] = {}
        self._target_ms = 0
        self._stop, self._wake = threading.Event(), threading.Event()
        self._last = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="rivals", daemon=True)

    def start(self) -> None:
        """Begin with the oracle's plan; then play up to wherever `follow` leads."""
        self._thread.start()

    def follow(self, event_ms: int) -> None:
        """Play up to this event time, soon."""
        self._target_ms = event_ms
        self._wake.set()

    def visits(self) -> dict[str, Visits]:
        """Each policy's visits that are over so far; empty until the oracle has its plan."""
        self.check()
        return {name: player.visits for name, player in self._players.items()}

    def finish(self, event_ms: int, waiting: Callable[[], object]) -> dict[str, Visits]:
        """Each policy's visits once all have reached this event time; `waiting` is called now and then meanwhile."""
        self._last = True
        self.follow(event_ms)
        while self._thread.is_alive():
            self._thread.join(0.2)
            waiting()
        return self.visits()

    def close(self) -> None:
        """End the thread; harmless twice."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            oracle = PlanningOracle(self._new_shop(), self._slate_size, decisions=self._plan_decisions)
            policies: dict[str, Recommender] = {
                "random": Random(self._seed),
                "popularity": Popularity(self._settings.items),
                "oracle": oracle,
            }
            self._players = {
                name: Player(self._new_shop(), policy, self._slate_size) for name, policy in policies.items()
            }
            while not self._stop.is_set():
                self._wake.wait()
                self._wake.clear()
                last, target_ms = self._last, self._target_ms
                for player in self._players.values():
                    player.play_until(target_ms, self._stop)
                if last:
                    return
        except Exception as error:
            self._error = error

    def _new_shop(self) -> Shop:
        return Shop(self._settings, self._seed)
