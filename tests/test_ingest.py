"""What the ingest benchmark writes: one topic, and the peer's own after it, where there is a peer."""

from __future__ import annotations

import pytest

from benchmarks.ingest import FRAME_BYTES, PLAIN, TOPIC, write
from streaming.log import Bounds


class Paper:
    """A log and its producer in one, which keeps what was sent, in order."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes, bytes]] = []

    def create_topic(self, topic: str, partitions: int) -> None:
        pass

    def producer(self) -> Paper:
        return self

    def send(self, topic: str, key: bytes, value: bytes) -> None:
        self.sent.append((topic, key, value))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def bounds(self, topic: str) -> dict[int, Bounds]:
        return {0: Bounds(0, sum(of == topic for of, _, _ in self.sent))}


def test_without_a_peer_nothing_is_written_but_what_is_read() -> None:
    paper = Paper()
    there = write(paper, 300, 20, 30)
    assert there >= 300
    assert [topic for topic, _, _ in paper.sent] == [TOPIC] * there


def test_a_peer_reads_the_same_records_written_afterwards() -> None:
    paper = Paper()
    there = write(paper, 3000, 20, 30, plain=True)
    assert [topic for topic, _, _ in paper.sent] == [TOPIC] * there + [PLAIN] * there
    ours, plain = paper.sent[:there], paper.sent[there:]
    assert [key for _, key, _ in ours] == [key for _, key, _ in plain]
    same = [a[FRAME_BYTES:] == b[1:] for (_, _, a), (_, _, b) in zip(ours, plain, strict=True)]
    assert 1 - sum(same) / there == pytest.approx(0.001, abs=0.002)  # those cut off
    assert not all(same)
