"""Simulated shoppers at a gRPC server: what they ask, what the storefront publishes, what happens without answers."""

import itertools
import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from serving import policy_pb2 as pb
from serving import policy_pb2_grpc
from serving.client import Client
from simulator import __main__ as command
from simulator.figures import mean_interval
from simulator.shop import HOUR_MS, Mind, Shop, ShopSettings, Visits
from simulator.traffic import (
    Publisher,
    Status,
    Traffic,
    TrafficConfig,
    TrafficError,
    start_after,
)
from streaming.log import open_log
from streaming.rewards import HISTORY_NAMES
from streaming.schemas import Codec

SETTINGS = ShopSettings(items=60, shoppers=100)


class ByHash(policy_pb2_grpc.PolicyServicer):
    """A policy server that ranks items by a hash of user and time; the simplest that answers truly."""

    def __init__(self, items):
        self._items = items
        self._number = itertools.count()
        self.asked = []
        self.given = {}
        self.refuse = None

    def Recommend(self, request, context):  # noqa: N802
        if self.refuse is not None:
            context.abort(self.refuse, "slate_size: asked for 6")
        rng = np.random.default_rng([request.timestamp_ms, int(request.user_id[-5:])])
        slate = [self._items[i] for i in rng.permutation(len(self._items))[: request.slate_size]]
        answer = pb.RecommendResponse(
            recommendation_id=f"r{next(self._number)}",
            slate=[pb.Slot(item_id=item, propensity=0.1) for item in slate],
            policy_version=7,
            strategy=pb.RANDOM,
        )
        self.asked.append(request)
        self.given[answer.recommendation_id] = (request.user_id, slate)
        return answer

    def BatchRecommend(self, request, context):  # noqa: N802
        return pb.BatchRecommendResponse(responses=[self.Recommend(r, context) for r in request.requests])


