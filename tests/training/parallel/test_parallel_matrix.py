"""Plans of parallelism against a single process: some here, all of them by `make matrix`."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.parallel_matrix import page, run


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_plans_on_two_ranks(model: str, tmp_path: Path) -> None:
    """Replicas, and shards of optimizer states and weights; each goes on from the one before."""
    (alone,) = run(1, model, tmp_path, None)
    rows = list(run(2, model, tmp_path, alone.plan, slice(0, 6)))
    assert [row.plan for row in rows if not row.holds] == []
    assert all(row.resumed_from and row.resume_error > 0 for row in rows), (
        "a loss that is the same bits was not computed"
    )
    assert f"| 2 | {rows[-1].plan} |" in page(rows)


def test_a_pipeline_with_shards_and_experts_of_one_rank(tmp_path: Path) -> None:
    """Before its first step torch's pipeline drops the gradients of what FSDP leaves alone."""
    (row,) = run(4, "experts", tmp_path, None, slice(-1, None))
    assert row.plan == "pp2 x shard2 x ep2, ZeRO-3, 1f1b"
    assert row.holds
