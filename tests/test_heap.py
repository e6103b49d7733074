"""Memory that was freed between blocks that stay goes back to the system, in learner and server once a minute."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from streaming.heap import give_back

FRAGMENTED = """
    import os, time
    from pathlib import Path
    from streaming.heap import give_back, keep_giving_back

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    freed, kept = [], []
    for _ in range(2000):
        freed.append(b"x" * 100_000)
        kept.append(b"y" * 1000)
    freed.clear()
    grown = resident() - before
    {do}
    print(grown, resident() - before)
"""
LONG_LIVED = """
    import os, signal, sys, threading, time
    from {program}.__main__ import main

    def look():
        while not any(thread.name == "heap" for thread in threading.enumerate()):
            time.sleep(0.02)
        print("heap")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()
    sys.exit(main({arguments}))
"""


def said_by(source, timeout_s):
    command = [sys.executable, "-c", textwrap.dedent(source)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True).stdout


@pytest.mark.parametrize("do", ["give_back()", "keep_giving_back(0.05); time.sleep(1.0)"])
def test_what_is_freed_between_blocks_that_stay_goes_back_to_the_system(do):
    grown, left = map(int, said_by(FRAGMENTED.format(do=do), 60).split())
    assert grown > 60e6
    assert left < 20e6


def test_a_c_library_that_cannot_is_left_alone():
    assert not give_back(object())  # musl's, say


def test_by_itself_the_c_library_keeps_it():
    grown, left = map(int, said_by(FRAGMENTED.format(do="pass"), 60).split())
    assert left > 0.9 * grown


@pytest.mark.parametrize(
    ("program", "flags"), [("serving", ["--port", "0"]), ("learner", ["--data-dir", "{folder}/data"])]
)
def test_learner_and_server_give_it_back_while_they_run(program, flags, tmp_path):
    if program == "learner":
        flags = [*flags, "--log", "sqlite:///{folder}/log.db"]
    arguments = [flag.format(folder=tmp_path) for flag in [*flags, "--weights", "{folder}/weights"]]
    assert said_by(LONG_LIVED.format(program=program, arguments=arguments), 120).splitlines()[0] == "heap"