class World:
    """A shop, a server and a log."""

    def __init__(self, tmp_path):
        self.shop = Shop(SETTINGS, 1)
        self.servicer = ByHash(self.shop.item_ids)
        self._server = grpc.server(ThreadPoolExecutor(4))
        policy_pb2_grpc.add_PolicyServicer_to_server(self.servicer, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self.url = f"sqlite:///{tmp_path / 'log.db'}"
        self.log = open_log(self.url)
        self.log.create_topic("events", 2)
        self.log.create_topic("catalog", 1, compacted=True)
        self.producer = self.log.producer()
        self.client = Client(f"127.0.0.1:{self.port}", retries=0, timeout_s=10.0)

    def traffic(self, shop=None, **config):
        shop = shop or self.shop
        self.paused = []
        return Traffic(
            TrafficConfig(rate=0, **config),
            shop,
            self.client,
            Publisher(shop, self.producer, Codec()),
            run="run",
            clock=itertools.count().__next__,  # a second for each look
            cpu=lambda: 0.0,
            pause=self.paused.append,
        )

    def records(self, topic):
        """Every record of a topic, decoded, partition by partition in order."""
        self.producer.flush()
        bounds = self.log.bounds(topic)
        reader = self.log.reader(topic, {p: b.low for p, b in bounds.items()})
        out = []
        while len(batch := reader.poll(10_000, 0.1)):
            out += [Codec().decode(batch.value(i))[1] for i in range(len(batch))]
        reader.close()
        return out

    def stop_server(self):
        self._server.stop(None).wait()

    def close(self):
        self.client.close()
        self.stop_server()
        self.producer.close()
        self.log.close()


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture
def signals_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_is_published_says_what_the_shoppers_did(world):
    report = world.traffic(decisions=1500).run(threading.Event())
    events = world.records("events")

    assert report.status.decisions == 1500
    assert len({e["event_id"] for e in events}) == len(events)
    clicks = [e for e in events if e["name"] == "select_item"]
    assert len(clicks) == report.status.clicks > 20
    for e in events:
        if e["name"] == "view_item":
            assert e["recommendation_id"] is None
        else:
            user, slate = world.servicer.given[e["recommendation_id"]]
            assert e["user_id"] == user
            assert slate[e["items"][0]["index"]] == e["items"][0]["item_id"]
    assert report.status.impressions == 1500 * 6
    assert report.strategies == {"RANDOM": 1500}
    assert report.status.policy_version == 7


def test_purchases_published_hours_later_name_their_recommendation(world):
    """A shop in which everything clicked is bought: each purchase in the log has a click with the same id."""
    shop = Shop(
        ShopSettings(items=60, shoppers=100, mind=ShopSettings().mind.__class__(cart=20.0, buy=20.0)), 1
    )
    world.traffic(shop, decisions=2500).run(threading.Event())
    events = world.records("events")
    clicked = {
        (e["recommendation_id"], e["items"][0]["item_id"]): e["timestamp"]
        for e in events
        if e["name"] == "select_item"
    }
    bought = [e for e in events if e["name"] == "purchase"]

    assert len(bought) > 20
    for e in bought:
        assert e["timestamp"] > clicked[e["recommendation_id"], e["items"][0]["item_id"]]
        assert e["value"] == e["items"][0]["price"] > 0


def test_requests_bring_the_history_oldest_first_with_event_time(world):
    world.traffic(decisions=400).run(threading.Event())
    longest = max(world.servicer.asked, key=lambda r: len(r.history))
    times = [entry.timestamp_ms for entry in longest.history]

    assert len(times) > 3
    assert times == sorted(times)
    assert times[-1] < longest.timestamp_ms
    assert {entry.name for entry in longest.history} <= set(HISTORY_NAMES)
    assert longest.session_id.startswith(longest.user_id)


def test_without_send_history_and_with_epsilon_requests_say_so(world):
    world.traffic(decisions=50, send_history=False, epsilon=0.25).run(threading.Event())

    assert all(not r.history and r.epsilon == 0.25 for r in world.servicer.asked)


def test_one_batch_call_leads_to_the_same_visits_as_single_calls(world):
    single = world.traffic(decisions=300).run(threading.Event())
    batch = world.traffic(Shop(SETTINGS, 1), decisions=300, call="batch").run(threading.Event())

    assert batch.status.clicks == single.status.clicks > 0
    assert all(np.array_equal(a, b) for a, b in zip(batch.visits, single.visits, strict=True))


def test_the_catalog_topic_follows_stock_and_releases(world):
    shop = Shop(ShopSettings(items=60, shoppers=100, new_items=0.5, stock_outs=0.2), 1)
    world.traffic(shop, decisions=1500).run(threading.Event())
    items = {}
    for item in world.records("catalog"):
        items[item["item_id"]] = item

    released = shop.goods.release_ms <= world.servicer.asked[-1].timestamp_ms
    assert set(items) <= {shop.item_ids[i] for i in np.flatnonzero(released)}
    assert {i for i, item in items.items() if item["in_stock"]} == {
        shop.item_ids[i] for i in np.flatnonzero(shop.available)
    }
    some = next(iter(items.values()))
    assert some["category"] in shop.goods.category_name
    assert len(some["vector"]) == 16


def test_measuring_writes_nothing(world):
    report = world.traffic(decisions=100, unlogged=True).run(threading.Event())

    assert report.status.decisions == 100
    assert world.records("events") == world.records("catalog") == []
    assert all(r.unlogged for r in world.servicer.asked)


@pytest.mark.parametrize("call", ["single", "batch"])
def test_a_server_that_is_away_is_counted_and_not_rushed_past(world, call):
    world.stop_server()
    report = world.traffic(decisions=20, call=call).run(threading.Event())

    assert report.status.errors == 20
    assert report.status.trouble == "UNAVAILABLE"
    assert report.status.impressions == 0
    assert 0.5 in world.paused


@pytest.mark.parametrize("call", ["single", "batch"])
def test_a_server_that_refuses_the_requests_ends_the_traffic_with_its_words(world, call):
    world.servicer.refuse = grpc.StatusCode.INVALID_ARGUMENT

    with pytest.raises(TrafficError, match="slate_size: asked for 6"):
        world.traffic(decisions=20, call=call).run(threading.Event())


def test_rate_and_speed_hold_the_traffic_back(world):
    """At two recommendations a second, the third turn of one shopper waits for the end of the first second."""
    traffic = Traffic(
        TrafficConfig(rate=2.0, decisions=3),
        world.shop,
        world.client,
        None,
        run="run",
        clock=lambda: 100.0,
        cpu=lambda: 0.0,
        pause=(slept := []).append,
    )
    traffic.run(threading.Event())

    assert slept == [0.5, 1.0]


class Instant:
    """A clock, a log, and a server that answers batches of requests after so long, but for the times when it stalls."""

    def __init__(self, stalls=(), takes_s=0.01, slate=()):
        self.now, self.asked, self.published = 0.0, [], []
        self._stalls, self._takes_s, self._slate = list(stalls), takes_s, slate

    def batch(self, requests):
        self.asked += [(self.now, request) for request in requests]
        if self._stalls and self.now >= self._stalls[0][0]:
            self.now += self._stalls.pop(0)[1]
        self.now += self._takes_s
        slate = [pb.Slot(item_id=item) for item in self._slate]
        return [pb.RecommendResponse(recommendation_id="r", slate=slate) for _ in requests]

    def send(self, topic, key, value):
        if topic == "events":
            self.published.append((self.now, Codec().decode(value)[1]))

    def flush(self, timeout_s):
        return 0

    def traffic(self, shop, publisher=None, **config):
        return Traffic(
            TrafficConfig(call="batch", **config),
            shop,
            self,
            publisher,
            run="run",
            clock=lambda: self.now,
            cpu=lambda: 0.0,
            pause=lambda seconds: setattr(self, "now", self.now + seconds),
        )


@pytest.mark.parametrize("stall_s", [0.5, 60.0])
def test_after_a_stall_no_more_than_a_second_of_the_rate_is_made_up_for(stall_s):
    server = Instant(stalls=[(5.0, stall_s)])
    server.traffic(Shop(ShopSettings(), 1), rate=300, duration_s=stall_s + 20).run(threading.Event())
    at = np.array([now for now, _ in server.asked])
    in_a_second = np.searchsorted(at, at + 1.0) - np.arange(len(at))

    assert in_a_second.max() <= 2 * 300 + 300 / 4
    assert len(at) == pytest.approx(300 * (20 + min(stall_s, 1.0)), abs=300 / 2)


@pytest.mark.parametrize(("speed", "seconds"), [(1.0, 1800.0), (60.0, 60.0), (7200.0, 1.0)])
def test_with_speed_all_comes_when_the_clock_has_reached_it_and_soon_after(speed, seconds):
    shop = Shop(ShopSettings(items=60, shoppers=300, mind=Mind(base=0.0)), 1)
    server = Instant(takes_s=0.0, slate=shop.item_ids[:6])
    publisher = Publisher(shop, server, Codec())
    server.traffic(shop, publisher, rate=0, speed=speed, duration_s=seconds).run(threading.Event())

    def late_s(came):
        """By how many seconds of the wall each was behind the clock."""
        when = np.array([ms for _, ms in came]) - shop.settings.start_ms
        return np.array([now for now, _ in came]) - when / 1000 / speed

    asked = late_s([(now, request.timestamp_ms) for now, request in server.asked])
    done = late_s(
        [(now, e["timestamp"]) for now, e in server.published if e["name"] in ("select_item", "add_to_cart")]
    )
    seen = late_s([(now, e["timestamp"]) for now, e in server.published])

    assert len(asked) > 30
    assert len(done) > 10
    assert min(asked.min(), seen.min()) >= -0.001
    assert max(asked.max(), done.max()) <= 0.26


def test_what_the_clock_has_reached_at_the_end_has_happened():
    """Also what shoppers looked at, a moment before, ahead of a page that was yet to come."""
    start_ms = ShopSettings().start_ms

    def happened(seconds):
        shop = Shop(ShopSettings(items=60, shoppers=30, mind=Mind(base=0.0)), 1)
        server = Instant(takes_s=0.0, slate=shop.item_ids[:6])
        publisher = Publisher(shop, server, Codec())
        server.traffic(shop, publisher, rate=0, speed=60.0, duration_s=seconds).run(threading.Event())
        return sorted((e["timestamp"], e["user_id"], e["name"]) for _, e in server.published)

    in_the_end = happened(30)
    looked_ms = [when for when, _, name in in_the_end if name == "view_item"]
    assert len(looked_ms) > 5
    for end_ms in looked_ms[:5]:
        found = happened((end_ms - start_ms + 1) / 60_000)
        assert found == [event for event in in_the_end if event[0] <= end_ms]


def test_an_unknown_item_in_a_slate_is_shown_to_nobody(world):
    world.servicer._items = ["something-else"] * 60
    report = world.traffic(decisions=50).run(threading.Event())

    assert report.status.impressions == report.status.clicks == 0


def test_a_second_shop_opens_after_the_days_of_the_first(world):
    assert start_after(world.log, "events", Codec(), now_ms=5) == 5
    world.traffic(decisions=200).run(threading.Event())
    newest = max(e["timestamp"] for e in world.records("events"))

    assert start_after(world.log, "events", Codec(), now_ms=5) == newest + HOUR_MS
    assert start_after(world.log, "events", Codec(), now_ms=2 * newest) == 2 * newest
    assert start_after(world.log, "no-such-topic", Codec(), now_ms=5) == 5


class Dozing:
    """A log whose readers give nothing at so many polls, and then all there is."""

    def __init__(self, log, naps):
        self._log, self.naps = log, naps

    def __getattr__(self, name):
        return getattr(self._log, name)

    def reader(self, topic, offsets):
        reader = self._log.reader(topic, offsets)
        poll = reader.poll
        reader.poll = lambda records, timeout_s: [] if self._nods() else poll(records, timeout_s)
        return reader

    def _nods(self):
        self.naps -= 1
        return self.naps >= 0


def test_a_log_that_is_slow_to_answer_is_read_to_its_end_all_the_same(world):
    world.traffic(decisions=50).run(threading.Event())
    newest = max(e["timestamp"] for e in world.records("events"))

    assert start_after(Dozing(world.log, 3), "events", Codec(), now_ms=5) == newest + HOUR_MS


def test_a_log_whose_end_does_not_come_is_named(world):
    world.traffic(decisions=50).run(threading.Event())

    with pytest.raises(TrafficError, match="the end of topic 'events' could not be read"):
        start_after(Dozing(world.log, 1000), "events", Codec(), now_ms=5)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Shoppers of 1 to 5 visits whose own means differ: the 95 % interval holds the mean in 93..97 % of 1,000 draws."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        count = rng.integers(1, 6, 200)
        shopper = np.repeat(np.arange(200), count)
        reward = 3.0 + rng.standard_normal(200)[shopper] + rng.standard_normal(len(shopper))
        nothing = np.zeros(len(shopper), dtype=np.int64)
        _, low, high = mean_interval(Visits(shopper, *[nothing] * 8, reward))
        hits += low <= 3.0 <= high

    assert 930 <= hits <= 970


def test_the_command_runs_and_reports(world, tmp_path, capsys, signals_restored):
    world.producer.flush()
    file = tmp_path / "out" / "report.json"
    where = f"--log {world.url} --server 127.0.0.1:{world.port} --report {file}"
    status = command.main(f"{where} --items 60 --shoppers 100 --seed 1 --rate 0 --decisions 200".split())
    report = json.loads(file.read_text())

    assert status == 0
    assert report["decisions"] == 200
    assert report["published"] > 60
    assert report["cpu_us_per_event"] > 0
    assert "200 recommendations" in capsys.readouterr().out
    users = {e["user_id"] for e in world.records("events")}
    assert len(users) > 10


def test_a_run_in_which_no_visit_ended_says_so_and_its_report_is_json(
    world, tmp_path, capsys, signals_restored
):
    file = tmp_path / "report.json"
    where = f"--log {world.url} --server 127.0.0.1:{world.port} --report {file}"
    status = command.main(f"{where} --items 60 --shoppers 100 --seed 1 --rate 0 --decisions 1".split())
    report = json.loads(file.read_text(), parse_constant=pytest.fail)

    assert status == 0
    assert (report["visits"], report["reward_per_visit"], report["ci95"]) == (0, None, [None, None])
    assert "\nno visit is over\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--shoppers", "0"], "shoppers must be within 1..1000000, not 0"),
        (["--slate-size", "101"], "slate_size must be within 1..100, not 101"),
        (["--seed", "-1"], "--seed must be >= 0, not -1"),
        (["--call", "bach"], "did you mean 'batch'?"),
        (["--shopers", "5"], "did you mean '--shoppers'?"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_status_two(wrong, words, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(wrong)
    message = capsys.readouterr().err

    assert end.value.code == 2
    assert words in message
    assert message.count("\n") == 1


def test_the_live_line_is_written_now_and_then(capsys):
    show = command.live_line(0, terminal=False)
    for second in range(25):
        show(Status(float(second), 0, 10 * second, 60, 3, 5, 2, 4, "LEARNED", 0.1))

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "LEARNED version 4" in lines[0]
    assert "2 unanswered" in lines[1]


def test_the_live_line_says_why_there_is_no_answer():
    start = Status(0.0, 0, 0, 0, 0, 0, 0, 0, "", 0.0)
    line = command.describe(start, Status(1.0, 0, 7, 0, 0, 5, 7, 0, "", 0.1, trouble="UNAVAILABLE"), 0)
    assert line.endswith(" · no answer yet · 5 published · 7 unanswered (the last one: UNAVAILABLE)")
