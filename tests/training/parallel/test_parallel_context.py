"""Attention over sequences that are spread over ranks, against one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sihe.core.errors import ConfigError
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.loss import cross_entropy
from sihe.training.parallel.context import (
    ContextAttention,
    positions_of_share,
    share_of_sequence,
    whole_sequence,
)
from sihe.training.parallel.mesh import ParallelMesh
from sihe.training.parallel.plan import ParallelPlan
from support.gloo import run_ranks

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=32,
)


def model_and_batch() -> tuple[Decoder, Tensor, Tensor]:
    torch.manual_seed(7)
    model = Decoder(CONFIG)
    tokens_BT = torch.randint(CONFIG.vocab_size, (3, 16))
    targets_BT = torch.randint(-1, CONFIG.vocab_size, (3, 16))
    return model, tokens_BT, targets_BT


def gradients_of_share(cp: int) -> tuple[Tensor, dict[str, Tensor]]:
    mesh = ParallelMesh(ParallelPlan(cp=cp))
    axis = mesh["cp"]
    model, tokens_BT, targets_BT = model_and_batch()
    positions_BT = positions_of_share(tokens_BT.shape[1], axis)
    hidden = model.hidden(share_of_sequence(tokens_BT, axis), positions_BT, ContextAttention(axis))
    loss = cross_entropy(hidden, model.head_weight, share_of_sequence(targets_BT, axis))
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("cp", [2, 4])
def test_gradients_summed_over_the_ranks_are_those_of_one_process(cp: int) -> None:
    model, tokens_BT, targets_BT = model_and_batch()
    loss, _ = model.loss(tokens_BT, targets_BT)
    loss.backward()
    answers = run_ranks(gradients_of_share, cp, cp)
    torch.testing.assert_close(sum(part for part, _ in answers), loss.detach())
    for name, weight in model.named_parameters():
        total = torch.stack([gradients[name] for _, gradients in answers]).sum(0)
        torch.testing.assert_close(total, weight.grad, rtol=1e-5, atol=1e-5 * float(weight.grad.abs().max()))


class Place:
    """An axis without processes behind it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_the_shares_are_the_sequence_again(cp: int) -> None:
    x_BT = torch.arange(2 * 12).view(2, 12)
    shares = [share_of_sequence(x_BT, Place(rank, cp)) for rank in range(cp)]
    assert torch.equal(whole_sequence(torch.stack(shares)), x_BT)


@pytest.mark.parametrize("cp", [2, 4])
def test_every_rank_attends_over_the_same_number_of_keys(cp: int) -> None:
    keys = {int((positions_of_share(16, Place(rank, cp)) + 1).sum()) for rank in range(cp)}
    assert keys == {16 * 17 // 2 // cp}


def test_a_length_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 cp \\(4\\) divides the length of a sequence, got 10") as caught:
        share_of_sequence(torch.zeros(1, 10), Place(0, 2))
    assert caught.value.key == "parallel.cp"
