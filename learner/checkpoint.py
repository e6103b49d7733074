"""Checkpoints: everything a learner needs to go on, whole or not at all.

A directory that holds

    parts/{sha256}.safetensors              one part each, named by what is in it, never changed
    checkpoint-{epoch}-{generation}.json    manifest: meta, and the hash of every part; carries its own hash

A part that did not change keeps its name, so a large replay buffer costs what changed in it. Writing goes
part files, fsync, rename, fsync of the directory, then the manifest likewise: at whatever moment the process or the
machine dies, the newest manifest that can be read is complete. The last few generations stay, so that a file which
the disk has damaged since costs one generation and no more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from enum import Enum
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from learner.fence import Fence

log = logging.getLogger(__name__)

FORMAT: Final = "bellwether-checkpoint/1"
TRIES: Final = 5  # to read a generation while a learner writes newer ones and drops it
_MANIFEST: Final = re.compile(r"checkpoint-(\d{8,})-(\d{12,})\.json")  # epoch, generation
T = TypeVar("T")
Arrays: TypeAlias = dict[str, npt.NDArray[Any]]


class Keep(Enum):
    """See KEEP."""

    KEEP = "keep"


KEEP: Final = Keep.KEEP  # in place of a part: as it was in the generation saved or loaded last
Part: TypeAlias = Any  # JSON values, numpy arrays, and dicts (str keys) and lists of them; or Later


class Later(NamedTuple):
    """A part that the writing thread works out, once, from copies that nobody changes."""

    make: Callable[[], Part]


class CheckpointFailed(Exception):
    """A checkpoint could not be written; the last good one is intact."""


class PartsGone(CheckpointFailed):
    """Parts that were to be kept, or were written just now, are no longer there: the next one must keep none."""


class CheckpointDamaged(Exception):
    """No generation can be read whole; the message names each file that is wrong."""


# --- parts as bytes --------------------------------------------------------------------------------------


def encode(part: Part) -> bytes:
    """A tree of JSON values and arrays as one safetensors file; equal trees give equal bytes.

    Raises: TypeError naming the path of a value that is neither.
    """
    if isinstance(part, Later):
        part = part.make()
    arrays: Arrays = {}
    skeleton = json.dumps(_strip(part, "", arrays), allow_nan=True, separators=(",", ":")).encode()
    arrays["json"] = np.frombuffer(skeleton, np.uint8)
    return safetensors.numpy.save(arrays)


def decode(data: bytes) -> Part:
    """What was encoded; arrays are writable copies.

    >>> decode(encode({"step": 7, "rng": [1 << 100, None]}))
    {'step': 7, 'rng': [1267650600228229401496703205376, None]}
    """
    arrays = safetensors.numpy.load(data)
    return _fill(json.loads(arrays["json"].tobytes()), arrays)


def _strip(value: Any, path: str, arrays: Arrays) -> Any:
    """The JSON skeleton of a tree: {"$array": name} where an array was, which goes into `arrays`."""
    if isinstance(value, np.ndarray):
        name = f"array/{len(arrays)}"
        # safetensors writes the raw buffer, so a strided view would come out as other numbers
        arrays[name] = np.asarray(value, order="C")
        return {"$array": name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str) or key == "$array"]
        if wrong:
            raise TypeError(f"checkpoint part {path or '/'}: key {wrong[0]!r} must be a string, not '$array'")
        return {key: _strip(item, f"{path}/{key}", arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strip(item, f"{path}/{i}", arrays) for i, item in enumerate(value)]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(
        f"checkpoint part {path or '/'}: {type(value).__name__} is neither JSON nor a numpy array"
    )


def _fill(value: Any, arrays: Arrays) -> Any:
    if isinstance(value, dict):
        if "$array" in value:
            return arrays[value["$array"]]
        return {key: _fill(item, arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, arrays) for item in value]
    return value


# --- files -----------------------------------------------------------------------------------------------


class Disk:
    """The few things done to files, one system call's worth each, so that tests can stop between any two."""

    def write(self, path: Path, data: bytes) -> None:
        """Create the file and write all of it."""
        with open(path, "wb") as file:
            file.write(data)

    def sync(self, path: Path) -> None:
        """Make a file's content, or a directory's names, safe against a power cut."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Give the file its final name, replacing what had it."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Delete the file; no matter if it is gone."""
        path.unlink(missing_ok=True)


