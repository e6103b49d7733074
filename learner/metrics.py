"""The learner's metrics, all declared here: name, type, unit and how to read it (docs/metrics.md)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from streaming.columns import Reason


class Metrics:
    """One learner's metrics in a registry of their own, served by `serve`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry)

        self.records = counter("learner_records", "Records read from the log.")
        self.dead_letters = counter(
            "learner_dead_letters", "Records that could not be used, by reason.", "reason"
        )
        for reason in Reason:
            if Reason.OK < reason <= Reason.LATE:
                self.dead_letters.labels(reason.name)  # at 0: a series that begins at 1 has not risen
        self.transitions = counter("learner_transitions", "Transitions that entered replay.")
        self.amendments = counter("learner_amendments", "Rewards that came after their transition was made.")
        self.amendments_missed = gauge(
            "learner_amendments_missed",
            "Rewards that came after replay had let go of their transition, since the first start: they are lost.",
        )
        self.updates = counter("learner_updates", "Gradient steps.")
        self.joined = gauge(
            "learner_joiner_events", "The joiner's counts since the first start, by what happened.", "what"
        )
        self.replay_transitions = gauge("learner_replay_transitions", "Transitions in replay now.")
        self.lag = gauge(
            "learner_lag_records", "Records in the log that were not read yet, by partition.", "partition"
        )
        self.parked = gauge(
            "learner_parked_partitions", "Partitions that wait for a schema registry that cannot be asked."
        )
        self.event_time = gauge(
            "learner_events_through_seconds",
            "Newest event time read, seconds since 1970, but for records stamped far ahead of the others.",
        )
        self.loss = gauge("learner_loss", "Loss of the last update; rising for long: divergence.")
        self.mean_q = gauge("learner_mean_q", "Mean Q(s, a) of the last update's actions, reward units.")
        self.q_spread = gauge(
            "learner_q_spread",
            "Standard deviation of Q(s, a) over the last update's actions, reward units; 0 for long: they are dead.",
        )
        self.foretold_scale = gauge(
            "learner_foretold_scale",
            "What log-odds foretold are multiplied with, by what came; near 0: they tell nothing of what is chosen.",
        )
        self.updates_per_transition = gauge(
            "learner_updates_per_transition", "Gradient steps for each transition, since the first start."
        )
        self.updates_left = gauge(
            "learner_updates_left",
            "Gradient steps that the band allows and that were not made yet; growing: too little CPU for training.",
        )
        self.stalled = gauge("learner_stalled", "1 while the pacing band holds this side up.", "side")
        self.catalog_refused = gauge(
            "learner_catalog_refused", "Catalog records that could not be used; see the log."
        )
        self.items = gauge("learner_items", "Items in the vocabulary.")
        self.items_refused = gauge(
            "learner_items_refused",
            "Times that an item was taken for the unknown one, as there were --max-items, since the first start.",
        )
        self.version = gauge("learner_policy_version", "Version of the weights published last.")
        self.publish_seconds = gauge("learner_publish_seconds", "Time that the last publishing took.")
        self.checkpoint_seconds = gauge(
            "learner_checkpoint_seconds", "Time that writing the last checkpoint took."
        )
        self.checkpoint_age = gauge(
            "learner_checkpoint_timestamp_seconds", "Wall clock of the last checkpoint."
        )
        self.checkpoint_failures = counter(
            "learner_checkpoint_failures", "Checkpoints that could not be written."
        )
        self.gaps = counter(
            "learner_gap_offsets",
            "Offsets that retention took before they were read, and that --on-gap let be stepped over.",
            "partition",
        )
        self.log_errors = counter("learner_log_errors", "Polls that failed and were tried again.")

    def serve(self, port: int) -> None:
        """Answer Prometheus on this port, in a thread; 0: don't. Raises: OSError where it is taken."""
        if not port:
            return
        try:
            start_http_server(port, registry=self.registry)
        except OSError as error:
            raise OSError(f"metrics port {port}: {error.strerror}; choose another --metrics-port") from error
