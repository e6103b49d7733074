"""The demo as a user runs it: real processes, an end by itself, one clear line when something breaks, nothing left."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simulator import demo
from simulator.figures import Figures
from simulator.parts import Broken, Parts

ROOT = Path(__file__).parent.parent


def gone(pid):
    """Whether a process has ended (or waits, dead, for its parent to look)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def eventually(check, timeout_s):
    """The first true thing that `check` returns; fails when none comes in time."""
    end = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.1)
    return found


class Run:
    """`python -m simulator.demo` in a folder of its own; killed when left, with all that it started."""

    def __init__(self, tmp_path, *arguments, ignored=False):
        """ignored: it starts with SIGINT ignored, as a shell's background jobs do."""
        self._ignored = ignored
        self.folder = tmp_path / "demo"
        self._arguments = [sys.executable, "-m", "simulator.demo", "--folder", str(self.folder), *arguments]
        self._out = (tmp_path / "out").open("w+")

    def __enter__(self):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if self._ignored else None
        try:
            self.process = subprocess.Popen(
                self._arguments, cwd=ROOT, stdout=self._out, stderr=subprocess.STDOUT
            )
        finally:
            if self._ignored:
                signal.signal(signal.SIGINT, before)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self._out.close()
        lock = self.folder.with_name("demo.lock")
        for pid in map(int, lock.read_text().split() if lock.exists() else ()):
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)

    def said(self):
        self._out.seek(0)
        return self._out.read()

    def pids(self):
        """Of the policy server and the learner, once they run."""
        lock = self.folder.with_name("demo.lock")
        return eventually(lambda: lock.exists() and [int(pid) for pid in lock.read_text().split()], 60)

    def report(self):
        return json.loads((self.folder / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_short_demo_runs_the_whole_loop_reports_and_leaves_nothing_behind(tmp_path):
    with Run(tmp_path, "--minutes", "1.5", "--rate", "250", "--seed", "2") as run:
        pids = run.pids()
        status = run.process.wait(400)
        made, said = run.report(), run.said()
    assert status == (0 if made["ok"] else 1), said  # a minute may be too short to learn
    assert set(made["policies"]) == {"random", "popularity", "learned", "oracle"}
    assert all({"ctr", "reward_per_visit", "ci95"} <= set(policy) for policy in made["policies"].values())
    earned = {name: policy["reward_per_visit"] for name, policy in made["policies"].items()}
    assert earned["random"] < earned["popularity"] < earned["oracle"]
    assert set(made["freshness_s"]) >= {"p50", "p99"}
    assert made["transitions"] > 0
    assert made["policy_version"] > 0
    assert made["learnt_from"] <= made["records"]
    assert made["recommendations"] > 1000
    assert made["unanswered"] == 0
    assert made["seeds"] == [2]
    assert f"gap closed: {made['gap_closed']:.2f}" in said
    names = {"report.json", "report.png", "serving.log", "learner.log", "log.db"}
    assert names <= {path.name for path in run.folder.iterdir()}
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize(("victim", "name"), [(0, "serving"), (1, "learner")])
def test_a_part_that_is_killed_ends_the_demo_with_a_line_that_names_it(tmp_path, victim, name):
    with Run(tmp_path) as run:
        pids = run.pids()
        os.kill(pids[victim], signal.SIGKILL)
        assert run.process.wait(60) == 1
        assert f"demo: the loop broke: {name} died (signal 9)" in run.said()
        assert run.report()["ok"] is False
        assert name in run.report()["why"]
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ignored", [False, True], ids=["", "background job"])
def test_ctrl_c_ends_all_processes(tmp_path, number, ignored):
    with Run(tmp_path, ignored=ignored) as run:
        pids = run.pids()
        run.process.send_signal(number)
        assert run.process.wait(60) == 130
    assert all(gone(pid) for pid in pids)


def test_an_older_demo_is_replaced_but_nothing_else_is_ever_deleted(tmp_path):
    with demo._fresh(tmp_path / "demo"):
        (tmp_path / "demo" / "old.log").touch()
    with demo._fresh(tmp_path / "demo"):
        assert not (tmp_path / "demo" / "old.log").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(OSError, match="other things than a demo"), demo._fresh(mine):
        pass
    assert (mine / "thesis.tex").exists()


def test_two_demos_do_not_share_a_folder(tmp_path):
    with (tmp_path / "demo.lock").open("w") as lock:
        lock.write("4711 4712")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="4711 4712"), demo._fresh(tmp_path / "demo"):
            pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "1,1"], "seeds must be >= 0, each once, not 1,1"),
        (["--minutes", "0.1"], "minutes must be within 0.4..1440.0, not 0.1"),
        (["--folders", "x"], "did you mean '--folder'?"),
    ],
)
def test_a_wrong_command_line_is_answered_with_one_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        demo.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Puts a module where `python -m` finds it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def put(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    return put


def test_a_part_that_dies_is_named_with_its_status_and_last_words(tmp_path, module):
    module("parrot", "print('well'); raise SystemExit('pining for the fjords')")
    with Parts(tmp_path) as parts:
        parts.start("parrot")
        with pytest.raises(
            Broken, match=r"parrot died \(exit status 1\): pining for the fjords \[.*parrot.log\]"
        ):
            eventually(parts.check, 20)


def test_a_part_that_ends_in_peace_tells_its_cpu_and_one_that_does_not_is_broken(tmp_path, module):
    peaceful = (
        "import signal, time\nsignal.signal(15, lambda *_: exit({}))\nprint('up', flush=True)\ntime.sleep(60)"
    )
    module("dove", peaceful.format(0))
    module("hawk", peaceful.format(3))
    with Parts(tmp_path) as parts:
        for name in ("dove", "hawk"):
            parts.start(name)
        for name in ("dove", "hawk"):
            eventually(lambda name=name: "up" in parts.said(name), 20)
        assert 0 < parts.end("dove") < 10
        with pytest.raises(Broken, match=r"hawk did not end cleanly \(exit status 3"):
            parts.end("hawk")


def test_no_part_outlives_the_block(tmp_path, module):
    module("mule", "import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)")
    with Parts(tmp_path) as parts:
        pid = parts.start("mule")
        assert not gone(pid)
    assert gone(pid)


@pytest.mark.parametrize("oracle", ["12.50", "-"])
def test_a_row_stands_under_its_header(oracle):
    figures = {
        name: Figures(0.041, reward, (0.0, 0.0), 8.0, 0.1)
        for name, reward in (("popularity", 2.5), ("learned", 7.25), ("oracle", 12.5))
    }
    if oracle == "-":  # it still makes its plan
        del figures["oracle"]
    row = " 1:30  " + demo.table_row(0.35, 41_500, figures, 61, 78_123)
    header = demo.HEADER.splitlines()[-1]
    assert [cell.rstrip("%") for cell in row.split()] == [
        *("1:30", "0.35", "41,500", "4.1", "4.1", "2.50", "7.25", oracle, "61", "78,123")
    ]
    assert len(row) == len(header)
