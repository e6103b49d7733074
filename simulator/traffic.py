"""Shoppers at a real server: they ask for slates over gRPC, and the storefront publishes what they do.

    traffic = Traffic(config, shop, client, publisher, run="a1", clock=time.monotonic, cpu=time.process_time)
    report = traffic.run(stop)

One thread serves all shoppers: the shop hands out turns of many shoppers whose pages open at about the same event
time, their requests are in flight together, and what they do is published in order of event time. Event time is the
shop's own and runs as fast as the server answers, unless `speed` or `rate` hold it back. With `speed` it is a clock:
nothing is asked or published before the clock has reached it, and what it has not reached at the end does not happen.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from serving import policy_pb2 as pb
from serving.client import CallError, Client
from simulator.figures import mean_interval, without_nan
from simulator.shop import (
    HOUR_MS,
    NO_EVENTS,
    Bools,
    Events,
    Outcome,
    Rows,
    Shop,
    Turn,
    Visits,
    in_order,
    picked,
)
from streaming.log import Log, LogFull, Producer
from streaming.rewards import EVENT_NAMES
from streaming.schemas import Codec, SchemaError

# no purchase or refund comes later than this after its click: 20 h + 1 h + 20 h, and a day of slack
_REMEMBER_MS: Final = 65 * HOUR_MS
_PUBLISH_TIMEOUT_S: Final = 30.0
_CREDIT_S: Final = 1.0  # of the rate: what a stall delays by less is made up for
_EMPTY_POLLS: Final = 30  # in a row, of a second each, before a log is thought to be away


class TrafficError(Exception):
    """The traffic cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class TrafficConfig:
    """How the shoppers come to the server."""

    slate_size: int = field(default=6, metadata={"help": "slots in a slate, 1..100"})
    rate: float = field(default=300.0, metadata={"help": "most recommendations a second, >= 0; 0: no limit"})
    speed: float = field(
        default=0.0,
        metadata={"help": "event-time seconds in a second, >= 0; 0: as fast as rate and server allow"},
    )
    duration_s: float = field(default=0.0, metadata={"help": "stop after so many seconds, >= 0; 0: never"})
    decisions: int = field(default=0, metadata={"help": "stop after so many recommendations, >= 0; 0: never"})
    call: Literal["single", "batch"] = field(
        default="single", metadata={"help": "Recommend for each shopper, or one BatchRecommend for a turn"}
    )
    in_flight: int = field(default=64, metadata={"help": "Recommend calls under way at once, 1..1000"})
    send_history: bool = field(
        default=True,
        metadata={"help": "requests bring the shopper's history; no: the server's own view of the log"},
    )
    epsilon: float | None = field(
        default=None, metadata={"help": "share of slots explored, 0..1, for each request; none: the server's"}
    )
    unlogged: bool = field(
        default=False, metadata={"help": "measure only: publish nothing, and ask that no decision be written"}
    )

    def __post_init__(self) -> None:
        checks = {
            "slate_size": (self.slate_size, 1, 100),
            "rate": (self.rate, 0.0, 1e9),
            "speed": (self.speed, 0.0, 1e9),
            "duration_s": (self.duration_s, 0.0, 1e9),
            "decisions": (self.decisions, 0, 10**15),
            "in_flight": (self.in_flight, 1, 1000),
            "epsilon": (self.epsilon or 0.0, 0.0, 1.0),
        }
        for name, (value, low, high) in checks.items():
            if not low <= value <= high:
                raise ValueError(f"{name} must be within {low}..{high}, not {value}")


class Status(NamedTuple):
    """Where the traffic stands."""

    wall_s: float
    event_ms: int  # event time reached
    decisions: int
    impressions: int
    clicks: int
    published: int  # events and catalog items
    errors: int  # requests that got no answer: those pages had no slate
    policy_version: int
    strategy: str
    cpu_s: float  # of this process: shoppers, requests and publishing
    empty: int = 0  # answers without an item, of which no decision is recorded
    trouble: str = ""  # gRPC's code of the newest request that got no answer


