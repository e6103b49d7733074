"""Publishes weights beside the training: one version in flight, the training never waits for the store."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from learner.weights import Manifest, Meta, Tensors, WeightStore
from streaming.interning import Vocabulary


class PublishFailed(Exception):
    """A version could not be published; the one before is still served, and the next try may succeed."""


class WeightPublisher:
    """`start` with tensors that nobody changes any more, then ask `finished`; one thread calls both."""

    def __init__(self, store: WeightStore, vocabulary: Vocabulary, clock: Callable[[], float]) -> None:
        """clock: monotonic seconds."""
        self._store = store
        self._vocabulary = vocabulary
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, "publish")
        self._running: Future[Manifest] | None = None
        self._began_s = 0.0
        self.took_s = 0.0  # by the last one that succeeded
        self.worked_s = 0.0  # CPU time of the last one
        self.version = 0  # published last; 0: none yet

    @property
    def busy(self) -> bool:
        """A version is being published, or its outcome has not been asked for yet."""
        return self._running is not None

    def start(self, tensors: Tensors, meta: Meta) -> None:
        """Begin. Raises: RuntimeError while busy."""
        if self._running is not None:
            raise RuntimeError("a version is still being published; ask `finished` first")
        self._began_s = self._clock()
        self._running = self._pool.submit(self._publish, tensors, meta)

    def _publish(self, tensors: Tensors, meta: Meta) -> Manifest:
        began_s = time.thread_time()
        try:
            return self._store.publish(tensors, meta, self._vocabulary)
        finally:
            self.worked_s = time.thread_time() - began_s

    def finished(self, timeout_s: float = 0.0) -> Manifest | None:
        """The version that has become visible since last asked; None while there is none.

        Raises: PublishFailed where a retry may help; Fenced and WeightsError as `WeightStore.publish` does.
        """
        running = self._running
        if running is None or not wait([running], timeout_s).done:
            return None
        self._running = None
        try:
            manifest = running.result()
        except OSError as error:
            raise PublishFailed(f"weights were not published to {self._store.url}: {error}") from error
        self.took_s = self._clock() - self._began_s
        self.version = manifest.version
        return manifest

    def close(self) -> None:
        """Wait for the one in flight."""
        self._pool.shutdown(wait=True)
