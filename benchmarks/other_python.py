"""Peers that live in a Python of their own, since what they require does not go together with what we do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent


class PeerMissing(RuntimeError):
    """A peer cannot be run; the message says why, and what to install."""


def said(python: str, peer: str, arguments: Sequence[str], needs: str) -> dict[str, Any]:
    """The last line that this module of the project says there, as JSON. needs: what to install for it.

    Raises: PeerMissing.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    try:
        done = subprocess.run(
            [python, "-m", peer, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        words = str(getattr(error, "stderr", None) or error).strip().splitlines()  # the last one says it
        raise PeerMissing(
            f"{python} cannot run {peer}: {words[-1]}; it needs `pip install {needs}` in a virtual environment "
            "of its own"
        ) from error
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def arguments_without(python: str | None) -> list[str]:
    """This process's arguments for the results, where everybody's path to that Python is PYTHON."""
    return ["PYTHON" if argument == python else argument for argument in sys.argv[1:]]