class Report(NamedTuple):
    """What a run came to. Intervals are 95 %, over shoppers."""

    status: Status
    visits: Visits
    ctr: float  # clicks per item shown
    reward_per_visit: float  # nan: no visit is over
    ci95: tuple[float, float]  # of reward_per_visit; nan: fewer than two shoppers
    strategies: dict[str, int]  # recommendations by what ranked them
    cpu_us_per_event: float  # decisions and published records count as events

    def summary(self) -> dict[str, Any]:
        """The report without its columns, for JSON."""
        status = self.status._asdict()
        whole = {**status, **{k: v for k, v in self._asdict().items() if k not in ("status", "visits")}} | {
            "visits": len(self.visits.visit)
        }
        return {name: without_nan(value) for name, value in whole.items()}


class Publisher:
    """The storefront's pen: catalog items and events, as records of the log."""

    def __init__(
        self,
        shop: Shop,
        producer: Producer,
        codec: Codec,
        events_topic: str = "events",
        catalog_topic: str = "catalog",
    ) -> None:
        self._shop = shop
        self._producer = producer
        self._codec = codec
        self._events_topic, self._catalog_topic = events_topic, catalog_topic
        self._in_catalog = np.full(
            len(shop.item_ids), -1, dtype=np.int8
        )  # -1: not yet; else in_stock as published
        self.published = 0

    def catalog(self, now_ms: int, in_stock: Bools) -> None:
        """Publish the items whose stock differs from what the catalog says; unreleased ones are not mentioned.

        in_stock: [N] by row of the catalog.
        """
        released = self._shop.goods.release_ms <= now_ms
        changed = released & (self._in_catalog != in_stock)
        for row in np.flatnonzero(changed).tolist():
            item = self._codec.encode_item(self._item(row, bool(in_stock[row])))
            self._send(self._catalog_topic, self._shop.item_ids[row], item)
        self._in_catalog[changed] = in_stock[changed]

    def events(self, events: Events, run: str, recommendations: dict[int, str]) -> None:
        """Publish events in their order; ids are unique within `run`, which must be unique within the log."""
        for when, shopper, visit, name, item, decision, slot in zip(
            *(c.tolist() for c in events), strict=True
        ):
            user = user_id(shopper)
            price = float(self._shop.goods.price[item])
            goods = {
                "item_id": self._shop.item_ids[item],
                "quantity": 1,
                "price": price,
                "index": slot if slot >= 0 else None,
            }
            record = {
                "event_id": f"{run}-{self.published}",
                "name": EVENT_NAMES[name],
                "user_id": user,
                "session_id": f"{user}-{visit}",
                "timestamp": when,
                "items": [goods],
                "value": price,
                "currency": "EUR",
                "recommendation_id": recommendations.get(decision),
            }
            self._send(self._events_topic, user, self._codec.encode_event(record))

    def flush(self) -> None:
        """Wait until all of it is durable. Raises TrafficError naming how many records are not."""
        left = self._producer.flush(_PUBLISH_TIMEOUT_S)
        if left:
            raise TrafficError(
                f"{left} records are not in the log after {_PUBLISH_TIMEOUT_S:.0f} s; is it up?"
            )

    def _item(self, row: int, in_stock: bool) -> dict[str, Any]:
        g = self._shop.goods
        return {
            "item_id": g.item_id[row],
            "category": g.category_name[g.category[row]],
            "brand": g.brand_name[g.brand[row]],
            "price": float(g.price[row]),
            "in_stock": in_stock,
            "vector": g.vector[row].tolist(),
            "title": f"{g.brand_name[g.brand[row]]} {g.item_id[row]}",
        }

    def _send(self, topic: str, key: str, value: bytes) -> None:
        # the log's time stamp is the log's own: Kafka refuses stamps far ahead of its clock, and ours may be days ahead
        try:
            self._producer.send(topic, key.encode(), value)
        except LogFull:
            self.flush()
            self._producer.send(topic, key.encode(), value)
        self.published += 1


