"""quixstreams reads a topic of Avro records and hands each to a trivial function; prints records a second.

    PYTHON benchmarks/peers/quixstreams_drain.py BOOTSTRAP TOPIC SCHEMA.json RECORDS

Run by `benchmarks.ingest --quixstreams PYTHON`, a Python that has quixstreams and fastavro; it knows nothing of ours.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from quixstreams import Application  # type: ignore[import-not-found]
from quixstreams.models.serializers.avro import AvroDeserializer  # type: ignore[import-not-found]


def main(bootstrap: str, topic: str, schema: str, records: str) -> None:
    """Read so many records; the clock starts at the first."""
    application = Application(
        broker_address=bootstrap,
        consumer_group=f"quixstreams-{time.monotonic_ns()}",
        auto_offset_reset="earliest",
        loglevel="ERROR",
    )
    read = AvroDeserializer(json.loads(Path(schema).read_text()))
    seen: list[float] = []

    def count(record: dict[str, Any]) -> None:
        if len(seen) < 2:
            seen.append(time.perf_counter())
        seen[-1] = time.perf_counter()

    frame = application.dataframe(application.topic(topic, value_deserializer=read))
    frame.update(count)
    application.run(count=int(records), timeout=30, collect=False)
    print(int(records) / (seen[-1] - seen[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
