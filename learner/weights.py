"""The weight store: versioned weights that a server can check before it uses them.

A directory, or any fsspec URL (`s3://bucket/prefix`, `memory://weights`), that holds

    v00000042.json             manifest, written last: what it names is there
    {sha256}.safetensors       tensors, online and target network
    vocabulary-{sha256}.json   item ids, in chunks that are shared between versions
    labels/stable              which version servers should use; labels/canary likewise
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy.typing as npt


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
    events_through_ms: int = 0  # event time: the newest event that is in these weights, 0: none
    transitions: int = 0  # inserted into replay so far
    updates: int = 0  # gradient updates so far
    epsilon: float = 0.05  # exploration that the learner suggests, in [0, 1]
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
