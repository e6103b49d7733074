"""What learner and server compile before anybody waits for them is all that they need later."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from learner.weights import WeightStore
from streaming.log import open_log
from tests.serving_process import publish
from tests.shop_log import write_shop

ROOT = Path(__file__).parent.parent

COMPILED = """
import gc
from numba.core.dispatcher import Dispatcher

def compiled():
    found = [each for each in gc.get_objects() if issubclass(type(each), Dispatcher)]
    return {(each.py_func.__qualname__, str(signature)) for each in found for signature in each.overloads}
"""
LEARNER = """
from learner.agent_settings import AgentSettings
from learner.learner import LearnerSettings
from learner.warm_up import warm_up
from streaming.join_settings import JoinSettings
from streaming.log import open_log
from tests import test_learner

warm_up(LearnerSettings(), AgentSettings(), JoinSettings())
before = compiled()
assert len(before) > 10, before
reader = open_log("sqlite:///log.db").reader("events", {0: 0, 1: 0})
learner = test_learner.new_learner()
while len(batch := reader.poll(400, 1.0)):
    learner.take(batch)
    learner.train(5)
learner.advance({0: 2_000_000_000_000}, {0: 10**6})
learner.snapshot()
print(sorted(compiled() - before))
"""
SERVER = """
from learner.compiled import compile_q
from learner.policy import Candidate, Policy
from learner.weights import WeightStore

compile_q()
before = compiled()
assert before
policy = Policy.from_weights(WeightStore("weights").load(1))
policy.check()
policy.q_candidates(policy.encode([[]], [0]), [Candidate("new", vector=[1.0])])
print(sorted(compiled() - before))
"""
ANSWERS = """
from serving import policy_pb2 as pb
from serving.client import Client
from serving.server import Instance, PolicyServer, ServingConfig
from serving.view import ViewConfig
from streaming.log import open_log
from streaming.schemas import Codec
from tests.serving_process import eventually

def ask_all():
    told = [pb.Candidate(item_id="a"), pb.Candidate(item_id="new", price=3.0, vector=[1.0])]
    client.recommend(pb.RecommendRequest(user_id="u"))
    client.recommend(pb.RecommendRequest(user_id="u", epsilon=0.0, exclude_item_ids=["a"]))
    client.recommend(pb.RecommendRequest(user_id="u", candidates=told))
    client.recommend(pb.RecommendRequest(user_id="u", history=[pb.HistoryEntry(item_id="b")]))

log, codec = open_log("sqlite:///log.db"), Codec()
log.create_topic("catalog", 1)
config = ServingConfig(weights="weights", port=0, exploration="boltzmann")
server = PolicyServer(config, ViewConfig(), log, codec, Instance("s"), lambda: 1_700_000_000_000)
with Client(f"127.0.0.1:{server.start()}") as client:
    before = compiled()
    ask_all()
    producer = log.producer()
    for i in range(2000):  # more than there is room for at first
        producer.send("catalog", f"more-{i}".encode(), codec.encode_item({"item_id": f"more-{i}"}))
    producer.flush(10.0)
    eventually(lambda: "more-1999" in server._view.items())
    ask_all()
print(sorted(compiled() - before))
server.drain()
"""


@pytest.mark.parametrize("script", [LEARNER, SERVER, ANSWERS], ids=["learner", "server", "answers"])
def test_nothing_is_left_to_compile_once_records_and_weights_come(tmp_path, script):
    log = open_log(f"sqlite:///{tmp_path / 'log.db'}")
    write_shop(log, 300, partitions=2, items=60, shoppers=40)
    log.close()
    publish(WeightStore(str(tmp_path / "weights")), ["a", "b", "c"])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED + script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
