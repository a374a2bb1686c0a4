"""What the planner says of pipelines, beside what the trainer does: layers, idle time, work begun and not finished."""

from __future__ import annotations

from typing import Any

import pytest

from sihe.cluster.planner.pipeline import begun, bubble, layers_of_stages, stages_of_rank
from sihe.cluster.planner.types import Layout, TransformerShape
from sihe.training.parallel import stage, timeline
from sihe.training.parallel.plan import ParallelPlan

CASES: list[dict[str, Any]] = [
    {"schedule": schedule, "stages_per_rank": stages, "pp": ranks, "microbatches": times * ranks + more}
    for schedule, stages in (
        ("gpipe", 1),
        ("1f1b", 1),
        ("interleaved-1f1b", 2),
        ("interleaved-1f1b", 3),
        ("interleaved-zero-bubble", 2),
        ("zbv", 2),
        ("dualpipe-v", 2),
    )
    for ranks in (2, 4)
    for times, more in ((1, 0), (1, 1), (2, 0), (4, 0))
    if (times > 1 or schedule != "dualpipe-v") and not (more and schedule.startswith("interleaved"))
]


@pytest.mark.parametrize("values", CASES, ids=lambda values: "-".join(map(str, values.values())))
def test_the_planners_schedule_is_the_trainers(values: dict[str, Any]) -> None:
    layout, plan = Layout(**values), ParallelPlan(**values)
    assert bubble(layout) == pytest.approx(timeline.bubble(timeline.timeline(plan)))
    for rank, works in enumerate(timeline.order(plan)):
        assert list(stages_of_rank(layout, rank)) == stage.stages_of_rank(plan, rank)
        alive = dict.fromkeys(stages_of_rank(layout, rank), 0)
        most: list[dict[int, int]] = [alive.copy()]
        for work in works:
            alive[work.stage] += {"F": 1, "B": -1, "I": 0, "W": -1}[work.kind]
            if sum(alive.values()) > sum(most[0].values()):
                most = []
            if not most or sum(alive.values()) == sum(most[0].values()):
                most.append(alive.copy())
        assert sum(begun(layout, rank)) == sum(most[0].values())
        if layout.schedule not in ("zbv", "dualpipe-v"):  # there the halves may differ by a few, in any direction
            assert dict(zip(stages_of_rank(layout, rank), begun(layout, rank), strict=True)) in most


@pytest.mark.parametrize("layers", [1, 2, 5, 6, 7, 12, 13])
@pytest.mark.parametrize("vocab", [100, 5000, 60_000])
def test_the_planner_cuts_layers_as_the_trainer_does(layers: int, vocab: int) -> None:
    shape = TransformerShape("tiny", layers, 64, 4, 2, 16, 160, vocab=vocab, sequence=32)
    for stages in range(1, layers + 1):
        costs = [float(shape.layer_parameters)] * layers
        cut = stage.cut_layers(costs, stages, last=float(vocab * 64))
        found = layers_of_stages(shape, Layout(pp=stages, microbatches=stages))
        assert found == tuple(len(piece) for piece in cut)
