"""Checkpoints: whole or not at all, at whatever moment something dies."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.checkpoint import (
    KEEP,
    CheckpointDamaged,
    CheckpointFailed,
    Checkpoints,
    CheckpointWriter,
    Disk,
    Later,
    PartsGone,
    decode,
    encode,
)
from learner.fence import Fence, Fenced

# --- encoding --------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda key: key != "$array"), inner),
)


@given(json_values)
def test_json_values_come_back_as_they_were(value):
    assert decode(encode(value)) == value


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_arrays_of_every_type_and_layout_come_back_as_they_were(dtype):
    base = np.arange(24).astype(dtype).reshape(2, 3, 4)
    views = [base, base.T, base[:, ::2], base[0, 0, 0:0], np.asfortranarray(base), np.array(base[1, 2, 3])]
    for view, back in zip(views, decode(encode({"nested": [views, 7]}))["nested"][0], strict=True):
        np.testing.assert_array_equal(view, back)
        assert (back.dtype, back.shape) == (view.dtype, view.shape)
        assert back.flags.writeable


def test_equal_trees_give_equal_bytes():
    tree = {"a": np.arange(5), "b": {"c": [1, 2.5, None, np.float32(0.5)]}}
    assert encode(tree) == encode({"a": np.arange(5), "b": {"c": [1, 2.5, None, 0.5]}})


def test_not_a_number_survives():
    assert np.isnan(decode(encode({"loss": float("nan")}))["loss"])


@pytest.mark.parametrize("part", [{"a": {"b": object()}}, {"a": {"b": b"bytes"}}])
def test_what_cannot_be_stored_is_named_by_its_path(part):
    with pytest.raises(TypeError, match="/a/b"):
        encode(part)


@pytest.mark.parametrize("key", [1, "$array"])
def test_keys_that_would_not_come_back_are_refused(key):
    with pytest.raises(TypeError, match="must be a string"):
        encode({key: 1})


# --- generations -----------------------------------------------------------------------------------------


def save(checkpoints, number, **others):
    """A generation that says its number in meta, in one part that changes and in one that does not."""
    parts = {"state": {"number": np.array(number)}, "fixed": np.arange(10), **others}
    return checkpoints.save(parts, {"number": number})


def loaded(directory):
    """The number of the newest whole generation, checked to be one and the same everywhere; 0: none."""
    found = Checkpoints(directory).load()
    if found is None:
        return 0
    number = found.meta["number"]
    assert int(found.parts["state"]["number"]) == number
    np.testing.assert_array_equal(found.parts["fixed"], np.arange(10))
    return number


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_an_empty_directory_has_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "new").load() is None


def test_the_newest_generation_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert [save(checkpoints, number) for number in (1, 2, 3)] == [1, 2, 3]
    assert loaded(tmp_path) == 3
    assert sorted(Checkpoints(tmp_path).load().parts) == ["fixed", "state"]


def test_the_last_generations_stay_and_nothing_else(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for number in range(1, 7):
        save(checkpoints, number)
    manifests = [name for name in files(tmp_path) if name.startswith("checkpoint-")]
    parts = [name for name in files(tmp_path) if name.startswith("parts/")]
    assert [int(name[-17:-5]) for name in manifests] == [4, 5, 6]
    assert len(parts) == 4  # three states, and "fixed" once
    assert len(files(tmp_path)) == 7


def test_a_kept_part_is_the_one_of_the_generation_before(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    for number in (2, 3):
        save(checkpoints, number, fixed=KEEP)
    assert loaded(tmp_path) == 3
    again = Checkpoints(tmp_path)
    again.load()
    save(again, 4, fixed=KEEP)
    assert loaded(tmp_path) == 4


def test_keeping_what_was_never_there_is_refused(tmp_path):
    with pytest.raises(KeyError, match="'fixed' is KEEP"):
        save(Checkpoints(tmp_path), 1, fixed=KEEP)


def test_meta_may_have_numbers_as_keys_which_come_back_as_strings(tmp_path):
    Checkpoints(tmp_path).save({}, {"positions": {partition: partition * 7 for partition in range(12)}})
    positions = Checkpoints(tmp_path).load().meta["positions"]
    assert {int(partition): offset for partition, offset in positions.items()} == {
        p: p * 7 for p in range(12)
    }


def test_files_that_are_not_ours_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save(Checkpoints(tmp_path), 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["{}-copy.json", "checkpoint-old.json", "checkpoint-1-2.json", "checkpoint-a-b.json"]
)
def test_a_copy_of_a_manifest_under_another_name_is_none(tmp_path, name):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    (manifest,) = tmp_path.glob("checkpoint-*.json")
    copy = tmp_path / name.format(manifest.stem)
    copy.write_bytes(manifest.read_bytes())
    for number in (2, 3):
        save(checkpoints, number)
    assert loaded(tmp_path) == 3
    assert copy.exists()


# --- damage ----------------------------------------------------------------------------------------------


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[len(data) // 2] ^= 4
    elif kind == "cut":
        del data[len(data) // 2 :]
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["flip", "cut", "gone"])
@pytest.mark.parametrize("which", ["manifest", "part"])
def test_damage_costs_one_generation_and_names_the_file(tmp_path, caplog, kind, which):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    before = set(files(tmp_path))
    save(checkpoints, 2)
    new = sorted(set(files(tmp_path)) - before)
    damage(tmp_path / new[0 if which == "manifest" else 1], kind)
    assert loaded(tmp_path) == 1
    if (which, kind) != ("manifest", "gone"):
        assert "checkpoint-00000000-000000000002.json is damaged" in caplog.text
    if which == "part":
        assert Path(new[1]).name in caplog.text


def test_saving_again_heals_a_damaged_part(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    before = set(files(tmp_path))
    save(checkpoints, 2)
    part = next(name for name in set(files(tmp_path)) - before if name.startswith("parts/"))
    damage(tmp_path / part, "flip")
    again = Checkpoints(tmp_path)
    assert again.load().meta["number"] == 1
    assert save(again, 2) == 3  # the number of a damaged generation is not used again
    assert loaded(tmp_path) == 2


def test_saving_again_heals_all_damaged_parts_of_a_generation(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    before = set(files(tmp_path))
    save(checkpoints, 2, more=np.arange(3))
    new = [name for name in set(files(tmp_path)) - before if name.startswith("parts/")]
    for part in new:
        damage(tmp_path / part, "flip")
    again = Checkpoints(tmp_path)
    assert again.load().meta["number"] == 1
    save(again, 2, more=np.arange(3))
    assert loaded(tmp_path) == 2
    assert len(new) == 2


def test_reading_changes_nothing_on_disk_and_saving_puts_damaged_parts_aside(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    before = set(files(tmp_path))
    save(checkpoints, 2)
    (part,) = (name for name in set(files(tmp_path)) - before if name.startswith("parts/"))
    damage(tmp_path / part, "flip")
    before = files(tmp_path)
    again = Checkpoints(tmp_path)
    assert again.load().meta["number"] == 1
    assert files(tmp_path) == before
    save(again, 3)
    assert set(before) - set(files(tmp_path)) == {part}
    assert (tmp_path / part).with_suffix(".damaged").exists()


def test_when_every_generation_is_damaged_it_says_so_and_does_not_start_anew(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    for name in files(tmp_path):
        if name.startswith("parts/"):
            damage(tmp_path / name, "flip")
    with pytest.raises(CheckpointDamaged, match=r"000000000002\.json.*000000000001\.json"):
        Checkpoints(tmp_path).load()


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    manifest = max(tmp_path.glob("checkpoint-*"))
    data = manifest.read_bytes()
    for bit in range(0, len(data) * 8, 7):
        manifest.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        assert Checkpoints(tmp_path).load().meta["number"] in (1, 2)


# --- dying while writing ---------------------------------------------------------------------------------


class Death(BaseException):
    """The process is gone."""


class DyingDisk(Disk):
    """Real files; dies before step `die_at`, half-way through it where it is a write.

    lose_unsynced: the machine dies, not the process alone: content that was not synced is cut in half, names
    that were not synced are as before.
    """

    def __init__(self, die_at, error=Death, lose_unsynced=False):
        self.steps = 0
        self.die_at = die_at
        self.error = error
        self.lose_unsynced = lose_unsynced
        self.unsynced = set()
        self.renamed = []

    def step(self):
        self.steps += 1
        if self.steps == self.die_at:
            if self.lose_unsynced:
                self.power_cut()
            raise self.error

    def power_cut(self):
        for source, target, before in reversed(self.renamed):
            os.replace(target, source)
            if before is not None:
                target.write_bytes(before)
        for path in self.unsynced:
            if path.exists():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def write(self, path, data):
        super().write(path, data[: len(data) // 2])
        self.unsynced.add(path)
        self.step()
        super().write(path, data)

    def sync(self, path):
        self.step()
        super().sync(path)
        self.unsynced.discard(path)
        self.renamed = [rename for rename in self.renamed if rename[1].parent != path]

    def rename(self, source, target):
        self.step()
        before = target.read_bytes() if target.exists() else None
        super().rename(source, target)
        self.renamed.append((source, target, before))
        if source in self.unsynced:
            self.unsynced ^= {source, target}

    def remove(self, path):
        self.step()
        super().remove(path)


def steps_of_a_save(tmp_path):
    checkpoints = Checkpoints(tmp_path / "count", disk=(disk := DyingDisk(0)), keep=2)
    for number in (1, 2):
        save(checkpoints, number)
    disk.steps = 0
    save(checkpoints, 3)
    return disk.steps


@pytest.mark.parametrize("lose_unsynced", [False, True])
def test_dying_at_any_step_leaves_the_generation_before_or_the_new_one(tmp_path, lose_unsynced):
    steps = steps_of_a_save(tmp_path)
    assert steps > 8
    outcomes = set()
    for die_at in range(1, steps + 1):
        directory = tmp_path / f"{die_at}"
        checkpoints = Checkpoints(directory, keep=2)
        save(checkpoints, 1)
        save(checkpoints, 2)
        checkpoints._disk = DyingDisk(die_at, lose_unsynced=lose_unsynced)
        with pytest.raises(Death):
            save(checkpoints, 3)
        outcomes.add(loaded(directory))
        again = Checkpoints(directory, keep=2)
        again.load()
        save(again, 4)
        assert loaded(directory) == 4
        save(again, 5)
        assert len(files(directory)) == 5  # two manifests, two states, "fixed": nothing is left over
    assert outcomes == {2, 3}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_the_last_good_one_and_the_next_save_works(tmp_path, code):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    for fail_at in range(1, 9):  # part and manifest: write, sync, rename, sync of the directory
        checkpoints._disk = DyingDisk(fail_at, OSError(code, os.strerror(code)))
        with pytest.raises(CheckpointFailed, match=f"{os.strerror(code)}.*last good one is intact"):
            save(checkpoints, 1 + fail_at, fixed=KEEP)
        assert loaded(tmp_path) == 1
        assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
    checkpoints._disk = Disk()
    save(checkpoints, 3, fixed=KEEP)
    assert loaded(tmp_path) == 3


def test_a_real_full_disk_is_reported(tmp_path):
    class Full(Disk):
        def write(self, path, data):
            with open("/dev/full", "wb", buffering=0) as file:
                file.write(data)

    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    checkpoints._disk = Full()
    with pytest.raises(CheckpointFailed, match="No space left"):
        save(checkpoints, 2)
    assert loaded(tmp_path) == 1


def test_failing_to_delete_old_generations_only_costs_space(tmp_path, caplog):
    class NoDelete(Disk):
        def remove(self, path):
            raise OSError(errno.EACCES, "Permission denied")

    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    checkpoints._disk = NoDelete()
    assert save(checkpoints, 2) == 2
    assert "could not delete old checkpoints" in caplog.text
    assert loaded(tmp_path) == 2


WRITER = """
import sys
import numpy as np
from learner.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep=2)
found = checkpoints.load()
number = found.meta["number"] if found else 0
while True:
    number += 1
    parts = {"state": {"number": np.array(number)}, "fixed": np.arange(10)}
    parts |= {f"filler-{i}": np.full(20_000, number + i) for i in range(4)}
    checkpoints.save(parts, {"number": number})
    print(number, flush=True)
