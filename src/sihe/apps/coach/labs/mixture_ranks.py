"""What `moe.balance` runs: a small mixture trained with each way to balance its router, and its choices counted.

B  samples      T  time      E  experts
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sihe.models.config import Balance, ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.moe import MixtureOfExperts, mixtures
from sihe.training.optimizer import MasterOptimizer

_BATCH, _TIME = 4, 64
_VOCABULARY = 128
_WAYS: tuple[Balance, ...] = ("none", "loss", "bias")
_RATE = 3e-3
_TEST_BATCHES = 4


def balances(
    _rank: int, _world_size: int, *, experts: int, chosen: int, steps: int, factors: list[float]
) -> dict[str, Any]:
    """For each way: loads of the experts on unseen text, imbalance in training, drops by capacity, and the loss."""
    return {way: _train(way, experts, chosen, steps, factors) for way in _WAYS}


def _train(way: Balance, experts: int, chosen: int, steps: int, factors: list[float]) -> dict[str, Any]:
    torch.manual_seed(31)
    config = ModelConfig(
        *(_VOCABULARY, 64, 2, 4, 4, 16, 64, _TIME),
        num_experts=experts,
        experts_per_token=chosen,
        router_balance=way,
    )
    model = Decoder(config)
    optimizer = MasterOptimizer(model)
    trace = []
    for number in range(steps):
        tokens_BT = _text(number)
        for weight in model.parameters():
            weight.grad = None
        loss, count = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        (loss / count).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step(_RATE)
        for mixture in mixtures(model):
            mixture.update_bias()
        trace.append((number + 1, max(imbalance(_load(mixture)) for mixture in mixtures(model))))
    load_E, loss_per_token = _test(model)
    return {
        "load": load_E.tolist(),
        "imbalance": imbalance(load_E),
        "loss": loss_per_token,
        "trace": trace,
        "dropped": [_dropped(model, factor) for factor in factors],
    }


def imbalance(load_E: Tensor) -> float:
    """The load of the fullest expert over the mean: how much longer its rank takes than it would with even loads."""
    return float(load_E.max() / load_E.double().mean())


def _text(number: int) -> Tensor:
    """Tokens [B, T + 1] in which a few words are frequent and each is followed by one of a few others."""
    generator = torch.Generator().manual_seed(1000 + number)
    frequency = 1.0 / torch.arange(1, _VOCABULARY + 1)
    tokens_BT = torch.multinomial(frequency, _BATCH * (_TIME + 1), replacement=True, generator=generator).view(
        _BATCH, -1
    )
    # Every second word follows from the one before.
    tokens_BT[:, 1::2] = (tokens_BT[:, :-1:2] * 7 + 3) % _VOCABULARY
    return tokens_BT


def _load(mixture: MixtureOfExperts) -> Tensor:
    assert mixture.load_E is not None
    return mixture.load_E


@torch.no_grad()
def _test(model: Decoder) -> tuple[Tensor, float]:
    """On texts that were not trained on: choices of each expert in the layer that is worst balanced, and the loss."""
    loads = [torch.zeros(model.config.num_experts, dtype=torch.int64) for _ in mixtures(model)]
    total, targets = 0.0, 0
    for number in range(_TEST_BATCHES):
        tokens_BT = _text(-1 - number)
        loss, count = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        total, targets = total + float(loss), targets + int(count)
        loads = [load_E + _load(mixture) for load_E, mixture in zip(loads, mixtures(model), strict=True)]
    return max(loads, key=imbalance), total / targets


@torch.no_grad()
def _dropped(model: Decoder, factor: float) -> float:
    """The share of all choices that finds its expert full at a capacity factor."""
    dropped = choices = 0
    for mixture in mixtures(model):
        mixture.capacity_factor = factor
    for number in range(_TEST_BATCHES):
        model.hidden(_text(-1 - number)[:, :-1])
        dropped += sum(mixture.dropped for mixture in mixtures(model))
        choices += sum(int(_load(mixture).sum()) for mixture in mixtures(model))
    for mixture in mixtures(model):
        mixture.capacity_factor = None
    return dropped / choices
