"""The weight store, over a directory and over fsspec."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid

import fsspec
import numpy as np
import pytest
import torch

from learner import weights as module
from learner.blobs import _Remote
from learner.fence import Fence, Fenced
from learner.weights import Meta, WeightsDamaged, WeightsError, WeightsMissing, WeightStore
from streaming.interning import Vocabulary


@pytest.fixture(params=["directory", "memory"])
def url(request, tmp_path):
    return (
        str(tmp_path / "weights") if request.param == "directory" else f"memory://weights-{uuid.uuid4().hex}"
    )


def items(*names):
    vocabulary = Vocabulary()
    vocabulary.intern_all(names)
    return vocabulary


def tensors(scale=1.0):
    return {
        "online.weight": np.arange(6, dtype=np.float32).reshape(2, 3) * scale,
        "target.weight": np.zeros((0, 3), np.float32),
        "catalog.on_offer": np.array([True, False]),
    }


def files(url):
    fs, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root).lstrip("/") for path in fs.find(root)}


def corrupt(url, name, change):
    fs, root = fsspec.core.url_to_fs(url)
    path = f"{root}/{name}"
    fs.pipe_file(path, change(fs.cat_file(path)))


def flip(data):
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def test_what_was_published_is_loaded(url):
    store = WeightStore(url)
    assert store.latest() is None
    meta = Meta(
        step=7,
        last_target_sync_step=5,
        published_ms=1_700_000_000_000,
        positions={0: 11, 3: 12},
        events_through_ms=1_600_000_000_000,
        transitions=100,
        updates=7,
        settings={"dims": 32, "names": ["a"]},
    )
    published = store.publish(tensors(), meta, items("phone", "étui"))
    reader = WeightStore(url)
    assert reader.latest() == published.version == 1
    weights = reader.load(1)
    assert weights.manifest == published
    assert weights.manifest.positions == {0: 11, 3: 12}
    assert weights.manifest.shapes["online.weight"] == (2, 3)
    assert weights.vocabulary == ["phone", "étui"]
    for name, tensor in tensors().items():
        np.testing.assert_array_equal(weights.tensors[name], tensor)
        assert weights.tensors[name].dtype == tensor.dtype


def test_torch_tensors_and_strided_views_keep_their_numbers(url):
    store = WeightStore(url)
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    view = np.arange(12).reshape(3, 4).T
    store.publish(
        {"online.a": base.T, "online.b": view, "online.c": base[:, 1], "online.d": np.float32(2)},
        Meta(),
        items(),
    )
    loaded = store.load(1).tensors
    np.testing.assert_array_equal(loaded["online.a"], base.detach().numpy().T)
    np.testing.assert_array_equal(loaded["online.b"], view)
    np.testing.assert_array_equal(loaded["online.c"], [1, 5, 9])
    assert (loaded["online.d"].shape, loaded["online.d"].tolist()) == ((), 2)


def test_versions_go_on_rising_after_a_restart_and_name_their_parent(url):
    for expected in (1, 2, 3):
        manifest = WeightStore(url, keep=1).publish(tensors(expected), Meta(), items("a"))
        assert (manifest.version, manifest.parent) == (expected, expected - 1 or None)


def test_old_versions_go_with_their_files_and_labelled_ones_stay(url):
    store = WeightStore(url, keep=2)
    vocabulary = items("a")
    store.publish(tensors(1), Meta(), vocabulary)
    store.set_label("canary", 1)
    for scale in (2, 3, 4):
        store.publish(tensors(scale), Meta(), vocabulary)
    assert store.versions() == [1, 3, 4]
    assert store.latest("canary") == 1
    assert store.latest() == 4
    store.load(1)
    with pytest.raises(WeightsMissing, match=r"v00000002-00000000\.json"):
        store.load(2)
    assert len([name for name in files(url) if name.endswith(".safetensors")]) == 3
    assert len([name for name in files(url) if name.startswith("vocabulary-")]) == 1


def test_equal_tensors_and_an_unchanged_vocabulary_share_their_files(url):
    store = WeightStore(url)
    vocabulary = items("a", "b")
    first = store.publish(tensors(), Meta(), vocabulary)
    second = store.publish(tensors(), Meta(step=1), vocabulary)
    assert first.tensors_sha256 == second.tensors_sha256
    assert first.vocabulary_sha256 == second.vocabulary_sha256
    assert store.load(1).tensors.keys() == store.load(2).tensors.keys()


def test_a_vocabulary_grows_in_chunks_that_are_written_once(url, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)
    store, vocabulary = WeightStore(url), items(*"abcd")
    first = store.publish(tensors(), Meta(), vocabulary)
    vocabulary.intern_all(list("efgh"))
    second = store.publish(tensors(), Meta(), vocabulary)
    assert len(first.vocabulary_sha256) == 2
    assert len(second.vocabulary_sha256) == 3
    assert first.vocabulary_sha256[0] == second.vocabulary_sha256[0]
    assert first.vocabulary_sha256[1] != second.vocabulary_sha256[1]
    reader = WeightStore(url)
    assert reader.load(1).vocabulary == list("abcd")
    assert reader.load(2).vocabulary == list("abcdefgh")
    assert store.load(2).vocabulary == list("abcdefgh")
    vocabulary.intern("i")
    store.publish(tensors(), Meta(), vocabulary)
    assert WeightStore(url).load(3).vocabulary == list("abcdefghi")


def test_another_vocabulary_in_the_same_store_object_is_refused(url, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    store = WeightStore(url)
    store.publish(tensors(), Meta(), items(*"abc"))
    with pytest.raises(WeightsError, match="not the one published before"):
        store.publish(tensors(), Meta(), items(*"xyz"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_tensors_that_are_not_finite_are_never_published(url, bad):
    store = WeightStore(url)
    with pytest.raises(WeightsError, match=r"'online\.w' has NaN or Inf"):
        store.publish({"online.w": np.array([1.0, bad])}, Meta(), items())
    assert store.latest() is None
    assert store.versions() == []


@pytest.mark.parametrize(
    "change", [flip, lambda data: data[:-1], lambda data: b"", lambda data: data + b" x"]
)
@pytest.mark.parametrize("kind", ["v0", "vocabulary-", "tensors"])
def test_any_damage_is_found_and_names_its_file(url, kind, change):
    WeightStore(url).publish(tensors(), Meta(), items("a"))
    names = sorted(files(url))
    name = next(n for n in names if (n.endswith(".safetensors") if kind == "tensors" else n.startswith(kind)))
    corrupt(url, name, change)
    with pytest.raises(WeightsDamaged, match=name.replace(".", r"\.")):
        WeightStore(url).load(1)


def test_every_single_bit_of_a_manifest_matters(tmp_path):
    store = WeightStore(tmp_path)
    whole = store.publish(tensors(), Meta(), items("a"))
    path = tmp_path / "v00000001-00000000.json"
    data = path.read_bytes()
    for bit in range(len(data) * 8):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        try:
            assert store.manifest(1) == whole  # white space and the like
        except WeightsDamaged:
            continue


def test_finite_numbers_are_demanded_on_loading_too(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finite", lambda array: True)  # a publisher without the check
        WeightStore(tmp_path).publish({"online.w": np.array([np.nan])}, Meta(), items())
    with pytest.raises(WeightsDamaged, match=r"online\.w has NaN or Inf"):
        WeightStore(tmp_path).load(1)


def test_a_damaged_label_says_so(url):
    store = WeightStore(url)
    store.publish(tensors(), Meta(), items())
    corrupt(url, "labels/stable", lambda data: data[:5])
    with pytest.raises(WeightsDamaged, match="'stable' cannot be read"):
        store.latest()


def test_a_label_may_go_back_to_an_older_version(url):
    store = WeightStore(url)
    store.publish(tensors(1), Meta(), items())
    store.publish(tensors(2), Meta(), items())
    reader = WeightStore(url)
    assert reader.latest() == 2
    WeightStore(url).set_label("stable", 1)
    assert reader.latest() == 1
    with pytest.raises(WeightsMissing):
        store.set_label("stable", 9)
    with pytest.raises(ValueError, match="lower-case word"):
        store.set_label("../stable", 1)


def test_a_replaced_learner_cannot_publish_and_is_not_followed(url, tmp_path):
    old = WeightStore(url, fence=Fence(tmp_path / "data", "main"))
    old.publish(tensors(1), Meta(), items())
    reader = WeightStore(url)
    assert reader.latest() == 1
    new = WeightStore(url, fence=Fence(tmp_path / "data", "main"))
    assert new.publish(tensors(2), Meta(), items()).epoch == 2
    assert reader.latest() == 2
    with pytest.raises(Fenced):
        old.publish(tensors(3), Meta(), items())
    with pytest.raises(Fenced):
        old.set_label("stable", 1)
    # what it may have written between asking and writing
    corrupt(url, "labels/stable", lambda data: json.dumps({"version": 1, "epoch": 1}).encode())
    assert reader.latest() == 2


def test_a_store_that_was_emptied_is_followed_anew_whoever_publishes(url, tmp_path):
    for _ in range(3):
        fence = Fence(tmp_path / "data", "main")
    WeightStore(url, fence=fence).publish(tensors(1), Meta(), items())
    reader = WeightStore(url)
    assert reader.latest() == 1
    blobs = WeightStore(url)._blobs
    for name in blobs.names():
        blobs.remove(name)
    blobs.remove("labels/stable")
    assert reader.latest() is None
    other = WeightStore(url, fence=Fence(tmp_path / "another", "main"))
    made = [other.publish(tensors(seed), Meta(), items()) for seed in (2, 3)][-1]
    assert (made.version, made.epoch, fence.epoch) == (2, 1, 3)
    assert reader.latest() == made.version
    assert reader.load(made.version).manifest == made


class Sleeper:
    """The blobs of a learner that sleeps, once, before it writes or removes what begins so; `meanwhile` happens."""

    def __init__(self, store, begins, meanwhile):
        self._blobs, self._begins, self._meanwhile = store._blobs, begins, meanwhile
        store._blobs = self

    def __getattr__(self, name):
        return getattr(self._blobs, name)

    def write(self, name, data):
        self._sleep_before(name)
        self._blobs.write(name, data)

    def remove(self, name):
        self._sleep_before(name)
        self._blobs.remove(name)

    def _sleep_before(self, name):
        if self._meanwhile and name.startswith(self._begins):
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()


class Shaky:
    """The blobs of a store in which a verb fails for names that begin so, as an object store's do for a moment. late:
    it does what it was asked to before it fails."""

    def __init__(self, store, verb, begins, late=False):
        self.blobs, self._fails, self._late = store._blobs, (verb, begins), late
        store._blobs = self

    def _maybe(self, verb, name, *data):
        fails = verb == self._fails[0] and name.startswith(self._fails[1])
        result = getattr(self.blobs, verb)(name, *data) if self._late or not fails else None
        if fails:
            raise OSError(f"503: {verb} {name}")
        return result

    def read(self, name):
        return self._maybe("read", name)

    def write(self, name, data):
        self._maybe("write", name, data)

    def remove(self, name):
        self._maybe("remove", name)

    def __getattr__(self, name):
        return getattr(self.blobs, name)


def published_files(store):
    """What should be there: manifests, and what they name."""
    needed = set()
    for version in store.versions():
        manifest = store.load(version).manifest
        needed |= {module._manifest_name(version, manifest.epoch), *module._files(manifest)}
    return needed | {f"labels/{name}" for name in store._blobs.names("labels")}


@pytest.mark.parametrize("begins", ["v0", "vocabulary-", ""])
def test_what_could_not_be_deleted_goes_with_a_later_version_and_hinders_none(url, begins, caplog):
    store, grown = WeightStore(url, keep=2), items("a")
    for n in range(3):
        store.publish(tensors(n), Meta(), grown)
    grown.intern("b")
    shaky = Shaky(store, "remove", begins)
    for n in (3, 4):
        assert store.publish(tensors(n), Meta(), grown).version == store.latest() == n + 1
    assert "stay in" in caplog.text
    store._blobs = shaky.blobs
    store.publish(tensors(5), Meta(), grown)
    assert store.versions() == [5, 6]
    assert files(url) == published_files(store)


def test_a_version_that_could_not_be_deleted_and_got_a_label_since_stays(url):
    store = WeightStore(url, keep=1)
    store.publish(tensors(1), Meta(), items("a"))
    shaky = Shaky(store, "remove", "v0")
    store.publish(tensors(2), Meta(), items("a"))
    store._blobs = shaky.blobs
    WeightStore(url).set_label("canary", 1)
    store.publish(tensors(3), Meta(), items("a"))
    assert store.versions() == [1, 3]
    store.load(1)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("begins", ["v0", "vocabulary-", ""])
def test_of_a_version_that_could_not_be_written_nothing_stays(url, begins, late):
    store, grown = WeightStore(url, keep=3), items("a")
    last = store.publish(tensors(0), Meta(), grown).version
    for n in range(3):
        grown.intern(f"more {n}")
        shaky = Shaky(store, "write", begins, late=late)
        with pytest.raises(OSError, match="503"):
            store.publish(tensors(10 + n), Meta(), grown)
        store._blobs = shaky.blobs
        assert store.latest() == last  # no label has moved
        last = store.publish(tensors(20 + n), Meta(), grown).version
        assert store.latest() == last
    assert len(store.versions()) == 3
    assert files(url) == published_files(store)


def test_a_store_that_could_not_be_opened_at_once_keeps_its_versions(url):
    for n in range(3):
        WeightStore(url).publish(tensors(n), Meta(), items("a"))
    store = WeightStore(url)
    shaky = Shaky(store, "read", "v00000003")
    with pytest.raises(OSError, match="503"):
        store.publish(tensors(3), Meta(), items("a"))
    store._blobs = shaky.blobs
    store.publish(tensors(3), Meta(), items("a"))
    assert store.versions() == [1, 2, 3, 4]


@pytest.mark.parametrize("begins", ["v0", "labels/"])
@pytest.mark.parametrize("published", [1, 2, 4])
def test_what_a_learner_writes_that_slept_while_it_was_replaced_is_used_by_nobody(
    url, tmp_path, begins, published
):
    old = WeightStore(url, fence=Fence(tmp_path / "data", "main"))
    vocabulary = items("a")
    old.publish(tensors(1), Meta(), vocabulary)
    watching, new = WeightStore(url), []
    assert watching.latest() == 1

    def take_over():
        new.append(WeightStore(url, keep=2, fence=Fence(tmp_path / "data", "main")))
        for n in range(published):
            new[0].publish(tensors(100 + n), Meta(), vocabulary)

    Sleeper(old, begins, take_over)
    with pytest.raises(Fenced):
        old.publish(tensors(2), Meta(), vocabulary)
    for reader in (WeightStore(url), watching):
        weights = reader.load(reader.latest())
        assert weights.manifest.epoch == 2
        assert weights.tensors["online.weight"].max() == 5 * (99 + published)
    assert WeightStore(url).epoch() == 2
    last = new[0].publish(tensors(200), Meta(), vocabulary)
    assert [reader.latest() for reader in (WeightStore(url), watching)] == [last.version] * 2
    third = WeightStore(url, keep=2, fence=Fence(tmp_path / "data", "main"))
    newest = third.publish(tensors(300), Meta(), vocabulary)
    assert third.versions() == [last.version, newest.version]


def test_a_vocabulary_file_that_a_replaced_learner_deletes_is_there_again_in_the_next_version(url, tmp_path):
    old, new = WeightStore(url, keep=1, fence=Fence(tmp_path / "data", "main")), []
    grown = items("a", "b")
    old.publish(tensors(1), Meta(), grown)
    grown.intern("c")  # the file of "a" and "b" is of no use to it any more
    vocabulary = items("a", "b")  # of the checkpoint that its successor goes on from

    def take_over():
        new.append(WeightStore(url, fence=Fence(tmp_path / "data", "main")))
        new[0].publish(tensors(2), Meta(), vocabulary)

    Sleeper(old, "v0", lambda: Sleeper(old, "v0", take_over))  # the second time before it removes a manifest
    old.publish(tensors(3), Meta(), grown)
    with pytest.raises(WeightsMissing, match="vocabulary-"):
        WeightStore(url).load(WeightStore(url).latest())
    new[0].publish(tensors(4), Meta(), vocabulary)
    assert WeightStore(url).load(WeightStore(url).latest()).vocabulary == ["a", "b"]


def test_a_label_that_was_set_by_hand_stays_whoever_publishes(url, tmp_path):
    WeightStore(url, fence=Fence(tmp_path / "data", "main")).publish(tensors(1), Meta(), items())
    WeightStore(url).set_label("held", 1)
    WeightStore(url, fence=Fence(tmp_path / "data", "main")).publish(tensors(2), Meta(), items())
    assert (WeightStore(url).latest("held"), WeightStore(url).latest()) == (1, 2)


def test_a_store_of_an_earlier_format_is_gone_on_from(url):
    published = WeightStore(url).publish(tensors(), Meta(), items())
    fs, root = fsspec.core.url_to_fs(url)
    fs.mv(f"{root}/v00000001-00000000.json", f"{root}/v00000007.json")
    corrupt(url, "labels/stable", lambda data: b'{"version": 7, "epoch": 5}')
    with pytest.raises(WeightsDamaged, match=r"v00000007\.json"):
        WeightStore(url).load(WeightStore(url).latest())
    assert WeightStore(url).epoch() == 5
    assert WeightStore(url).publish(tensors(), Meta(), items()).version == 8
    assert files(url) >= {"v00000008-00000005.json", f"{published.tensors_sha256}.safetensors"}
    assert WeightStore(url).versions() == [8]


def test_a_learner_that_lost_its_data_directory_must_claim_above_the_stores_epoch(url, tmp_path):
    for _ in range(3):
        fence = Fence(tmp_path / "data", "main")
    WeightStore(url, fence=fence).publish(tensors(), Meta(), items())
    with pytest.raises(Fenced, match="epoch 3 publishes"):
        WeightStore(url, fence=Fence(tmp_path / "other", "main")).publish(tensors(), Meta(), items())
    above = WeightStore(url).epoch()
    fence = Fence(tmp_path / "third", "main", above=above)
    assert WeightStore(url, fence=fence).publish(tensors(), Meta(), items()).epoch == 4


def test_leftovers_of_a_killed_learner_go_and_other_files_stay(url):
    WeightStore(url).publish(tensors(), Meta(), items())
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/{'0' * 64}.safetensors", b"half")
    fs.pipe_file(f"{root}/README.txt", b"mine")
    WeightStore(url).publish(tensors(2), Meta(), items())
    assert f"{'0' * 64}.safetensors" not in files(url)
    assert "README.txt" in files(url)


def test_what_a_learner_was_killed_while_writing_goes_once_nobody_can_be_at_it_any_more(tmp_path):
    data, root = tmp_path / "data", tmp_path / "weights"
    WeightStore(root, fence=Fence(data, "main")).publish(tensors(), Meta(), items())
    folders = (root, root / "labels", data / "fence" / "main")
    old, young, other = (
        f".{name}" for name in (f"v1.json.{'a' * 32}.tmp", f"v2.json.{'b' * 32}.tmp", "x.tmp")
    )
    for folder in folders:
        for name in (old, young, other):
            (folder / name).write_bytes(b"half")
        for name, age_s in ((old, 3600), (young, 10), (other, 3600)):
            then_s = (folder / young).stat().st_mtime - age_s
            os.utime(folder / name, (then_s, then_s))
    WeightStore(root).load(1)  # who reads deletes nothing
    assert all((folder / old).exists() for folder in folders)
    WeightStore(root, fence=Fence(data, "main")).publish(tensors(2), Meta(), items())
    for folder in folders:
        assert {path.name for path in folder.glob(".*")} == {young, other}


def test_a_reader_beside_a_publisher_always_gets_a_whole_version(tmp_path):
    publisher, seen, stop = WeightStore(tmp_path, keep=2), [], threading.Event()

    def follow():
        reader = WeightStore(tmp_path)
        while not stop.is_set():
            version = reader.latest()
            try:
                weights = reader.load(version) if version else None
            except WeightsMissing:
                continue  # dropped while being read: the next look finds a newer one
            if weights:
                seen.append((version, float(weights.tensors["online.w"][0]), len(weights.vocabulary)))

    thread = threading.Thread(target=follow)
    thread.start()
    vocabulary = Vocabulary()
    for version in range(1, 60):
        vocabulary.intern(f"item {version}")
        publisher.publish({"online.w": np.full(50_000, float(version))}, Meta(), vocabulary)
    stop.set()
    thread.join()
    assert len(seen) > 5
    assert all(version == value == count for version, value, count in seen)


def test_an_unknown_scheme_is_named():
    with pytest.raises(ValueError, match="nosuch"):
        WeightStore("nosuch://bucket/x")


def test_the_module_works_without_torch():
    code = "import sys; sys.modules['torch'] = None; import learner.weights"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_damaged_label_is_mended_by_the_next_version(url):
    store = WeightStore(url)
    store.publish(tensors(), Meta(), items("a"))
    corrupt(url, "labels/stable", lambda data: data[:5])
    with pytest.raises(WeightsDamaged, match="publish anew"):
        WeightStore(url).latest()
    again = WeightStore(url)
    assert again.epoch() == 0
    assert again.publish(tensors(2.0), Meta(), items("a")).version == 2
    assert WeightStore(url).latest() == 2


class Unruly(fsspec.AbstractFileSystem):
    """A driver that raises what only its own package knows."""

    def fail(self, *_, **__):
        raise RuntimeError("the service says: slow down")

    cat_file = pipe_file = ls = rm_file = fail


def test_whatever_a_driver_raises_is_an_oserror_that_says_it():
    blobs = _Remote(Unruly(), "bucket")
    for call in (
        lambda: blobs.read("x"),
        lambda: blobs.write("x", b""),
        blobs.names,
        lambda: blobs.remove("x"),
    ):
        with pytest.raises(OSError, match="RuntimeError: the service says: slow down"):
            call()
