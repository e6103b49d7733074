"""What is compiled before a learner claims its name is all that it needs later."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

SCRIPT = """
import gc
from numba.core.dispatcher import Dispatcher
from learner.agent import AgentSettings
from learner.learner import LearnerSettings
from learner.warm_up import warm_up
from streaming.join_settings import JoinSettings
from tests import test_learner
from tests.shop_log import write_shop
from streaming.log import open_log

def compiled():
    found = [each for each in gc.get_objects() if issubclass(type(each), Dispatcher)]
    return {(each.py_func.__qualname__, str(signature)) for each in found for signature in each.overloads}

warm_up(LearnerSettings(), AgentSettings(), JoinSettings())
before = compiled()
assert len(before) > 10, before
log = open_log("sqlite:///log.db")
write_shop(log, 300, partitions=2, items=60, shoppers=40)
reader = log.reader("events", {0: 0, 1: 0})
simulators = {name for name, _ in compiled() - before}
learner = test_learner.new_learner()
while len(batch := reader.poll(400, 1.0)):
    learner.take(batch)
    learner.train(5)
learner.advance({0: 2_000_000_000_000}, {0: 10**6})
learner.snapshot()
print(sorted((name, signature) for name, signature in compiled() - before if name not in simulators))
"""


def test_nothing_is_left_to_compile_once_records_come(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
