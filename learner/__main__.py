"""`learner --topic events [--log URL] [--data-dir DIR] [--weights URL] ...` learns; `learner audit` looks into what."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from learner.agent_settings import AgentSettings
from learner.audit import Audit, AuditConfig, NothingToAudit
from learner.audit_explain import Explainer
from learner.audit_report import as_json, as_text
from learner.catalog_feed import CatalogFeed
from learner.checkpoint import CheckpointDamaged, CheckpointFailed, Checkpoints, CheckpointWriter, Loaded
from learner.evaluate import evaluate
from learner.evaluate_report import as_json as evaluation_json
from learner.evaluate_report import as_text as evaluation_text
from learner.evaluation import EvaluateConfig, NothingToEvaluate
from learner.fence import Fenced
from learner.intake import Arrivals, Source
from learner.learner import CannotContinue, Learner, LearnerSettings
from learner.metrics import Metrics
from learner.misplaced import Misplaced
from learner.policy import PolicyDamaged
from learner.prequential import Prequential
from learner.progress import ProgressLine
from learner.publishing import WeightPublisher
from learner.replay import ReplayError
from learner.train import TrainConfig, Trainer, claim, offsets_to_start, open_checkpoints
from learner.warm_up import warm_up
from learner.watch import LogWatch
from learner.weights import WeightsError, WeightStore
from streaming.chunks import Chunker
from streaming.commandline import Parser, add_config, add_log, build, codec_from, log_from, run
from streaming.dead_letters import DeadLetters, dlq_topic, late_topic
from streaming.heap import keep_giving_back
from streaming.join_settings import JoinSettings
from streaming.log import Log, LogUnavailable, Reader, UnknownTopic
from streaming.rewards import RewardTable
from streaming.schemas import Codec

AWAIT_S = 1.0  # between two looks for a topic that is not there
LOOK_S = 2.0  # between two looks at how much the log holds
logger = logging.getLogger("learner")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status: 0 after a last checkpoint, or a clean audit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["audit"]:
        return _audit(arguments[1:])
    if arguments[:1] == ["evaluate"]:
        return _evaluate(arguments[1:])
    parser = Parser(
        prog="learner",
        description="Learns from the events in a log, for ever: a double DQN that publishes its weights "
        "every --publish-s seconds. "
        "SIGTERM or Ctrl-C ends it after a last checkpoint; started again, it goes on as if nothing had happened. "
        "`learner audit` says which events trained which weights, and whether any was lost or counted twice; "
        "`learner evaluate` what other policies would have earned.",
    )
    add_config(parser, TrainConfig)
    _add_rewards(parser)
    add_log(parser)
    add_config(parser, LearnerSettings)
    add_config(parser, AgentSettings)
    add_config(parser, JoinSettings, omit=("gamma", "history_length"))
    namespace = parser.parse_args(arguments)
    config = build(TrainConfig, namespace)
    settings, agent = build(LearnerSettings, namespace), build(AgentSettings, namespace)
    rewards = _rewards(parser, namespace)
    join = build(JoinSettings, namespace, rewards=rewards, gamma=agent.gamma, history_length=agent.entries)
    _check_device(parser, config.device)
    if config.prequential is not None:
        _make_room(parser, Path(config.prequential))
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return run(lambda: _guarded(lambda: _train(config, settings, agent, join, namespace, stop)))


def _audit(arguments: Sequence[str]) -> int:
    """`learner audit`: 0 where all is as the log says, 1 where it is not, or where nothing can be said."""
    parser = Parser(
        prog="learner audit",
        description="Reads the log again up to where the newest checkpoint has read it, joins it by plain code, and "
        "compares: was a decision lost, doubled, or wrongly rewarded? Only reads, also while the learner runs. "
        "Exit status: 0 clean; 1 differences, or nothing to audit.",
    )
    add_config(parser, AuditConfig)
    parser.add_argument("--json", action="store_true", help="write all of it to stdout as JSON")
    add_log(parser)
    namespace = parser.parse_args(arguments)
    config = build(AuditConfig, namespace)

    def body() -> int:
        with contextlib.closing(log_from(namespace)) as log:
            try:
                if config.explain is not None:
                    return _explain(
                        Explainer(log, codec_from(namespace), config), config.explain, namespace.json
                    )
                report = Audit(log, codec_from(namespace), config).run()
            except (NothingToAudit, CheckpointDamaged, ReplayError) as error:
                print(f"learner audit: {error}", file=sys.stderr)
                return 1
        print(json.dumps(as_json(report), indent=1) if namespace.json else as_text(report))
        return 0 if report.clean else 1

    return run(body)


def _explain(explainer: Explainer, what: str, json_wanted: bool) -> int:
    found = explainer.explain(what)
    if json_wanted:
        print(json.dumps([each.as_json() for each in found], indent=1))
    else:
        print("\n".join(each.as_text() for each in found))
    return 0 if all(each.as_it_should_be for each in found) else 1


def _evaluate(arguments: Sequence[str]) -> int:
    """`learner evaluate`: 0, or 1 where nothing can be said."""
    parser = Parser(
        prog="learner evaluate",
        description="Estimates from the decisions in the log, and from what they earned, what other policies would "
        "have earned in their place: IPS, SNIPS, DM, DR, SNDR and switch-DR, with 95 % intervals over users. Only "
        "reads, also while the learner runs. Exit status: 0; 1 where nothing can be said.",
    )
    add_config(parser, EvaluateConfig)
    parser.add_argument("--json", action="store_true", help="write all of it to stdout as JSON")
    _add_rewards(parser)
    add_log(parser)
    add_config(parser, JoinSettings, omit=("gamma", "horizon", "history_length"))
    namespace = parser.parse_args(arguments)
    config = build(EvaluateConfig, namespace)
    join = build(JoinSettings, namespace, rewards=_rewards(parser, namespace))

    def body() -> int:
        with contextlib.closing(log_from(namespace)) as log:
            try:
                report = evaluate(log, codec_from(namespace), config, join)
            except (NothingToEvaluate, PolicyDamaged, WeightsError) as error:
                print(f"learner evaluate: {error}", file=sys.stderr)
                return 1
        print(json.dumps(evaluation_json(report), indent=1) if namespace.json else evaluation_text(report))
        return 0

    return run(body)


def _add_rewards(parser: Parser) -> None:
    parser.add_argument(
        "--rewards",
        metavar="TABLE",
        help="what each event earns: name=weight[+value_weight*value],...; others earn nothing "
        f"[{_shown(RewardTable())}]",
    )


def _rewards(parser: Parser, namespace: Namespace) -> RewardTable:
    try:
        return RewardTable.parse(namespace.rewards) if namespace.rewards else RewardTable()
    except ValueError as error:
        parser.error(str(error))


def _make_room(parser: Parser, report: Path) -> None:
    """Make sure, before anything is read for it, that this report can be written."""
    try:
        if report.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(report))
        report.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=report.parent):
            pass
    except OSError as error:
        parser.error(f"--prequential: no report can be written there: {error}")


def _check_device(parser: Parser, name: str) -> None:
    """Make sure, before anything is read for it, that there is such a device."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("is neither cpu nor cuda nor cuda:N")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a PyTorch without CUDA
        parser.error(f"--device {name}: {str(error).splitlines()[0]}")


