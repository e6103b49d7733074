"""The processes of a loop: started with their output in a file each, watched, and never left behind."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

_KILL_AFTER_S: Final = 30.0


class Broken(Exception):
    """The loop broke; the message is one line that says why and where to look."""


class Parts:
    """Python modules that run as processes; leaving the `with` block kills what still runs."""

    def __init__(self, folder: Path, keep_open: Sequence[int] = ()) -> None:
        """folder: for NAME.log. keep_open: file descriptors that each process inherits."""
        self._folder = folder
        self._keep_open = tuple(keep_open)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def start(self, name: str, *arguments: str) -> int:
        """Start `python -m name arguments...`; returns its process id."""
        with self._file(name).open("wb") as out:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", name, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=self._keep_open,
                start_new_session=True,  # Ctrl-C is for us: we end them, in order
            )
        return self._running[name].pid

    def said(self, name: str) -> str:
        """All that a process has written."""
        return self._file(name).read_text(errors="replace")

    def check(self) -> None:
        """Raise Broken if one has ended by itself."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise Broken(self._obituary(name, "died", process.returncode))

    def end(self, name: str) -> float:
        """SIGTERM; returns the seconds of CPU that it used. Raises Broken when it does not end in peace and in time."""
        before = _children_cpu_s()
        process = self._running[name]
        process.terminate()
        try:
            status = process.wait(_KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            raise Broken(f"{name} did not end within {_KILL_AFTER_S:.0f} s; see {self._file(name)}") from None
        del self._running[name]
        if status:
            raise Broken(self._obituary(name, "did not end cleanly", status))
        return _children_cpu_s() - before

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _obituary(self, name: str, what: str, status: int) -> str:
        lines = self.said(name).strip().splitlines()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        last = f": {lines[-1].strip()}" if lines else ""
        return f"{name} {what} ({how}){last} [{self._file(name)}]"


def own_cpu_s() -> float:
    """Seconds of CPU that this process has used."""
    return time.process_time()


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # of those that have been waited for
    return used.ru_utime + used.ru_stime
