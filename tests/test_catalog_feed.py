"""The learner's way to the catalog: all of it, then what is new; nothing is lost while a registry is away."""

import logging

import pytest

from learner.catalog_feed import CatalogFeed
from streaming.catalog import QUIET_S, Catalog
from streaming.chunks import batch_of
from streaming.interning import Vocabulary
from streaming.log import Bounds, OffsetOutOfRange, TopicReplaced, UnknownTopic, open_log
from streaming.schemas import ITEM, Codec
from tests.small_shop import delete_topic, expire
from tests.test_decoder import Schemas


class Stock:
    """A catalog's topic, and a feed that reads it; records may be framed as a registry's are, which may be down."""

    def __init__(self, url):
        self.log, self.codec = open_log(url), Codec()
        self.registry = Schemas(self.codec.reader_schemas()[ITEM])
        self.producer = self.log.producer()
        self.vocabulary = Vocabulary()
        self.catalog = Catalog(Codec(registry=self.registry), self.vocabulary)
        self.feed = CatalogFeed(self.log, "catalog", self.catalog)
        self.now_s = 0.0

    def create(self):
        self.log.create_topic("catalog", 1, compacted=True)

    def write(self, item_id, *, framed=False, **fields):
        value = self.codec.encode_item({"item_id": item_id, **fields})
        self.send(item_id, b"\0\0\0\0\1" + value[10:] if framed else value)

    def send(self, item_id, value):
        self.producer.send("catalog", item_id.encode(), value)
        assert self.producer.flush() == 0

    def follow(self):
        self.feed.follow(self.log.bounds("catalog"), self.now_s)

    def follow_for(self, seconds):
        """Two looks, so far apart."""
        self.follow()
        self.now_s += seconds
        self.follow()

    def on_offer(self):
        """Items that the catalog has in stock."""
        ids = (self.catalog.known & self.catalog.in_stock).nonzero()[0]
        return sorted(self.vocabulary.item_id(i) for i in ids.tolist())


@pytest.fixture
def stock(tmp_path):
    stock = Stock(f"sqlite:///{tmp_path}/log.db")
    yield stock
    stock.feed.close()
    stock.producer.close()
    stock.log.close()


def test_all_that_is_there_is_taken_in_and_then_what_is_new(stock):
    stock.create()
    stock.write("a")
    stock.write("b")
    stock.feed.catch_up()
    assert stock.on_offer() == ["a", "b"]
    stock.write("c")
    stock.send("a", None)
    stock.follow()
    assert stock.on_offer() == ["b", "c"]


class Stalled:
    """A log, and a reader of it, that has five records and gives none."""

    polls = 0

    def bounds(self, topic):
        return {0: Bounds(0, 5)}

    def reader(self, topic, offsets, *, keys):
        return self

    def position(self):
        return {0: 0}

    def poll(self, max_records, timeout_s):
        self.polls += 1
        return batch_of([])

    def close(self): ...


def test_a_catalog_that_does_not_come_is_not_waited_for_once_the_learner_is_told_to_end():
    log = Stalled()
    feed = CatalogFeed(log, "catalog", Catalog(Codec(), Vocabulary()))
    feed.catch_up(lambda: log.polls >= 3)
    assert log.polls == 3


def test_a_topic_that_is_not_there_yet_is_an_empty_catalog_and_read_once_it_is(stock):
    stock.feed.catch_up()
    stock.feed.follow({}, 0.0)
    assert stock.on_offer() == []
    stock.create()
    stock.write("a")
    stock.follow()
    assert stock.on_offer() == ["a"]


def test_what_is_read_while_the_registry_is_away_is_taken_in_once_it_answers(stock, caplog):
    caplog.set_level(logging.INFO, logger="learner.catalog_feed")
    stock.create()
    stock.write("a")
    stock.write("b")
    stock.feed.catch_up()
    stock.registry.down = True
    stock.write("a", framed=True, in_stock=False)
    stock.send("b", None)
    stock.follow()
    stock.write("c")
    stock.follow()
    assert stock.on_offer() == ["a", "b"]
    stock.registry.down = False
    stock.follow()
    assert stock.on_offer() == []
    stock.follow()
    assert stock.on_offer() == ["c"]
    assert caplog.messages == ["the catalog waits: down", "the catalog goes on: the registry answers"]


def test_a_catalog_made_anew_is_read_from_its_beginning(stock):
    stock.create()
    stock.write("a")
    stock.write("b")
    stock.feed.catch_up()
    delete_topic(stock.log, "catalog")
    with pytest.raises(UnknownTopic):
        stock.feed.follow({}, 0.0)
    stock.create()
    stock.follow_for(2 * QUIET_S)
    assert stock.on_offer() == ["a", "b"]  # an empty catalog says nothing
    stock.write("c")
    stock.follow_for(0.9 * QUIET_S)
    assert stock.on_offer() == ["a", "b", "c"]  # nor one that is still being written
    stock.write("a")
    stock.follow_for(0.9 * QUIET_S)
    assert stock.on_offer() == ["a", "b", "c"]
    stock.follow_for(0.1 * QUIET_S)
    assert stock.on_offer() == ["a", "c"]
    assert stock.catalog.gone.nonzero()[0].tolist() == stock.vocabulary.ids(["b"]).tolist()


def test_what_waited_is_let_go_with_a_catalog_that_is_deleted(stock):
    stock.create()
    stock.feed.catch_up()
    stock.registry.down = True
    stock.write("a", framed=True)
    stock.follow()
    delete_topic(stock.log, "catalog")
    stock.feed.close()
    stock.registry.down = False
    stock.create()
    stock.write("b")
    stock.follow()
    assert stock.on_offer() == ["b"]


def test_a_catalog_made_anew_between_two_looks_is_read_from_its_beginning(stock):
    stock.create()
    stock.write("a")
    stock.write("b")
    stock.feed.catch_up()
    delete_topic(stock.log, "catalog")
    stock.create()
    stock.write("a", in_stock=False)
    stock.write("c")
    with pytest.raises(TopicReplaced):
        stock.follow()
    stock.follow_for(QUIET_S)
    assert stock.on_offer() == ["c"]


def test_a_catalog_of_which_retention_took_what_was_not_read_yet_is_read_from_what_is_left(stock):
    stock.create()
    stock.write("a")
    stock.feed.catch_up()
    stock.write("b")
    expire(stock.log.url, "catalog")
    stock.write("c")
    with pytest.raises(OffsetOutOfRange):
        stock.follow()
    stock.follow()
    stock.write("d")
    stock.follow()
    assert stock.on_offer() == ["a", "c", "d"]


def test_a_record_that_cannot_be_used_is_counted_and_named(stock, caplog):
    stock.create()
    stock.send("a", b"hello")
    stock.write("b")
    stock.feed.catch_up()
    assert (stock.feed.refused, stock.on_offer()) == (1, ["b"])
    assert caplog.messages == ["catalog record catalog/0 offset 0 cannot be used: BAD_FRAME"]