class Traffic:
    """Drives one server with one shop's shoppers."""

    def __init__(
        self,
        config: TrafficConfig,
        shop: Shop,
        client: Client,
        publisher: Publisher | None,
        *,
        run: str,
        clock: Callable[[], float],
        cpu: Callable[[], float],
        pause: Callable[[float], object] | None = None,
    ) -> None:
        """publisher: None publishes nothing. run: prefix of event ids, unique within the log. clock: monotonic, in
        seconds. cpu: seconds of CPU this process has used. pause: sleeps; None: sleeps until `stop` at most."""
        self.config = config
        self.shop = shop
        self._client = client
        self._publisher = None if config.unlogged else publisher
        self._run = run
        self._clock, self._cpu, self._pause = clock, cpu, pause
        self._began, self._cpu_began = clock(), cpu()
        self._event_ms = shop.settings.start_ms
        self._row_of = {item_id: row for row, item_id in enumerate(shop.item_ids)}
        self._recommendations: dict[int, str] = {}  # decision -> id, of slates that were clicked
        self._ages: deque[tuple[int, int]] = deque()  # (event time, decision) of these
        self._held = NO_EVENTS  # what came of slates and is not published yet, by event time
        self._strategies: Counter[str] = Counter()
        self._decisions = self._impressions = self._clicks = self._errors = self._empty = self._version = 0
        self._strategy = self._trouble = ""
        self._paced_s = self._began  # when the rate allowed the newest turn
        self._paced = 0  # decisions before it

    def run(self, stop: threading.Event, each_turn: Callable[[Status], None] | None = None) -> Report:
        """Until `stop` is set, or the configured duration or number of recommendations is reached.

        Raises: TrafficError, LogError when nothing can be published any more. A server that does not answer is
        waited for: its pages have no slate meanwhile, and are counted.
        """
        self._began, self._cpu_began = self._clock(), self._cpu()
        self._paced_s = self._began
        while not stop.is_set() and not self._done():
            if self.turn(stop) is not None and each_turn is not None:
                each_turn(self.status())
        if self._publisher is not None:
            self._publish_until(self._clock_ms())
            self._publisher.flush()
        return self.report()

    def turn(self, stop: threading.Event) -> Outcome | None:
        """One turn: publish what happened, ask for slates, publish what came of them. None: the traffic ended while the
        turn was waited for."""
        turn = self.shop.next_turn(self._turn_size(), self._spread_s())
        event_ms = int(turn.timestamp_ms.max())
        if not self._keep_pace(stop, event_ms):
            self._held = in_order(self._held, turn.events)  # what of it came before the end does happen
            return None
        self._event_ms = event_ms
        if self._publisher is not None:
            self._publisher.catalog(self._event_ms, turn.available)
            self._publisher.events(turn.events, self._run, self._recommendations)
        answers = self._ask([self._request(turn, b) for b in range(len(turn.shopper))])
        slates = self._slates(answers)
        outcome = self.shop.show(turn, slates)
        self._note(turn, slates, answers, outcome)
        self._held = in_order(self._held, outcome.events)
        if not self.config.speed:
            self._publish_until(None)
        missing = sum(answer is None for answer in answers)
        if 2 * missing > len(answers):  # the server is away: do not rush through the days without it
            self._sleep(stop, 0.5)
        return outcome

    def status(self) -> Status:
        """Where the traffic stands now."""
        return Status(
            wall_s=self._clock() - self._began,
            event_ms=self._event_ms,
            decisions=self._decisions,
            impressions=self._impressions,
            clicks=self._clicks,
            published=self._publisher.published if self._publisher is not None else 0,
            errors=self._errors,
            policy_version=self._version,
            strategy=self._strategy,
            cpu_s=self._cpu() - self._cpu_began,
            empty=self._empty,
            trouble=self._trouble,
        )

    def report(self) -> Report:
        """What the run came to so far; visits that are still going on are left out."""
        status, visits = self.status(), self.shop.visits()
        mean, low, high = mean_interval(visits)
        return Report(
            status=status,
            visits=visits,
            ctr=status.clicks / max(1, status.impressions),
            reward_per_visit=mean,
            ci95=(low, high),
            strategies=dict(self._strategies),
            cpu_us_per_event=1e6 * status.cpu_s / max(1, status.decisions + status.published),
        )

    # -- asking ------------------------------------------------------------------------------------------------

    def _request(self, turn: Turn, b: int) -> pb.RecommendRequest:
        user = user_id(int(turn.shopper[b]))
        request = pb.RecommendRequest(
            user_id=user,
            session_id=f"{user}-{int(turn.visit[b])}",
            slate_size=self.config.slate_size,
            timestamp_ms=int(turn.timestamp_ms[b]),
            epsilon=self.config.epsilon,
            unlogged=self.config.unlogged,
        )
        if self.config.send_history:
            past = turn.history
            known = int((past.item[b] >= 0).sum())
            columns = (past.item, past.name, past.timestamp_ms, past.value)
            # newest first in the shop, oldest first on the wire
            for item, name, when, value in zip(*(c[b, :known][::-1].tolist() for c in columns), strict=True):
                request.history.add(
                    item_id=self.shop.item_ids[item], name=EVENT_NAMES[name], timestamp_ms=when, value=value
                )
        return request

    def _ask(self, requests: Sequence[pb.RecommendRequest]) -> list[pb.RecommendResponse | None]:
        """The answers in order; None where there was none."""
        if self.config.call == "batch":
            try:
                return list(self._client.batch(requests))
            except CallError as error:
                self._fail(error)
                return [None] * len(requests)
        calls: list[Any] = []
        for i, request in enumerate(requests):
            if i >= self.config.in_flight:
                calls[i - self.config.in_flight].exception()  # waits for it
            calls.append(self._client.recommend_future(request))
        for call in calls:
            if call.exception() is not None:
                self._fail(call.exception())
        return [None if call.exception() is not None else call.result() for call in calls]

    def _fail(self, error: Any) -> None:
        """Note why there is no answer. Raises: TrafficError where asking again would not help."""
        _refuse_refusals(error)
        self._trouble = error.code().name

    def _slates(self, answers: Sequence[pb.RecommendResponse | None]) -> Rows:
        """[B, slate_size] rows of the catalog; -1: no answer, fewer slots, or an item that is none of this shop's."""
        slates = np.full((len(answers), self.config.slate_size), -1, dtype=np.int32)
        for b, answer in enumerate(answers):
            if answer is not None:
                rows = [self._row_of.get(slot.item_id, -1) for slot in answer.slate][: slates.shape[1]]
                slates[b, : len(rows)] = rows
        return slates

    def _note(
        self, turn: Turn, slates: Rows, answers: Sequence[pb.RecommendResponse | None], outcome: Outcome
    ) -> None:
        """Count, and remember the ids that later events will name."""
        for answer in answers:
            if answer is None:
                self._errors += 1
            else:
                self._empty += not answer.slate
                self._strategy = pb.Strategy.Name(answer.strategy)
                self._strategies[self._strategy] += 1
                self._version = max(self._version, answer.policy_version)
        self._decisions += len(turn.shopper)
        self._impressions += int((slates >= 0).sum())
        self._clicks += int(outcome.clicked.sum())
        first = int(turn.decision[0])
        for decision in np.unique(outcome.events.decision).tolist():
            answer = answers[decision - first]
            if answer is not None:
                self._recommendations[decision] = answer.recommendation_id
                self._ages.append((self._event_ms, decision))
        while self._ages and self._ages[0][0] < self._event_ms - _REMEMBER_MS:
            del self._recommendations[self._ages.popleft()[1]]

    # -- pace --------------------------------------------------------------------------------------------------

    def _turn_size(self) -> int:
        """At most 256 shoppers, a quarter of a second's worth, and what is left to do."""
        c = self.config
        size = 256 if not c.rate else min(256, max(1, round(c.rate / 4)))
        return min(size, c.decisions - self._decisions) if c.decisions else size

    def _done(self) -> bool:
        c = self.config
        if c.decisions and self._decisions >= c.decisions:
            return True
        return bool(c.duration_s) and self._clock() - self._began >= c.duration_s

    def _spread_s(self) -> float:
        """Event-time span of a turn: with `speed` what its clock does in a quarter of a second, for the first of the
        turn's shoppers wait until the last is due."""
        spread = self.shop.settings.spread_s
        return min(spread, self.config.speed / 4) if self.config.speed else spread

    def _keep_pace(self, stop: threading.Event, event_ms: int) -> bool:
        """Wait until wall time allows this turn, and publish meanwhile what shoppers do; False: the traffic ended."""
        c, due = self.config, self._began
        if c.rate:  # a server that stalled is not asked for all that it missed at once
            due = max(self._paced_s + (self._decisions - self._paced) / c.rate, self._clock() - _CREDIT_S)
            self._paced_s, self._paced = due, self._decisions
        if c.speed:
            while len(self._held) and self._held.timestamp_ms[0] <= event_ms:
                until_ms = min(event_ms, int(self._held.timestamp_ms[0] + 1000 * self._spread_s()))
                if not self._wait(stop, self._due_s(until_ms)):
                    return False
                self._publish_until(until_ms)
            due = max(due, self._due_s(event_ms))
        return self._wait(stop, due)

    def _due_s(self, event_ms: int) -> float:
        """When the clock of `speed` reaches this event time."""
        return self._began + (event_ms - self.shop.settings.start_ms) / 1000 / self.config.speed

    def _clock_ms(self) -> int | None:
        """Event time by the clock of `speed`; None without."""
        if not self.config.speed:
            return None
        return self.shop.settings.start_ms + int(1000 * self.config.speed * (self._clock() - self._began))

    def _publish_until(self, event_ms: int | None) -> None:
        """Publish what shoppers have done with their slates until this event time; None: all of it."""
        done = self._held.timestamp_ms <= (np.inf if event_ms is None else event_ms)
        if self._publisher is not None:
            self._publisher.events(picked(self._held, done), self._run, self._recommendations)
        self._held = picked(self._held, ~done)

    def _wait(self, stop: threading.Event, due_s: float) -> bool:
        """Sleep until then; False: the traffic ended before."""
        end_s = self._began + self.config.duration_s if self.config.duration_s else np.inf
        self._sleep(stop, min(due_s, end_s) - self._clock())
        return due_s <= end_s and not stop.is_set()

    def _sleep(self, stop: threading.Event, seconds: float) -> None:
        if seconds > 0:
            (self._pause or stop.wait)(seconds)


