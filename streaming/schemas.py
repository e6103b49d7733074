"""The contracts in proto/*.avsc, and the frames that tell which of them a record was written with.

Two frames, told apart by their first byte; both are always understood:

* Avro single-object encoding: `C3 01`, then the CRC-64-AVRO fingerprint of the writer schema's canonical form,
  little-endian. Written where no registry is named.
* Confluent's: `00`, then the schema id in the registry, big-endian. Written where a registry is named; subjects
  are record names (`bellwether.Event`), kept BACKWARD_TRANSITIVE.

fastavro works row by row here; batches of records are read by `streaming.columns`.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import fastavro
import fastavro.schema

from streaming.log import LogError, LogUnavailable, RecordBatch

Schema = dict[str, Any]

EVENT: Final = "bellwether.Event"
DECISION: Final = "bellwether.Decision"
ITEM: Final = "bellwether.Item"
DEAD_LETTER: Final = "bellwether.DeadLetter"

SINGLE_OBJECT: Final = b"\xc3\x01"  # + 8 bytes of fingerprint
CONFLUENT: Final = b"\x00"  # + 4 bytes of schema id

_PROTO = Path(__file__).resolve().parents[1] / "proto"
_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"
_NO_SUCH_SCHEMA = 40403
MOST_BACKOFF_S: Final = 15.0  # between two questions to a registry that is down
MAX_VECTOR: Final = 256  # numbers in an item's vector, in whatever record or request it comes

logger = logging.getLogger(__name__)

_SAID: Final = 300  # characters of what fastavro says


class SchemaError(LogError):
    """A record or a schema that does not fit the contracts; the message says which and why."""


class RegistryUnavailable(LogUnavailable):
    """The schema registry cannot be asked now. The record may be fine: park it, never dead-letter it."""


class Codec:
    """Encodes and decodes records of the contracts; knows every writer schema met so far. Threads may share one.

    registry: where Confluent's framing gets its ids; None: single-object framing is written, and Confluent
    frames are unknown schemas. schemas: further versions of our contracts that producers write with, known by their
    fingerprints.
    """

    def __init__(
        self,
        registry_url: str | None = None,
        *,
        registry: Registry | None = None,
        schemas: Iterable[Schema] = (),
    ) -> None:
        self._registry = Registry(registry_url) if registry_url else registry
        self._readers: dict[str, Schema] = {}
        self._parsed: dict[bytes, Schema] = {}  # by prefix, as fastavro wants them
        self._writers: dict[bytes, Schema] = {}  # by prefix, as written
        self._prefixes: dict[str, bytes] = {}  # what we write, by record name
        # current schemas lie in proto/ itself; versions that were replaced, in folders below it
        for path in sorted(_PROTO.rglob("*.avsc"), key=lambda path: (len(path.parts), path)):
            schema = json.loads(path.read_text())
            prefix = self._learn(single_object_prefix(schema), schema)
            if path.parent == _PROTO:
                self._readers[full_name(schema)] = schema
                self._prefixes[full_name(schema)] = prefix
        for schema in schemas:
            self._learn(single_object_prefix(schema), schema)
        self._parsed_readers = {name: _parse(schema) for name, schema in self._readers.items()}
        self._registered: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def encode_event(self, event: Mapping[str, Any]) -> bytes:
        """An Event's bytes, frame and all; `event` has the fields of proto/event.avsc, those with defaults optional.

        Raises: SchemaError naming what does not fit; RegistryUnavailable, before the first success only.
        """
        return self.encode(EVENT, event)

    def encode_decision(self, decision: Mapping[str, Any]) -> bytes:
        """A Decision's bytes; as `encode_event`."""
        return self.encode(DECISION, decision)

    def encode_item(self, item: Mapping[str, Any]) -> bytes:
        """An Item's bytes; as `encode_event`."""
        return self.encode(ITEM, item)

    def encode(self, name: str, record: Mapping[str, Any]) -> bytes:
        """A record's bytes by the full name of its schema: its frame, and its body."""
        return self.frame(name) + self.body(name, record)

    def body(self, name: str, record: Mapping[str, Any]) -> bytes:
        """What comes after the frame; no registry is asked. Raises: SchemaError naming what does not fit."""
        out = io.BytesIO()
        try:
            fastavro.schemaless_writer(out, self._parsed_readers[name], record, strict_allow_default=True)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            said = str(error)  # with all of the record, which may be long
            said = said if len(said) <= _SAID else said[:_SAID] + " ..."
            raise SchemaError(f"no {name}: {said}; its fields are in proto/") from None
        return out.getvalue()

    def decode(self, data: bytes) -> tuple[str, dict[str, Any]]:
        """The record's schema (full name, ours) and its fields by our newest version of that schema.

        Timestamps are int, ms. Raises: SchemaError for bytes that are no such record, RegistryUnavailable.
        """
        prefix = prefix_of(data)
        writer = self.resolve(prefix) if prefix else None
        if prefix is None or writer is None:
            raise SchemaError(f"frame {data[:10].hex(' ')} names no schema of ours")
        name = ours(writer)
        assert name is not None  # resolve returns none but ours
        source = io.BytesIO(data)
        source.seek(len(prefix))
        try:
            record = fastavro.schemaless_reader(source, self._parsed[prefix], self._parsed_readers[name])
        except Exception as error:  # fastavro raises whatever its C code met
            raise SchemaError(f"no {name}: {type(error).__name__} {error}") from error
        if source.tell() != len(data):
            raise SchemaError(f"no {name}: {len(data) - source.tell()} bytes too many")
        assert isinstance(record, dict)
        return name, record

    def reader_schemas(self) -> Mapping[str, Schema]:
        """Our newest version of each contract, by full name."""
        return self._readers

    def writer_schemas(self) -> Mapping[bytes, Schema]:
        """Every writer schema known so far, by the frame that names it (10 bytes, or Confluent's 5)."""
        return dict(self._writers)

    def resolve(self, prefix: bytes) -> Schema | None:
        """The writer schema that a frame names; None when it is none of ours. An unknown id is asked for once.

        Raises: RegistryUnavailable when the registry cannot be asked now.
        """
        known = self._writers.get(prefix)
        if (
            known is not None
            or self._registry is None
            or not prefix.startswith(CONFLUENT)
            or len(prefix) != 5
        ):
            return known
        with self._lock:
            schema = self._registry.schema(int.from_bytes(prefix[1:], "big"))
            if schema is None or ours(schema) is None:
                return None
            self._learn(prefix, schema)
            return schema

    def register(self) -> None:
        """Ask for the ids of everything that we write, now rather than with the first record.

        Raises: RegistryUnavailable; SchemaError when the registry refuses a schema.
        """
        for name in (EVENT, DECISION, ITEM):
            self.frame(name)

    def frame(self, name: str) -> bytes:
        """What stands before each record of this schema. Dead letters' is always that of single-object encoding.

        Raises: RegistryUnavailable and SchemaError, as `register`; before the first success only.
        """
        if self._registry is None or name == DEAD_LETTER:
            return self._prefixes[name]
        if name not in self._registered:
            with self._lock:
                schema = self._readers[name]
                number = self._registry.id_of(name, schema)
                self._registered[name] = self._learn(CONFLUENT + number.to_bytes(4, "big"), schema)
        return self._registered[name]

    def _learn(self, prefix: bytes, schema: Schema) -> bytes:
        self._parsed[prefix] = _parse(schema)
        self._writers[prefix] = schema  # last: whoever sees it here may decode with it
        return prefix


