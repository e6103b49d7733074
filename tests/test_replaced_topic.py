"""A topic deleted and made anew: nothing of the new one is ever read at offsets of the old one."""

from __future__ import annotations

import dataclasses
import signal

import pytest

from learner.audit import Audit, AuditConfig, NothingToAudit
from learner.checkpoint import Checkpoints
from learner.learner import CannotContinue
from learner.train import TrainConfig, offsets_to_start
from serving.view import Follower, View, ViewConfig
from streaming.log import Bounds, open_log
from streaming.schemas import Codec
from tests.learner_process import finish, start
from tests.serving_process import eventually
from tests.small_shop import Shop, await_offset, delete_topic, learn, newest_meta

SAVED = {"topic": "events", "positions": {"0": 100}}


def test_a_checkpoint_of_another_topic_by_this_name_is_refused():
    with pytest.raises(
        CannotContinue,
        match=r"deleted and made anew, or this is another log: its id was old, now it is new.*empty --data-dir",
    ):
        offsets_to_start(TrainConfig(), SAVED | {"topic_id": "old"}, {0: Bounds(0, 900)}, "new")


@pytest.mark.parametrize(
    ("saved", "found"), [({}, "new"), ({"topic_id": ""}, "new"), ({"topic_id": "old"}, "")]
)
def test_where_either_id_is_not_known_offsets_alone_decide(saved, found):
    assert offsets_to_start(TrainConfig(), SAVED | saved, {0: Bounds(0, 900)}, found) == {0: 100}
    with pytest.raises(CannotContinue, match="ends at 90: another log, or the topic was recreated"):
        offsets_to_start(TrainConfig(), SAVED | saved, {0: Bounds(0, 90)}, found)


@pytest.fixture
def shop(log_url, tmp_path):
    shop = Shop(log_url, f"events-{tmp_path.name}")
    yield shop
    shop.log.close()


def test_a_topic_made_anew_while_the_learner_was_down_is_refused_though_it_is_longer(shop, tmp_path):
    shop.write(100)
    flags = shop.flags("--until-caught-up")
    assert learn(tmp_path, shop.url, *flags)[0] == 0
    shop.begin_anew()
    shop.write(300)
    status, said = learn(tmp_path, shop.url, *flags)
    assert status == 1
    assert f"topic {shop.topic!r} was deleted and made anew" in said.splitlines()[-1]
    assert "empty --data-dir" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert newest_meta(tmp_path)["positions"] == {"0": 100}
    config = AuditConfig(data_dir=str(tmp_path / "data"), weights=str(tmp_path / "weights"))
    with pytest.raises(NothingToAudit, match="deleted and made anew"):
        Audit(shop.log, Codec(), config).run()


def test_a_topic_made_anew_under_a_running_learner_ends_it_with_nothing_of_the_new_one_learnt(shop, tmp_path):
    shop.write(100)
    learner = start(tmp_path, shop.url, *shop.flags())
    try:
        await_offset(tmp_path, 100)
        learner.send_signal(signal.SIGSTOP)  # so that it does not meet a topic that is just not there
        shop.begin_anew()
        shop.write(300)
        learner.send_signal(signal.SIGCONT)
        status, said = finish(learner)
    finally:
        learner.kill()
    assert status == 1
    assert f"topic {shop.topic!r} was deleted and made anew" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert (newest_meta(tmp_path)["positions"], newest_meta(tmp_path)["joined"]["events"]) == (
        {"0": 100},
        100,
    )


def test_a_checkpoint_of_before_ids_were_kept_goes_on_and_keeps_the_id_from_then_on(tmp_path):
    shop = Shop(f"sqlite:///{tmp_path / 'log.db'}", "events")
    shop.write(100)
    flags = shop.flags("--until-caught-up")
    assert learn(tmp_path, shop.url, *flags)[0] == 0
    checkpoints = Checkpoints(tmp_path / "data" / "learner")
    loaded = checkpoints.load()
    meta = {key: value for key, value in loaded.meta.items() if key != "topic_id"}
    checkpoints._fence = dataclasses.make_dataclass(
        "Epoch", [("epoch", int, 1)], namespace={"check": lambda _: None}
    )()
    checkpoints.save({name: loaded.parts[name] for name in loaded.parts}, meta)
    shop.write(50)
    assert learn(tmp_path, shop.url, *flags)[0] == 0
    assert newest_meta(tmp_path)["joined"]["events"] == 150
    assert newest_meta(tmp_path)["topic_id"] == shop.log.identity("events") != ""
    shop.log.close()


def test_a_log_file_that_was_replaced_under_a_running_learner_ends_it(tmp_path):
    shop = Shop(f"sqlite:///{tmp_path / 'log.db'}", "events")
    shop.write(100)
    learner = start(tmp_path, shop.url, *shop.flags())
    try:
        await_offset(tmp_path, 100)
        shop.log.close()
        for part in tmp_path.glob("log.db*"):
            part.unlink()
        Shop(shop.url, "events").log.close()
        status, said = finish(learner)
    finally:
        learner.kill()
    assert status == 1
    assert "log.db was moved, deleted or replaced" in said.splitlines()[-1]


def test_a_server_reads_a_topic_made_anew_from_its_beginning(tmp_path):
    shop = Shop(f"sqlite:///{tmp_path / 'log.db'}", "events")
    shop.write(10)
    config = ViewConfig()
    view = View(config, Codec())
    clock = iter(range(10**9))
    follower = Follower(shop.log, view, config, lambda: float(next(clock)))
    assert follower.start(30)
    try:
        shop.begin_anew()
        shop.write(60)
        assert eventually(lambda: len(view.history("user-3")) >= 3)  # of the new one
    finally:
        follower.stop()
    shop.log.close()


def test_a_server_recommends_nothing_that_a_catalog_made_anew_lacks(tmp_path):
    log, codec = open_log(f"sqlite:///{tmp_path / 'log.db'}"), Codec()
    producer = log.producer()

    def stock(*item_ids):
        log.create_topic("catalog", 1, compacted=True)
        for item_id in item_ids:
            producer.send("catalog", item_id.encode(), codec.encode_item({"item_id": item_id}))
        producer.flush()

    stock("cup", "hat")
    config = ViewConfig()
    view = View(config, codec)
    clock = iter(range(10**9))
    follower = Follower(log, view, config, lambda: float(next(clock)))
    assert follower.start(30)
    try:
        delete_topic(log, "catalog")
        stock("hat", "pen")
        assert eventually(lambda: view.items() == ["", "cup", "hat", "pen"] and view.availability(3)[1][1])
        known, off = view.availability(3)
        assert (known[1:].all(), off[1:].tolist()) == (True, [True, False, False])
    finally:
        follower.stop()
        producer.close()
        log.close()