def user_id(shopper: int) -> str:
    """The id under which a shopper is known to the storefront."""
    return f"shopper-{shopper:05d}"


def _refuse_refusals(error: Any) -> None:
    """Raise TrafficError where the server answered that no such request will ever do."""
    if error.code().name in ("INVALID_ARGUMENT", "UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED"):
        raise TrafficError(f"the server refuses our requests: {error.code().name}: {error.details()}")


def start_after(log: Log, topic: str, codec: Codec, now_ms: int, partitions_tail: int = 50) -> int:
    """Event time from which a new shop's days can follow what the log holds: now, or an hour after its newest
    event (looking at the last few records of each partition). Simulated days may be ahead of the clock, and
    a shop that opened before them would find its events late.

    Raises: TrafficError where these records do not come."""
    newest = empty = 0
    if log.partitions(topic):
        bounds = log.bounds(topic)
        wanted = {p: max(b.low, b.high - partitions_tail) for p, b in bounds.items() if b.high > b.low}
        reader = log.reader(topic, wanted)
        try:
            while any(at < bounds[p].high for p, at in reader.position().items()):
                batch = reader.poll(10_000, 1.0)
                for i in range(len(batch)):
                    newest = max(newest, _event_time(codec, batch.value(i)))
                empty = 0 if len(batch) else empty + 1
                if empty >= _EMPTY_POLLS:
                    raise TrafficError(
                        f"the end of topic {topic!r} could not be read: nothing came in {empty} s; is the log up?"
                    )
        finally:
            reader.close()
    return max(now_ms, newest + HOUR_MS) if newest else now_ms


def _event_time(codec: Codec, value: bytes | None) -> int:
    """Event time of a record in ms; 0 where it cannot be read."""
    try:
        _, record = codec.decode(value or b"")
    except SchemaError:
        return 0
    return int(record.get("timestamp", 0))