def _guarded(body: Callable[[], None]) -> int:
    """0, or 1 and one line about what an operator can act on."""
    try:
        body()
    except (CannotContinue, CheckpointDamaged, CheckpointFailed, Fenced, ReplayError, WeightsError) as error:
        print(f"learner: {error}", file=sys.stderr)
        return 1
    return 0


def _train(
    config: TrainConfig,
    settings: LearnerSettings,
    agent: AgentSettings,
    join: JoinSettings,
    namespace: Namespace,
    stop: threading.Event,
) -> None:
    torch.set_num_threads(config.threads)
    keep_giving_back()
    with ExitStack() as closing:
        log, codec = log_from(namespace), codec_from(namespace)
        closing.callback(log.close)
        if not _await_topic(log, config, stop):
            return
        # before the name is claimed: a second start by mistake, which finds the port taken, must not stop the first
        metrics = Metrics()
        metrics.serve(config.metrics_port)
        warm_up(settings, agent, join)
        if stop.is_set():
            return
        topic_id = log.identity(config.topic)  # before anything else is asked of it
        watch = LogWatch(log, config.topic, config.catalog_topic, group_of(config), LOOK_S)
        closing.callback(watch.close)

        def resume(loaded: Loaded | None) -> _Resumed:
            learner = Learner(settings, agent, join, codec, lambda: len(watch.bounds), config.device)
            return _resume(config, learner, loaded, watch, topic_id)

        # before the name is claimed, too: what cannot go on from the checkpoint must not stop a learner that does
        checkpoints = open_checkpoints(config)
        resumed = checkpoints.read(resume)
        if stop.is_set():
            return
        store = claim(config, f"{socket.gethostname()}, pid {os.getpid()}", checkpoints)
        if checkpoints.overtaken():  # by the learner that went on until now
            del resumed  # there may be no room for two
            resumed = checkpoints.read(resume)
        trainer = _prepared(
            config, resumed, log, codec, watch, checkpoints, store, metrics, topic_id, closing, stop
        )
        if stop.is_set():  # nothing was read of the topic yet
            return
        with _reported(config.prequential, resumed, join):
            line = ProgressLine(sys.stderr, trainer.totals)
            trainer.run(stop, line.tell)
            line.end()


def _await_topic(log: Log, config: TrainConfig, stop: threading.Event) -> bool:
    """Make sure that the topics for dead letters are there, and wait for the one to read; False: stopped before."""
    told = False
    while not log.partitions(config.topic):
        if config.until_caught_up:
            raise UnknownTopic(
                f"there is no topic {config.topic!r} in {log.url}; create it with `streaming topics`"
            )
        if not told:
            logger.info("waiting for topic %r in %s; `streaming topics` creates it", config.topic, log.url)
        told = True
        if stop.wait(AWAIT_S):
            return False
    for topic in (dlq_topic(config.topic), late_topic(config.topic)):
        if not log.partitions(topic):
            log.create_topic(topic, 1)
    return True


