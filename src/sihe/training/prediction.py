"""What the planner says of a run before it, and both beside each other after it."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from sihe.cluster.planner.comparison import Compared, compare
from sihe.cluster.planner.step import StepEstimate, estimate_step
from sihe.cluster.planner.types import ClusterSpec, Layout, TransformerShape
from sihe.training import layout
from sihe.training.plan import TrainPlan
from sihe.training.progress import EventReader
from sihe.training.types import RankMemory, StepDone

if TYPE_CHECKING:
    from pathlib import Path

    from sihe.cluster.planner.types import Precision, Recompute
    from sihe.models.config import ModelConfig
    from sihe.training.config import TrainConfig

_RECOMPUTE: dict[str, Recompute] = {"none": "none", "attention": "selective", "full": "full", "every": "none"}
_PRECISIONS: dict[str, Precision] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}


def predict(plan: TrainPlan, cluster: ClusterSpec) -> StepEstimate:
    """Memory and time of one step of `plan` on `cluster`. Recomputation of every k-th block counts as none."""
    return estimate_step(shape_of(plan.model, plan.config.sequence_length), layout_of(plan.config), cluster)


def predicted_beside_measured(folder: Path, cluster: ClusterSpec) -> list[Compared]:
    """What `predict` says of the run in `folder`, beside what it took: a step in the median, the fullest rank's memory.

    Empty for a run without a step. Raises `CorruptData` for a folder that is none of a run.
    """
    events = list(EventReader(folder / layout.EVENTS).new())
    steps = [event for event in events if isinstance(event, StepDone)]
    if not steps:
        return []
    seconds = statistics.median(step.seconds for step in steps[len(steps) // 4 :])  # the first ones warm up
    measured = {"step time": seconds, "throughput": steps[-1].tokens / seconds}
    if memory := [event.peak_bytes for event in events if isinstance(event, RankMemory)]:
        measured["peak memory"] = float(max(memory))
    return compare(predict(TrainPlan.read(folder / layout.PLAN), cluster), measured)


def shape_of(model: ModelConfig, sequence_length: int) -> TransformerShape:
    """A model as the planner sees it."""
    return TransformerShape(
        name="model",
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        ffn=model.expert_intermediate_size or model.intermediate_size,
        vocab=model.vocab_size,
        sequence=sequence_length,
        family="llama" if model.layers.gated else "gpt",
        tied=model.tie_embeddings,
        experts=model.num_experts,
        experts_per_token=model.experts_per_token,
        shared_ffn=model.shared_expert_size,
    )


def layout_of(config: TrainConfig) -> Layout:
    """A plan of parallelism as the planner sees it, with the portions of a step, on processors like this one."""
    from sihe.models.precision import native_bf16  # imports torch

    plan = config.plan
    return Layout(
        dp=plan.dp,
        shard=plan.shard,
        tp=plan.tp,
        pp=plan.pp,
        cp=plan.cp,
        ep=plan.ep,
        zero=plan.zero,
        schedule=plan.schedule,
        microbatches=config.accumulation_steps,
        stages_per_rank=plan.stages_per_rank,
        micro_batch=config.micro_batch,
        recompute=_RECOMPUTE[config.recompute.policy],
        precision=_PRECISIONS[config.precision],
        widened=config.precision == "bf16" and not native_bf16(),
    )
