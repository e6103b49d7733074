"""The weight store: versioned weights that a server can check before it uses them.

A directory, or any fsspec URL (`s3://bucket/prefix`, `memory://weights`), that holds

    v00000042-00000003.json    manifest of version 42, by the learner of epoch 3; written last: what it names is there
    {sha256}.safetensors       tensors, online and target network
    vocabulary-{sha256}.json   item ids, in chunks that are shared between versions
    labels/stable              which version servers should use; labels/canary likewise

What is in a file named by its hash never changes, so a manifest that can be read names files that are whole, and a
server that reads while the learner writes gets one version or the other. A learner that was replaced, and does not know
yet, writes manifests of its own epoch only; where it has moved a label, its successor's newest version is meant.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from learner.blobs import open_blobs
from learner.fence import Fence, Fenced
from streaming.interning import Vocabulary

logger = logging.getLogger(__name__)

FORMAT: Final = "bellwether-weights/5"
CHUNK: Final = 8192  # item ids in one vocabulary file; all but the last file of a vocabulary are full


class WeightsError(Exception):
    """The weight store cannot do what was asked; the message says what and what to do about it."""


class WeightsMissing(WeightsError):
    """No such version: never published, or dropped since."""


class WeightsDamaged(WeightsError):
    """A file of this version is not what its manifest says; keep what you have and wait for the next version."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What a learner says about the weights it publishes."""

    step: int = 0  # the learner's step (gradient updates) that these weights have seen
    last_target_sync_step: int = (
        0  # the step at which the target network was last made equal to the online one
    )
    published_ms: int = 0  # wall clock of the learner, ms since 1970
    positions: Mapping[int, int] = field(
        default_factory=dict
    )  # partition -> next offset of `events` to be read
    events_through_ms: int = 0  # event time that these weights have come to, by clocks beyond doubt, 0: none
    transitions: int = 0  # inserted into replay so far
    updates: int = 0  # gradient updates so far
    settings: Mapping[str, Any] = field(
        default_factory=dict
    )  # of the network: all that is needed to build it (JSON)


@dataclass(frozen=True, kw_only=True)
class Manifest(Meta):
    """One version: what the learner said, and what the files must be."""

    version: int
    epoch: int  # of the learner that published it (see learner.fence); readers never go back to a lower one
    parent: int | None  # the version that these weights were trained on from; None for the first
    tensors_sha256: str
    shapes: Mapping[str, tuple[int, ...]]  # of each tensor
    dtypes: Mapping[str, str]  # of each tensor, numpy's names
    vocabulary_sha256: tuple[str, ...]  # of each chunk, in order
    items: int  # length of the vocabulary


class Weights(NamedTuple):
    """One version, checked: hashes, shapes, and every number finite."""

    manifest: Manifest
    tensors: dict[str, npt.NDArray[Any]]  # "online.…" and "target.…", as the agent named them
    vocabulary: list[str]  # [items] vocabulary[i] is the item_id of vocabulary id i + 1


class _Tensor(Protocol):
    """What we need of a torch tensor; this module works without torch."""

    def detach(self) -> Any: ...


Tensors: TypeAlias = Mapping[str, npt.NDArray[Any] | _Tensor]


class _Label(NamedTuple):
    """What a label file says."""

    version: int
    epoch: int  # of the learner that set it
    held: bool  # set by hand: it names this version, whoever publishes meanwhile


def store_url(text: str) -> str:
    """The text, if it is a path or a URL that a store can be opened at. Raises: ValueError."""
    open_blobs(text)
    return text


