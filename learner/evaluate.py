"""`learner evaluate`: what other policies would have earned, told from the decisions in a log.

Reads the log twice, up to where it ended at the start, and lets `learner.evaluation` judge what is in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from learner.catalog_feed import CatalogFeed
from learner.evaluate_report import Report
from learner.evaluation import EvaluateConfig, Evaluation, padded
from learner.policy import Candidate, Policy, use_threads
from learner.target_policies import Learned, Popularity, Target, Uniform
from learner.weights import WeightsMissing, WeightStore
from streaming.catalog import Catalog
from streaming.chunks import concatenate, rows, split
from streaming.decoder import Decoder
from streaming.interning import Vocabulary
from streaming.join_settings import JoinSettings
from streaming.log import Bounds, Log, LogUnavailable, OffsetOutOfRange, RecordBatch
from streaming.rewards import RewardTable
from streaming.schemas import Codec

POLL_RECORDS: Final = 5000
# The reward model learns once a batch: it must not be ignorant for thousands of records.
FIRST_RECORDS: Final = 64
POLL_S: Final = 1.0
QUIET_S: Final = (
    60.0  # of silence, before the end: longer than a reader of ours takes to find out that it has stalled
)
TRIES: Final = 5  # to read a log whose beginning retention takes meanwhile


def evaluate(
    log: Log,
    codec: Codec,
    config: EvaluateConfig,
    join: JoinSettings,
    clock: Callable[[], float] = time.monotonic,
) -> Report:
    """Judge policies by what the log holds now. join: the learner's settings, its reward table included.

    Raises: NothingToEvaluate; WeightsError, PolicyDamaged; LogError.
    """
    use_threads(config.threads)
    began = clock()
    for attempt in range(TRIES):
        try:
            report = _evaluate(log, codec, config, join)
        except OffsetOutOfRange:  # between the two readings retention has taken the beginning
            if attempt == TRIES - 1:
                raise
            continue
        report.took_s = clock() - began
        return report
    raise AssertionError("unreachable")


def _evaluate(log: Log, codec: Codec, config: EvaluateConfig, join: JoinSettings) -> Report:
    bounds, identity = log.bounds(config.topic), log.identity(config.topic)
    vocabulary = Vocabulary()
    catalog = read_catalog(log, codec, config.catalog_topic, vocabulary)
    versions = load_policies(config, vocabulary)
    decoder = Decoder(codec, vocabulary)
    evaluation = Evaluation(config, join, {p: bound.low for p, bound in bounds.items()})
    for batch in read(log, config.topic, bounds, identity):
        evaluation.join(decoder.decode(batch))
    evaluation.joined(targets_of(config, versions, vocabulary, catalog), vocabulary, catalog)
    for batch in read(log, config.topic, bounds, identity):
        evaluation.judge(decoder.decode(batch), partial(candidates_of, codec, batch))
    return evaluation.report()


def read(log: Log, topic: str, bounds: Mapping[int, Bounds], identity: str) -> Iterator[RecordBatch]:
    """All records within the bounds; the partitions advance side by side, and batches grow as more was read.

    Raises: OffsetOutOfRange, TopicReplaced; LogUnavailable, also where what is within the bounds does not come: what a
    part of a log says is no estimate of the whole.
    """
    left = {p: bound.high for p, bound in bounds.items() if bound.low < bound.high}
    if not left:
        return
    reader = log.reader(topic, {p: bounds[p].low for p in left}, identity=identity)
    size, quiet_s = FIRST_RECORDS, 0.0
    try:
        while left:
            if quiet_s >= QUIET_S:
                at = ", ".join(f"{p} at {reader.position()[p]} of {high}" for p, high in sorted(left.items()))
                raise LogUnavailable(
                    f"the end of topic {topic!r} could not be read: nothing came in {QUIET_S:.0f} s (partition {at}); "
                    "is the log up?"
                )
            batch = reader.poll(min(size, POLL_RECORDS), POLL_S)
            size = min(2 * size, POLL_RECORDS)
            quiet_s = 0.0 if len(batch) else quiet_s + POLL_S
            runs = [rows(run, 0, int(np.searchsorted(run.offset, left.get(p, 0)))) for p, run in split(batch)]
            if sum(map(len, runs)):
                yield concatenate(runs)
            done = [p for p, at in reader.position().items() if p in left and at >= left[p]]
            reader.pause(done)
            left = {p: high for p, high in left.items() if p not in done}
    finally:
        reader.close()


def read_catalog(log: Log, codec: Codec, topic: str, vocabulary: Vocabulary) -> Catalog:
    """The catalog as it stands; empty where there is no such topic. Its items get ids."""
    catalog = Catalog(codec, vocabulary)
    feed = CatalogFeed(log, topic, catalog)
    try:
        feed.catch_up()
    finally:
        feed.close()
    return catalog


def candidates_of(codec: Codec, batch: RecordBatch, row: int) -> list[Candidate]:
    """Those that the decision in this row was made among."""
    _, decision = codec.decode(batch.value(row) or b"")
    return [Candidate(**candidate) for candidate in decision["candidates"]]


class Version(NamedTuple):
    """One version of the weights, to be judged."""

    policy: Policy
    read_to: Mapping[int, int]  # partition -> offset: what its learner had read lies before


def load_policies(config: EvaluateConfig, vocabulary: Vocabulary) -> dict[str, Version]:
    """The versions asked for, by name; their items get ids. Raises: WeightsError, PolicyDamaged."""
    wanted = [name for name in config.policies if name.startswith("weights")]
    versions: dict[str, Version] = {}
    if not wanted:
        return versions
    store = WeightStore(config.weights)
    for name in wanted:
        number = name.partition(":")[2]
        version = int(number) if number else store.latest(config.label)
        if version is None:
            raise WeightsMissing(
                f"{store.url} has no version labelled {config.label!r}; name another store by --weights, or leave "
                "`weights` out of --policies"
            )
        weights = store.load(version)
        policy = Policy.from_weights(weights, config.network)
        policy.check()
        versions[f"weights:{version}"] = Version(policy, weights.manifest.positions)
        vocabulary.intern_all(weights.vocabulary)
    return versions


def targets_of(
    config: EvaluateConfig,
    versions: Mapping[str, Version],
    vocabulary: Vocabulary,
    catalog: Catalog,
) -> list[Target]:
    """The policies asked for, but logging. vocabulary: complete."""
    targets: list[Target] = []
    if "uniform" in config.policies:
        targets.append(Uniform())
    if "popularity" in config.policies:
        # a server counts deeds by the default rewards, whatever the learner's are
        targets.append(Popularity(vocabulary, RewardTable(), config.popularity_half_life, config.epsilon))
    known = padded(catalog.known | catalog.gone, len(vocabulary) + 1)
    for name, (policy, read_to) in versions.items():
        targets.append(Learned(name, policy, vocabulary, known, config.epsilon, read_to))
    return targets
