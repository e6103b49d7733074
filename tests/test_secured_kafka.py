"""Kafka as shops run it: TLS by a CA of their own, SASL/SCRAM, ACLs; and one clear line where something is wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from streaming.kafka_settings import write_settings
from streaming.log import LogRefused, NotAllowed, open_log
from tests.kafka_broker import BrokerMissing
from tests.learner_process import await_line, finish, start
from tests.secured_broker import SecuredBroker
from tests.serving_process import ServerProcess, eventually
from tests.small_shop import Shop, await_offset, learn, newest_meta

pytestmark = pytest.mark.kafka

USER, PASSWORD, WRONG = "bellwether", "the right password", "another password"


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    """With `events` of 100 records, and a user who has the rights that docs/operations.md names for a learner."""
    try:
        secured = SecuredBroker(tmp_path_factory.mktemp("certificates"))
    except BrokerMissing as missing:
        pytest.skip(f"!!! NO REAL KAFKA WAS TESTED: {missing}")
    with secured:
        shop = Shop(secured.plain_url, "events")
        shop.write(100)
        for topic in ("events.dlq", "events.late", "catalog", "private"):
            shop.log.create_topic(topic, 1)
        shop.log.close()
        secured.add_user(USER, PASSWORD)
        secured.allow(
            USER,
            ("TOPIC", "events", "READ"),
            ("TOPIC", "catalog", "READ"),
            ("TOPIC", "events.dlq", "WRITE"),
            ("TOPIC", "events.late", "WRITE"),
            ("GROUP", "bellwether-learner", "READ"),
        )
        secured.add_user("server", PASSWORD)
        secured.allow(
            "server", ("TOPIC", "events", "READ"), ("TOPIC", "events", "WRITE"), ("TOPIC", "catalog", "READ")
        )
        eventually(lambda: may_read(secured))
        yield secured


def may_read(broker: SecuredBroker) -> bool:
    """Whether rights and user have reached the broker."""
    with closing(open_log(broker.secured_url, broker.settings(USER, PASSWORD))) as log:
        try:
            return log.partitions("events.late") == 1
        except (LogRefused, NotAllowed):
            return False


def file_of(broker: SecuredBroker, folder: Path, password: str = PASSWORD, **more: str) -> str:
    """The settings in a file, as an operator has them."""
    path = folder / f"kafka-{len(list(folder.glob('kafka-*')))}.properties"
    write_settings(path, broker.settings(more.pop("user", USER), password, **more))
    return str(path)


def logins_per_s(broker: SecuredBroker) -> float:
    """Refused log-ins a second. librdkafka forgets how long it has waited each time that it begins anew with
    `bootstrap.servers`, so each of our clients comes once or twice a second for ever, not ever more rarely.
    """
    before, began = broker.failed_logins(), time.monotonic()
    time.sleep(5)
    return (broker.failed_logins() - before) / (time.monotonic() - began)


def learner(broker, folder, settings: str, *flags: str):
    return start(folder, broker.secured_url, "--min-replay", "40", "--kafka-config", settings, *flags)


def test_a_learner_with_the_rights_that_the_docs_name_learns_and_shows_how_far_it_is(broker, tmp_path):
    status, said = finish(learner(broker, tmp_path, file_of(broker, tmp_path), "--until-caught-up"))
    assert status == 0, said
    assert newest_meta(tmp_path)["positions"] == {"0": 100}
    assert newest_meta(tmp_path)["topic_id"]
    with closing(open_log(broker.plain_url)) as log:
        assert log.committed("bellwether-learner", "events") == {0: 100}
    assert "ERROR" not in said
    assert "keeps our user" not in said


@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        ({"password": WRONG}, "does not let user 'bellwether' in: check sasl.username, sasl.password"),
        ({"user": "nobody"}, "does not let user 'nobody' in: check sasl.username, sasl.password"),
        ({"ca": "another-ca"}, "no TLS with Kafka at 127.0.0.1"),
        ({"expired": True}, "whether certificates, the broker's and ours, have expired"),
    ],
)
def test_whoever_is_turned_away_at_the_start_ends_with_one_line_and_few_attempts(
    broker, tmp_path, wrong, wanted
):
    url = broker.expired_url if wrong.pop("expired", False) else broker.secured_url
    before = broker.failed_logins()
    status, said = learn(tmp_path, url, "--kafka-config", file_of(broker, tmp_path, **wrong))
    assert status == 1
    (line,) = said.splitlines()
    assert wanted in line
    assert PASSWORD not in said
    assert WRONG not in said
    assert broker.failed_logins() - before <= 20


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--topic", "private"), "keeps our user from topic 'private' (READ to read it"),
        (
            ("--name", "other"),
            "keeps our user from the consumer group that shows how far 'events' was read (READ)",
        ),
    ],
)
def test_a_missing_right_ends_a_learner_at_its_start_with_one_line(broker, tmp_path, flags, wanted):
    status, said = learn(tmp_path, broker.secured_url, "--kafka-config", file_of(broker, tmp_path), *flags)
    assert status == 1
    assert wanted in said.splitlines()[-1]
    assert "check its rights (ACLs)" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert PASSWORD not in said


def test_topics_are_created_by_who_may_and_not_by_who_may_not(broker, tmp_path):
    broker.add_user("admin", PASSWORD)
    rights = [("TOPIC", topic, right) for topic in TOPICS for right in ("CREATE", "DESCRIBE")]
    broker.allow("admin", *rights)

    def topics(user: str, password: str) -> tuple[int, str]:
        settings = file_of(broker, tmp_path, password, user=user)
        command = [sys.executable, "-m", "streaming", "topics", "--topic", "news", "--catalog", "newsitems"]
        done = subprocess.run(
            [*command, "--log", broker.secured_url, "--kafka-config", settings],
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    status, said = eventually(lambda: found if (found := topics("admin", PASSWORD))[0] == 0 else None, 30)
    assert "news" in said
    status, said = topics("admin", WRONG)  # and is not waited for
    assert status == 1
    assert "does not let user 'admin' in" in said.splitlines()[-1]
    status, said = topics(USER, PASSWORD)
    assert status == 1
    assert "keeps our user from topic 'news'" in said.splitlines()[-1]


TOPICS = ("news", "news.dlq", "news.late", "newsitems")


def test_a_password_taken_away_in_mid_run_is_said_and_the_learner_waits_for_it(broker, tmp_path):
    broker.add_user("changing", PASSWORD)
    topics = ("events", "catalog", "events.dlq", "events.late")
    rights = [("TOPIC", topic, right) for topic in topics for right in ("READ", "WRITE")]
    broker.allow("changing", *rights, ("GROUP", "bellwether-changing", "READ"))
    settings = file_of(broker, tmp_path, user="changing")
    process = learner(broker, tmp_path, settings, "--name", "changing", "--checkpoint-s", "0.3")
    await_line(process, "no checkpoint of")
    await_offset(tmp_path, 100, "changing")
    broker.add_user("changing", WRONG)
    broker.restart()  # connections that are there stay
    line = await_line(process, "does not let user 'changing' in")
    assert "trying again" in line or "asking again" in line
    assert logins_per_s(broker) < 20
    assert process.poll() is None
    broker.add_user("changing", PASSWORD)
    shop = Shop(broker.plain_url, "events")
    shop.written = 100
    shop.write(10)
    shop.log.close()
    await_offset(tmp_path, 110, "changing")
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert status == 0, said
    assert PASSWORD not in said
    assert WRONG not in said


def test_a_server_that_is_turned_away_answers_and_does_not_repeat_itself(broker, tmp_path):
    settings = ("--kafka-config", file_of(broker, tmp_path, WRONG, user="server"), "--warm-up-s", "1")
    weights = ("--weights", str(tmp_path / "weights"))
    with ServerProcess(*weights, "--log", broker.secured_url, *settings) as server:
        assert logins_per_s(broker) < 20
        said = server.stderr()
    complaints = [line for line in said.splitlines() if "does not let user 'server' in" in line]
    assert 1 <= len(complaints) <= 2
    assert len(said.splitlines()) < 15
    assert PASSWORD not in said
    assert WRONG not in said


def test_no_secret_is_in_the_list_of_processes(broker, tmp_path):
    process = learner(broker, tmp_path, file_of(broker, tmp_path))
    try:
        await_line(process, "no checkpoint of", "going on from")
        assert PASSWORD.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = finish(process)
    assert PASSWORD not in said


def test_a_reader_needs_no_right_to_any_group(broker):
    with closing(open_log(broker.secured_url, broker.settings("server", PASSWORD))) as log:
        reader = log.reader("events", {0: 0})
        give_up = time.monotonic() + 20
        while reader.position()[0] < 100 and time.monotonic() < give_up:
            reader.poll(1000, 0.5)
        read = reader.position()[0]
        assert read >= 100
        for _ in range(5):
            assert len(reader.poll(1000, 0.5)) == 0
        reader.close()


def test_the_docs_name_the_rights():
    text = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    for right in (
        "READ` on `events` and `catalog`",
        "WRITE` on `events.dlq` and `events.late`",
        "READ` on the group",
    ):
        assert right in text
