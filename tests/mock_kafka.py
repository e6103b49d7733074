"""librdkafka's own mock of a Kafka cluster, which answers requests with the errors it is told: a fault rig, no broker.

with MockKafka() as cluster:
    cluster.create_topic("events", 3)
    cluster.fail(FETCH, NOT_LEADER, NOT_LEADER)  # the next two such requests

It keeps no more than 5 MiB of a partition, and shows records of aborted transactions.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final

import confluent_kafka

# requests, as Kafka's protocol numbers them
PRODUCE: Final = 0
FETCH: Final = 1
LIST_OFFSETS: Final = 2
METADATA: Final = 3
_PRODUCER: Final = 0


class MockKafka:
    """A cluster of so many brokers in this process while its `with` block lasts."""

    def __init__(self, brokers: int = 3) -> None:
        self._brokers = brokers
        self._library = _library()

    def __enter__(self) -> MockKafka:
        reason = ctypes.create_string_buffer(512)
        configuration = self._library.rd_kafka_conf_new()
        self._client = self._library.rd_kafka_new(_PRODUCER, configuration, reason, len(reason))
        assert self._client, reason.value
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._client, self._brokers)
        servers = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        self.url = f"kafka://{servers}"
        return self

    def __exit__(self, *exception: object) -> None:
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)

    def create_topic(self, topic: str, partitions: int) -> None:
        """On all brokers."""
        made = self._library.rd_kafka_mock_topic_create(
            self._cluster, topic.encode(), partitions, self._brokers
        )
        assert made == 0, made

    def fail(self, request: int, *errors: int) -> None:
        """Answer the next requests of this kind with these errors, one each."""
        given = (ctypes.c_int * len(errors))(*errors)
        self._library.rd_kafka_mock_push_request_errors_array(self._cluster, request, len(errors), given)

    def lead(self, topic: str, partition: int, broker: int) -> None:
        """Make this broker (1, 2, ...) the leader of a partition."""
        self._library.rd_kafka_mock_partition_set_leader(self._cluster, topic.encode(), partition, broker)

    def down(self, broker: int, is_down: bool = True) -> None:
        """Take a broker away, or bring it back."""
        name = "rd_kafka_mock_broker_set_down" if is_down else "rd_kafka_mock_broker_set_up"
        getattr(self._library, name)(self._cluster, broker)


def _library() -> Any:
    """librdkafka as confluent_kafka's wheel brings it."""
    folder = Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs"
    library = ctypes.CDLL(str(next(folder.glob("librdkafka*.so*"))))
    pointers = ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new")
    for name in pointers:
        getattr(library, name).restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    library.rd_kafka_new.argtypes = [number, pointer, text, ctypes.c_size_t]
    library.rd_kafka_destroy.argtypes = [pointer]
    library.rd_kafka_mock_cluster_new.argtypes = [pointer, number]
    library.rd_kafka_mock_cluster_destroy.argtypes = [pointer]
    library.rd_kafka_mock_cluster_bootstraps.argtypes = [pointer]
    library.rd_kafka_mock_topic_create.argtypes = [pointer, text, number, number]
    library.rd_kafka_mock_partition_set_leader.argtypes = [pointer, text, number, number]
    library.rd_kafka_mock_broker_set_down.argtypes = [pointer, number]
    library.rd_kafka_mock_broker_set_up.argtypes = [pointer, number]
    library.rd_kafka_mock_push_request_errors_array.argtypes = [
        *(pointer, ctypes.c_int16, ctypes.c_size_t, ctypes.POINTER(ctypes.c_int)),
    ]
    return library
