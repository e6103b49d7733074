"""A Kafka consumer that gives arrays: librdkafka's own C interface, with no Python object for any record.

confluent-kafka's `consume` makes an object for each record and one more for each field that is asked for, while it
holds the GIL; that takes longer than all that we then do with the record. This calls the very library that
confluent-kafka is linked with (rdkafka.h, whose interface and message struct are public and stable), and copies the
records of a batch in one compiled loop without the GIL (docs/adr/0012-kafka-as-arrays.md).
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from ctypes import c_char_p, c_int, c_int32, c_int64, c_size_t, c_ssize_t, c_void_p
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from confluent_kafka import KafkaError, KafkaException, cimpl
from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending, types

from streaming.jit import jit
from streaming.kafka_errors import translated
from streaming.log import LogError, RecordBatch

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_OFTEN_S: Final = 0.2  # Python's signal handlers do not run while librdkafka waits
_CONSUMER: Final = 1  # rd_kafka_type_t
_LEVELS: Final = (50, 50, 50, 40, 30, 20, 20, 10)  # syslog's → logging's


class _Message(ctypes.Structure):
    """rd_kafka_message_t, as rdkafka.h has it."""

    _fields_ = (
        ("err", c_int),
        ("rkt", c_void_p),
        ("partition", c_int32),
        ("payload", c_void_p),
        ("len", c_size_t),
        ("key", c_void_p),
        ("key_len", c_size_t),
        ("offset", c_int64),
        ("_private", c_void_p),
    )


_ERROR: Final = _Message.err.offset
_PARTITION: Final = _Message.partition.offset
_PAYLOAD: Final = _Message.payload.offset
_LENGTH: Final = _Message.len.offset
_KEY: Final = _Message.key.offset
_KEY_LENGTH: Final = _Message.key_len.offset
_OFFSET: Final = _Message.offset.offset

_HEAR_ERROR = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_char_p, c_void_p)
_HEAR_LOG = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_char_p, c_char_p)


def _library() -> ctypes.CDLL:
    """librdkafka, as confluent-kafka has loaded it: what its module is linked with is found through it."""
    library = ctypes.CDLL(cimpl.__file__)
    for name, result, *arguments in (
        ("conf_new", c_void_p),
        ("conf_set", c_int, c_void_p, c_char_p, c_char_p, c_char_p, c_size_t),
        ("conf_destroy", None, c_void_p),
        ("conf_set_error_cb", None, c_void_p, _HEAR_ERROR),
        ("conf_set_log_cb", None, c_void_p, _HEAR_LOG),
        ("new", c_void_p, c_int, c_void_p, c_char_p, c_size_t),
        ("set_log_queue", c_int, c_void_p, c_void_p),
        ("poll_set_consumer", c_int, c_void_p),
        ("queue_get_consumer", c_void_p, c_void_p),
        ("queue_destroy", None, c_void_p),
        ("consumer_close", c_int, c_void_p),
        ("destroy", None, c_void_p),
        ("topic_partition_list_new", c_void_p, c_int),
        ("topic_partition_list_destroy", None, c_void_p),
        ("topic_partition_list_add", c_void_p, c_void_p, c_char_p, c_int32),
        ("topic_partition_list_set_offset", c_int, c_void_p, c_char_p, c_int32, c_int64),
        ("assign", c_int, c_void_p, c_void_p),
        ("pause_partitions", c_int, c_void_p, c_void_p),
        ("resume_partitions", c_int, c_void_p, c_void_p),
        ("consume_batch_queue", c_ssize_t, c_void_p, c_int, c_void_p, c_size_t),
        ("message_errstr", c_char_p, c_void_p),
        ("message_destroy", None, c_void_p),
        ("message_timestamp", c_int64, c_void_p, c_void_p),
        ("err2str", c_char_p, c_int),
        ("last_error", c_int),
        ("fatal_error", c_int, c_void_p, c_char_p, c_size_t),
    ):
        function = getattr(library, f"rd_kafka_{name}")
        function.restype, function.argtypes = result, arguments
    return library


_LIBRARY: Final = _library()


def _address(name: str) -> int:
    found = ctypes.cast(getattr(_LIBRARY, f"rd_kafka_{name}"), c_void_p).value
    assert found is not None
    return found


# --- the compiled loop -----------------------------------------------------------------------------------

intrinsic: Any = extending.intrinsic


@intrinsic
def _peek(typingctx: Any, address: Any) -> Any:
    """The 64 bits at this address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), codegen


