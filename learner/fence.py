"""Fencing: of two learners with one name, the one that started last goes on and the other one stops.

Each claims an epoch, one higher than any before. Whatever it publishes carries that epoch, and before it makes
anything visible it asks whether a newer one exists. Readers use nothing of a lower epoch than has published. So a
learner that was only thought dead (a pause, a partition) cannot overwrite its successor's work.
"""

from __future__ import annotations

import os
import uuid

from learner.blobs import open_blobs


class Fenced(Exception):
    """Another learner with this name has taken over; stop, and write nothing more."""


class Fence:
    """This learner's claim: `epoch` is ours until somebody claims a higher one.

    url: a directory, or any fsspec URL whose listings show every completed write (local disks, S3, GCS, Azure).
    name: of the learner; learners of different names do not know of each other.
    owner: who we are, for the message the other one gets; any text. above: epochs known to be taken elsewhere, as by
    a learner whose claims are gone but whose checkpoints or weights are not.
    Raises: OSError when the claim cannot be written.
    """

    def __init__(self, url: str | os.PathLike[str], name: str, owner: str = "", above: int = 0) -> None:
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"a learner's name must be a plain word without '/', not {name!r}")
        self._blobs = open_blobs(url)
        self._name = name
        self._folder = f"fence/{name}"
        self.epoch = self._claim(owner or f"pid {os.getpid()}", above)

    def _claim(self, owner: str, above: int) -> int:
        """Take the next epoch.

        Written first, listed after: of two that took the same number, at least the later one sees the other and
        goes on to the next, so no two ever hold one epoch.
        """
        mine = uuid.uuid4().hex
        epoch = max([above, *(e for e, _ in self._claims())])
        while True:
            epoch += 1
            self._blobs.write(f"{self._folder}/{epoch:08d}-{mine}", owner.encode())
            others = [(e, token) for e, token in self._claims() if token != mine]
            if all(e < epoch for e, _ in others):
                break
            epoch = max(e for e, _ in others)
        for e, token in self._claims():
            if e < epoch:  # the highest stays for ever: numbers are never used again
                self._blobs.remove(f"{self._folder}/{e:08d}-{token}")
        self._blobs.sweep(self._folder)
        return epoch

    def _claims(self) -> list[tuple[int, str]]:
        """(epoch, token) of every claim there is."""
        pairs = (name.split("-") for name in self._blobs.names(self._folder))
        return [(int(pair[0]), pair[1]) for pair in pairs if len(pair) == 2 and pair[0].isdigit()]

    def check(self) -> None:
        """Return while the claim stands. Raises: Fenced, naming who took over; OSError when it cannot be told."""
        newer = [claim for claim in self._claims() if claim[0] > self.epoch]
        if not newer:
            return
        epoch, token = max(newer)
        try:
            owner = self._blobs.read(f"{self._folder}/{epoch:08d}-{token}").decode()
        except FileNotFoundError:
            owner = "unknown"
        raise Fenced(
            f"learner {self._name!r} of epoch {self.epoch} was taken over by epoch {epoch} ({owner}); "
            "this one stops. To run both, give them different names"
        )
