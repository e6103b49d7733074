"""librdkafka's settings from a file: read exactly, errors that name the line, and secrets that are shown nowhere."""

from __future__ import annotations

import logging
import subprocess
import sys
from argparse import Namespace
from contextlib import ExitStack

import pytest

from simulator.demo import Loop
from streaming.commandline import Parser, add_log, kafka_options, registry_from
from streaming.kafka_settings import Mask, is_secret, read_settings, write_settings
from streaming.log import LogError, open_log
from streaming.schemas import Codec, RegistryUnavailable

SECRET = "hunter2-hunter2"


def written(tmp_path, text):
    path = tmp_path / "kafka.properties"
    path.write_text(text)
    return path


def test_a_file_is_read_as_javas_are(tmp_path):
    text = """
        # a comment
        ! another
        security.protocol = SASL_SSL
        sasl.username: bell wether
        sasl.password=a=b:c#d\\\\e
        ssl.ca.pem=-----BEGIN\\nMII\\n-----END
        client.id=one,\\
                  two
        empty=
    """
    assert read_settings(written(tmp_path, text)) == {
        "security.protocol": "SASL_SSL",
        "sasl.username": "bell wether",
        "sasl.password": "a=b:c#d\\e",
        "ssl.ca.pem": "-----BEGIN\nMII\n-----END",
        "client.id": "one,two",
        "empty": "",
    }


def test_what_is_written_is_read_and_nobody_else_can(tmp_path):
    settings = {"sasl.password": " \\n#=:\\", "ssl.key.pem": "a\nb\n"}
    settings["sasl.password"] = settings["sasl.password"].strip()
    path = tmp_path / "new"
    write_settings(path, settings)
    assert read_settings(path) == settings
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"sasl.username=x\n\n{SECRET}\n", "line 3 is no `key=value`"),
        (f"sasl.password {SECRET}\n", "line 1 is no `key=value`"),
        (f"sasl.password={SECRET}\nsasl.password={SECRET}\n", "line 2: sasl.password is there twice"),
        (
            f"a=b\nsasl.jaas.config=x password='{SECRET}';",
            "line 2: sasl.jaas.config is for Java's clients only",
        ),
    ],
)
def test_an_error_names_the_line_and_never_the_value(tmp_path, text, wanted):
    with pytest.raises(ValueError, match=wanted) as caught:
        read_settings(written(tmp_path, text))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("module", ["learner", "serving", "simulator", "simulator.demo", "streaming"])
def test_every_command_takes_the_file_and_says_in_one_line_what_is_wrong_with_it(tmp_path, module):
    path = written(tmp_path, f"sasl.password {SECRET}\n")
    arguments = ["topics"] if module == "streaming" else ["--weights", "w"] if module == "serving" else []
    command = [sys.executable, "-m", module, *arguments, "--kafka-config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"--kafka-config: {path} line 1 is no `key=value`" in line


def parsed(*arguments: str) -> Namespace:
    parser = Parser(prog="test")
    add_log(parser)
    return parser.parse_args(arguments)


def test_the_command_line_wins_over_the_file_and_the_registry_may_be_in_it(tmp_path):
    path = written(tmp_path, "client.id=file\nlinger.ms=1\nschema.registry.url=http://me:pw@here:8081\n")
    namespace = parsed("--kafka-config", str(path), "--kafka", "client.id=line")
    assert kafka_options(namespace) == {"client.id": "line", "linger.ms": "1"}
    assert registry_from(namespace) == "http://me:pw@here:8081"
    assert registry_from(parsed("--kafka-config", str(path), "--registry", "http://there")) == "http://there"


def test_a_slip_in_a_secret_on_the_command_line_is_not_repeated(capsys):
    with pytest.raises(SystemExit):
        parsed("--kafka", f"sasl.password:{SECRET}")
    assert SECRET not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("sasl.password", True),
        ("ssl.key.password", True),
        ("ssl.keystore.password", True),
        ("sasl.oauthbearer.client.secret", True),
        ("sasl.oauthbearer.config", True),
        ("basic.auth.user.info", True),
        ("ssl.key.pem", True),
        ("ssl.key.location", False),
        ("ssl.certificate.pem", False),
        ("sasl.username", False),
    ],
)
def test_these_are_secrets(key, secret):
    assert is_secret(key) == secret


def test_a_mask_takes_every_line_of_a_key_and_every_user_of_a_url():
    mask = Mask({"ssl.key.pem": "-----BEGIN KEY-----\nMIIabc\n-----END KEY-----", "sasl.password": SECRET})
    assert mask(f"bad MIIabc, {SECRET}{SECRET}, https://a:b@host/c") == "bad ***, ******, https://***@host/c"


@pytest.mark.parametrize(
    "options",
    [
        {"ssl.key.pem": SECRET, "security.protocol": "SSL"},
        {"ssl.key.pem": "x", "ssl.key.password": SECRET, "sasl.password": SECRET, "security.protocol": "SSL"},
        {"sasl.oauthbearer.config": SECRET, "sasl.mechanism": "nothing", "security.protocol": "SASL_SSL"},
        {"sasl.oauthbearer.method": SECRET, "sasl.password": SECRET},
        {"no.such.secret": SECRET},
    ],
)
def test_no_error_of_a_client_shows_a_secret(options, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(LogError) as caught:
        open_log("kafka://127.0.0.1:1", options).reader("events", {0: 0})
    shown = [str(caught.value), caplog.text, *capfd.readouterr()]
    assert not [text for text in shown if SECRET in text]
    assert caught.value.__cause__ is None


def test_a_url_with_a_password_is_refused_and_not_shown():
    with pytest.raises(LogError, match="--kafka-config") as caught:
        open_log(f"kafka://me:{SECRET}@broker:9092")
    assert SECRET not in str(caught.value)


def test_no_error_about_a_registry_shows_its_password(caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(RegistryUnavailable) as caught:
        Codec(f"http://me:{SECRET}@127.0.0.1:1").resolve(b"\x00\x00\x00\x00\x07")
    assert SECRET not in str(caught.value) + caplog.text
    with pytest.raises(LogError) as refused:
        Codec(f"ftp://me:{SECRET}@127.0.0.1:1")
    assert SECRET not in str(refused.value)


def test_a_secret_on_the_command_line_is_warned_of(tmp_path):
    command = [sys.executable, "-m", "streaming", "tail", "--log", f"sqlite:///{tmp_path}/log.db"]
    done = subprocess.run([*command, "--kafka", f"sasl.password={SECRET}"], capture_output=True, text=True)
    assert "--kafka sasl.password=*** can be seen by whoever lists processes" in done.stderr
    assert SECRET not in done.stderr


def test_the_demo_hands_secrets_on_in_a_file(tmp_path):
    with ExitStack() as closing:
        loop = object.__new__(Loop)
        loop._folder, loop._closing = tmp_path, closing
        loop._namespace = parsed(
            "--kafka", f"sasl.password={SECRET}", "--registry", f"http://me:{SECRET}@here"
        )
        flags = loop._log_settings()
        assert SECRET not in " ".join(flags)
        handed_on = parsed(*flags)
        assert kafka_options(handed_on) == {"sasl.password": SECRET}
        assert registry_from(handed_on) == f"http://me:{SECRET}@here"
    assert list(tmp_path.iterdir()) == []
