"""Every plan of parallelism against a single process: gradients, clipping, updates, and going on under another plan.

`python -m support.parallel_matrix docs/reference/parallelism.md` (`make matrix`) runs all plans on 2, 4 and 8 processes
and writes the table. The tests run some of them, and `-m slow` all.

Each plan trains a tiny model for two steps from the same seed and batch as a single process does, saves a checkpoint,
loads the checkpoint of the plan before it (on whatever number of ranks that was), and takes the two steps after that.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.checkpoint.store import Checkpoints
from sihe.training.optimizer import MasterOptimizer
from sihe.training.parallel.apply import ParallelModel
from sihe.training.parallel.mesh import ParallelMesh
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.ranks import Ranks
from sihe.training.schedule import ScheduleConfig
from sihe.training.step import TrainStep
from support.gloo import run_ranks

BATCH, LENGTH = 16, 16
TOLERANCE = 5e-6
"""Of a gradient, relative to the largest of its tensor; of losses and norms, relative. float32 in another order."""
ROUNDED = {"bf16": 2e-2, "fp16": 2e-3}
"""The same, where gradients are rounded on their way."""
_CHANNELS = {"vocab_size": 64, "hidden_size": 32, "num_layers": 8, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8}
MODELS = {
    "dense": ModelConfig(**_CHANNELS, intermediate_size=48, max_positions=LENGTH),
    "experts": ModelConfig(
        **_CHANNELS,
        intermediate_size=48,
        max_positions=LENGTH,
        tie_embeddings=False,
        num_experts=4,
        experts_per_token=2,
        expert_intermediate_size=16,
        router_balance="none",  # a loss over one micro-batch is not that over their union
    ),
}
_PIPELINES: tuple[dict[str, Any], ...] = (
    {"schedule": "gpipe"},
    {"schedule": "1f1b"},
    {"schedule": "interleaved-1f1b", "stages_per_rank": 2},
    {"schedule": "interleaved-zero-bubble", "stages_per_rank": 2},
    {"schedule": "zbv", "stages_per_rank": 2},
    {"schedule": "dualpipe-v", "stages_per_rank": 2},
)


def plans(world_size: int) -> list[ParallelPlan]:
    """The plans that are held against a single process on so many ranks; those with experts shared out come last."""
    return [ParallelPlan(**values) for values in _VALUES[world_size]]


def _values() -> dict[int, list[dict[str, Any]]]:
    deep = [{"pp": 2, "microbatches": 4, **kind} for kind in _PIPELINES]
    deeper = [{"pp": 4, "microbatches": 8, **kind} for kind in _PIPELINES]
    flow = {"pp": 2, "microbatches": 4}
    two: list[dict[str, Any]] = [
        {"dp": 2},
        {"dp": 2, "compression": "bf16"},
        {"dp": 2, "compression": "fp16"},
        *({"shard": 2, "zero": stage} for stage in (1, 2, 3)),
        {"tp": 2},
        {"cp": 2},
        *deep,
        {"dp": 2, "ep": 2},
        *({"shard": 2, "zero": stage, "ep": 2} for stage in (1, 2, 3)),
    ]
    four = [
        {"dp": 4},
        *({"shard": 4, "zero": stage} for stage in (1, 2, 3)),
        *({"dp": 2, "shard": 2, "zero": stage} for stage in (1, 2, 3)),
        {"tp": 4},
        {"dp": 2, "tp": 2},
        *({"shard": 2, "zero": stage, "tp": 2} for stage in (1, 2, 3)),
        {"cp": 4},
        {"dp": 2, "cp": 2},
        {"shard": 2, "zero": 3, "cp": 2},
        {"cp": 2, "tp": 2},
        *deeper,
        {**flow, "dp": 2},
        *({**flow, "shard": 2, "zero": stage} for stage in (1, 2, 3)),
        {**flow, "tp": 2},
        {**flow, "cp": 2},
        {"dp": 4, "ep": 4},
        {"dp": 4, "ep": 2},
        *({"shard": 4, "zero": stage, "ep": 2} for stage in (1, 2, 3)),
        {"dp": 2, "ep": 2, "tp": 2},
        {"dp": 2, "ep": 2, "cp": 2},
        {**flow, "dp": 2, "ep": 2},
        {**flow, "shard": 2, "zero": 3, "ep": 2},
    ]
    eight = [
        {"dp": 8},
        {"shard": 8, "zero": 3},
        {"dp": 2, "shard": 4, "zero": 3},
        {"dp": 4, "shard": 2, "zero": 1},
        {"dp": 2, "tp": 4},
        {"shard": 2, "zero": 3, "tp": 4},
        {"dp": 2, "shard": 2, "zero": 3, "tp": 2},
        {"dp": 2, "cp": 2, "tp": 2},
        {"shard": 2, "zero": 3, "cp": 2, "tp": 2},
        {**flow, "dp": 2, "tp": 2},
        {**flow, "shard": 2, "zero": 1, "tp": 2},
        {**flow, "shard": 2, "zero": 3, "tp": 2},
        {**flow, "cp": 2, "tp": 2},
        {"pp": 2, "microbatches": 4, "schedule": "zbv", "stages_per_rank": 2, "dp": 2, "tp": 2},
        {"pp": 4, "microbatches": 8, "dp": 2},
        {"pp": 4, "microbatches": 8, "schedule": "interleaved-1f1b", "stages_per_rank": 2, "tp": 2},
        {"dp": 4, "ep": 4, "tp": 2},
        {"shard": 4, "zero": 3, "ep": 2, "tp": 2},
        {"dp": 2, "shard": 2, "zero": 3, "ep": 2, "cp": 2},
        {**flow, "dp": 2, "ep": 2, "tp": 2},
        {**flow, "shard": 4, "zero": 3, "ep": 4},
    ]
    return {1: [{}], 2: two, 4: four, 8: eight}


_VALUES = _values()


@dataclass(frozen=True)
class Row:
    """How one plan compared with a single process."""

    plan: str
    ranks: int
    model: str
    gradient_error: float
    """The largest difference of a gradient, relative to the largest of its tensor."""
    norm_error: float
    update_error: float
    """Of the loss after an update."""
    resumed_from: str | None
    """Whose checkpoint it went on from."""
    resume_error: float
    """Of the two losses after that."""
    seconds: float
    tolerance: float

    @property
    def hands_on(self) -> bool:
        """Whether the next plan goes on from its checkpoint: rounded weights would be no measure for that."""
        return self.tolerance == TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether everything is within the tolerance."""
        return max(self.gradient_error, self.norm_error, self.update_error, self.resume_error) <= self.tolerance


