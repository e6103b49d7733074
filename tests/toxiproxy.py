"""A bad network between clients and a server: Shopify's toxiproxy, in a process of its own.

with Toxiproxy(listen=port, upstream=broker.upstream) as proxy:
    with proxy.toxic("latency", latency=300): ...
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.kafka_broker import free_ports

INSTALL = "go install github.com/Shopify/toxiproxy/v2/cmd/server@latest"


class ToxiproxyMissing(Exception):
    """No toxiproxy can be run here; the message says how to get it."""


def program(path: str | None = None) -> str:
    """The command; path: where it is, None: `toxiproxy-server` on the PATH. Raises: ToxiproxyMissing."""
    found = shutil.which(path or "toxiproxy-server")
    if found is None:
        raise ToxiproxyMissing(
            f"no {path or 'toxiproxy-server'} command; `{INSTALL}` makes it, under the name `server`"
        )
    return found


class Toxiproxy:
    """Passes on what comes to 127.0.0.1:`listen`, both ways, until it is told to do worse."""

    def __init__(self, listen: int, upstream: str, path: str | None = None) -> None:
        self._program = program(path)
        self._listen, self._upstream = listen, upstream

    def __enter__(self) -> Toxiproxy:
        (port,) = free_ports(1)
        self._api = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [self._program, "-port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._await()
            proxy = {
                "name": "it",
                "listen": f"127.0.0.1:{self._listen}",
                "upstream": self._upstream,
                "enabled": True,
            }
            self._call("POST", "/proxies", proxy)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()

    @contextmanager
    def toxic(
        self, kind: str, stream: str = "downstream", toxicity: float = 1.0, **attributes: int
    ) -> Iterator[None]:
        """Make it so for as long as the block lasts. stream: downstream, to the client; upstream, to the server."""
        body = {
            "name": kind,
            "type": kind,
            "stream": stream,
            "toxicity": toxicity,
            "attributes": attributes,
        }
        self._call("POST", "/proxies/it/toxics", body)
        try:
            yield
        finally:
            self._call("DELETE", f"/proxies/it/toxics/{kind}")

    def _await(self, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self._call("GET", "/version")
            except urllib.error.URLError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _call(self, method: str, path: str, body: Any = None) -> None:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._api + path, data, {"Content-Type": "application/json", "User-Agent": "tests"}, method=method
        )
        with urllib.request.urlopen(request, timeout=30):
            pass
