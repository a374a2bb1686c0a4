"""What a rank of `pipeline.bubble` runs: its stages of a small decoder under several schedules, all work watched.

Torch's schedule decides what a rank does next; the watch writes down what its stages were really asked for, in which
order, and when. All processes of one machine read the same monotonic clock.

    B  samples of all micro-batches      T  time
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage

from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.parallel.mesh import ParallelMesh
from sihe.training.parallel.pipeline import Pipeline
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.parallel.timeline import Span, timeline

_LAYERS = 8
_TIME = 32
_HIDDEN = 64
_VOCABULARY = 64  # small, so that the head adds little to the last stage
_REPEATS = 2

Seen = tuple[str, int, int, float, float]
"""Kind (F, B, I, W), stage, micro-batch, start and end in seconds."""


def schedules(
    _rank: int, _world_size: int, *, plans: list[dict[str, Any]], outlines: list[dict[str, Any]]
) -> dict[str, Any]:
    """For each plan this rank's work in the order in which it was done, and how far the loss is from one process's.

    Of several steps the one with the least time is taken: what the machine can do when nothing else disturbs it. The
    `outlines` are plans that are simulated only, for all their ranks.
    """
    simulated = [[_span(span) for span in timeline(ParallelPlan(**plan))] for plan in outlines]
    return {"runs": [_run(ParallelPlan(**plan)) for plan in plans], "simulated": simulated}


def _span(span: Span) -> tuple[int, str, int, int, float, float]:
    return span.rank, span.work.kind, span.work.stage, span.work.microbatch, span.start, span.end


def _run(plan: ParallelPlan) -> dict[str, Any]:
    torch.manual_seed(5)
    model = Decoder(ModelConfig(_VOCABULARY, _HIDDEN, _LAYERS, 4, 4, _HIDDEN // 4, 2 * _HIDDEN, _TIME))
    tokens_BT = torch.randint(_VOCABULARY, (plan.microbatches, _TIME))
    targets_BT = tokens_BT.roll(-1, 1)
    with torch.no_grad():
        expected = float(model.loss(tokens_BT, targets_BT)[0])
    pipeline = Pipeline(model, ParallelMesh(plan))
    runs = []
    for _ in range(_REPEATS + 1):  # the first one also builds the schedule
        torch.distributed.barrier()
        with _watched() as seen:
            loss = float(pipeline.step(tokens_BT, targets_BT))
        runs.append(list(seen))
    best = min(runs[1:], key=lambda run: _length(run))
    return {"seen": best, "loss_difference": abs(loss - expected) / abs(expected)}


def _length(run: list[Seen]) -> float:
    return max(end for *_, end in run) - min(start for *_, start, _ in run)


@contextmanager
def _watched() -> Iterator[list[Seen]]:
    """Within it every piece of work of this process's stages is written down."""
    seen: list[Seen] = []
    kept = {name: getattr(PipelineStage, name) for name in _KINDS}
    for name, method in kept.items():
        setattr(PipelineStage, name, _noting(method, _KINDS[name], seen))
    try:
        yield seen
    finally:
        for name, method in kept.items():
            setattr(PipelineStage, name, method)


def _noting(method: Callable[..., Any], kind: str, seen: list[Seen]) -> Callable[..., Any]:
    def noted(stage: PipelineStage, microbatch: int, *args: Any, **keywords: Any) -> Any:
        start = time.monotonic()
        result = method(stage, microbatch, *args, **keywords)
        is_part = kind == "B" and keywords.get("full_backward") is False
        seen.append(("I" if is_part else kind, stage.stage_index, microbatch, start, time.monotonic()))
        return result

    return noted


_KINDS = {"forward_one_chunk": "F", "backward_one_chunk": "B", "backward_weight_one_chunk": "W"}
