"""The policy server's metrics, all of them: name, type, unit and how to read each. Prometheus scrapes them."""

from __future__ import annotations

import errno
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

REGISTRY: Final = CollectorRegistry()
_LATENCY_BUCKETS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)

REQUESTS = Counter(
    "serving_requests",
    "Calls by rpc and gRPC status code. INVALID_ARGUMENT: the caller's fault; INTERNAL: ours, look at the log.",
    ["rpc", "code"],
    registry=REGISTRY,
)
LATENCY = Histogram(
    "serving_latency_seconds",
    "From the start of a call's handler to its answer, seconds; a whole batch counts once, a stream each answer.",
    ["rpc"],
    buckets=_LATENCY_BUCKETS_S,
    registry=REGISTRY,
)
BATCH_SIZE = Histogram(
    "serving_batch_size",
    "Requests ranked in one go; grows with load. Near 1 at high latency: look for what else takes the CPU.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    registry=REGISTRY,
)
ANSWERS = Counter(
    "serving_answers",
    "Slates given, by what ranked them. POPULARITY rising while weights are published: see serving_weights_refused.",
    ["strategy"],
    registry=REGISTRY,
)
EMPTY_SLATES = Counter(
    "serving_empty_slates",
    "Answers without an item, because none was eligible: an empty catalog, or exclusions that leave nothing.",
    registry=REGISTRY,
)
COVERAGE = Gauge(
    "serving_shown_coverage",
    "Share of the items on offer (or of 10,000, where there are more) among the last 10,000 slots given by learnt "
    "values; falling for long: a few items take it all.",
    registry=REGISTRY,
)
GINI = Gauge(
    "serving_shown_gini",
    "How unequally those slots fell on the items on offer: Gini coefficient, 0 all alike, 1 all on one; rising for "
    "long: popularity feeds on itself.",
    registry=REGISTRY,
)
DECISIONS = Counter(
    "serving_decisions",
    "Decision records by fate: queued (written, unless it is lost later), dropped (the queue was full), lost (queued, "
    "but the log refused it or did not take it in time); of answers dropped or lost nothing will be learnt. unlogged: "
    "the caller asked for none.",
    ["fate"],
    registry=REGISTRY,
)
POLICY_VERSION = Gauge(
    "serving_policy_version",
    "Version of the weights in use; 0: none, popularity is served.",
    registry=REGISTRY,
)
POLICY_PUBLISHED = Gauge(
    "serving_policy_published_timestamp_seconds",
    "When the weights in use were published, unix seconds; time() minus it is their age.",
    registry=REGISTRY,
)
POLICY_EVENTS = Gauge(
    "serving_policy_events_through_timestamp_seconds",
    "Event time of the newest event that the weights in use have seen, unix seconds; while events keep coming, time() "
    "minus it is how long they take to count.",
    registry=REGISTRY,
)
POLICY_ITEMS = Gauge(
    "serving_policy_items",
    "Items that the weights in use can rank.",
    registry=REGISTRY,
)
WEIGHTS_SWAPPED = Counter(
    "serving_weights_swapped",
    "Times that new weights were taken into use.",
    registry=REGISTRY,
)
WEIGHTS_REFUSED = Counter(
    "serving_weights_refused",
    "Times that weights could not be used, by reason: damaged, probe (non-finite answers); store (it, or its label, "
    "cannot be read: tried again, each 5 s at the seldomest).",
    ["reason"],
    registry=REGISTRY,
)
VIEW_RECORDS = Counter(
    "serving_view_records",
    "Records that the server's own view took from the log, by topic.",
    ["topic"],
    registry=REGISTRY,
)
VIEW_BAD_RECORDS = Counter(
    "serving_view_bad_records",
    "Records that the view could not read, by topic; the learner dead-letters them.",
    ["topic"],
    registry=REGISTRY,
)
VIEW_LAG = Gauge(
    "serving_view_lag_records",
    "Records of events that the view has not read yet; near 0 when all is well.",
    registry=REGISTRY,
)
VIEW_FAILURES = Counter(
    "serving_view_failures",
    "Times that the log could not be read, by kind: unavailable (retried), gap (retention took unread records), fault "
    "(a bug, look at the log; the records in hand are passed over).",
    ["kind"],
    registry=REGISTRY,
)
USERS = Gauge(
    "serving_users",
    "Users whose history is remembered.",
    registry=REGISTRY,
)
USERS_FORGOTTEN = Gauge(
    "serving_users_forgotten",
    "Users given up since the start to stay within --max-users, least recently active first.",
    registry=REGISTRY,
)
ITEMS_REFUSED = Gauge(
    "serving_view_items_refused",
    "Times that an item had no room within --max-items: it is the unknown item in histories.",
    registry=REGISTRY,
)


def _at_zero() -> None:
    """Let what alarms are on begin at 0: a series that begins at 1 has not risen."""
    for rpc in ("Recommend", "BatchRecommend", "RecommendStream", "GetPolicy"):
        REQUESTS.labels(rpc, "INTERNAL")
    for strategy in ("LEARNED", "POPULARITY"):
        ANSWERS.labels(strategy)
    for fate in ("queued", "dropped", "lost", "unlogged"):
        DECISIONS.labels(fate)
    for reason in ("damaged", "probe", "store"):
        WEIGHTS_REFUSED.labels(reason)
    for kind in ("unavailable", "gap", "fault"):
        VIEW_FAILURES.labels(kind)


_at_zero()


def expose(port: int, host: str) -> int:
    """Serve the metrics over HTTP from a daemon thread; returns the port, which is chosen freely for port 0.

    Raises: OSError naming the flag to change.
    """
    try:
        server, _ = start_http_server(port, addr=host, registry=REGISTRY)
    except OSError as error:
        flag = "--metrics-port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise OSError(f"metrics port {port} of {host}: {error.strerror}; choose another {flag}") from None
    return int(server.server_port)