class Lazy(Mapping[str, Part]):
    """A checkpoint's parts, each read when it is asked for; hashes were checked when it was loaded."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Part:
        return decode(self._files[name].read_bytes())

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Loaded(NamedTuple):
    """A generation that was found whole."""

    meta: dict[str, Any]
    parts: Lazy
    generation: int


class _File(NamedTuple):
    """What a manifest says about a part."""

    sha256: str
    size: int


class _Generation(NamedTuple):
    """A manifest on disk: newest sorts last."""

    epoch: int
    generation: int

    @property
    def name(self) -> str:
        return f"checkpoint-{self.epoch:08d}-{self.generation:012d}.json"


# --- the store -------------------------------------------------------------------------------------------


class Checkpoints:
    """The generations in one directory; one thread at a time.

    fence: asked before anything is made visible or deleted; generations of a newer epoch outrank all older
    ones. It may be set once it is known that what is there can be gone on from: reading needs none. keep: generations
    kept, >= 1.
    """

    def __init__(
        self, directory: Path | str, *, fence: Fence | None = None, keep: int = 3, disk: Disk | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1 generations, not {keep}")
        self.directory = Path(directory)
        self._parts = self.directory / "parts"
        self.fence = fence
        self._keep = keep
        self._disk = disk or Disk()
        self._base: dict[str, _File] = {}
        self._last = 0
        self._loaded: list[_Generation] = []  # the newest that was there when one was loaded
        self._damaged: list[Path] = []  # parts found then, to be put aside
        self._swept = False
        self._parts.mkdir(parents=True, exist_ok=True)

    def load(self) -> Loaded | None:
        """The newest generation that is whole; None where none was ever completed. Nothing on disk is changed.

        Every byte is checked against its hash before anything is returned. A damaged file is named in the log, the
        generation before is tried, and the next `save` puts the file aside as `*.damaged`.
        Raises: CheckpointDamaged when there are generations and none is whole.
        """
        found = self._generations()
        self._loaded, self._damaged = found[-1:], []
        troubles = []
        for generation in reversed(found):
            try:
                meta, files = self._read(generation)
            except (OSError, ValueError) as error:
                if not (self.directory / generation.name).exists():
                    return self.load()  # dropped while it was read: there are newer ones
                troubles.append(f"{generation.name}: {error}")
                log.error("checkpoint %s is damaged, falling back: %s", generation.name, error)
                continue
            self._base, self._last = files, found[-1].generation
            paths = {name: self._path(file) for name, file in files.items()}
            return Loaded(meta, Lazy(paths), generation.generation)
        if troubles:
            raise CheckpointDamaged(
                f"no checkpoint in {self.directory} can be read: {'; '.join(troubles)}. "
                "Restore the directory from a backup, or start with an empty --data-dir"
            )
        return None

    def read(self, take: Callable[[Loaded | None], T]) -> T:
        """What `take` makes of what `load` gives; of a newer one where a learner that runs drops it meanwhile.

        Raises: as `load` and `take`; FileNotFoundError where TRIES in a row were dropped.
        """
        for _ in range(TRIES - 1):
            with contextlib.suppress(FileNotFoundError):
                return take(self.load())
        return take(self.load())

    def overtaken(self) -> bool:
        """Whether somebody has written a generation since one was loaded."""
        return self._generations()[-1:] != self._loaded

    def epoch(self) -> int:
        """The highest epoch of all generations; a new learner must claim a higher one (`Fence(above=...)`)."""
        return max((generation.epoch for generation in self._generations()), default=0)

    def save(self, parts: Mapping[str, Part | Keep], meta: Mapping[str, Any]) -> int:
        """Write the next generation and return its number; it is safe once this returns.

        meta: JSON values (keys come back as strings). A part that is KEEP must be in the generation loaded or saved
        last.
        Raises: CheckpointFailed on a full disk or any failing write; PartsGone; Fenced when a newer learner has taken
        over. In any case the generation before stays the newest that counts, and KEEP still refers to it.
        """
        kept = [name for name, part in parts.items() if part is KEEP and name not in self._base]
        if kept:
            raise KeyError(f"part {kept[0]!r} is KEEP, but the last generation has no such part")
        try:
            if self.fence is not None:
                self.fence.check()
            self._put_aside()
            self._sweep()
            files = {
                name: self._base[name] if part is KEEP else self._write_part(part)
                for name, part in parts.items()
            }
            self._disk.sync(self._parts)
            generation = self._write_manifest(files, meta)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._clean()
            raise CheckpointFailed(
                f"could not write a checkpoint to {self.directory}: {error}; the last good one is intact"
            ) from error
        self._base, self._last = files, generation.generation
        self._drop_old()
        return generation.generation

    # --- writing

    def _write_part(self, part: Part) -> _File:
        data = encode(part)
        file = _File(hashlib.sha256(data).hexdigest(), len(data))
        if not self._has(file):
            self._write(self._path(file), data)
        return file

    def _has(self, file: _File) -> bool:
        """Whether the part is there, as far as its size tells."""
        try:
            return self._path(file).stat().st_size == file.size
        except FileNotFoundError:
            return False

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(path.name + ".tmp")
        self._disk.write(temporary, data)
        self._disk.sync(temporary)
        self._disk.rename(temporary, path)

    def _write_manifest(self, files: Mapping[str, _File], meta: Mapping[str, Any]) -> _Generation:
        self._last = max([self._last, *(g.generation for g in self._generations())])
        generation = _Generation(self.fence.epoch if self.fence else 0, self._last + 1)
        raw = {
            "format": FORMAT,
            "epoch": generation.epoch,
            "generation": generation.generation,
            "meta": dict(meta),
            "parts": {name: file._asdict() for name, file in files.items()},
        }
        body = json.loads(json.dumps(raw))  # as it will be read: keys are strings, in their order
        text = json.dumps({"sha256": _digest(body), **body}, indent=1)
        if self.fence is not None:
            self.fence.check()  # writing the parts may have taken long
        # a learner that was fenced between its last check and its deletions takes what nobody needed then
        gone = [name for name, file in files.items() if not self._has(file)]
        if gone:
            raise PartsGone(
                f"{len(gone)} parts of the checkpoint are gone from {self._parts} (as {gone[0]!r}): not written; "
                "the next one writes all of them anew"
            )
        path = self.directory / generation.name
        self._write(path, text.encode())
        try:
            self._disk.sync(self.directory)
        except OSError:
            self._disk.remove(path)  # reported as failed, so it must not be found either
            raise
        return generation

    # --- reading

    def _generations(self) -> list[_Generation]:
        """All manifests there are, oldest first. Other files, as copies that somebody made of one, are none of ours."""
        found = (_MANIFEST.fullmatch(path.name) for path in self.directory.glob("checkpoint-*.json"))
        return sorted(_Generation(int(match[1]), int(match[2])) for match in found if match)

    def _manifest(self, generation: _Generation) -> dict[str, Any]:
        """A manifest, checked against its own hash. Raises: OSError, ValueError."""
        body = json.loads((self.directory / generation.name).read_bytes())
        if not isinstance(body, dict) or body.pop("sha256", None) != _digest(body):
            raise ValueError("the manifest's own hash is wrong")
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']!r}, but this version reads {FORMAT!r}")
        return body

    def _read(self, generation: _Generation) -> tuple[dict[str, Any], dict[str, _File]]:
        """Meta and files of a generation, each file's hash checked. Raises: OSError, ValueError."""
        body = self._manifest(generation)
        files = {name: _File(**file) for name, file in body["parts"].items()}
        damaged = []
        for name, file in files.items():
            path = self._path(file)
            with open(path, "rb") as stream:
                actual = hashlib.file_digest(stream, "sha256").hexdigest()
            if actual != file.sha256:
                self._damaged.append(path)
                damaged.append(f"part {name!r}: {path.name} is not what its hash says")
        if damaged:
            raise ValueError("; ".join(damaged))
        return body["meta"], files

    def _path(self, file: _File) -> Path:
        return self._parts / f"{file.sha256}.safetensors"

    # --- deleting

    def _drop_old(self) -> None:
        """Delete generations beyond `keep`, and the parts that only they had. A failure costs disk space only.

        Raises: Fenced.
        """
        try:
            if self.fence is not None:
                self.fence.check()  # or parts that a successor keeps would go
            found = self._generations()
            dropped, kept = found[: -self._keep], found[-self._keep :]
            loose = self._hashes(dropped) - self._hashes(kept)
            for generation in dropped:  # manifests first: one that names a missing part would look damaged
                self._disk.remove(self.directory / generation.name)
            for sha256 in loose:
                self._disk.remove(self._path(_File(sha256, 0)))
        except OSError as error:
            log.warning("could not delete old checkpoints in %s: %s", self.directory, error)

    def _hashes(self, generations: list[_Generation]) -> set[str]:
        hashes = set()
        for generation in generations:
            try:
                parts = self._manifest(generation)["parts"]
            except ValueError:
                continue  # damaged: what it names is swept at the next start
            hashes |= {file["sha256"] for file in parts.values()}
        return hashes

    def _put_aside(self) -> None:
        """Damaged parts, all of them: a save of the same bytes must not take such a file for them."""
        while self._damaged:
            if self._damaged[-1].exists():
                self._disk.rename(self._damaged[-1], self._damaged[-1].with_suffix(".damaged"))
            self._damaged.pop()

    def _sweep(self) -> None:
        """Once, before the first save: delete what a killed predecessor left half done."""
        if self._swept:
            return
        self._swept = True
        self._clean()
        named = self._hashes(self._generations())
        for path in self._parts.glob("*.safetensors"):
            if path.stem not in named:
                self._disk.remove(path)

    def _clean(self) -> None:
        for path in (*self._parts.glob("*.tmp"), *self.directory.glob("*.tmp")):
            self._disk.remove(path)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class CheckpointWriter:
    """Writes checkpoints beside the stream: one in flight, the caller never waits for the disk."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[int] | None = None

    @property
    def busy(self) -> bool:
        """A checkpoint is being written, or one is done and `finished` has not been asked yet."""
        return self._running is not None

    def start(self, parts: Mapping[str, Part | Keep], meta: Mapping[str, Any]) -> None:
        """Begin to write; the arrays must be copies that nobody changes. Raises: RuntimeError while busy."""
        if self._running is not None:
            raise RuntimeError("a checkpoint is still being written; ask `finished` first")
        self._running = self._pool.submit(self._checkpoints.save, parts, meta)

    def finished(self, timeout_s: float = 0.0) -> int | None:
        """The generation that has become safe since last asked; None while there is none.

        Raises: CheckpointFailed, Fenced: what `Checkpoints.save` raised; then the writer is free again.
        """
        running = self._running
        if running is None or not wait([running], timeout_s).done:
            return None
        self._running = None
        return running.result()

    def close(self) -> None:
        """Wait for the one in flight; its outcome stays there for `finished`."""
        self._pool.shutdown(wait=True)
