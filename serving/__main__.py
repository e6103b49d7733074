"""`serving --weights URL [--log URL] [--port N] ...`: the policy server."""

from __future__ import annotations

import logging
import secrets
import signal
import sys
import threading
import time
from collections.abc import Sequence

from serving.processes import Launch, run_many, run_one
from serving.server import ServingConfig
from serving.view import ViewConfig
from streaming.commandline import (
    Parser,
    add_config,
    add_log,
    build,
    kafka_options,
    log_from,
    registry_from,
    run,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status: 0 after a drain that lost nothing."""
    parser = Parser(
        prog="serving",
        description="Answers Recommend with ε-greedy slates from the newest weights, and writes each decision to "
        "the log. SIGTERM drains. Without --log no decisions are written, and histories must come with the requests.",
    )
    add_config(parser, ServingConfig)
    add_log(parser, default=None)
    add_config(parser, ViewConfig)
    namespace = parser.parse_args(arguments)
    launch = Launch(
        build(ServingConfig, namespace),
        build(ViewConfig, namespace),
        namespace.log,
        kafka_options(namespace),
        registry_from(namespace),
        namespace.registry_headers,
        namespace.schemas,
        _now_ms,
        _new_name,
    )
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    serve = run_one if launch.config.processes == 1 else run_many

    def body() -> int:
        if launch.log_url is not None:
            log_from(namespace).close()  # what is wrong with it is one line, before any process starts
        return serve(launch, stop)

    return run(body)


def _now_ms() -> int:
    return int(time.time() * 1000)


def _new_name() -> str:
    return secrets.token_hex(6)


if __name__ == "__main__":
    from serving import __main__ as importable  # what travels to children must be found by name

    sys.exit(importable.main())
