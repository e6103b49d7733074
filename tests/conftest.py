"""Fixtures that several test files share: a real Kafka, and logs of both kinds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from streaming.log import Log, open_log
from tests import learner_process
from tests.kafka_broker import BrokerMissing, KafkaBroker

_counter = itertools.count()
torch.set_num_threads(
    1
)  # as our programs do; threads that wait for each other spin, on a busy machine for ever


@pytest.fixture(scope="session")
def kafka() -> Iterator[KafkaBroker]:
    """The session's real Kafka broker. Topics stay: use names from `topic`."""
    try:
        broker = KafkaBroker()
    except BrokerMissing as missing:
        pytest.skip(f"!!! NO REAL KAFKA WAS TESTED: {missing}")
    with broker:
        yield broker


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
def log_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty log, of each kind in turn (Kafka's may hold other tests' topics)."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'log.db'}"
    broker = request.getfixturevalue("kafka")
    assert isinstance(broker, KafkaBroker)
    return broker.url


@pytest.fixture
def open_here(log_url: str) -> Iterator[Callable[[], Log]]:
    """Opens the log once more, as another process would; all are closed at the end."""
    opened: list[Log] = []

    def once_more() -> Log:
        opened.append(open_log(log_url))
        return opened[-1]

    yield once_more
    for log in opened:
        log.close()


@pytest.fixture
def log(open_here: Callable[[], Log]) -> Log:
    """A log of each kind in turn."""
    return open_here()


@pytest.fixture(autouse=True)
def no_learner_is_left() -> Iterator[None]:
    yield
    learner_process.stop_all()


@pytest.fixture
def topic() -> str:
    """A topic name that no other test has."""
    return f"topic-{next(_counter)}"