@intrinsic
def _call(typingctx: Any, function: Any, first: Any, second: Any) -> Any:
    """What the C function at this address returns."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word, word]).as_pointer()
        return builder.call(builder.inttoptr(args[0], kind), args[1:])

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def _copy(typingctx: Any, target: Any, source: Any, length: Any) -> Any:
    """memcpy."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(64)
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [byte, byte, word])
        places = [builder.inttoptr(place, byte) for place in args[:2]]
        builder.call(memcpy, [*places, args[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


class _Gathered(NamedTuple):
    """N records, copied; errors are left out."""

    partition: npt.NDArray[np.int32]  # [N]
    offset: Ints  # [N]
    timestamp_ms: Ints  # [N]
    bounds: Ints  # [N + 1] into data
    null: npt.NDArray[np.bool_]  # [N] no value
    key_bounds: Ints  # [N + 1] into keys
    keyless: npt.NDArray[np.bool_]  # [N]


@jit
def _measure(messages: Ints, failed: Ints, out: _Gathered, timestamp_of: int, ignored: Ints) -> int:
    """Fill in all but the bytes; messages that tell of an error move to `failed`, and their number is returned."""
    errors = n = 0
    out.bounds[0] = out.key_bounds[0] = 0
    for message in messages:
        if np.int32(_peek(message + _ERROR)) != 0:
            failed[errors] = message
            errors += 1
            continue
        messages[n] = message
        out.partition[n] = np.int32(_peek(message + _PARTITION))
        out.offset[n] = _peek(message + _OFFSET)
        out.timestamp_ms[n] = _call(timestamp_of, message, ignored.ctypes.data)
        out.null[n] = _peek(message + _PAYLOAD) == 0
        out.keyless[n] = _peek(message + _KEY) == 0
        out.bounds[n + 1] = out.bounds[n] + (0 if out.null[n] else _peek(message + _LENGTH))
        out.key_bounds[n + 1] = out.key_bounds[n] + (0 if out.keyless[n] else _peek(message + _KEY_LENGTH))
        n += 1
    return errors


@jit
def _gather(messages: Ints, out: _Gathered, data: Bytes, keys: Bytes, destroy: int) -> None:
    """Copy values, and keys where there is room for any; then the messages are librdkafka's again."""
    for n in range(len(messages)):
        message = messages[n]
        place, length = data.ctypes.data + out.bounds[n], out.bounds[n + 1] - out.bounds[n]
        _copy(place, _peek(message + _PAYLOAD), length)
        if len(keys):
            place, length = keys.ctypes.data + out.key_bounds[n], out.key_bounds[n + 1] - out.key_bounds[n]
            _copy(place, _peek(message + _KEY), length)
        _call(destroy, message, 0)


# --- the consumer ----------------------------------------------------------------------------------------


class Trouble(NamedTuple):
    """What librdkafka has to tell in the place of a record: an error, or a partition's end."""

    error: KafkaError
    partition: int  # -1: none
    offset: int


class ClientLog(Protocol):
    """Hears librdkafka's log: a `logging.Logger`, or alike."""

    def log(self, level: int, text: str, *arguments: Any) -> None:
        """One line; level: as `logging` has them."""


class ArrayConsumer:
    """Reads partitions that are assigned by hand; owned by one thread. Joins no group, stores no offset.

    Once it is made, what librdkafka refuses is raised as LogError, by what can be done about it.
    """

    def __init__(self, settings: Mapping[str, Any], *, logger: ClientLog) -> None:
        """settings: librdkafka's, and `error_cb`, which is told of errors that belong to no partition, within `take`.

        Raises: KafkaException for a setting that librdkafka refuses.
        """
        plain = dict(settings)
        callbacks = _error_callback(plain.pop("error_cb")), _log_callback(logger)
        self._handle = _made({**plain, "log.queue": "true"}, *callbacks)
        _LIBRARY.rd_kafka_set_log_queue(self._handle, None)
        _LIBRARY.rd_kafka_poll_set_consumer(self._handle)
        self._queue = _LIBRARY.rd_kafka_queue_get_consumer(self._handle)
        self._messages = self._failed = np.zeros(0, np.int64)
        self._ignored = np.zeros(1, np.int64)
        # librdkafka knows the callbacks by their addresses only: they must outlive it
        self._closing = weakref.finalize(self, _close, self._handle, self._queue, callbacks)

    def assign(self, topic: str, offsets: Mapping[int, int]) -> None:
        """Read exactly these partitions from these offsets; what was fetched before is forgotten."""
        self._ask("assign", topic, offsets)

    def pause(self, topic: str, partitions: Iterable[int]) -> None:
        """Give nothing more of these until `resume`; what was fetched of them is fetched again then."""
        self._ask("pause_partitions", topic, dict.fromkeys(partitions, 0))

    def resume(self, topic: str, partitions: Iterable[int]) -> None:
        """Undo `pause`."""
        self._ask("resume_partitions", topic, dict.fromkeys(partitions, 0))

    def close(self) -> None:
        """Let go; harmless twice."""
        self._closing()

    def take(self, most: int, timeout_s: float, *, keys: bool = False) -> tuple[RecordBatch, list[Trouble]]:
        """Up to so many records, waiting at most so long for the first of them, or for trouble."""
        self._check_open()
        deadline = time.monotonic() + timeout_s
        count = self._consume(most, 0.0)
        while not count and (left_s := deadline - time.monotonic()) > 0:
            # it would wait for `most` or the whole timeout; we want the first
            count = self._consume(1, min(left_s, _OFTEN_S))
            if count and most > 1:
                count += self._consume(most - 1, 0.0, count)
        return self._gathered(self._messages[:count], keys)

    def _consume(self, most: int, timeout_s: float, already: int = 0) -> int:
        """More messages, behind those that there are; returns how many came."""
        if len(self._messages) < already + most:
            self._messages = np.concatenate([self._messages[:already], np.zeros(most, np.int64)])
            self._failed = np.zeros(already + most, np.int64)
        place = self._messages[already:].ctypes.data
        count = _LIBRARY.rd_kafka_consume_batch_queue(self._queue, int(1000 * timeout_s), place, most)
        if count < 0:
            raise _refused(_LIBRARY.rd_kafka_last_error())
        return int(count)

    def _gathered(self, messages: Ints, keys: bool) -> tuple[RecordBatch, list[Trouble]]:
        n = len(messages)
        out = _Gathered(
            np.empty(n, np.int32),
            np.empty(n, np.int64),
            np.empty(n, np.int64),
            np.empty(n + 1, np.int64),
            np.empty(n, np.bool_),
            np.empty(n + 1, np.int64),
            np.empty(n, np.bool_),
        )
        errors = _measure(messages, self._failed, out, _TIMESTAMP, self._ignored)
        n -= errors
        data = np.empty(out.bounds[n], np.uint8)
        key_data = np.empty(out.key_bounds[n] if keys else 0, np.uint8)
        _gather(messages[:n], out, data, key_data, _DESTROY)
        records = RecordBatch(
            out.partition[:n],
            out.offset[:n],
            out.timestamp_ms[:n],
            data,
            out.bounds[: n + 1],
            out.null[:n],
            _sliced(key_data, out.key_bounds, out.keyless[:n]) if keys else None,
        )
        return records, [self._trouble(message) for message in self._failed[:errors].tolist()]

    def _trouble(self, message: int) -> Trouble:
        told = _Message.from_address(message)
        error = KafkaError(told.err, _text(_LIBRARY.rd_kafka_message_errstr(message)))
        trouble = Trouble(error, told.partition, told.offset)
        _LIBRARY.rd_kafka_message_destroy(message)
        return trouble

    def _check_open(self) -> None:
        if not self._closing.alive:  # its memory is no longer ours
            raise RuntimeError("this consumer is closed")

    def _ask(self, what: str, topic: str, offsets: Mapping[int, int]) -> None:
        self._check_open()
        library, name = _LIBRARY, topic.encode()
        places = library.rd_kafka_topic_partition_list_new(len(offsets))
        for partition, offset in offsets.items():
            library.rd_kafka_topic_partition_list_add(places, name, partition)
            library.rd_kafka_topic_partition_list_set_offset(places, name, partition, offset)
        code = getattr(library, f"rd_kafka_{what}")(self._handle, places)
        library.rd_kafka_topic_partition_list_destroy(places)
        if code:
            raise _refused(code, topic)


def _made(settings: Mapping[str, Any], hear_error: Any, hear_log: Any) -> int:
    """A consumer's handle. Raises: KafkaException."""
    library, why = _LIBRARY, ctypes.create_string_buffer(512)
    conf = library.rd_kafka_conf_new()
    library.rd_kafka_conf_set_error_cb(conf, hear_error)
    library.rd_kafka_conf_set_log_cb(conf, hear_log)
    refused = any(
        library.rd_kafka_conf_set(conf, name.encode(), str(value).encode(), why, len(why))
        for name, value in settings.items()
    )
    handle: int | None = None if refused else library.rd_kafka_new(_CONSUMER, conf, why, len(why))
    if handle is None:
        library.rd_kafka_conf_destroy(conf)
        raise KafkaException(KafkaError(KafkaError._INVALID_ARG, why.value.decode()))
    return handle


def _error_callback(heard: Callable[[KafkaError], None]) -> Any:
    def hear(handle: int, code: int, reason: bytes | None, opaque: None) -> None:
        if code == KafkaError._FATAL:
            text = ctypes.create_string_buffer(512)
            code = _LIBRARY.rd_kafka_fatal_error(handle, text, len(text))
            heard(KafkaError(code, _text(text.value), True))
        else:
            heard(KafkaError(code, _text(reason)))

    return _HEAR_ERROR(hear)


def _log_callback(logger: ClientLog) -> Any:
    def hear(handle: int, level: int, facility: bytes, text: bytes) -> None:
        logger.log(_LEVELS[level], "%s %s", _text(facility), _text(text))

    return _HEAR_LOG(hear)


def _refused(code: int, topic: str | None = None) -> LogError:
    return translated(KafkaError(code, _text(_LIBRARY.rd_kafka_err2str(code))), topic)


def _close(handle: int, queue: int, callbacks: object) -> None:
    _LIBRARY.rd_kafka_queue_destroy(queue)
    _LIBRARY.rd_kafka_consumer_close(handle)
    _LIBRARY.rd_kafka_destroy(handle)


def _text(text: bytes | None) -> str:
    return (text or b"").decode(errors="replace")


def _sliced(data: Bytes, bounds: Ints, missing: npt.NDArray[np.bool_]) -> list[bytes | None]:
    whole, edges = data.tobytes(), bounds.tolist()
    return [None if gone else whole[edges[i] : edges[i + 1]] for i, gone in enumerate(missing.tolist())]


_TIMESTAMP: Final = _address("message_timestamp")
_DESTROY: Final = _address("message_destroy")
