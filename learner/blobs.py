"""Small named files, written whole or not at all: in a directory, or behind any fsspec URL."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

import fsspec

ABANDONED_S: Final = 600.0  # nobody writes one file for longer


class Blobs(Protocol):
    """Names are relative, with `/` between folders."""

    def read(self, name: str) -> bytes:
        """Raises: FileNotFoundError; another OSError where a retry may help."""

    def write(self, name: str, data: bytes) -> None:
        """Create or replace; a reader sees all of it or what was before. Raises: OSError."""

    def names(self, folder: str = "") -> list[str]:
        """The files directly in a folder, without its name, sorted; empty where there is no such folder."""

    def remove(self, name: str) -> None:
        """Delete; no matter if it is gone."""

    def sweep(self, folder: str = "") -> None:
        """Delete what writers that were killed have left of files directly in a folder. Raises: OSError."""


def open_blobs(url: str | os.PathLike[str]) -> Blobs:
    """The store at a path, `file://` URL or any fsspec URL (`s3://bucket/prefix`, `memory://name`).

    Raises: ValueError for a scheme that fsspec does not know, or whose package is missing.
    """
    text = os.fspath(url)
    if "://" not in text or text.startswith("file://"):
        return _Directory(Path(text.removeprefix("file://")))
    try:
        # listings are asked anew each time: other processes write here too
        filesystem, root = fsspec.core.url_to_fs(text, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise ValueError(f"cannot open {text!r}: {error}") from error
    return _Remote(filesystem, root)


_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


class _Directory:
    """A local directory: temporary file, fsync, rename."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # a name of its own: two processes may write the same blob at once
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # unless we are killed: see `sweep`

    def names(self, folder: str = "") -> list[str]:
        try:
            with os.scandir(self._root / folder) as entries:
                return sorted(e.name for e in entries if e.is_file() and not e.name.endswith(".tmp"))
        except FileNotFoundError:
            return []

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def sweep(self, folder: str = "") -> None:
        try:
            with os.scandir(self._root / folder) as entries:
                left = [Path(e.path) for e in entries if _TEMPORARY.fullmatch(e.name)]
        except FileNotFoundError:
            return
        if not left:
            return
        probe = self._root / folder / f".now.{uuid.uuid4().hex}.tmp"
        probe.touch()  # what time it is where the others were written; another process may still be at some
        now_s = probe.stat().st_mtime
        for path in (*left, probe):
            with suppress(FileNotFoundError):
                if path == probe or now_s - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()


class _Remote:
    """An object store through fsspec: an object appears whole when its upload ends."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def read(self, name: str) -> bytes:
        with _drivers_errors():
            return bytes(self._fs.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        with _drivers_errors():
            self._fs.pipe_file(self._path(name), data)

    def names(self, folder: str = "") -> list[str]:
        self._fs.invalidate_cache()
        try:
            with _drivers_errors():
                entries = self._fs.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file")

    def remove(self, name: str) -> None:
        try:
            with _drivers_errors():
                self._fs.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def sweep(self, folder: str = "") -> None:
        """Nothing: what was not uploaded whole is not there."""


@contextmanager
def _drivers_errors() -> Iterator[None]:
    """Whatever a driver raises is an OSError: of its own kinds nobody knows who uses a store."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