class WeightStore:
    """Publishes and reads versions; one thread at a time, any number of processes.

    url: a directory, or any fsspec URL. keep: newest versions kept, >= 1; those that a label names stay beyond
    that. fence: the publishing learner's; readers have none.
    Raises: ValueError for a URL that cannot be opened.
    """

    def __init__(self, url: str | os.PathLike[str], keep: int = 10, fence: Fence | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1 versions, not {keep}")
        self.url = os.fspath(url)
        self._blobs = open_blobs(url)
        self._keep = keep
        self._fence = fence
        self._published: dict[int, Manifest] = {}  # every version that is still there, once publishing began
        self._unsure: dict[int, Manifest] = {}  # whose manifest failed to be written, or was all the same
        self._leftovers: set[str] = set()  # files that go unless a version needs them
        self._last = 0  # the highest version number ever given
        self._opened = False
        self._chunks: list[_Chunk] = []  # of the vocabulary published last, in order
        self._read: dict[str, list[str]] = {}  # chunks of the version loaded last
        self._seen: dict[str, _Label] = {}
        self._said: dict[str, bytes] = {}  # what these labels' files said

    # --- reading

    def latest(self, label: str = "stable") -> int | None:
        """The version that the label names now; None before the first. One small read, and a listing if it has moved.

        A label moved by a learner that was replaced stands for what its successor published last. One that is
        gone is forgotten, for the store was emptied: whoever sets it anew is followed.
        Raises: WeightsDamaged when the label cannot be understood; OSError where a retry may help.
        """
        try:
            data = self._blobs.read(f"labels/{label}")
        except FileNotFoundError:
            self._seen.pop(label, None)
            self._said.pop(label, None)
            return None
        if data != self._said.get(label):
            found = self._meant(_parse_label(label, data))
            if label not in self._seen or found.epoch >= self._seen[label].epoch:
                self._seen[label] = found
            self._said[label] = data
        return self._seen[label].version

    def _meant(self, label: _Label) -> _Label:
        """The label, unless a learner has moved it who has a successor."""
        epoch, version = max(((epoch, version) for version, epoch, _ in self._manifests()), default=(0, 0))
        return _Label(version, epoch, False) if epoch > label.epoch and not label.held else label

    def manifest(self, version: int) -> Manifest:
        """What a version is. Raises: WeightsMissing, WeightsDamaged, OSError where a retry may help."""
        names = [(name, epoch) for number, epoch, name in self._manifests() if number == version]
        name, epoch = names[-1] if names else (_manifest_name(version, 0), 0)
        return _parse_manifest(name, self._get(version, name), version, epoch)

    def load(self, version: int) -> Weights:
        """One version, every byte and number of it checked.

        Raises: WeightsMissing; WeightsDamaged, naming file and reason; OSError where a retry may help.
        """
        manifest = self.manifest(version)
        name = f"{manifest.tensors_sha256}.safetensors"
        tensors = _checked_tensors(name, self._hashed(version, name, manifest.tensors_sha256), manifest)
        vocabulary: list[str] = []
        for sha256 in manifest.vocabulary_sha256:
            vocabulary += self._chunk(version, sha256)
        self._read = {sha256: self._read[sha256] for sha256 in manifest.vocabulary_sha256}
        if len(vocabulary) != manifest.items:
            raise WeightsDamaged(
                f"version {version}: vocabulary of {len(vocabulary)} items, the manifest says {manifest.items}"
            )
        return Weights(manifest, tensors, vocabulary)

    def versions(self) -> list[int]:
        """All versions that are there, ascending."""
        return sorted({version for version, _, _ in self._manifests()})

    def epoch(self) -> int:
        """The highest epoch of all versions and labels; a new learner must claim a higher one (`Fence(above=...)`)."""
        labels = (label.epoch for label in self._labels().values())
        return max([0, *labels, *(epoch for _, epoch, _ in self._manifests())])

    def _manifests(self) -> list[tuple[int, int, str]]:
        """(version, epoch, name) of all manifests, ascending: of one version's, the last one counts."""
        return _manifests_in(self._blobs.names())

    def _get(self, version: int, name: str) -> bytes:
        try:
            return self._blobs.read(name)
        except FileNotFoundError:
            raise WeightsMissing(
                f"version {version}: {name} is not in {self.url}; it was never published, or dropped since"
            ) from None

    def _hashed(self, version: int, name: str, sha256: str) -> bytes:
        data = self._get(version, name)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise WeightsDamaged(f"version {version}: {name} is not what its hash says ({len(data)} bytes)")
        return data

    def _chunk(self, version: int, sha256: str) -> list[str]:
        """One file of the vocabulary; those of the version loaded last are not read again."""
        if sha256 not in self._read:
            data = self._hashed(version, f"vocabulary-{sha256}.json", sha256)
            self._read[sha256] = json.loads(data)
        return self._read[sha256]

    def _labels(self) -> dict[str, _Label]:
        labels = {}
        for name in self._blobs.names("labels"):
            try:
                labels[name] = _parse_label(name, self._blobs.read(f"labels/{name}"))
            except FileNotFoundError:
                continue  # removed in between
            except WeightsDamaged as error:  # it names nothing, until it is set anew
                logger.warning("%s", error)
        return labels

    # --- publishing

    def publish(
        self, tensors: Tensors, meta: Meta, vocabulary: Vocabulary, label: str | None = "stable"
    ) -> Manifest:
        """Make the next version and point the label at it; None: no label moves.

        tensors: numpy arrays or torch tensors. vocabulary: the same one, grown or not, at each call of this store.
        Raises: Fenced when a newer learner has taken over; WeightsError on a tensor that is not finite (nothing is
        published); OSError where a retry may help. That old versions could not be deleted is no error: it is tried
        again with the next one.
        """
        self._allow()
        self._open()
        arrays = {name: _array(tensor) for name, tensor in tensors.items()}
        for name, array in arrays.items():
            if not _finite(array):
                raise WeightsError(
                    f"tensor {name!r} has NaN or Inf: not published; the training has diverged"
                )
        data = safetensors.numpy.save(arrays)
        sha256 = hashlib.sha256(data).hexdigest()
        self._leftovers.add(f"{sha256}.safetensors")  # until its manifest is written
        self._blobs.write(f"{sha256}.safetensors", data)
        there = self._blobs.names()  # one listing for both
        chunks = self._write_vocabulary(vocabulary, set(there))
        self._check()  # the upload may have taken long
        version = max([self._last, *(version for version, _, _ in _manifests_in(there))]) + 1
        manifest = Manifest(
            **{f.name: getattr(meta, f.name) for f in fields(Meta)},
            version=version,
            epoch=self._epoch,
            parent=max(self._published, default=None),
            tensors_sha256=sha256,
            shapes={name: array.shape for name, array in arrays.items()},
            dtypes={name: str(array.dtype) for name, array in arrays.items()},
            vocabulary_sha256=chunks,
            items=sum(len(chunk.items) for chunk in self._chunks),
        )
        # before it is written: a number is not given again where nobody can tell whether that was
        self._last, self._unsure[version] = version, manifest
        self._blobs.write(_manifest_name(version, manifest.epoch), _manifest_json(manifest))
        self._published[version] = self._unsure.pop(version)
        if label is not None:
            self._set_label(label, version, held=False)
        try:
            self._check()  # or files that a successor has come to use would go
            self._drop_old()
        except OSError as error:  # the version is there all the same
            logger.warning("old versions stay in %s until the next one: %s", self.url, error)
        return manifest

    def set_label(self, label: str, version: int) -> None:
        """Point a label at a version that is there: promote a canary, or go back.

        Raises: WeightsMissing, WeightsDamaged, Fenced.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", label):
            raise ValueError(f"a label is a lower-case word like 'stable' or 'canary', not {label!r}")
        self._allow()
        self.manifest(version)
        self._set_label(label, version, held=True)

    @property
    def _epoch(self) -> int:
        """Ours; without a fence that of whoever set a label last, so that an operator's label counts."""
        return self._fence.epoch if self._fence else self.epoch()

    def _set_label(self, label: str, version: int, held: bool) -> None:
        text = json.dumps(_Label(version, self._epoch, held)._asdict())
        self._check()
        self._blobs.write(f"labels/{label}", text.encode())

    def _check(self) -> None:
        """Raises: Fenced."""
        if self._fence is not None:
            self._fence.check()

    def _allow(self) -> None:
        """Raises: Fenced. The store is asked too: a learner with another data directory may publish here."""
        if self._fence is None:
            return
        self._fence.check()
        epoch = self.epoch()
        if epoch > self._fence.epoch:
            raise Fenced(
                f"epoch {epoch} publishes to {self.url}, this learner has epoch {self._fence.epoch}; "
                "give each learner a weight store of its own"
            )

    def _open(self) -> None:
        """Before the first publication: learn what is there, delete what a killed predecessor left half done."""
        if self._opened:
            return
        manifests = self._manifests()
        numbers = (version for version, _, _ in manifests)
        self._last = max([0, *numbers, *(label.version for label in self._labels().values())])
        published: dict[int, Manifest] = {}  # not ours yet: where this fails, it begins anew
        for version, epoch, name in manifests:
            try:
                manifest = _parse_manifest(name, self._get(version, name), version, epoch)
            except WeightsDamaged:  # nobody can use it; its number is not given again
                self._blobs.remove(name)
                continue
            if version in published:  # by a learner that was replaced meanwhile
                self._blobs.remove(_manifest_name(version, published[version].epoch))
            published[version] = manifest
        named = {name for manifest in published.values() for name in _files(manifest)}
        for name in self._blobs.names():
            if re.fullmatch(r"(vocabulary-)?[0-9a-f]{64}\.(json|safetensors)", name) and name not in named:
                self._blobs.remove(name)
        self._published, self._opened = published, True

    def _write_vocabulary(self, vocabulary: Vocabulary, there: set[str]) -> tuple[str, ...]:
        """Write the chunks that are not there; returns the hashes of all, in order.

        A learner that was replaced may have deleted what it had no more use for, just after we had come to use it.
        """
        while self._chunks and len(self._chunks[-1].items) < CHUNK:
            self._chunks.pop()
        for i, chunk in enumerate(self._chunks):
            if len(vocabulary) < (i + 1) * CHUNK or vocabulary.item_id((i + 1) * CHUNK) != chunk.items[-1]:
                raise WeightsError("the vocabulary is not the one published before; open the store anew")
        items = vocabulary.item_ids(len(self._chunks) * CHUNK + 1)
        for start in range(0, len(items), CHUNK):
            ids = items[start : start + CHUNK]
            self._chunks.append(_Chunk(hashlib.sha256(_chunk_json(ids)).hexdigest(), ids))
        for chunk in self._chunks:
            name = f"vocabulary-{chunk.sha256}.json"
            if name not in there:
                self._leftovers.add(name)
                self._blobs.write(name, _chunk_json(chunk.items))
        return tuple(chunk.sha256 for chunk in self._chunks)

    def _drop_old(self) -> None:
        """Delete versions beyond `keep` that no label names, and those of which it is not sure that they are any; then
        the files that no other has. What cannot be deleted is remembered."""
        named, failed = {label.version for label in self._labels().values()}, list[OSError]()
        for versions, kept in ((self._published, self._keep), (self._unsure, 0)):
            for version in sorted(versions)[: max(0, len(versions) - kept)]:
                name = _manifest_name(version, versions[version].epoch)
                # before the files: who finds one must find its files
                if version not in named and self._removed(name, failed):
                    self._leftovers.update(_files(versions.pop(version)))
        there = (*self._published.values(), *self._unsure.values())
        self._leftovers -= {name for manifest in there for name in _files(manifest)}
        self._leftovers = {name for name in sorted(self._leftovers) if not self._removed(name, failed)}
        for folder in ("", "labels"):  # each time: what was killed lately is left, as it may be alive
            self._blobs.sweep(folder)
        if failed:
            logger.warning(
                "%d old files stay in %s until the next version: %s", len(failed), self.url, failed[-1]
            )

    def _removed(self, name: str, failed: list[OSError]) -> bool:
        """Delete a file; whether that succeeded."""
        try:
            self._blobs.remove(name)
        except OSError as error:
            failed.append(error)
            return False
        return True


class _Chunk(NamedTuple):
    """One file of the vocabulary."""

    sha256: str
    items: list[str]


# --- files -----------------------------------------------------------------------------------------------


def _manifest_name(version: int, epoch: int) -> str:
    return f"v{version:08d}-{epoch:08d}.json"


def _manifests_in(names: list[str]) -> list[tuple[int, int, str]]:
    """(version, epoch, name) of the manifests among these names, ascending."""
    # formats before 4 have no epoch in the name
    found = (re.fullmatch(r"v(\d+)(?:-(\d+))?\.json", name) for name in names)
    return sorted((int(match[1]), int(match[2] or 0), match[0]) for match in found if match)


def _chunk_json(items: list[str]) -> bytes:
    return json.dumps(items, ensure_ascii=False, separators=(",", ":")).encode()


def _files(manifest: Manifest) -> list[str]:
    """What a version needs beside its manifest."""
    chunks = [f"vocabulary-{sha256}.json" for sha256 in manifest.vocabulary_sha256]
    return [f"{manifest.tensors_sha256}.safetensors", *chunks]


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _manifest_json(manifest: Manifest) -> bytes:
    """As JSON with its own hash in front. Positions' partitions become strings, as JSON wants."""
    body = json.loads(json.dumps({"format": FORMAT, **asdict(manifest)}))
    return json.dumps({"sha256": _digest(body), **body}, indent=1).encode()


def _parse_manifest(name: str, data: bytes, version: int, epoch: int) -> Manifest:
    """Raises: WeightsDamaged."""
    try:
        body = json.loads(data)
        if body.pop("sha256") != _digest(body):
            raise ValueError("its own hash is wrong")
        if (made := body.pop("format")) != FORMAT:
            raise ValueError(f"is of format {made!r}, this version reads {FORMAT!r}")
        body["positions"] = {int(partition): offset for partition, offset in body["positions"].items()}
        body["shapes"] = {tensor: tuple(shape) for tensor, shape in body["shapes"].items()}
        body["vocabulary_sha256"] = tuple(body["vocabulary_sha256"])
        manifest = Manifest(**body)
        if (manifest.version, manifest.epoch) != (version, epoch):
            raise ValueError(f"it is that of version {manifest.version} by epoch {manifest.epoch}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsDamaged(f"version {version}: {name} is no manifest: {error!r}") from error
    return manifest


def _parse_label(label: str, data: bytes) -> _Label:
    """Raises: WeightsDamaged."""
    try:
        body = json.loads(data)
        # those of earlier formats do not say by whom they were set
        return _Label(int(body["version"]), int(body["epoch"]), bool(body.get("held", True)))
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsDamaged(f"label {label!r} cannot be read: {data[:80]!r}; publish anew") from error


def _checked_tensors(name: str, data: bytes, manifest: Manifest) -> dict[str, npt.NDArray[Any]]:
    """Raises: WeightsDamaged where shapes, types or numbers are not what they must be."""
    where = f"version {manifest.version}: {name}"
    tensors = safetensors.numpy.load(data)
    if sorted(tensors) != sorted(manifest.shapes):
        raise WeightsDamaged(f"{where} has other tensors than its manifest says")
    for tensor, array in tensors.items():
        stated = (manifest.shapes[tensor], manifest.dtypes[tensor])
        if (array.shape, str(array.dtype)) != stated:
            raise WeightsDamaged(
                f"{where}: {tensor} is {array.shape} {array.dtype}, the manifest says {stated}"
            )
        if not _finite(array):
            raise WeightsDamaged(f"{where}: {tensor} has NaN or Inf")
    return tensors


def _array(tensor: npt.NDArray[Any] | _Tensor) -> npt.NDArray[Any]:
    """As numpy, laid out plainly: safetensors writes the raw buffer, a strided view would come out wrong."""
    if isinstance(tensor, np.ndarray | np.generic):  # numpy gives scalars for 0-d results
        return np.asarray(tensor, order="C")
    return np.asarray(tensor.detach().cpu().numpy(), order="C")


def _finite(array: npt.NDArray[Any]) -> bool:
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())
