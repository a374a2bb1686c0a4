"""What a rank of `accum.equivalence` runs: the trainer's own step over a batch, whole and in parts, and two wrong ways.

    B  samples      T  time      V  vocabulary

Half of the samples have all their targets, the other half only some at the start: as real texts do that end early.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.optimizer import MasterOptimizer
from sihe.training.parallel.apply import ParallelModel
from sihe.training.parallel.mesh import ParallelMesh
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.ranks import Ranks
from sihe.training.schedule import ScheduleConfig
from sihe.training.step import TrainStep

_TIME = 64
_VOCABULARY = 128
_CONFIG = ModelConfig(_VOCABULARY, 64, 2, 4, 4, 16, 128, _TIME)


def equivalence(rank: int, world_size: int, *, samples: int, shortness: int, ones: int, parts: int) -> dict[str, Any]:
    """The gradients of one batch by way of computing them, and what bfloat16 loses in long sums."""
    batch = ragged_batch(samples, shortness)
    whole, loss = _gradient(batch, ParallelPlan(), samples)
    runs = []
    for ranks, micro_batch in ((1, samples // 4), (1, 1), (world_size, samples // world_size), (world_size, 1)):
        gradient, found = _gradient(batch, ParallelPlan(dp=ranks), micro_batch, rank)
        runs.append((ranks, micro_batch, samples // ranks // micro_batch, _error(gradient, whole), found))
    wrong, wrong_loss = _mean_of_means(batch)
    return {
        "loss": loss,
        "runs": runs,
        "mean_of_means_error": _error(wrong, whole),
        "mean_of_means_loss": wrong_loss,
        "short_weight": short_weight(batch),
        "sums": _sums_of_ones(ones),
        "gradient_sums": _sums_of_gradients(parts) if rank == 0 else [],
    }


def ragged_batch(samples: int, shortness: int) -> np.ndarray:
    """Tokens [B, T + 1]; every second sample has 1 / `shortness` of the targets, -1 after them."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(_VOCABULARY, (samples, _TIME + 1), generator=generator)
    # Short texts are also other texts: their words come from a part of the vocabulary.
    tokens[1::2] %= _VOCABULARY // 4
    tokens[1::2, 1 + _TIME // shortness :] = -1
    return tokens.numpy()


def _decoder() -> Decoder:
    torch.manual_seed(12)
    return Decoder(_CONFIG)


def _gradient(batch: np.ndarray, plan: ParallelPlan, micro_batch: int, rank: int = 0) -> tuple[Tensor, float]:
    """All gradients that the trainer's step leaves, and its loss."""
    is_alone = plan.world_size == 1
    mesh = None if is_alone else ParallelMesh(plan)
    model = ParallelModel(_decoder(), mesh)
    ranks = Ranks() if is_alone else Ranks(rank, plan.world_size, group=dist.group.WORLD)
    schedule = ScheduleConfig(peak_lr=1e-3, warmup_steps=0, total_steps=1, kind="constant")
    step = TrainStep(model, MasterOptimizer(model.held, mesh=mesh), schedule, ranks, micro_batch=micro_batch)
    own = batch if is_alone else np.array_split(batch, plan.batch_ranks)[model.batch_rank]
    loss, _, _ = step.accumulate(own)
    return torch.cat([held.local_grad.flatten() for held in model.held if held.local_grad is not None]), loss


def _mean_of_means(batch: np.ndarray) -> tuple[Tensor, float]:
    """Gradients and loss when each micro-batch of one sample is averaged by itself, and then the averages are."""
    model = _decoder()
    inputs_BT, targets_BT = _inputs_and_targets(batch)
    total = torch.zeros(())
    for tokens_T, targets_T in zip(inputs_BT, targets_BT, strict=True):
        sum_nll, count = model.loss(tokens_T[None], targets_T[None])
        mean = sum_nll / count / len(batch)
        mean.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total += mean.detach()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]), float(total)


def short_weight(batch: np.ndarray) -> float:
    """How many times too much a target of a short sample counts in a mean of means: the ratio of its gradients."""
    inputs_BT, targets_BT = _inputs_and_targets(batch)
    with torch.no_grad():
        logits_BTV = _decoder()(inputs_BT)
    logits_BTV.requires_grad_()
    nll_BT = torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-1, reduction="none"
    ).view_as(targets_BT)
    counted_BT = targets_BT >= 0
    means_B = nll_BT.sum(1) / counted_BT.sum(1)
    (right_BTV,) = torch.autograd.grad(nll_BT.sum() / counted_BT.sum(), logits_BTV, retain_graph=True)
    (wrong_BTV,) = torch.autograd.grad(means_B.mean(), logits_BTV)
    return float(wrong_BTV[1, 0].norm() / right_BTV[1, 0].norm())


def _inputs_and_targets(batch: np.ndarray) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(batch)
    return tokens[:, :-1].clamp(min=0), tokens[:, 1:]


def _sums_of_ones(ones: int) -> dict[str, float]:
    """1 + 1 + … in both formats, one at a time."""
    sums = {}
    for dtype in (torch.bfloat16, torch.float32):
        total, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
        for _ in range(ones):
            total += one
        sums[str(dtype).removeprefix("torch.")] = float(total)
    return sums


def _sums_of_gradients(parts: int) -> list[tuple[int, float, float]]:
    """(micro-batches, error of their sum kept in bfloat16, and in float32), relative to the sum in float64."""
    model = _decoder()
    generator = torch.Generator().manual_seed(13)
    sums: dict[torch.dtype, Tensor] = {}
    found = []
    for number in range(1, parts + 1):
        tokens_BT = torch.randint(_VOCABULARY, (1, _TIME + 1), generator=generator)
        model.zero_grad()
        model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])[0].backward()  # type: ignore[no-untyped-call]  # torch's own
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            sums[dtype] = sums.get(dtype, torch.zeros_like(gradient, dtype=dtype)) + gradient.to(dtype)
        if number & (number - 1) == 0:
            exact = sums[torch.float64]
            errors = [
                float((sums[dtype].double() - exact).norm() / exact.norm()) for dtype in (torch.bfloat16, torch.float32)
            ]
            found.append((number, errors[0], errors[1]))
    return found


def _error(gradient: Tensor, expected: Tensor) -> float:
    return float((gradient - expected).norm() / expected.norm())