class Registry:
    """A client of Confluent's schema registry protocol, as much as `Codec` needs.

    url: http(s), with `user:password@` for basic authentication; several, comma-separated, are tried in turn.
    headers: sent with every request (bearer tokens, ...); `read_headers` reads them from a file.
    clock: monotonic seconds. After a failure nothing is asked for `backoff_s`, twice as long after each further
    one up to MOST_BACKOFF_S, and a single attempt is made then: a registry that is down costs a poll loop little.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 3.0,
        attempts: int = 3,
        backoff_s: float = 1.0,
        forget_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._urls = [_split_user(part.strip().rstrip("/")) for part in url.split(",")]
        if not all(bare.startswith(("http://", "https://")) for bare, _ in self._urls):
            raise SchemaError(f"{self._urls[0][0]!r} is no schema registry; use http://host:8081")
        self._headers = {"Accept": _CONTENT_TYPE, "Content-Type": _CONTENT_TYPE, **(headers or {})}
        self._timeout_s, self._attempts, self._backoff_s, self._forget_s = (
            timeout_s,
            attempts,
            backoff_s,
            forget_s,
        )
        self._clock = clock
        self._down_until = float("-inf")
        self._failures = 0  # in a row
        self._unknown: dict[int, float] = {}  # id → when to ask again

    def schema(self, number: int) -> Schema | None:
        """The schema with this id; None when the registry has no such Avro record (remembered for `forget_s`).

        Raises: RegistryUnavailable when it gives no definite answer.
        """
        if self._clock() < self._unknown.get(number, float("-inf")):
            return None
        status, answer = self._ask("GET", f"/schemas/ids/{number}")
        if status != 200 and answer.get("error_code") != _NO_SUCH_SCHEMA:
            # a wrong password, or a proxy's 404: says nothing about the record
            raise RegistryUnavailable(f"schema id {number}: HTTP {status} {answer.get('message', '')}")
        schema = _readable(answer) if status == 200 else None
        if schema is None:
            logger.warning("the registry has no Avro record schema with id %d", number)
            self._forget(number)
        return schema

    def id_of(self, subject: str, schema: Schema) -> int:
        """The schema's id under this subject; it is registered, BACKWARD_TRANSITIVE, where it is not yet there.

        Raises: SchemaError when the registry refuses it: as incompatible, or for lack of rights;
        RegistryUnavailable.
        """
        path = f"/subjects/{urllib.parse.quote(subject, safe='')}"
        body = {"schema": json.dumps(schema)}
        status, answer = self._ask("POST", path, body)
        if status == 404:
            # before the first version, so that no version is ever in without the check
            config = f"/config/{urllib.parse.quote(subject, safe='')}"
            code, said = self._ask("PUT", config, {"compatibility": "BACKWARD_TRANSITIVE"})
            if code != 200:
                logger.warning("registry keeps its own compatibility for %s: %s %s", subject, code, said)
            status, answer = self._ask("POST", path + "/versions", body)
        if status != 200 or "id" not in answer:
            said = answer.get("message", "")
            raise SchemaError(f"registry refuses subject {subject}: HTTP {status} {said}")
        return int(answer["id"])

    def _forget(self, number: int) -> None:
        if len(self._unknown) >= 10_000:  # garbage that looks like ids must not fill the memory
            self._unknown.clear()
        self._unknown[number] = self._clock() + self._forget_s

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of the answer, from the first registry that gives a definite one."""
        if self._clock() < self._down_until:
            raise RegistryUnavailable(f"schema registry {self._urls[0][0]} failed a moment ago; retry")
        trouble = ""
        for attempt in range(1 if self._failures else self._attempts):
            if attempt:
                time.sleep(0.1 * 2**attempt)
            for url, user in self._urls:
                try:
                    status, answer = self._once(method, url + path, user, body)
                except (OSError, ValueError) as error:
                    trouble = f"{url}: {error}"
                    continue
                if status < 500 and status != 429:
                    self._failures = 0
                    return status, answer
                trouble = f"{url}: HTTP {status} {answer.get('message', '')}"
        self._down_until = self._clock() + min(self._backoff_s * 2**self._failures, MOST_BACKOFF_S)
        self._failures = min(self._failures + 1, 30)
        raise RegistryUnavailable(f"schema registry cannot be asked: {trouble}")

    def _once(
        self, method: str, url: str, user: str | None, body: Mapping[str, Any] | None
    ) -> tuple[int, dict[str, Any]]:
        headers = dict(self._headers)
        if user is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _json_or_text(error.read())


