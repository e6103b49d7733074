"""The command lines' manners: one line and status 2 for what is wrong; flags made from dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest

from streaming.commandline import Parser, add_config, add_log, build, codec_from, log_from, run
from streaming.log import LogUnavailable
from streaming.schemas import Codec, RegistryUnavailable


@dataclass(frozen=True)
class Fishing:
    """How to fish."""

    depth_m: float = field(default=3.0, metadata={"help": "depth of the hook; metres, > 0, 100 % at most"})
    bait: Literal["worm", "fly"] = field(default="worm", metadata={"help": "what is on it"})
    patience_s: int | None = field(default=None, metadata={"help": "give up after; seconds"})
    lakes: tuple[str, ...] = field(default=(), metadata={"help": "where"})
    release: bool = field(default=True, metadata={"help": "put them back"})
    tags: Mapping[str, str] = field(default_factory=dict, metadata={"help": "labels"})
    weights: list[float] = field(
        default_factory=list, metadata={"help": "w", "parse": lambda s: [float(x) for x in s.split("+")]}
    )
    hidden: int = 7

    def __post_init__(self) -> None:
        if not self.depth_m > 0:
            raise ValueError(f"depth_m must be > 0, not {self.depth_m}")


def parser() -> Parser:
    made = Parser(prog="fish")
    add_config(made, Fishing)
    return made


def read(*args: str) -> Fishing:
    return build(Fishing, parser().parse_args(args))


def complaint(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as exit:
        read(*args)
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_with_no_flags_the_dataclass_decides() -> None:
    assert read() == Fishing()


def test_every_supported_type_is_read() -> None:
    args = (
        "--depth-m 2 --bait fly --patience-s 5 --lakes a,b --no-release --tags a=1 --tags b=c=d --weights 1+2"
    )
    assert read(*args.split()) == Fishing(
        2.0, "fly", 5, ("a", "b"), False, {"a": "1", "b": "c=d"}, [1.0, 2.0]
    )


def test_the_word_none_gives_none() -> None:
    assert read("--patience-s", "none").patience_s is None


def test_what_the_caller_gives_wins_over_the_command_line() -> None:
    assert build(Fishing, parser().parse_args(["--depth-m", "2"]), depth_m=9.0, hidden=1) == Fishing(
        9.0, hidden=1
    )


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["--dept-m", "2"], "did you mean '--depth-m'?"),
        (["--bait", "flie"], "did you mean 'fly'?"),
        (["--depth-m", "-1"], "depth_m must be > 0, not -1.0"),
        (["--depth-m", "deep"], "could not convert string to float: 'deep'"),
        (["--patience-s", "1.5"], "invalid literal for int()"),
        (["--tags", "alone"], "--tags needs KEY=VALUE; what was given has no ="),
        (["--depth", "2"], "--depth-m"),  # abbreviations are refused
        (["pond"], "no such argument pond"),
        (["--hidden", "8"], "no such flag --hidden"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_status_2(
    args: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint in complaint(capsys, *args)


def test_a_wrong_flag_behind_a_subcommand_is_compared_with_that_commands_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    top = Parser(prog="pond")
    add_config(top.add_subparsers(dest="command", required=True).add_parser("fish"), Fishing)
    with pytest.raises(SystemExit):
        top.parse_args(["fish", "--bate", "fly"])
    assert capsys.readouterr().err == "pond fish: no such flag --bate; did you mean '--bait'?\n"


def test_help_names_unit_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        read("--help")
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert "How to fish" in said
    assert "metres, > 0, 100 % at most [3.0]" in " ".join(said.split())


@pytest.mark.parametrize("url", ["redis://here", "kafka:/here:9092", "sqlite:log.db"])
def test_a_url_that_names_no_log_is_a_wrong_command_line(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Parser(prog="fish")
    add_log(made)
    with pytest.raises(SystemExit) as exit:
        log_from(made.parse_args(["--log", url]))
    assert exit.value.code == 2
    assert "sqlite:///path.db" in capsys.readouterr().err


def test_kafka_settings_are_collected() -> None:
    made = Parser(prog="fish")
    add_log(made)
    read = made.parse_args(["--kafka", "client.id=a", "--kafka", "linger.ms=2"])
    assert read.kafka == {"client.id": "a", "linger.ms": "2"}


def test_a_registry_is_asked_for_by_flag() -> None:
    made = Parser(prog="fish")
    add_log(made)
    assert codec_from(made.parse_args([])).decode(Codec().encode_item({"item_id": "a"}))[1]["item_id"] == "a"
    with pytest.raises(RegistryUnavailable):
        codec_from(made.parse_args(["--registry", "http://127.0.0.1:9"])).register()


def test_a_log_that_cannot_be_reached_is_one_line_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise LogUnavailable("no broker at nowhere:9092")

    assert run(body) == 1
    assert capsys.readouterr().err.endswith(": no broker at nowhere:9092\n")


@pytest.mark.parametrize("started_as", ["/opt/bin/fish", "/opt/fish/__main__.py"])
def test_a_file_that_is_not_there_is_told_by_the_command_in_words(
    started_as: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [started_as])
    assert run(lambda: open("/nowhere/lake.txt").close()) == 1
    assert capsys.readouterr().err == "fish: /nowhere/lake.txt: No such file or directory\n"
