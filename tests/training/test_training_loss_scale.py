"""Dynamic loss scaling: its rule, and a float16 step that overflows and is done again."""

from __future__ import annotations

import math

import pytest
import torch

from sihe.models.decoder import Decoder
from sihe.training.loss_scale import LossScale
from sihe.training.optimizer import MasterOptimizer
from sihe.training.parallel.apply import ParallelModel
from sihe.training.ranks import Ranks
from sihe.training.schedule import CosineSchedule
from sihe.training.step import TrainStep
from support.gradient_ranks import CONFIG, global_batch


def step_with(dtype: torch.dtype, scale: LossScale | None) -> tuple[ParallelModel, TrainStep]:
    torch.manual_seed(3)
    model = ParallelModel(Decoder(CONFIG), dtype=dtype)
    schedule = CosineSchedule(peak_lr=1e-3, warmup_steps=1, total_steps=10)
    return model, TrainStep(model, MasterOptimizer(model.held), schedule, Ranks(), micro_batch=4, loss_scale=scale)


def test_the_factor_grows_after_good_steps_and_halves_on_overflow() -> None:
    scale = LossScale(factor=8.0, growth_interval=2)
    scale.fitted()
    assert scale.factor == 8
    scale.fitted()
    assert (scale.factor, scale.good_steps) == (16, 0)
    scale.fitted()
    assert scale.overflowed()
    assert (scale.factor, scale.good_steps) == (8, 0), "an overflow also starts the count anew"
    again = LossScale(growth_interval=2)
    again.load_state(scale.state())
    assert again == scale


def test_a_factor_that_cannot_shrink_further_gives_up() -> None:
    scale = LossScale(factor=1.0)
    halvings = 0
    while scale.overflowed():
        halvings += 1
    assert halvings == 14


def test_a_batch_that_overflows_is_done_again_and_gives_the_gradients_of_float32() -> None:
    exact, exact_step = step_with(torch.float32, None)
    scale = LossScale(factor=2.0**40)
    model, step = step_with(torch.float16, scale)
    outcome, expected = step(0, global_batch(ragged=True)), exact_step(0, global_batch(ragged=True))
    assert 1 < scale.factor < 2.0**40, "it shrank until nothing overflowed"
    assert outcome.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2)
    assert outcome.samples == expected.samples
    for mine, theirs in zip(model.held, exact.held, strict=True):
        assert mine.local_grad is not None
        assert theirs.local_grad is not None
        error = (mine.local_grad - theirs.local_grad).abs().max() / theirs.local_grad.abs().max()
        assert float(error) < 1e-2, mine.name


def test_gradients_that_vanish_in_float16_survive_with_a_factor() -> None:
    """With targets scaled down to 2^-20 of their weight, plain float16 loses most of the gradient."""
    batch = global_batch(ragged=False)
    tokens, targets = torch.from_numpy(batch)[:, :-1], torch.from_numpy(batch)[:, 1:]
    norms = {}
    for factor in (1.0, 2.0**12):
        model, _ = step_with(torch.float16, None)
        model.zero_grad()
        model.backward(tokens, targets, 2.0**-20 * factor, is_last=True)
        model.finish_gradients(2.0**20 / factor)
        norms[factor] = float(torch.stack([h.local_grad.norm() for h in model.held if h.local_grad is not None]).norm())
    exact, _ = step_with(torch.float32, None)
    exact.zero_grad()
    exact.backward(tokens, targets, 1.0, is_last=True)
    norm = float(torch.stack([h.local_grad.norm() for h in exact.held if h.local_grad is not None]).norm())
    assert norms[2.0**12] == pytest.approx(norm, rel=1e-2)
    assert not math.isclose(norms[1.0], norm, rel_tol=5e-2), "the test would show nothing"


def test_a_loss_that_is_nan_is_not_tried_again() -> None:
    scale = LossScale()
    model, step = step_with(torch.float16, scale)
    with torch.no_grad():
        model.stages[0].norm.weight.fill_(math.nan)
    assert math.isnan(step(0, global_batch(ragged=False)).loss)
    assert scale.factor == 2.0**16
