"""The planner's word on a run beside what the run took."""

from __future__ import annotations

from pathlib import Path

from sihe.cluster.collectives.costs import Link
from sihe.cluster.planner.types import ClusterSpec
from sihe.core import settings
from sihe.core.workspace import Workspace
from sihe.training.prediction import predict, predicted_beside_measured
from sihe.training.progress import EventReader
from sihe.training.service import TrainingService
from sihe.training.types import RankMemory
from support.tokens import make_dataset
from support.training_runs import InProcess, small_config

LINK = Link(1e-5, 1e9)
MACHINE = ClusterSpec("machine", 1, 1, 1e9, 1e10, {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11}, LINK, LINK, 0.9, 1.0)


def test_time_throughput_and_memory_of_a_run_are_compared(tmp_path: Path) -> None:
    loaded = settings.load({"home": str(tmp_path / "home")}, environ={}, directory=tmp_path)
    config = small_config(make_dataset(tmp_path), world_size=1, max_steps=4, warmup_steps=1)
    with Workspace(loaded) as workspace:
        service = TrainingService(workspace, launcher=InProcess())
        folder = service.train(config).folder
        estimate = predict(service.plan(config), MACHINE)
    found = {row.quantity: row for row in predicted_beside_measured(folder, MACHINE)}
    assert list(found) == ["step time", "throughput", "peak memory"]
    (memory,) = (event for event in EventReader(folder / "events.jsonl").new() if isinstance(event, RankMemory))
    assert found["peak memory"].measured == memory.peak_bytes
    assert found["peak memory"].predicted == estimate.memory.total
    assert found["throughput"].predicted == estimate.tokens_per_s


def test_a_run_without_a_step_has_nothing_to_compare(tmp_path: Path) -> None:
    assert predicted_beside_measured(tmp_path, MACHINE) == []
