"""Checkpoints that fail: training goes on, the last good one stays, and it ends where that has lasted too long."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from learner.checkpoint import CheckpointFailed, Disk
from learner.train import TrainConfig
from streaming.dead_letters import dlq_topic
from streaming.log import LogError, LogUnavailable
from tests.learner_process import await_line, finish, start
from tests.small_shop import Shop, await_offset, delete_topic, learn, newest_meta
from tests.trainer_rig import Rig


class FillingDisk(Disk):
    """A disk that is full while `full` is set."""

    full = False

    def write(self, path, data):
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(path, data)


@pytest.fixture
def disk():
    return FillingDisk()


def rig_on(disk, tmp_path, **config):
    rig = Rig(tmp_path, disk, turn_s=10.0, checkpoint_s=10.0, **config)
    rig.write(100)
    rig.turns(3)
    assert newest_meta(tmp_path)["positions"] == {"0": 100}
    disk.full = True
    return rig


def test_it_ends_once_every_checkpoint_has_failed_for_so_long(disk, tmp_path):
    rig = rig_on(disk, tmp_path, give_up_after_s=600)
    began_s = rig.now_s
    with pytest.raises(CheckpointFailed, match=r"last 6\d\d s has failed .*No space left.*Make room"):
        rig.turns(1000)
    assert 600 <= rig.now_s - began_s <= 640
    assert rig.metrics.checkpoint_failures._value.get() > 50
    assert newest_meta(tmp_path)["positions"] == {"0": 100}
    rig.close()


def test_one_that_succeeds_in_between_begins_the_time_anew(disk, tmp_path):
    rig = rig_on(disk, tmp_path, give_up_after_s=600)
    for _ in range(3):
        disk.full = True
        rig.turns(50)
        disk.full = False
        rig.turns(3)
    rig.close()


def test_0_never_gives_up(disk, tmp_path):
    rig = rig_on(disk, tmp_path, give_up_after_s=0)
    rig.write(50)
    rig.turn_s = 86_400.0
    rig.turns(20)
    assert rig.reader.position() == {0: 150}
    rig.close()


def test_where_parts_on_disk_are_gone_the_checkpoint_after_next_is_whole_again(tmp_path):
    rig = Rig(tmp_path, turn_s=10.0, checkpoint_s=10.0)
    rig.write(100)
    rig.turns(5)
    for part in (tmp_path / "data" / "learner" / "parts").iterdir():
        part.unlink()
    rig.turns(4)  # nothing is new: all of replay is to be kept
    assert rig.metrics.checkpoint_failures._value.get() == 1
    assert newest_meta(tmp_path)["positions"] == {"0": 100}
    rig.close()


@pytest.mark.parametrize("seconds", [0.5, -1, 604_801])
def test_what_cannot_be_meant_is_refused(seconds):
    with pytest.raises(ValueError, match="give_up_after_s must be 0 or within"):
        TrainConfig(give_up_after_s=seconds)


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of its own with 16 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_really_full_disk_ends_a_real_learner_in_time_with_one_line(small_disk, tmp_path):
    shop = Shop(f"sqlite:///{tmp_path / 'log.db'}", "events")
    shop.write(100)
    stores = ("--data-dir", str(small_disk / "data"), "--give-up-after-s", "2")
    learner = start(tmp_path, shop.url, *shop.flags(*stores))
    try:
        await_offset(small_disk, 100)
        (small_disk / "filler").write_bytes(bytes(free(small_disk)))
        shop.write(100)
        assert "No space left on device" in await_line(learner, "training goes on")
        status, said = finish(learner)
    finally:
        learner.kill()
    assert status == 1
    assert "(--give-up-after-s 2)" in said.splitlines()[-1]
    assert "No space left on device" in said.splitlines()[-1]
    assert "Traceback" not in said
    (small_disk / "filler").unlink()
    assert newest_meta(small_disk)["positions"] == {"0": 100}
    assert learn(tmp_path, shop.url, *shop.flags(*stores, "--until-caught-up"))[0] == 0
    assert newest_meta(small_disk)["joined"]["events"] == 200
    shop.log.close()


def free(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


def test_a_letter_that_was_refused_for_good_is_never_forgotten_by_a_checkpoint(disk, tmp_path):
    rig = Rig(tmp_path, disk, turn_s=10.0, checkpoint_s=10.0)
    rig.write(50)
    rig.producer.send("events", b"nobody", b"no record")
    rig.producer.flush()
    rig.turns(4)
    assert newest_meta(tmp_path)["positions"] == {"0": 51}
    delete_topic(rig.log, dlq_topic("events"))
    rig.producer.send("events", b"nobody", b"no record either")
    rig.producer.flush()
    with pytest.raises(LogError, match="could not be written"):
        rig.turns(4)
    assert newest_meta(tmp_path)["positions"] == {"0": 51}
    rig.close()


class Away:
    """A producer whose log cannot be reached any more."""

    def __init__(self, takes):
        self.takes = takes  # into its queue

    def send(self, *_):
        if not self.takes:
            raise LogUnavailable("cannot be reached")

    def flush(self, timeout_s=30.0):
        raise LogUnavailable("cannot be reached")


@pytest.mark.parametrize("takes", [True, False])
def test_where_letters_keep_it_from_a_last_checkpoint_it_does_not_end_well(disk, tmp_path, takes):
    rig = Rig(tmp_path, disk, checkpoint_s=10.0)
    rig.write(50)
    rig.turns(12)
    rig.producer.send("events", b"nobody", b"no record")
    rig.producer.flush()
    rig.letters._producer = Away(takes)
    rig.turns(4)
    assert rig.reader.position() == {0: 51}
    with pytest.raises(CheckpointFailed, match="ended without a last checkpoint; the one before is intact"):
        rig.end()
    assert newest_meta(tmp_path)["positions"] == {"0": 50}
    rig.letters._producer = rig.producer
    rig.close()


def test_a_disk_that_takes_no_last_checkpoint_is_no_good_end_either(disk, tmp_path):
    rig = rig_on(disk, tmp_path)
    rig.write(50)
    rig.turns(1)
    with pytest.raises(CheckpointFailed, match="could not be written: ended without a last checkpoint"):
        rig.end()
    rig.close()
