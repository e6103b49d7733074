"""`learner` on a disk that fails it: `python -m benchmarks.frail_learner STEP[:SKIP] FLAGS...`

SIGUSR1 arms it. From then on, at the next time that a checkpoint comes to STEP (or, with SKIP, so many times later):

    part      between fsync and rename of a part       the process dies (-9)
    parts     all parts are safe, no manifest yet      it dies
    manifest  between fsync and rename of the manifest it dies
    commit    the manifest is safe, nobody was told    it dies
    error     each write fails with an input/output error, until the next SIGUSR1
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Final

import learner.checkpoint
from learner.__main__ import main
from learner.checkpoint import Disk

STEPS: Final = ("part", "parts", "manifest", "commit", "error")


class FrailDisk(Disk):
    """A disk until it is armed."""

    step = ""
    skip = 0
    armed = False

    def write(self, path: Path, data: bytes) -> None:
        if path.name.startswith("checkpoint-"):
            self._reach("parts")
        if self.armed and self.step == "error":
            super().write(path, data[: len(data) // 2])
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        super().write(path, data)

    def rename(self, source: Path, target: Path) -> None:
        self._reach("part" if target.parent.name == "parts" else "manifest")
        super().rename(source, target)

    def sync(self, path: Path) -> None:
        super().sync(path)
        if path.is_dir() and path.name != "parts":
            self._reach("commit")

    def _reach(self, step: str) -> None:
        if self.armed and step == self.step:
            if not FrailDisk.skip:
                os.kill(os.getpid(), signal.SIGKILL)
            FrailDisk.skip -= 1


def arm(*_: object) -> None:
    """Begin, or end, to fail."""
    FrailDisk.armed = not FrailDisk.armed


if __name__ == "__main__":
    step, _, skip = sys.argv[1].partition(":")
    if step not in STEPS:
        sys.exit(f"{step!r} is no step: {', '.join(STEPS)}")
    FrailDisk.step, FrailDisk.skip = step, int(skip or 0)
    learner.checkpoint.Disk = FrailDisk  # type: ignore[misc]
    signal.signal(signal.SIGUSR1, arm)
    sys.exit(main(sys.argv[2:]))
