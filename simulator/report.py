"""What a demo found: as numbers for scripts, as words for a terminal, as a picture."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from simulator.figures import (
    Comparison,
    Interval,
    compare,
    mean_interval,
    over_seeds,
    same_visits,
    without_nan,
)
from simulator.freshness import Freshness
from simulator.goods import DAY_MS
from simulator.shop import HOUR_MS, Visits

NAMES: Final = ("random", "popularity", "learned", "oracle")
_POINTS: Final = 24  # of the learning curve
_STARVED: Final = 0.9  # a learner that makes less than this share of its updates has too little CPU
_COLOURS: Final = {"random": "#9a9a9a", "popularity": "#d1801f", "learned": "#1f5fbf", "oracle": "#3c8d4f"}
Json = dict[str, Any]


class Findings(NamedTuple):
    """One run, measured."""

    seed: int
    accounts: Mapping[str, Visits]  # by policy, since the shop opened
    opened_ms: int  # event times: the shop opened,
    exam_ms: int  # exploration ended,
    reached_ms: int  # and the last page
    explored: float  # share of slots drawn at random before the exam
    freshness: Freshness
    recommendations: int
    unanswered: int
    records: int  # in the log when the traffic ended: events and decisions
    learnt_from: int  # of these, as the last weights served said
    transitions: int
    updates: int
    updates_left: int  # that the learner's settings allow besides, and that it had no time for
    policy_version: int
    cpu_s: Mapping[str, float]  # by process
    wall_s: float
    log: str  # URL


def report(found: Findings) -> Json:
    """`report.json` of one run. Raises ValueError when no visit can be compared."""
    end_ms = found.reached_ms - HOUR_MS  # later visits are over only where they were short
    exam = same_visits(found.accounts, found.exam_ms, end_ms)
    if not len(exam["learned"].visit):
        raise ValueError("no visit began and ended in the last stretch; give it more --minutes")
    before = same_visits(found.accounts, found.opened_ms, found.exam_ms)
    compared = compare(exam)
    why = verdict(found.policy_version, found.transitions, compared.gain)
    return {
        "ok": not why,
        "why": why,
        "seeds": [found.seed],
        **_comparison(compared),
        "while_learning": _comparison(compare(before)) | {"epsilon": found.explored},
        "exam": {
            "from_h": _hours(found, found.exam_ms),
            "to_h": _hours(found, end_ms),
            "visits": compared.visits,
            "shoppers": compared.shoppers,
            "epsilon": 0.0,
        },
        "freshness_s": found.freshness._asdict(),
        "transitions": found.transitions,
        "updates": found.updates,
        "updates_left": found.updates_left,
        "policy_version": found.policy_version,
        "records": found.records,
        "learnt_from": found.learnt_from,
        "recommendations": found.recommendations,
        "unanswered": found.unanswered,
        "event_days": (found.reached_ms - found.opened_ms) / DAY_MS,
        "wall_s": found.wall_s,
        "cpu_s": dict(found.cpu_s),
        "log": found.log,
        "curve": curve(found, end_ms),
    }


def summary(runs: Sequence[Json]) -> Json:
    """`report.json` of several seeds: means over seeds with their intervals (Student's t), and every run's own."""
    policies = {}
    for name in NAMES:
        each = [run["policies"][name] for run in runs]
        reward = over_seeds([policy["reward_per_visit"] for policy in each])
        policies[name] = {
            "ctr": float(np.mean([policy["ctr"] for policy in each])),
            "reward_per_visit": reward.mean,
            "ci95": [reward.low, reward.high],
        }
    gain, gap = (over_seeds([run[key] for run in runs]) for key in ("learned_minus_popularity", "gap_closed"))
    failed = [f"seed {run['seeds'][0]}: {run['why']}" for run in runs if not run["ok"]]
    why = "; ".join(failed) or ("" if len(runs) == 1 else _not_better(gain))
    return {
        "ok": not why,
        "why": why,
        "seeds": [run["seeds"][0] for run in runs],
        "policies": policies,
        "learned_minus_popularity": gain.mean,
        "learned_minus_popularity_ci95": [gain.low, gain.high],
        "gap_closed": gap.mean,
        "gap_closed_ci95": [gap.low, gap.high],
        "freshness_s": {
            key: float(np.mean([run["freshness_s"][key] for run in runs])) for key in ("p50", "p99")
        },
        "transitions": sum(run["transitions"] for run in runs),
        "policy_version": min(run["policy_version"] for run in runs),
        "runs": list(runs),
    }


def verdict(policy_version: int, transitions: int, gain: Interval) -> str:
    """What went wrong, in one line; empty where the loop learnt.

    >>> verdict(40, 9000, Interval(1.5, 1.1, 1.9))
    ''
    >>> verdict(40, 9000, Interval(0.2, -0.1, 0.5))
    'learned is not better than popularity: +0.20 reward per visit (-0.10 to +0.50, 95 %)'
    """
    if not policy_version:
        return "no weights ever reached the policy server; see learner.log"
    if not transitions:
        return "the learner made no transition out of the events; see learner.log"
    return _not_better(gain)


def _not_better(gain: Interval) -> str:
    if gain.low > 0:
        return ""
    return f"learned is not better than popularity: {_signed(gain)} reward per visit ({_signed(gain, 'to')}, 95 %)"


def curve(found: Findings, end_ms: int) -> list[Json]:
    """Reward per visit of each policy on the visits that began in each stretch of event time."""
    edges = np.linspace(found.opened_ms, end_ms, _POINTS + 1)
    points = []
    for begin, end in itertools.pairwise(edges.tolist()):
        paired = same_visits(found.accounts, begin, end)
        if len(paired["learned"].visit):
            points.append(
                {"hour": _hours(found, (begin + end) / 2), "visits": len(paired["learned"].visit)}
                | {name: mean_interval(visits)._asdict() for name, visits in paired.items()}
            )
    return points


def write(folder: Path, made: Json) -> None:
    """Write report.json and report.png."""
    (folder / "report.json").write_text(json.dumps(without_nan(made), indent=2) + "\n")
    picture(made, folder / "report.png")


def words(made: Json, folder: Path) -> str:
    """The report as a terminal shows it."""
    several = len(made["seeds"]) > 1
    lines = [_heading(made), "", "                click-through    reward per visit (95 % interval)"]
    for name in NAMES:
        policy = made["policies"][name]
        low, high = policy["ci95"]
        lines.append(
            f"  {name:<12}{100 * policy['ctr']:9.2f} %    {policy['reward_per_visit']:9.2f}   ({low:.2f} to {high:.2f})"
        )
    gain = Interval(made["learned_minus_popularity"], *made["learned_minus_popularity_ci95"])
    low, high = made["gap_closed_ci95"]
    fresh = made["freshness_s"]
    lines += [
        "",
        f"  learned - popularity: {_signed(gain)} reward per visit ({_signed(gain, 'to')}, 95 %)",
        f"  gap closed: {made['gap_closed']:.2f} ({low:.2f} to {high:.2f}) of the way from random to the oracle",
        f"  freshness: from an event to answers by weights that learnt from it: p50 {fresh['p50']:.2f} s, "
        f"p99 {fresh['p99']:.2f} s",
        *([] if several else _counts(made)),
        "",
        "Whether to believe it",
        *_caveats(made),
        "",
        f"{folder}/: report.png, report.json, and the log of each process",
    ]
    return "\n".join(lines)


def _heading(made: Json) -> str:
    if len(made["seeds"]) > 1:
        return f"Seeds {', '.join(map(str, made['seeds']))}: means over seeds of what each run's last stretch earned"
    exam = made["exam"]
    return (
        f"The last {exam['to_h'] - exam['from_h']:.1f} simulated hours: {exam['visits']:,} visits of "
        f"{exam['shoppers']:,} shoppers, the same for every policy"
    )


def _counts(made: Json) -> list[str]:
    cpu = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in made["cpu_s"].items())
    return [
        f"  {made['recommendations']:,} recommendations in {made['event_days']:.2f} simulated days "
        f"({made['unanswered']:,} unanswered), {made['records']:,} records in the log, "
        f"{made['learnt_from']:,} learnt from",
        f"  {made['transitions']:,} transitions, {made['updates']:,} updates, "
        f"policy version {made['policy_version']:,}",
        f"  {made['wall_s']:.0f} s of wall time; CPU: {cpu}",
    ]


def _caveats(made: Json) -> list[str]:
    if len(made["seeds"]) > 1:
        return [
            *_starved(made["runs"]),
            "  - Each seed is another shop with other goods and people, and another training run; intervals are over",
            "    seeds (Student's t), so they cover both. Each seed's own report lies in its folder.",
            "  - The shop is made up (docs/simulator.md): this is evidence about the learner, not about your shop.",
        ]
    learning = made["while_learning"]
    return [
        *_starved([made]),
        "  - All four served the same seeded shop since it opened, each its own copy, to the same shoppers at the same",
        "    times with the same luck; differences are taken visit by visit. Intervals are over shoppers.",
        "  - `learned` answered over gRPC with whatever weights were newest, and had seen none of these visits before.",
        f"    No slot was explored in them; before, {100 * learning['epsilon']:.0f} % were: then it earned "
        f"{learning['policies']['learned']['reward_per_visit']:.2f} a visit, slow start included",
        f"    (popularity {learning['policies']['popularity']['reward_per_visit']:.2f}).",
        "  - The oracle reads the shoppers' minds and plans; no learner could. It is strong, not a proven optimum.",
        "  - This is one training run in one shop; `python -m simulator.demo --seeds 1,2,3` plays several.",
        "  - The shop is made up (docs/simulator.md): this is evidence about the learner, not about your shop.",
    ]


def _starved(runs: Sequence[Json]) -> list[str]:
    """What to know of learners that had too little CPU: where a machine is slow, learning is what gives way."""
    share = min(run["updates"] / max(1, run["updates"] + run["updates_left"]) for run in runs)
    if share >= _STARVED:
        return []
    return [
        f"  - The learner was starved of CPU: it made {100 * share:.0f} % of the updates that its settings allow"
        f"{' (worst seed)' if len(runs) > 1 else ''}. What it",
        "    learnt says as much about this machine as about learning: give it a faster one, or a lower --rate.",
    ]


def picture(made: Json, file: Path) -> None:
    """Draw the learning curve beside the other policies, and the last stretch with its intervals."""
    from matplotlib.figure import Figure

    several = len(made["seeds"]) > 1
    figure = Figure(figsize=(6.5, 4) if several else (11, 4.8), layout="constrained", dpi=130)
    if several:
        last = figure.subplots()
    else:
        over_time, last = figure.subplots(1, 2, width_ratios=(2.6, 1))
        _draw_curve(over_time, made)
    _draw_last(last, made)
    low, high = made["gap_closed_ci95"]
    seeds = f"seed{'s' if several else ''} {', '.join(map(str, made['seeds']))}"
    space = "\n" if several else " "  # the picture of several is narrow
    figure.suptitle(
        f"Bellwether demo, {seeds}:{space}{made['gap_closed']:.2f} of the gap from random to the oracle closed "
        f"({low:.2f} to {high:.2f})",
        fontsize=11,
    )
    figure.savefig(file)


def _draw_curve(axes: Any, made: Json) -> None:
    hours = [point["hour"] for point in made["curve"]]
    for name in NAMES:
        mean = [point[name]["mean"] for point in made["curve"]]
        main = name == "learned"
        axes.plot(hours, mean, color=_COLOURS[name], linewidth=2.2 if main else 1.3, zorder=3 if main else 2)
        if main:
            low, high = ([point[name][side] for point in made["curve"]] for side in ("low", "high"))
            axes.fill_between(hours, low, high, color=_COLOURS[name], alpha=0.18, linewidth=0)
    ends = [float(np.mean([point[name]["mean"] for point in made["curve"][-3:]])) for name in NAMES]
    top = axes.get_ylim()[1]
    for name, end, at in zip(NAMES, ends, apart(ends, 0.05 * top), strict=True):
        axes.annotate(
            name,
            (hours[-1], end),
            xytext=(made["exam"]["to_h"] * 1.01, at),
            color=_COLOURS[name],
            va="center",
            annotation_clip=False,
        )
    axes.axvspan(made["exam"]["from_h"], made["exam"]["to_h"], color="#000000", alpha=0.05, linewidth=0)
    axes.set_xlim(0, made["exam"]["to_h"])
    axes.set_ylim(0, top)
    axes.text(
        made["exam"]["from_h"],
        top,
        " compared here, without exploration",
        va="top",
        fontsize=8,
        color="#555555",
    )
    axes.set_xlabel("simulated hours since the shop opened")
    axes.set_ylabel("reward per visit (learned: with 95 % interval)")
    _plain(axes)


def apart(heights: Sequence[float], least: float) -> list[float]:
    """These heights, in their order, moved as little as it takes to lie `least` apart, upwards first.

    >>> apart([1.0, 5.0, 1.2], 0.5)
    [1.0, 5.0, 1.5]
    """
    placed: dict[int, float] = {}
    last = -math.inf
    for at in sorted(range(len(heights)), key=heights.__getitem__):
        last = placed[at] = max(heights[at], last + least)
    return [placed[at] for at in range(len(heights))]


def _draw_last(axes: Any, made: Json) -> None:
    for at, name in enumerate(NAMES):
        policy = made["policies"][name]
        low, high = policy["ci95"]
        axes.plot([low, high], [at, at], color=_COLOURS[name], linewidth=2)
        axes.plot(policy["reward_per_visit"], at, "o", color=_COLOURS[name])
        axes.annotate(
            f"{policy['reward_per_visit']:.2f}",
            (policy["reward_per_visit"], at),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(NAMES)), NAMES)
    axes.set_ylim(-0.5, len(NAMES) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("reward per visit, last stretch (95 %)")
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if axes.get_yticklabels()[0].get_text() == "random" else "y", alpha=0.25)


def _comparison(compared: Comparison) -> Json:
    policies = {name: figures._asdict() for name, figures in compared.policies.items()}
    return {
        "policies": {name: values | {"ci95": list(values["ci95"])} for name, values in policies.items()},
        "learned_minus_popularity": compared.gain.mean,
        "learned_minus_popularity_ci95": [compared.gain.low, compared.gain.high],
        "gap_closed": compared.gap_closed.mean,
        "gap_closed_ci95": [compared.gap_closed.low, compared.gap_closed.high],
    }


def _hours(found: Findings, event_ms: float) -> float:
    return (event_ms - found.opened_ms) / HOUR_MS


def _signed(value: Interval, what: str = "mean") -> str:
    return f"{value.low:+.2f} to {value.high:+.2f}" if what == "to" else f"{value.mean:+.2f}"
