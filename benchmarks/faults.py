"""Is anything lost or doubled when one thing breaks, again and again, under load? And how soon is all well again?

    python -m benchmarks.faults [--only NAME,...] [--times N] [--json FILE]

Real processes: a learner, a shop whose every id is known, a broker of its own (three where the fault needs them), or
SQLite. Each fault of benchmarks/fault_kinds.py strikes at random moments. Recovered: from the end of the fault (the
process is started again, the broker answers, the link is whole) until a checkpoint holds all that the log held then.
At the end the shop closes, the learner reads to the end and stops, and it is counted: what was sent, what the log
holds, what replay holds, what `learner audit` says (benchmarks/load.py). Exit status 1 if anything was lost, doubled,
not recovered, or not as promised.
"""

from __future__ import annotations

import argparse
import logging
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.fault_kinds import FAULTS
from benchmarks.load import account, in_the_log
from benchmarks.processes import catch_up, ends
from benchmarks.record import append
from benchmarks.stage import CLUSTER, MISSING, Fault, Rig, Settings, Wrong, staged
from learner.audit import load_memory
from streaming.log import LogError

RECOVERY_S = 180.0
PAUSE_S = (0.5, 3.0)  # between two strikes


@dataclass
class Row:
    """One line of the table."""

    fault: str
    log: str
    times: int = 0
    lost: int = 0
    doubled: int = 0
    recovered_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""


def attempt(fault: Fault, where: str, times: int, settings: Settings, folder: Path) -> Row:
    """Strike so often, and count."""
    row = Row(fault.name, where)
    folder.mkdir()
    try:
        with staged(fault, where, settings, folder) as rig:
            for _ in range(times):
                time.sleep(rig.luck.uniform(*PAUSE_S))
                row.times += 1
                row.recovered_s.append(strike(fault, rig))
            settle(row, rig)
    except MISSING as missing:
        row.skipped = str(missing)
    except (Wrong, TimeoutError, ChildProcessError, subprocess.TimeoutExpired, LogError) as error:
        row.wrong.append(f"{type(error).__name__}: {error}")
    except Exception:
        # a fault of the rig's own: the row has failed, and says so; the others are still worth their time
        row.wrong.append(traceback.format_exc())
    return row


def strike(fault: Fault, rig: Rig) -> float:
    """Once; returns how long recovery took."""
    acting = fault.act(rig)
    next(acting)
    over_s = time.monotonic()
    catch_up(rig.learner, ends(rig.log, rig.topic), RECOVERY_S)  # that the log answers is part of it
    took_s = time.monotonic() - over_s
    next(acting, None)
    return took_s


def settle(row: Row, rig: Rig) -> None:
    """Close the shop, let the learner read to the end, and judge."""
    rig.load.finish()
    catch_up(rig.learner, ends(rig.log, rig.topic), RECOVERY_S)
    held = in_the_log(rig.log, rig.topic)
    for check in rig.checks:
        check(held)
    if (status := rig.learner.stop()) != 0:
        row.wrong.append(f"the learner stopped with status {status}")
    status, told = rig.learner.audit()
    replay = load_memory(rig.learner.directory).contents
    found = account(rig.load.sent, held, rig.learner.meta()["joined"], told["differences"], replay)
    row.lost, row.doubled = found.lost, found.doubled
    row.wrong += found.wrong
    if status != 0:
        row.wrong.append(f"learner audit: exit status {status} {told['stderr']}")


# --- shown -----------------------------------------------------------------------------------------------

_HEAD = ("fault", "log", "times tried", "lost", "doubled", "recovered in s: median", "max")
_WIDTHS = (max(map(len, FAULTS)), 8, 11, 5, 7, 22, 6)


def line(cells: Sequence[object]) -> str:
    """Of the table."""
    shown = (str(cell) for cell in cells)
    return "  ".join(
        f"{cell:<{width}}" if k < 2 else f"{cell:>{width}}"
        for k, (cell, width) in enumerate(zip(shown, _WIDTHS, strict=True))
    )


def tell(row: Row) -> str:
    """The row, and below it what was wrong."""
    if row.skipped:
        return f"{row.fault:<{_WIDTHS[0]}}  {row.log:<{_WIDTHS[1]}}  skipped: {row.skipped}"
    took = row.recovered_s
    seconds = (f"{statistics.median(took):.1f}", f"{max(took):.1f}") if took else ("never", "never")
    cells = line((row.fault, row.log, row.times, row.lost, row.doubled, *seconds))
    return "\n".join([cells, *(f"  !!! {what}" for what in row.wrong)])


def main(arguments: list[str] | None = None) -> int:
    """The command's exit status: 1 where something was not as promised."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parsed(arguments)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    # what the brokers' clients have to say about brokers that are away
    logging.basicConfig(filename=folder / "faults.log", level=logging.INFO)
    print(f"logs of all processes: {folder}", file=sys.stderr)
    print(line(_HEAD), flush=True)
    rows = []
    for name in options.only or FAULTS:
        fault = FAULTS[name]
        for where in fault.logs:
            if options.log in (None, "kafka" if where == CLUSTER else where):
                settings = Settings(options.seed, options.rate, options.away_s, options.toxiproxy)
                rows.append(attempt(fault, where, options.times, settings, folder / f"{name}-{where}"))
                print(tell(rows[-1]), flush=True)
                append(options.json, "faults", arguments, asdict(rows[-1]))
    return verdict(rows)


def verdict(rows: list[Row]) -> int:
    """In words, and as an exit status."""
    tried = [row for row in rows if not row.skipped]
    bad = [row for row in tried if row.wrong or row.lost or row.doubled]
    total = f"{sum(row.times for row in tried)} faults of {len(tried)} kinds"
    skipped = f"; {len(rows) - len(tried)} kinds skipped" if len(rows) > len(tried) else ""
    print(
        f"{total}: {'something is wrong, see !!!' if bad else 'nothing lost, nothing doubled, all recovered'}{skipped}"
    )
    return 1 if bad or not tried else 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.faults",
        description=(__doc__ or "").splitlines()[0],
        epilog="\n".join(f"{fault.name:<{_WIDTHS[0]}}  {fault.about}" for fault in FAULTS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", metavar="NAME,...", type=named, help="these faults [all that are below]")
    parser.add_argument("--times", metavar="N", type=int, default=3, help="strikes of each; >= 1 [3]")
    parser.add_argument(
        "--log", choices=["kafka", "sqlite"], help="only on this log [each where it makes sense]"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the moments of trouble [0]")
    parser.add_argument("--rate", metavar="X", type=float, default=150.0, help="records a second [150]")
    parser.add_argument(
        "--away-s",
        metavar="S",
        type=float,
        default=15.0,
        help="how long a process is stopped, and all brokers are away; seconds [15]",
    )
    parser.add_argument(
        "--toxiproxy", metavar="PATH", help="the toxiproxy server [toxiproxy-server on the PATH]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each row, one JSON object a line")
    options = parser.parse_args(arguments)
    if options.times < 1 or options.rate <= 0 or options.away_s < 0:
        parser.error("--times must be >= 1, --rate > 0, --away-s >= 0")
    return options


def named(text: str) -> list[str]:
    """The faults of a comma-separated list."""
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in FAULTS]:
        raise argparse.ArgumentTypeError(f"no fault {unknown[0]!r}; one of {', '.join(FAULTS)}")
    return names


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does, it leaves no process behind
    sys.exit(main())