class _Resumed(NamedTuple):
    """A learner that can go on where a checkpoint ends, or begin; nothing was written or claimed for it yet."""

    learner: Learner
    loaded: Loaded | None
    since: int  # see Trainer
    offsets: dict[int, int]  # to read from


def _resume(
    config: TrainConfig, learner: Learner, loaded: Loaded | None, watch: LogWatch, topic_id: str
) -> _Resumed:
    """The learner, which is new, as it was when the checkpoint was written.

    Raises: CannotContinue, ReplayError: checkpoint, log and flags do not fit.
    """
    # asked now: the learner that wrote the checkpoint may have read on since we looked last
    offsets = offsets_to_start(config, None if loaded is None else loaded.meta, watch.ask(), topic_id)
    return _Resumed(learner, loaded, 0 if loaded is None else learner.restore(loaded.parts), offsets)


def _prepared(
    config: TrainConfig,
    resumed: _Resumed,
    log: Log,
    codec: Codec,
    watch: LogWatch,
    checkpoints: Checkpoints,
    store: WeightStore,
    metrics: Metrics,
    topic_id: str,
    closing: ExitStack,
    stop: threading.Event,
) -> Trainer:
    """A trainer for what has resumed, and all that it works with. Where `stop` came meanwhile, it knows a part of the
    catalog only, and must not run."""
    learner, loaded, since, offsets = resumed
    saved = None if loaded is None else loaded.meta
    _show_progress(log, config, offsets)
    learner.assign(offsets)
    logger.info("%s", _beginning(config, loaded))
    if learner.joiner.settings.late_after_s > learner.joiner.settings.dedup_window_s:
        logger.warning(
            "--late-after-s is above --dedup-window-s: a record put back after that would count twice"
        )
    producer = log.producer()
    closing.callback(producer.close)
    letters = DeadLetters(producer, codec, config.topic)
    misplaced = Misplaced(log, config.topic, codec, lambda: len(watch.bounds), time.monotonic)
    closing.callback(misplaced.close)
    catalog = CatalogFeed(log, config.catalog_topic, learner.catalog)
    closing.callback(catalog.close)
    catalog.catch_up(stop.is_set)
    # of the partitions that it reads: there may be more by now
    until = {p: watch.bounds[p].high for p in offsets} if config.until_caught_up else None
    reader = log.reader(config.topic, offsets, identity=topic_id)
    closing.callback(reader.close)
    source = _source(config, reader, until, 0 if saved is None else int(saved["turn"]))
    writer, publisher = (
        CheckpointWriter(checkpoints),
        WeightPublisher(store, learner.vocabulary, time.monotonic),
    )
    closing.callback(writer.close)
    closing.callback(publisher.close)
    return Trainer(
        config,
        learner,
        source,
        until=until,
        watch=watch,
        catalog=catalog,
        letters=letters,
        misplaced=misplaced,
        checkpoints=writer,
        publisher=publisher,
        metrics=metrics,
        clock=time.monotonic,
        now_ms=lambda: int(time.time() * 1000),
        since=since,
        topic_id=topic_id,
        live=() if saved is None else saved["live"],
    )


@contextlib.contextmanager
def _reported(path: str | None, resumed: _Resumed, join: JoinSettings) -> Iterator[None]:
    """What the learner takes in meanwhile is ranked, and the report of it written, however that ends; None: neither."""
    if path is None:
        yield
        return
    prequential = Prequential(resumed.learner.vocabulary, join.rewards)
    resumed.learner.observe = prequential.observe
    if resumed.loaded is not None:
        logger.info("%s will cover what comes from now on, not what the checkpoint has seen", path)
    try:
        yield
    finally:
        prequential.write(path)
        if not len(prequential.ranked().number):
            logger.warning("%s covers 0 steps: nothing came that could be ranked", path)


def _show_progress(log: Log, config: TrainConfig, offsets: Mapping[int, int]) -> None:
    """Commit where we begin, so that a right that is missing is said now, and not at the first checkpoint."""
    with contextlib.suppress(
        LogUnavailable
    ):  # the group's coordinator is made only when it is first asked for
        log.commit(group_of(config), config.topic, offsets)


def group_of(config: TrainConfig) -> str:
    """The consumer group that shows how far this learner is."""
    return f"bellwether-{config.name}"


def _source(config: TrainConfig, reader: Reader, until: Mapping[int, int] | None, turn: int) -> Source:
    if config.deterministic:
        return Chunker(reader, config.chunk, until, turn)
    return Arrivals(reader, config.poll_records)


def _beginning(config: TrainConfig, loaded: Loaded | None) -> str:
    if loaded is None:
        return f"no checkpoint of {config.name!r} in {config.data_dir}: beginning with the {config.start} records"
    return (
        f"going on from checkpoint {loaded.generation}: {loaded.meta['transitions']:,} transitions, "
        f"{loaded.meta['updates']:,} updates"
    )


def _shown(table: RewardTable) -> str:
    return ",".join(f"{name}={reward.weight:g}" for name, reward in table.rewards.items())


if __name__ == "__main__":
    sys.exit(main())
