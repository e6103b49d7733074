"""The command lines' common manners: flags made from a frozen dataclass, and one line when something is wrong.

A config is a frozen dataclass whose fields carry `metadata={"help": "what it is; unit, range"}`:

>>> from dataclasses import dataclass, field
>>> @dataclass(frozen=True)
... class Settings:
...     '''Fishing'''
...     depth_m: float = field(default=3.0, metadata={"help": "how deep the hook hangs; metres, > 0"})
...     def __post_init__(self) -> None:
...         if not self.depth_m > 0:
...             raise ValueError(f"depth_m must be > 0, not {self.depth_m}")
>>> parser = Parser(prog="fish")
>>> add_config(parser, Settings)
>>> build(Settings, parser.parse_args(["--depth-m", "5"]))
Settings(depth_m=5.0)
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import os
import shutil
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from streaming.kafka_settings import REGISTRY_URL, SHOWN, is_secret, read_settings
from streaming.log import Log, LogError, open_log
from streaming.schemas import Codec, Registry, read_headers, read_schemas

T = TypeVar("T")

logger = logging.getLogger(__name__)

DEFAULT_LOG = "sqlite:///.bellwether/log.db"


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong command line with exit status 2 and one line.

    The line names what was wrong and the nearest valid choice. Abbreviated flags are refused, so that a new
    flag never changes what an old script means. Sub-parsers made with `add_subparsers` behave alike.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """Print `prog: message` on one line of stderr and exit with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, but strict: what is not known is an error here, where the known flags are at hand."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            flags = [name for name in self._option_string_actions if name.startswith("--")]
            self.error(
                f"no such {'flag' if flag.startswith('-') else 'argument'} {flag}; {nearest(flag, flags)}"
            )
        return parsed, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = action.metavar or "/".join(action.option_strings) or action.dest
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                None, f"{what}: no such choice {value!r}; {nearest(str(value), choices)}"
            )


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint for somebody who wrote `word` and meant one of `choices`.

    >>> nearest("tial", ["topics", "tail"])
    "did you mean 'tail'?"
    >>> nearest("x", ["topics", "tail"])
    'one of topics, tail'
    """
    choices = list(choices)
    best = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {best[0]!r}?" if best else f"one of {', '.join(choices)}"


def add_config(
    parser: argparse.ArgumentParser,
    config: type[Any],
    *,
    omit: Collection[str] = (),
    title: str | None = None,
) -> None:
    """Give `parser` a flag for each field of the dataclass that carries a help line: `depth_m` → `--depth-m`.

    Types: int, float, str, bool (`--x / --no-x`), Literal, `X | None` (the word `none` gives None),
    `tuple[X, ...]` (comma-separated), Mapping[str, str] (repeatable key=value). Other types bring their own
    reader as metadata["parse"]; metadata["metavar"] names the value in the help.
    omit: fields that get no flag here. title: of the flags' group in the help; None: the docstring's first line.

    Raises: TypeError for a field whose type cannot be read from a command line.
    """
    lines = (config.__doc__ or "").strip().splitlines()
    group = parser.add_argument_group(title or (lines[0].rstrip(".") if lines else config.__name__))
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        if "help" in field.metadata and field.name not in omit:
            _add_flag(group, field, hints[field.name])
    parser.set_defaults(_parser=parser)


def build(config: type[T], namespace: argparse.Namespace, **given: Any) -> T:
    """The config with what the command line said; `given` wins over it, defaults fill the rest.

    A value that `__post_init__` refuses (ValueError) ends the program as any wrong command line does.
    """
    read = vars(namespace)
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    values = {name: value for name, value in read.items() if name in names} | given
    try:
        return config(**values)
    except ValueError as error:
        parser = read.get("_parser")
        if isinstance(parser, argparse.ArgumentParser):
            parser.error(str(error))
        raise


def add_log(parser: argparse.ArgumentParser, default: str | None = DEFAULT_LOG) -> None:
    """Add the flags that `log_from` and `codec_from` read. default None: no log unless it is named."""
    group = parser.add_argument_group("The log")
    shown = "none" if default is None else default
    group.add_argument(
        "--log",
        metavar="URL",
        default=default,
        help=f"kafka://host:9092 or sqlite:///path.db (four slashes: an absolute path) [{shown}]",
    )
    group.add_argument(
        "--kafka",
        metavar="KEY=VALUE",
        action=_Pairs,
        default={},
        help="any librdkafka setting, passed untouched; repeatable. Secrets belong into --kafka-config: "
        "whoever may list processes sees this line",
    )
    group.add_argument(
        "--kafka-config",
        metavar="FILE",
        action=_Settings,
        default={},
        help="librdkafka settings as `key=value` lines, # begins a comment; --kafka wins over it. Also "
        f"{REGISTRY_URL}, for --registry [none]",
    )
    group.add_argument(
        "--registry",
        metavar="URL",
        help="schema registry, http(s)://[user:password@]host:8081; records then carry Confluent's framing [none]",
    )
    group.add_argument(
        "--schemas",
        metavar="DIR",
        help="folder of .avsc files: other versions of Event, Decision or Item that producers write, known by their "
        "fingerprints; no registry is needed for them [none]",
    )
    group.add_argument(
        "--registry-headers",
        metavar="FILE",
        help="`Name: value` lines sent with every request to the registry",
    )
    parser.set_defaults(_parser=parser)


def log_from(namespace: argparse.Namespace) -> Log:
    """The log that `--log` and `--kafka` name. A URL that is none ends the program as a wrong command line."""
    for key in filter(is_secret, namespace.kafka):
        logger.warning(
            "--kafka %s=%s can be seen by whoever lists processes; use --kafka-config FILE", key, SHOWN
        )
    try:
        return open_log(namespace.log, kafka_options(namespace))
    except LogError as error:
        parser = namespace._parser
        if isinstance(parser, argparse.ArgumentParser) and not namespace.log.startswith(
            ("kafka://", "sqlite://")
        ):
            parser.error(str(error))
        raise


def kafka_options(namespace: argparse.Namespace) -> dict[str, str]:
    """librdkafka's settings, from the file and from the command line."""
    options = {**namespace.kafka_config, **namespace.kafka}
    options.pop(REGISTRY_URL, None)
    return options


