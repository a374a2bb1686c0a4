"""A decoder cut into stages, under each schedule, against one process."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.gradients import GradientBuffer
from sihe.training.parallel.mesh import ParallelMesh
from sihe.training.parallel.pipeline import Pipeline
from sihe.training.parallel.plan import ParallelPlan, Schedule
from sihe.training.parallel.stage import cut_layers, rank_of_stage, stages_of_rank
from support.gloo import run_ranks

CONFIG = ModelConfig(
    vocab_size=44,
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_positions=16,
)
CONFIGS = {
    "tied": CONFIG,
    "mixture": replace(
        CONFIG,
        tie_embeddings=False,
        num_experts=4,
        experts_per_token=2,
        expert_intermediate_size=12,
        shared_expert_size=8,
        balance_coefficient=0.5,
    ),
}
SAMPLES = 8
SCALE = 1 / 64


def plan_for(schedule: Schedule, pp: int) -> ParallelPlan:
    stages = 1 if schedule in ("gpipe", "1f1b") else 2
    return ParallelPlan(pp=pp, schedule=schedule, stages_per_rank=stages, microbatches=2 * pp)


def model_and_batches(kind: str, pp: int) -> tuple[Decoder, list[tuple[Tensor, Tensor]]]:
    """A model of one layer more than any schedule has stages, and two batches; the second has left-out targets."""
    torch.manual_seed(13)
    model = Decoder(replace(CONFIGS[kind], num_layers=2 * pp + 1))
    shape = (SAMPLES, 6)
    return model, [(torch.randint(44, shape), torch.randint(lowest, 44, shape)) for lowest in (0, -8)]


def pipeline_gradients(pp: int) -> dict[tuple[str, str], tuple[list[float], dict[str, Tensor], dict[str, Tensor]]]:
    return {(schedule, kind): gradients_under(plan_for(schedule, pp), kind) for schedule, kind in cases(pp)}


def cases(pp: int) -> list[tuple[Schedule, str]]:
    """Each schedule with each model; the quick subset on two ranks has the mixture where stages are passed each way."""
    return [
        (schedule, kind)
        for kind in CONFIGS
        for schedule in get_args(Schedule)
        if pp > 2 or kind == "tied" or schedule in ("1f1b", "zbv")
    ]


def gradients_under(plan: ParallelPlan, kind: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses, gradients of what this rank owns, and those of its copies; checks that they stay in the flat buffer."""
    model, batches = model_and_batches(kind, plan.pp)
    pipeline = Pipeline(model, ParallelMesh(plan))
    buffer = GradientBuffer(parameter for _, parameter, _ in pipeline.named_parameters())
    losses = [float(pipeline.step(tokens_BT, targets_BT, SCALE)) for tokens_BT, targets_BT in batches]
    pipeline.sum_tied_gradients()
    own: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for name, parameter, is_copy in pipeline.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.untyped_storage().data_ptr() == buffer.flat.untyped_storage().data_ptr()
        (copies if is_copy else own)[name] = parameter.grad.clone()
    return losses, own, copies


@pytest.mark.parametrize("pp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_are_those_of_one_process_under_each_schedule(pp: int) -> None:
    by_rank = run_ranks(pipeline_gradients, pp, pp)
    for kind, config in CONFIGS.items():
        model, batches = model_and_batches(kind, pp)
        losses = []
        for tokens_BT, targets_BT in batches:
            losses.append(0.0)
            for micro_tokens_BT, micro_targets_BT in zip(
                tokens_BT.chunk(2 * pp), targets_BT.chunk(2 * pp), strict=True
            ):
                loss, _ = model.loss(micro_tokens_BT, micro_targets_BT)
                (loss * SCALE).backward()
                losses[-1] += float(loss.detach())
        want = {name: weight.grad for name, weight in model.named_parameters()}
        for schedule in (schedule for schedule, of in cases(pp) if of == kind):
            answers = [answer[schedule, kind] for answer in by_rank]
            for got_losses, own, copies in answers:
                assert got_losses == pytest.approx(losses, rel=1e-6)
                for name, gradient in (*own.items(), *copies.items()):
                    scale = float(want[name].abs().max())
                    torch.testing.assert_close(gradient, want[name], rtol=1e-5, atol=1e-5 * scale)
            owned = [name for _, own, _ in answers for name in own]
            assert sorted(owned) == sorted(want), "each weight has one owner"
            assert [name for _, _, copies in answers for name in copies] == (
                ["embedding.weight"] if config.tie_embeddings else []
            )


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_each_stage_has_the_rank_that_torch_gives_it(schedule: Schedule) -> None:
    plan = plan_for(schedule, 4)
    owners = {stage: rank for rank in range(4) for stage in stages_of_rank(plan, rank)}
    assert owners == {stage: rank_of_stage(plan, stage) for stage in range(plan.num_stages)}


def test_layers_are_cut_where_the_most_costly_stage_is_cheapest() -> None:
    assert cut_layers([1.0] * 8, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert cut_layers([1.0] * 8, 3, last=2.0) == [range(0, 3), range(3, 6), range(6, 8)]
    assert cut_layers([1.0, 1.0, 5.0, 1.0], 3) == [range(0, 2), range(2, 3), range(3, 4)]
