"""Recipes over two real ranks: the numbers of one where batches are given, the same weights on both in any case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sihe.cluster.launchers.local import LocalLauncher
from sihe.cluster.types import ProcessJob, RestartPolicy
from sihe.training.ranks import Ranks
from support.recipe_ranks import run
from support.training_runs import TESTS


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    env = {"PYTHONPATH": str(TESTS)}
    job = ProcessJob("recipes", "support.recipe_ranks", 2, folder / "logs", (str(folder),), env=env)
    LocalLauncher().run(job, RestartPolicy(max_restarts=0))
    return folder


@pytest.mark.parametrize("rollouts", [False, True])
def test_both_ranks_end_with_the_same_weights(two_ranks: Path, rollouts: bool) -> None:
    first, second = (torch.load(two_ranks / f"{rollouts}-{rank}.pt") for rank in range(2))
    assert len(first["steps"]) == (6 if not rollouts else 8)
    assert first["steps"] == second["steps"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name


def test_two_ranks_compute_what_one_computes(two_ranks: Path, tmp_path: Path) -> None:
    both: dict[str, Any] = torch.load(two_ranks / "False-0.pt")
    alone: dict[str, Any] = run(tmp_path, Ranks(), rollouts=False)
    for (stage, loss), (_, expected) in zip(both["steps"], alone["steps"], strict=True):
        assert loss == pytest.approx(expected, rel=1e-4), stage