@dataclass(frozen=True)
class Truth:
    """What a single process computes: gradients and norm of the first step, losses of four."""

    gradients: dict[str, torch.Tensor]
    norm: float
    losses: list[float]


class Trainee:
    """The tiny model under a plan, and its steps."""

    def __init__(self, model: str, plan: ParallelPlan) -> None:
        ranks = Ranks(dist.get_rank(), plan.world_size, 60.0) if plan.world_size > 1 else Ranks()
        self.mesh = ParallelMesh(plan, timeout_s=60) if plan.world_size > 1 else None
        torch.manual_seed(1)
        self.decoder = Decoder(MODELS[model])
        self.model = ParallelModel(self.decoder, self.mesh)
        self.optimizer = MasterOptimizer(self.model.held, clip_norm=0.5, mesh=self.mesh)
        schedule = ScheduleConfig(peak_lr=1e-2, warmup_steps=0, total_steps=4, kind="constant")
        passes_of_one = BATCH // (plan.batch_ranks * plan.microbatches)
        micro_batch = max(1, passes_of_one // 2)  # gradients add up over two passes
        self.step = TrainStep(self.model, self.optimizer, schedule, ranks, micro_batch=micro_batch)
        self.ranks = ranks

    def batch(self, step: int) -> Any:
        """This rank's samples of a step; some targets do not count, more of them on some ranks than on others."""
        drawn = torch.randint(64, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        drawn[1, 4:], drawn[BATCH // 2 :, 13:] = -1, -1
        return drawn.chunk(self.model.plan.batch_ranks)[self.model.batch_rank].numpy()

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradients of the whole model that this rank has a part in."""
        whole = {}
        for held in self.model.held:
            assert held.local_grad is not None
            part = held.own_rows(held.local_grad).contiguous()
            at_rest = part if self.mesh is None else held.at_rest(part, self.mesh)
            whole[held.name] = at_rest.full_tensor() if isinstance(at_rest, DTensor) else at_rest.clone()
        return whole


def truth(model: str) -> Truth:
    """What one process computes."""
    trainee = Trainee(model, ParallelPlan())
    trainee.step.accumulate(trainee.batch(0))
    gradients = trainee.gradients()
    outcomes = [trainee.step(step, trainee.batch(step)) for step in range(4)]
    return Truth(gradients, outcomes[0].grad_norm, [outcome.loss for outcome in outcomes])


def compare(model: str, values: dict[str, Any], expected: Truth, folder: Path, resumed_from: str | None) -> Row:
    """One rank's part of one plan; checkpoints go through `folder`."""
    # torch warns, once a rank and plan, that putting a tensor together that is cut twice takes two messages.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    started, plan = time.perf_counter(), ParallelPlan(**values)
    trainee = Trainee(model, plan)
    trainee.step.accumulate(trainee.batch(0))
    gradient_error = max(
        float((gradient - expected.gradients[name]).abs().max() / expected.gradients[name].abs().max())
        for name, gradient in trainee.gradients().items()
    )
    outcomes = [trainee.step(step, trainee.batch(step)) for step in range(2)]
    checkpoints = Checkpoints(folder, {"model": model}, keep=1, ranks=trainee.ranks)
    resume_error = 0.0
    if resumed_from is not None:
        again = Trainee(model, plan)
        checkpoint = checkpoints.newest(lambda _event: None)
        assert checkpoint is not None
        checkpoint.load_into(again.decoder, again.optimizer)
        losses = [again.step(step, again.batch(step)).loss for step in (2, 3)]
        resume_error = max(_error(loss, want) for loss, want in zip(losses, expected.losses[2:], strict=True))
    if plan.compression == "none":  # rounded weights are no measure for the plan that goes on from them
        # Steps of checkpoints only grow: each plan's is the newest for the one after it.
        checkpoints.save(max(checkpoints.steps(), default=0) + 1, BATCH, trainee.decoder, trainee.optimizer)
        checkpoints.finish()
    errors = [gradient_error, resume_error]
    if plan.world_size > 1:
        worst = torch.tensor(errors, dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        errors = worst.tolist()
    return Row(
        str(plan),
        plan.world_size,
        model,
        errors[0],
        _error(outcomes[0].grad_norm, expected.norm),
        _error(outcomes[1].loss, expected.losses[1]),
        resumed_from,
        errors[1],
        time.perf_counter() - started,
        ROUNDED.get(plan.compression, TOLERANCE),
    )


def _error(actual: float, expected: float) -> float:
    return abs(actual - expected) / abs(expected)


def run(
    world_size: int, model: str, folder: Path, resumed_from: str | None, chosen: slice = slice(None)
) -> Iterator[Row]:
    """The rows of some plans on `world_size` processes, which start anew for each: what torch keeps of the groups of
    one plan does not fit the next. Experts are not shared out where there are none."""
    (expected,) = run_ranks(truth, 1, model)
    for values in [each for each in _VALUES[world_size] if model == "experts" or "ep" not in each][chosen]:
        row: Row = run_ranks(compare, world_size, model, values, expected, folder, resumed_from)[0]
        resumed_from = row.plan if row.hands_on else resumed_from
        yield row


def everything() -> Iterator[Row]:
    """All plans on 1, 2, 4 and 8 processes, and one process again; each goes on from the one before."""
    for model in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            before: str | None = None
            for world_size in (1, 2, 4, 8, 1):
                for row in run(world_size, model, Path(scratch), before):
                    before = row.plan if row.hands_on else before
                    yield row


def page(rows: list[Row]) -> str:
    """The table as a page of the reference."""
    lines = [
        "# Parallelism, held against a single process",
        "",
        "Written by `make matrix`. Each plan trains a tiny model with the batch, seed and clipping of a single",
        "process. Errors are relative: of gradients to the largest of their tensor, the worst tensor counting; of the",
        "loss after an update; and of two losses after loading the checkpoint of the last plan above that sends",
        f"float32, whatever its ranks. The tolerance is {TOLERANCE:.0e}, for sums in another order; gradients that",
        "travel in 16 bits have their own.",
        "",
    ]
    for model in MODELS:
        lines += [
            f"## {model}",
            "",
            "| ranks | plan | gradients | norm | update | resumed | tolerance |",
            "|--:|---|--:|--:|--:|--:|--:|",
        ]
        lines += [
            f"| {row.ranks} | {row.plan} | {row.gradient_error:.1e} | {row.norm_error:.1e} | {row.update_error:.1e} "
            f"| {row.resume_error:.1e} | {row.tolerance:.0e}{'' if row.holds else ' **exceeded**'} |"
            for row in rows
            if row.model == model
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Writes the page; 1 when a plan exceeds its tolerance."""
    rows = []
    for row in everything():
        rows.append(row)
        errors = f"{row.gradient_error:.1e} {row.resume_error:.1e}"
        sys.stdout.write(f"{row.ranks}  {row.model:8}  {row.plan:45} {errors} {row.seconds:5.1f} s")
        sys.stdout.write("\n" if row.holds else "  EXCEEDS\n")
        sys.stdout.flush()
    Path(sys.argv[1]).write_text(page(rows), encoding="utf-8")
    failed = [row for row in rows if not row.holds]
    sys.stdout.write(f"{len(rows) - len(failed)} passed, {len(failed)} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