def read_headers(path: str | Path) -> dict[str, str]:
    """HTTP headers from a file of `Name: value` lines, so that secrets stay off the command line.

    Raises: SchemaError naming the line that is none (not its content, which may be secret).
    """
    headers = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        name, colon, value = line.partition(":")
        if line.strip() and not (colon and name.strip()):
            raise SchemaError(f"{path}:{number} is no header; write `Name: value`")
        if line.strip():
            headers[name.strip()] = value.strip()
    return headers


def read_schemas(folder: str | Path) -> list[Schema]:
    """The schemas in a folder's .avsc files, each a version of one of our contracts.

    Raises: SchemaError naming the file that is none; OSError.
    """
    paths = sorted(Path(folder).glob("*.avsc"))
    if not paths:
        raise SchemaError(f"{folder} holds no .avsc file")
    schemas = []
    for path in paths:
        try:
            schema = json.loads(path.read_text())
            known = isinstance(schema, dict) and ours(schema) is not None
            if known:
                _parse(schema)
        except (ValueError, fastavro.schema.SchemaParseException, fastavro.schema.UnknownType) as error:
            raise SchemaError(f"{path} is no Avro schema: {error}") from error
        if not known:
            raise SchemaError(f"{path} is no version of Event, Decision or Item")
        schemas.append(schema)
    return schemas


