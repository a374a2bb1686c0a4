"""One optimizer step: its gradients on one and two ranks, with and without micro-batches, against plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from sihe.cluster.launchers.local import LocalLauncher
from sihe.cluster.types import ProcessJob, RestartPolicy
from sihe.models.decoder import Decoder
from sihe.training.gradients import GradientBuffer
from sihe.training.ranks import Ranks
from sihe.training.step import samples_digest
from support.gradient_ranks import LEFT_OUT, global_batch, step_for
from support.training_runs import TESTS

# Relative to the largest gradient of a tensor. float32 sums in another order; bfloat16 keeps 8 bits of each factor.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def oracle(model: Decoder, batch: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients by plain autograd through the logits, in float64, without micro-batches."""
    model = model.double()
    model.zero_grad()
    tokens = torch.from_numpy(batch)
    logits = model(tokens[:, :-1].clamp(min=0))
    loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=LEFT_OUT)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), dict(zip((name for name, _ in model.named_parameters()), gradients, strict=True))


def assert_close(actual: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        got = actual[name]
        assert got is not None
        error = float((got.double() - gradient).abs().max() / gradient.abs().max())
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    env = {"PYTHONPATH": str(TESTS)}
    job = ProcessJob("gradients", "support.gradient_ranks", 2, folder / "logs", (str(folder),), env=env)
    LocalLauncher().run(job, RestartPolicy(max_restarts=0))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ragged", [False, True])
def test_two_ranks_have_the_gradients_of_one(two_ranks: Path, dtype: torch.dtype, ragged: bool) -> None:
    batch = global_batch(ragged=ragged)
    loss, gradients = oracle(step_for(torch.float32, Ranks(), 8)[0], batch)
    results: list[dict[str, Any]] = [torch.load(two_ranks / f"{dtype}-{ragged}-{rank}.pt") for rank in range(2)]
    for result in results:
        assert result["tokens"] == int((batch[:, 1:] >= 0).sum())
        assert result["samples"] == f"{samples_digest(batch, first=0):012x}"
        assert result["loss"] == pytest.approx(loss, rel=TOLERANCE[dtype])
        assert_close(result["gradients"], gradients, dtype)
    for name, gradient in results[0]["gradients"].items():
        assert gradient.equal(results[1]["gradients"][name]), f"{name} differs between the ranks"
        assert gradient.dtype == torch.float32


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_micro_batches_add_up(micro_batch: int) -> None:
    batch = global_batch(ragged=True)
    model, step = step_for(torch.float32, Ranks(), micro_batch)
    for _ in range(2):  # the second time shows that the sums start from zero
        loss, tokens, _ = step.accumulate(batch)
    actual = {name: None if weight.grad is None else weight.grad.clone() for name, weight in model.named_parameters()}
    expected_loss, expected = oracle(step_for(torch.float32, Ranks(), 8)[0], batch)
    assert tokens == 4 * 2 + 4 * 16
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(actual, expected, torch.float32)


def test_a_step_trains() -> None:
    _, step = step_for(torch.float32, Ranks(), 8)
    losses = [step(number, global_batch(ragged=False)).loss for number in range(8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


def test_small_gradients_survive_in_bfloat16() -> None:
    """256 micro-batches that each add 1: in bfloat16 the sum would stick at 256."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    buffer = GradientBuffer([weight])
    for _ in range(300):
        weight.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [300.0] * 3
    buffer.zero_()
    assert weight.grad.tolist() == [0.0] * 3


def test_the_digest_of_samples() -> None:
    batch = global_batch(ragged=False)
    whole = samples_digest(batch, first=0)
    parts = samples_digest(batch[:3], first=0) + samples_digest(batch[3:], first=3)
    assert parts % (1 << 48) == whole
    swapped = batch[[1, 0, 2, 3, 4, 5, 6, 7]]
    assert samples_digest(swapped, first=0) != whole, "the order counts"
    changed = batch.copy()
    changed[7, 16] ^= 1
    assert samples_digest(changed, first=0) != whole, "every token counts"