"""


def test_a_process_killed_while_it_writes_loses_nothing_that_it_said_was_safe(tmp_path):
    for delay_s in (0.003, 0.02, 0.045):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        said = int(process.stdout.readline())
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        said = max([said, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
        process.wait()
        process.stdout.close()
        assert loaded(tmp_path) in (said, said + 1)


# --- fencing ---------------------------------------------------------------------------------------------


def test_a_replaced_learner_cannot_save_and_what_it_wrote_does_not_count(tmp_path):
    old = Checkpoints(tmp_path, fence=Fence(tmp_path, "main"))
    for number in (1, 2, 3):
        save(old, number)
    new = Checkpoints(tmp_path, fence=Fence(tmp_path, "main"))
    assert new.load().meta["number"] == 3
    save(new, 10)
    with pytest.raises(Fenced):
        save(old, 4)
    # as if it had asked just before, and was late: its generation is higher, but of a lower epoch
    old.fence.check = lambda: None
    for number in (5, 6):
        save(old, number)
    assert loaded(tmp_path) == 10


def test_a_generation_that_is_dropped_while_it_is_read_is_no_damage_and_a_newer_one_is_taken(
    tmp_path, caplog
):
    running, taken = Checkpoints(tmp_path, keep=1), []
    save(running, 1)

    def take(found):
        taken.append(found.meta["number"])
        if taken == [1]:
            save(running, 2)
        return int(found.parts["state"]["number"])

    class Racing(Checkpoints):
        def _manifest(self, generation):
            if generation.generation == 2 and len(taken) == 1:
                save(running, 3)
            return super()._manifest(generation)

    assert Racing(tmp_path).read(take) == 3
    assert taken == [1, 3]
    assert "damaged" not in caplog.text


def test_one_that_was_loaded_before_the_name_was_claimed_is_loaded_again_if_the_other_learner_went_on(
    tmp_path,
):
    old, new = Checkpoints(tmp_path, fence=Fence(tmp_path, "main")), Checkpoints(tmp_path)
    assert new.load() is None
    assert not new.overtaken()
    save(old, 1)
    assert new.overtaken()
    new.fence = Fence(tmp_path, "main")
    assert new.load().meta["number"] == 1
    assert not new.overtaken()
    save(new, 2, fixed=KEEP)
    assert loaded(tmp_path) == 2


def test_it_is_asked_again_before_the_manifest_is_written(tmp_path):
    fence = Fence(tmp_path, "main")
    checkpoints = Checkpoints(tmp_path, fence=fence)

    class Slow(Disk):
        def write(self, path, data):
            Fence(tmp_path, "main")
            super().write(path, data)

    checkpoints._disk = Slow()
    with pytest.raises(Fenced):
        save(checkpoints, 1)
    assert loaded(tmp_path) == 0


class Sleeper(Disk):
    """That of a learner which sleeps before it gives a manifest its name, once, while `meanwhile` happens."""

    def __init__(self, meanwhile):
        self.meanwhile = meanwhile

    def rename(self, source, target):
        if target.suffix == ".json" and self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        super().rename(source, target)


def test_a_learner_that_slept_while_it_was_replaced_deletes_nothing_that_its_successor_keeps(tmp_path):
    old, new = Checkpoints(tmp_path, fence=Fence(tmp_path, "main"), keep=1), []
    save(old, 1)

    def take_over():
        new.append(Checkpoints(tmp_path, fence=Fence(tmp_path, "main"), keep=1))
        assert new[0].load().meta["number"] == 1

    old._disk = Sleeper(take_over)
    with pytest.raises(Fenced):
        save(old, 2, fixed=np.arange(3))
    save(new[0], 3, fixed=KEEP)
    assert loaded(tmp_path) == 3


def test_no_manifest_names_a_part_that_is_gone_and_one_that_keeps_none_heals_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    before = files(tmp_path)
    for name in before:
        if name.startswith("parts/"):
            damage(tmp_path / name, "gone")
    with pytest.raises(PartsGone, match=r"1 parts .*'fixed'"):
        save(checkpoints, 2, fixed=KEEP)
    assert [name for name in files(tmp_path) if name.startswith("checkpoint-")] == before[:1]
    save(checkpoints, 3)
    assert loaded(tmp_path) == 3


# --- in the background -----------------------------------------------------------------------------------


class GatedDisk(Disk):
    def __init__(self):
        self.gate = threading.Event()

    def write(self, path, data):
        assert self.gate.wait(30)
        super().write(path, data)


def test_the_writer_works_beside_the_caller_one_at_a_time(tmp_path):
    disk = GatedDisk()
    writer = CheckpointWriter(Checkpoints(tmp_path, disk=disk))
    assert writer.finished() is None
    writer.start({"state": {"number": np.array(1)}, "fixed": np.arange(10)}, {"number": 1})
    assert writer.busy
    assert writer.finished() is None
    with pytest.raises(RuntimeError, match="still being written"):
        writer.start({}, {})
    disk.gate.set()
    assert writer.finished(timeout_s=30) == 1
    assert not writer.busy
    assert writer.finished() is None
    writer.close()
    assert loaded(tmp_path) == 1


def test_a_part_for_later_is_worked_out_by_the_writer_not_by_the_caller(tmp_path):
    disk, made_by = GatedDisk(), []

    def make():
        made_by.append(threading.current_thread())
        return {"number": np.array(7)}

    writer = CheckpointWriter(Checkpoints(tmp_path, disk=disk))
    disk.gate.set()
    writer.start({"state": Later(make)}, {})
    assert writer.finished(timeout_s=30) == 1
    writer.close()
    assert len(made_by) == 1
    assert made_by[0] is not threading.main_thread()
    found = Checkpoints(tmp_path).load()
    assert found is not None
    assert found.parts["state"] == {"number": np.array(7)}


def test_the_writer_tells_of_a_failure_once_and_goes_on(tmp_path):
    checkpoints = Checkpoints(tmp_path, disk=DyingDisk(1, OSError(errno.ENOSPC, "No space left on device")))
    writer = CheckpointWriter(checkpoints)
    writer.start({"fixed": np.arange(10), "state": {"number": np.array(1)}}, {"number": 1})
    with pytest.raises(CheckpointFailed):
        writer.finished(timeout_s=30)
    assert writer.finished() is None
    writer.start({"fixed": np.arange(10), "state": {"number": np.array(2)}}, {"number": 2})
    assert writer.finished(timeout_s=30) == 1
    writer.close()
    assert loaded(tmp_path) == 2