def single_object_prefix(schema: Schema) -> bytes:
    """The 10 bytes before a record in Avro single-object encoding.

    >>> single_object_prefix({"type": "record", "name": "R", "fields": []}).hex()[:4]
    'c301'
    """
    canonical = fastavro.schema.to_parsing_canonical_form(schema)
    return SINGLE_OBJECT + bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))


def prefix_of(data: bytes) -> bytes | None:
    """The frame at the start of a record: 10 bytes (single-object) or 5 (Confluent's); None when there is neither."""
    if data.startswith(SINGLE_OBJECT) and len(data) >= 10:
        return data[:10]
    return data[:5] if data.startswith(CONFLUENT) and len(data) >= 5 else None


def frame_of(batch: RecordBatch, row: int) -> bytes | None:
    """The frame of one record of a batch; None when it has none."""
    start, end = batch.bounds[row], batch.bounds[row + 1]
    return prefix_of(batch.data[start : min(start + 10, end)].tobytes())


def full_name(schema: Schema) -> str:
    """Namespace and name of a record schema."""
    name, namespace = schema.get("name", ""), schema.get("namespace", "")
    return name if "." in name or not namespace else f"{namespace}.{name}"


def ours(schema: Schema) -> str | None:
    """The contract that a writer schema is a version of, by its unqualified name as Avro resolves it; None: none.

    >>> ours({"type": "record", "name": "Event", "namespace": "com.example.shop", "fields": []})
    'bellwether.Event'
    """
    short = full_name(schema).rpartition(".")[2]
    known = {name.rpartition(".")[2]: name for name in (EVENT, DECISION, ITEM, DEAD_LETTER)}
    return known.get(short) if schema.get("type") == "record" else None


def _parse(schema: Schema) -> Schema:
    # logical types are left out: fastavro would make datetimes of our milliseconds
    parsed = fastavro.parse_schema(_plain(schema))
    assert isinstance(parsed, dict)  # a record's schema stays a dict
    return parsed


def _plain(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_plain(part) for part in schema]
    if isinstance(schema, dict):
        return {k: v if k == "default" else _plain(v) for k, v in schema.items() if k != "logicalType"}
    return schema


def _split_user(url: str) -> tuple[str, str | None]:
    """URL without its user:password, which must not reach a log line, and those two."""
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    return urllib.parse.urlunsplit(parts._replace(netloc=host)), urllib.parse.unquote(user) if at else None


def _readable(answer: Mapping[str, Any]) -> Schema | None:
    """The record schema in a registry's answer; None when it is no Avro, no record, or needs other subjects."""
    try:
        schema = json.loads(answer["schema"])
        if answer.get("schemaType", "AVRO") != "AVRO" or not isinstance(schema, dict):
            return None
        _parse(schema)
    except (KeyError, ValueError, fastavro.schema.SchemaParseException, fastavro.schema.UnknownType):
        return None
    return schema


def _json_or_text(body: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {"message": body[:200].decode(errors="replace")}
    return answer if isinstance(answer, dict) else {"message": str(answer)}
