"""Fencing: the learner that started last goes on, all others stop."""

from __future__ import annotations

import shutil
import threading
import uuid

import pytest

from learner.fence import Fence, Fenced
from learner.train import TrainConfig, claim, open_checkpoints


@pytest.fixture(params=["directory", "memory"])
def url(request, tmp_path):
    return str(tmp_path) if request.param == "directory" else f"memory://fence-{uuid.uuid4().hex}"


def test_each_claim_is_one_epoch_higher_and_fences_the_one_before(url):
    first = Fence(url, "main", owner="host-a")
    first.check()
    second = Fence(url, "main", owner="host-b")
    assert (first.epoch, second.epoch) == (1, 2)
    second.check()
    with pytest.raises(Fenced, match=r"'main' of epoch 1 was taken over by epoch 2 \(host-b\)"):
        first.check()


def test_learners_of_different_names_do_not_disturb_each_other(url):
    first, second = Fence(url, "main"), Fence(url, "experiment")
    first.check()
    second.check()
    assert first.epoch == second.epoch == 1


def test_a_fenced_learner_stays_fenced_after_its_successor_is_gone(url):
    first = Fence(url, "main")
    Fence(url, "main")
    Fence(url, "main")
    with pytest.raises(Fenced):
        first.check()
    assert Fence(url, "main").epoch == 4


def test_an_epoch_known_from_elsewhere_is_outbid(url):
    assert Fence(url, "main", above=7).epoch == 8
    assert Fence(url, "main", above=3).epoch == 9


def test_a_learner_whose_claims_are_lost_outbids_its_own_checkpoints(tmp_path):
    config = TrainConfig(
        data_dir=str(tmp_path / "data"), weights=str(tmp_path / "weights"), keep_checkpoints=2
    )
    for number in (1, 2, 3):
        checkpoints = open_checkpoints(config)
        claim(config, "before", checkpoints)
        checkpoints.save({}, {"number": number})
    shutil.rmtree(tmp_path / "data" / "fence")
    checkpoints = open_checkpoints(config)
    claim(config, "after", checkpoints)
    checkpoints.save({}, {"number": 4})
    assert checkpoints.epoch() == 4
    assert checkpoints.load().meta == {"number": 4}


def test_of_many_that_start_at_once_each_gets_its_own_epoch_and_one_goes_on(url):
    fences = []
    start = threading.Barrier(8)

    def claim():
        start.wait()
        fences.append(Fence(url, "main"))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({fence.epoch for fence in fences}) == 8
    fences.sort(key=lambda fence: fence.epoch)
    fences[-1].check()
    for fence in fences[:-1]:
        with pytest.raises(Fenced):
            fence.check()


@pytest.mark.parametrize("name", ["", "a/b", ".hidden"])
def test_a_name_must_be_a_plain_word(name, tmp_path):
    with pytest.raises(ValueError, match="plain word"):
        Fence(tmp_path, name)