def registry_from(namespace: argparse.Namespace) -> str | None:
    """The schema registry's URL; None: there is none."""
    url: str | None = namespace.registry or namespace.kafka_config.get(REGISTRY_URL)
    return url


def codec_from(namespace: argparse.Namespace) -> Codec:
    """The codec that `--registry` (or the file of `--kafka-config`), `--registry-headers` and `--schemas` ask for."""
    return codec_of(registry_from(namespace), namespace.registry_headers, namespace.schemas)


def codec_of(registry: str | None, headers_file: str | None, schemas_folder: str | None) -> Codec:
    """A codec with this registry (URL), which is sent the headers in this file, and with the schemas in this folder."""
    schemas = read_schemas(schemas_folder) if schemas_folder else []
    if registry is None:
        return Codec(schemas=schemas)
    headers = read_headers(headers_file) if headers_file else None
    return Codec(registry=Registry(registry, headers=headers), schemas=schemas)


def run(command: Callable[[], int | None]) -> int:
    """Run a program's body; returns its exit status. What an operator can act on is one line, not a traceback.

    LogError and OSError give 1, Ctrl-C gives 130, a reader that went away (`| head`) gives 0.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # else the interpreter complains once more when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (LogError, OSError) as error:
        print(f"{_program()}: {_in_words(error)}", file=sys.stderr)
        return 1


def _program() -> str:
    """The command's name, also where it was started as `python -m NAME`."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.stem


def _in_words(error: Exception) -> str:
    """What is wrong, without the number that the system has for it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, 110) - 2
        super().__init__(prog, max_help_position=34, width=width)


class _Pairs(argparse.Action):
    """Collects repeated KEY=VALUE into a dict; a later one wins."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        key, eq, value = str(values).partition("=")
        if not (key and eq):  # the text is not shown: it may be a secret with a slip in it
            parser.error(f"{option_string} needs KEY=VALUE; what was given has {'no key' if eq else 'no ='}")
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), key: value})


class _Settings(argparse.Action):
    """Reads a properties file into a dict."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            setattr(namespace, self.dest, read_settings(str(values)))
        except (OSError, ValueError) as error:
            parser.error(f"{option_string}: {error}")


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], hint: Any) -> None:
    text = field.metadata["help"].replace("%", "%%")
    shown = _shown_default(field).replace("%", "%%")
    flag = "--" + field.name.replace("_", "-")
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": f"{text}{shown}"}
    parse = field.metadata.get("parse")
    if parse is None and hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        return
    if parse is None and get_origin(hint) in _MAPPINGS:
        group.add_argument(flag, action=_Pairs, metavar="KEY=VALUE", **options)
        return
    reader, choices, metavar = (
        (parse, None, field.name.rpartition("_")[2].upper()) if parse else _reader(hint)
    )
    options["required"] = (
        field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    options["metavar"] = field.metadata.get("metavar", metavar)
    group.add_argument(flag, type=_named(reader), choices=choices, **options)


_MAPPINGS = (dict, Mapping)


def _reader(hint: Any) -> tuple[Callable[[str], Any], list[Any] | None, str | None]:
    """How to read a value of this type: reader, choices, name of the value in the help."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in (int, float, str):
        return hint, None, {int: "N", float: "X", str: "TEXT"}[hint]
    if origin is Literal:
        return type(args[0]), list(args), None
    if origin in (Union, types.UnionType) and len(args) == 2 and type(None) in args:
        inner, choices, metavar = _reader(args[0] if args[1] is type(None) else args[1])
        return (
            lambda text: None if text == "none" else inner(text),
            [*choices, None] if choices else None,
            metavar,
        )
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        inner, _, metavar = _reader(args[0])
        return lambda text: tuple(inner(part) for part in text.split(",") if part), None, f"{metavar},..."
    raise TypeError(f"no flag can be made for a field of type {hint}; give it metadata['parse']")


def _named(reader: Callable[[str], Any]) -> Callable[[str], Any]:
    """`reader`, whose ValueError becomes argparse's one line with the reason."""

    def read(text: str) -> Any:
        try:
            return reader(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _shown_default(field: dataclasses.Field[Any]) -> str:
    if "shown" in field.metadata:
        return f" [{field.metadata['shown']}]"
    if field.default is dataclasses.MISSING or field.default == "":
        return ""
    value = field.default
    if value is None:
        return " [none]"
    if isinstance(value, bool):
        return " [yes]" if value else " [no]"
    return f" [{','.join(map(str, value)) if isinstance(value, tuple) else value}]"
