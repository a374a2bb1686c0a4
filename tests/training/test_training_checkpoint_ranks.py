"""Several ranks and one checkpoint: killed while they write, full disks, damage, peers that stay away."""

from __future__ import annotations

import random
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from sihe.training.ranks import Ranks
from support.checkpoint_ranks import (
    STEPS_A_SAVE,
    load,
    one_disk_full,
    save_for_ever,
    save_steps,
    stay_away,
    train,
)
from support.forked_ranks import fork_ranks, run_ranks
from support.sharded_states import by_rows, replicated, rows_of_columns

PEER_TIMEOUT_S = 1.0
DEADLINE_S = 60.0


@pytest.mark.parametrize("seed", range(4))
def test_killed_while_it_writes(tmp_path: Path, seed: int) -> None:
    """After a SIGKILL at any moment, the newest checkpoint is whole, one step's, and none that was reported is lost."""
    folder = tmp_path / "checkpoints"
    reported = tmp_path / "reported"
    for moment in random.Random(seed).choices(range(1, 200), k=2):  # the second continues where the first was killed
        reported.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        ranks = fork_ranks(save_for_ever, 2, folder, by_rows)
        deadline = time.monotonic() + DEADLINE_S
        while not reported.exists():
            assert time.monotonic() < deadline, "no checkpoint came to be"
            time.sleep(0.001)
        time.sleep(moment / 1000)  # the moment is the input of this test, not something that it waits for
        ranks.kill()
        step, values, skipped = load(Ranks(), folder, replicated)
        assert step is not None
        assert step % STEPS_A_SAVE == 0
        assert step >= int(reported.read_text() or 0)
        assert values == {float(step)}
        assert skipped == []


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1, 2 and 3, written by two ranks; not to be changed."""
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    assert run_ranks(save_steps, 2, folder, by_rows, 1, 2, 3) == [[1, 2, 3]] * 2
    return folder


@pytest.mark.parametrize("damaged", ["__0_0.distcp", "__1_0.distcp", ".metadata", "state.json"])
def test_all_ranks_go_back_to_the_same_one(three: Path, tmp_path: Path, damaged: str) -> None:
    folder = shutil.copytree(three, tmp_path / "checkpoints")
    file = folder / "step-00000003" / damaged
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = run_ranks(load, 2, folder, rows_of_columns)
    ((step, values, (reason,)), second) = found
    assert second == found[0]
    assert (step, values) == (2, {2.0})
    assert damaged in reason
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        *("damaged-step-00000003-1", "step-00000001", "step-00000002")
    ]


def test_a_full_disk_of_one_rank_is_the_error_of_all(tmp_path: Path) -> None:
    results = run_ranks(one_disk_full, 2, tmp_path / "checkpoints", by_rows)
    for raised, steps in results:
        assert "no space left" in raised
        assert steps == [1, 3]


@pytest.mark.parametrize("from_what", ["save", "load"])
def test_a_peer_that_stays_away_is_a_loud_error(three: Path, tmp_path: Path, from_what: str) -> None:
    folder = shutil.copytree(three, tmp_path / "checkpoints")
    message, _ = run_ranks(stay_away, 2, folder, by_rows, from_what, timeout_s=PEER_TIMEOUT_S)
    assert "did not answer within 1 s" in message
    assert not list(folder.glob(".*tmp*"))
    assert load(Ranks(), folder, replicated) == (3, {3.0}, [])


def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    """To the bit on as many ranks, within rounding on others."""
    undisturbed, _ = run_ranks(partial(train, until=6, save_at=3, resume=False), 2, tmp_path)
    resumed = run_ranks(partial(train, until=6, save_at=None, resume=True), 2, tmp_path)
    for state in resumed:
        assert all(tensor.equal(undisturbed[name]) for name, tensor in state.items())
    alone = train(Ranks(), tmp_path, until=6, save_at=None, resume=True)
    for name, tensor in undisturbed.items():
        torch.testing.assert_close(alone[name], tensor, rtol=1e-5, atol=1e-7)
