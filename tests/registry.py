"""A schema registry over real HTTP, as small as a test needs: ids, subjects, compatibility settings, faults."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeRegistry:
    """Speaks Confluent's REST protocol on 127.0.0.1 while its `with` block lasts."""

    def __init__(self) -> None:
        self.schemas: list[str] = []  # id = index + 1
        self.subjects: dict[str, list[int]] = {}
        self.compatibility: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.failures: list[int] = []  # HTTP statuses to answer next, instead of the truth
        self.away: set[int] = set()  # ids that it cannot tell of now
        self.refuse: str | None = None  # why every new version is refused

    def add(self, schema: dict[str, Any], subject: str = "elsewhere") -> int:
        """Register, as somebody else's producer would; returns the id."""
        text = json.dumps(schema)
        if text not in self.schemas:
            self.schemas.append(text)
        number = self.schemas.index(text) + 1
        self.subjects.setdefault(subject, []).append(number)
        return number

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.failures:
            return self.failures.pop(0), {"message": "as the test wants it"}
        match [method, *path.strip("/").split("/")]:
            case ["GET", "schemas", "ids", number]:
                if int(number) in self.away:
                    return 503, {"message": "as the test wants it"}
                if 0 < int(number) <= len(self.schemas):
                    return 200, {"schema": self.schemas[int(number) - 1]}
                return 404, {"error_code": 40403, "message": "Schema not found"}
            case ["POST", "subjects", subject]:
                if subject not in self.subjects:
                    return 404, {"error_code": 40401, "message": "Subject not found"}
                if body["schema"] in self.schemas:
                    number = self.schemas.index(body["schema"]) + 1
                    if number in self.subjects[subject]:
                        return 200, {"id": number}
                return 404, {"error_code": 40403, "message": "Schema not found"}
            case ["PUT", "config", subject]:
                self.compatibility[subject] = body["compatibility"]
                return 200, body
            case ["POST", "subjects", subject, "versions"]:
                if self.refuse:
                    return 409, {"error_code": 409, "message": self.refuse}
                return 200, {"id": self.add(json.loads(body["schema"]), subject)}
        return 404, {"error_code": 404, "message": "HTTP 404 Not Found"}

    def __enter__(self) -> FakeRegistry:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def respond(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
                registry.requests.append((self.command, self.path))
                registry.headers.append(dict(self.headers))
                status, answer = registry.answer(self.command, self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = respond  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
