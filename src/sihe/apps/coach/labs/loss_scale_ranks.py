"""What `amp.scale` runs: the backward pass of a small decoder in float16 at many loss scales, and a training with one.

B  samples      T  time
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.loss_scale import LossScale
from sihe.training.optimizer import MasterOptimizer
from sihe.training.parallel.apply import ParallelModel
from sihe.training.ranks import Ranks
from sihe.training.schedule import ScheduleConfig
from sihe.training.step import TrainStep

_BATCH, _TIME = 4, 64
_VOCABULARY = 256
_CONFIG = ModelConfig(_VOCABULARY, 64, 2, 4, 4, 16, 192, _TIME)


def scales(
    _rank: int, _world_size: int, *, exponents: list[int], batch_tokens: int, steps: int, growth: int
) -> dict[str, Any]:
    """Of each scale 2^k how the gradients in float16 fare beside those in float32, and the trace of a dynamic scale.

    The gradients are a micro-batch's share of those of a step over `batch_tokens` targets.
    """
    batch_BT = _batch(0)
    exact = _gradients(torch.float32, batch_BT, 1.0 / batch_tokens)
    is_live = exact != 0
    found = []
    for exponent in exponents:
        factor = 2.0**exponent
        gradient = _gradients(torch.float16, batch_BT, factor / batch_tokens) / factor
        is_finite = bool(torch.isfinite(gradient).all())
        vanished = float(((gradient == 0) & is_live).sum() / is_live.sum())
        error = float((gradient - exact).norm() / exact.norm()) if is_finite else None
        found.append({"finite": is_finite, "vanished": vanished, "error": error})
    return {"scales": found, "trace": _trace(steps, growth)}


def _batch(number: int) -> Tensor:
    """Tokens [B, T + 1] of words of which few are frequent."""
    generator = torch.Generator().manual_seed(100 + number)
    frequency = 1.0 / torch.arange(1, _VOCABULARY + 1)
    return torch.multinomial(frequency, _BATCH * (_TIME + 1), replacement=True, generator=generator).view(_BATCH, -1)


def _model(dtype: torch.dtype) -> ParallelModel:
    torch.manual_seed(21)
    return ParallelModel(Decoder(_CONFIG), dtype=dtype)


def _gradients(dtype: torch.dtype, batch_BT: Tensor, factor: float) -> Tensor:
    """All gradients of `factor` times the summed loss, computed in `dtype` and kept in float32, as the trainer does."""
    model = _model(dtype)
    model.zero_grad()
    model.backward(batch_BT[:, :-1], batch_BT[:, 1:], factor, is_last=True)
    return torch.cat([held.local_grad.flatten() for held in model.held if held.local_grad is not None])


def _trace(steps: int, growth: int) -> list[tuple[int, float, int, float]]:
    """(step, exponent of the scale after it, tries that overflowed in it, loss) of a training with a dynamic scale."""
    model = _model(torch.float16)
    scale = _CountingScale(factor=2.0**16, growth_interval=growth)
    schedule = ScheduleConfig(peak_lr=3e-3, warmup_steps=0, total_steps=steps, kind="constant")
    step = TrainStep(model, MasterOptimizer(model.held), schedule, Ranks(), micro_batch=_BATCH, loss_scale=scale)
    trace = []
    for number in range(steps):
        before = scale.overflows
        outcome = step(number, _batch(number % 8).numpy())
        trace.append((number + 1, math.log2(scale.factor), scale.overflows - before, outcome.loss))
    return trace


class _CountingScale(LossScale):
    """The trainer's loss scale, which also counts its overflows."""

    overflows: int = 0

    def overflowed(self) -> bool:
        """As the trainer's."""
        self.overflows += 1
        return super().overflowed()
