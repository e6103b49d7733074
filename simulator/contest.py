"""The other policies of a contest: each serves its own copy of the shop, in process, over the same days."""

from __future__ import annotations

import threading
from collections.abc import Callable

from simulator.policies import PlanningOracle, Popularity, Random, Recommender
from simulator.shop import Shop, ShopSettings, Visits


class Player:
    """One policy and the shop that it serves, in a thread of its own."""

    def __init__(self, name: str, shop: Shop, slate_size: int, make: Callable[[], Recommender]) -> None:
        """make: called in the thread, for a policy may take its time to get ready."""
        self.visits: Visits | None = None  # those that are over; replaced whole, so any thread may read it
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._shop, self._slate_size, self._make = shop, slate_size, make
        self.reached_ms = 0  # event time
        self._target_ms = 0
        self._last = False
        self._wake, self._stop = threading.Event(), threading.Event()

    def follow(self, event_ms: int, last: bool = False) -> None:
        """Play up to this event time, soon. last: then end."""
        self._target_ms, self._last = event_ms, last
        self._wake.set()

    def close(self) -> None:
        """End the thread; harmless twice."""
        self._stop.set()
        self._wake.set()
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        try:
            policy = self._make()
            while not self._stop.is_set():
                self._wake.wait()
                self._wake.clear()
                last = self._last
                self._play_until(policy, self._target_ms)
                if last:
                    return
        except Exception as error:
            self.error = error

    def _play_until(self, policy: Recommender, event_ms: int) -> None:
        reached_ms = self.reached_ms
        while reached_ms < event_ms and not self._stop.is_set():
            turn = self._shop.next_turn()
            policy.observe(turn.events)
            outcome = self._shop.show(turn, policy.recommend(self._shop, turn, self._slate_size))
            policy.observe(outcome.events)
            reached_ms = int(turn.timestamp_ms.max())
        self.visits = self._shop.visits()
        self.reached_ms = reached_ms  # only now: whoever sees it finds the visits


class Rivals:
    """Random, popularity and the planning oracle, kept up with a leader's event time."""

    def __init__(
        self, settings: ShopSettings, seed: int, slate_size: int, plan_decisions: int = 16_000
    ) -> None:
        """plan_decisions: in each round of the oracle's planning."""

        def new_shop() -> Shop:
            return Shop(settings, seed)

        policies: dict[str, Callable[[], Recommender]] = {
            "random": lambda: Random(seed),
            "popularity": lambda: Popularity(settings.items),
            "oracle": lambda: PlanningOracle(new_shop(), slate_size, decisions=plan_decisions),
        }
        self._players = {name: Player(name, new_shop(), slate_size, make) for name, make in policies.items()}

    def start(self) -> None:
        """The oracle begins with its plan; then all play up to wherever `follow` leads."""
        for player in self._players.values():
            player.thread.start()

    def follow(self, event_ms: int) -> None:
        """Play up to this event time, soon."""
        for player in self._players.values():
            player.follow(event_ms)

    def visits(self, at_least_ms: int = 0) -> dict[str, Visits]:
        """The visits that are over so far, of each policy that is ready and has come as far as this event time."""
        self.check()
        return {
            name: player.visits
            for name, player in self._players.items()
            if player.visits is not None and player.reached_ms >= at_least_ms
        }

    def finish(self, event_ms: int, waiting: Callable[[], object]) -> dict[str, Visits]:
        """Each policy's visits once it has reached this event time; `waiting` is called now and then meanwhile."""
        for player in self._players.values():
            player.follow(event_ms, last=True)
        for player in self._players.values():
            while player.thread.is_alive():
                player.thread.join(0.2)
                waiting()
        return self.visits()

    def close(self) -> None:
        """End the threads; harmless twice."""
        for player in self._players.values():
            player.close()

    def check(self) -> None:
        """Raise what went wrong with one of them."""
        for player in self._players.values():
            if player.error is not None:
                raise player.error
