"""Experts that are shared out over ranks, against one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sihe.core.errors import ConfigError
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.parallel.expert import ExpertExchange, cut_experts
from sihe.training.parallel.mesh import ParallelMesh
from sihe.training.parallel.plan import ParallelPlan
from support.gloo import run_ranks

CONFIG = ModelConfig(
    vocab_size=44,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    max_positions=16,
    num_experts=8,
    experts_per_token=2,
    expert_intermediate_size=12,
    shared_expert_size=8,
)
CONFIGS = {
    "balanced by loss": replace(CONFIG, balance_coefficient=0.5),
    "bounded": replace(CONFIG, capacity_factor=1.0),
}


def model_and_batch(kind: str) -> tuple[Decoder, Tensor, Tensor]:
    torch.manual_seed(17)
    model = Decoder(CONFIGS[kind])
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.router.weight.mul_(30)  # far from even: some experts get no row of a rank
    return model, torch.randint(44, (4, 6)), torch.randint(-1, 44, (4, 6))


def gradients(dp: int, ep: int) -> dict[str, tuple[Tensor, dict[str, Tensor], dict[str, int]]]:
    mesh = ParallelMesh(ParallelPlan(dp=dp, ep=ep))
    return {kind: gradients_of(kind, mesh) for kind in CONFIGS}


def gradients_of(kind: str, mesh: ParallelMesh) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
    """Loss and gradients of this rank's samples, and of its experts the place along the axis."""
    model, tokens_BT, targets_BT = model_and_batch(kind)
    cuts = {weight: cut for block in model.blocks for weight, cut in cut_experts(block, mesh["ep"])}
    batch = mesh["batch"]
    loss, _ = model.loss(tokens_BT.chunk(batch.size)[batch.rank], targets_BT.chunk(batch.size)[batch.rank])
    loss.backward()
    named = dict(model.named_parameters())
    places = {name: cuts[weight].axis.rank for name, weight in named.items() if weight in cuts}
    return loss.detach(), {name: weight.grad for name, weight in named.items() if weight.grad is not None}, places


@pytest.mark.parametrize(("dp", "ep"), [(2, 2), (4, 2), (4, 4)])
def test_gradients_are_those_of_one_process(dp: int, ep: int) -> None:
    by_rank = run_ranks(gradients, dp, dp, ep)
    for kind in CONFIGS:
        model, tokens_BT, targets_BT = model_and_batch(kind)
        total = torch.zeros(())
        for micro_tokens_BT, micro_targets_BT in zip(tokens_BT.chunk(dp), targets_BT.chunk(dp), strict=True):
            loss, _ = model.loss(micro_tokens_BT, micro_targets_BT)
            loss.backward()
            total += loss.detach()
        answers = [answer[kind] for answer in by_rank]
        torch.testing.assert_close(sum(loss for loss, _, _ in answers), total)
        for name, weight in model.named_parameters():
            want = weight.grad
            assert want is not None
            got = torch.zeros_like(want)
            for _, grads, places in answers:
                part = got.chunk(ep)[places[name]] if name in places else got
                part += grads[name]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        assert len(answers[0][2]) == 2 * CONFIG.num_layers


def rows_that_travel() -> tuple[Tensor, Tensor, Tensor]:
    """Rank 0 sends everything to rank 1's experts, and rank 1 has nothing to send."""
    axis = ParallelMesh(ParallelPlan(dp=2, ep=2))["ep"]
    counts_E = torch.tensor([[0, 0, 2, 1], [0, 0, 0, 0]])[axis.rank]
    x_SD = (torch.arange(int(counts_E.sum())) + 1.0).unsqueeze(1).requires_grad_()
    exchange = ExpertExchange(axis)
    rows_RD, counts_L, state = exchange.dispatch(x_SD, counts_E)
    y_SD = exchange.combine(rows_RD * 10, state)
    (y_SD * y_SD.detach()).sum().backward()
    assert x_SD.grad is not None
    return rows_RD.detach(), counts_L, torch.cat((y_SD.detach(), x_SD.grad), 1)


def test_a_rank_may_have_no_rows_and_get_none() -> None:
    (rows, counts, home), (far_rows, far_counts, nothing) = run_ranks(rows_that_travel, 2)
    assert (rows.shape, counts.tolist()) == ((0, 1), [0, 0])
    assert (far_rows.tolist(), far_counts.tolist()) == ([[1.0], [2.0], [3.0]], [2, 1])
    assert home.tolist() == [[10.0, 100.0], [20.0, 200.0], [30.0, 300.0]]
    assert nothing.shape == (0, 2)


class Place:
    """An axis without processes behind it."""

    name, rank, size = "ep", 0, 3


def test_a_number_of_experts_that_does_not_divide_is_refused() -> None:
    model, _, _ = model_and_batch("bounded")
    with pytest.raises(ConfigError, match=r"divisor of num_experts \(8\), got 3") as caught:
        list(cut_experts(model.blocks[0], Place()))
    assert caught.value.key == "parallel.ep"
