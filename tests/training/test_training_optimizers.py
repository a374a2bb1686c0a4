"""Each update rule against torch's or against its paper, step by step; states come back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sihe.core.errors import ConfigError
from sihe.training.optimizers import SGD, AdamW, Lion, UpdateRule, Weight, WholeMatrix, make_rule

SHAPES = {"matrix": (24, 10), "stack": (2, 9, 12), "norm": (10,), "nothing": (0, 10)}


def weights(seed: int = 0, *, scale: float = 1.0) -> list[Weight]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Weight(
            name,
            scale * torch.randn(shape, generator=generator),
            decays=len(shape) > 1,
            matrix=WholeMatrix() if len(shape) > 1 else None,
        )
        for name, shape in SHAPES.items()
    ]


def gradients(step: int) -> list[Tensor]:
    return [weight.master for weight in weights(100 + step, scale=3.0 / step)]


def run(rule: UpdateRule, steps: int = 10, *, decay_lr: bool = True) -> list[Tensor]:
    ours = weights()
    states = [rule.init(weight) for weight in ours]
    for step in range(1, steps + 1):
        grads = gradients(step)
        kept = [grad.clone() for grad in grads]
        rule.update(ours, grads, states, lr=0.1 / step if decay_lr else 0.1, step=step)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True)), "gradients are not the rule's"
    return [weight.master for weight in ours]


def run_torch(make: type[torch.optim.Optimizer], steps: int = 10, *, decay: float, **settings: Any) -> list[Tensor]:
    theirs = [torch.nn.Parameter(weight.master) for weight in weights()]
    groups = [
        {"params": [p for p in theirs if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in theirs if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = make(groups, lr=0.1, **settings)
    for step in range(1, steps + 1):
        for parameter, grad in zip(theirs, gradients(step), strict=True):
            parameter.grad = grad
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / step
        optimizer.step()
    return [parameter.detach() for parameter in theirs]


def assert_close(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    for name, got, want in zip(SHAPES, ours, theirs, strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_adamw_is_torchs_plain_adamw() -> None:
    theirs = run_torch(torch.optim.AdamW, decay=0.3, betas=(0.8, 0.9), eps=1e-6, foreach=False, fused=False)
    assert_close(run(AdamW(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)), theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs_plain_sgd(momentum: float, nesterov: bool) -> None:
    theirs = run_torch(torch.optim.SGD, decay=0.0, momentum=momentum, nesterov=nesterov, foreach=False, fused=False)
    assert_close(run(SGD(momentum=momentum, nesterov=nesterov)), theirs, atol=1e-6, rtol=1e-5)


def test_sgd_decays_apart_from_the_gradient() -> None:
    rule = SGD(momentum=0.5, weight_decay=0.2)
    weight = Weight("w", torch.tensor([[2.0]]), decays=True)
    state = rule.init(weight)
    rule.update([weight], [torch.tensor([[1.0]])], [state], lr=0.1, step=1)
    rule.update([weight], [torch.tensor([[1.0]])], [state], lr=0.1, step=2)
    first = 2.0 * 0.98 - 0.1
    assert float(weight.master) == pytest.approx(first * 0.98 - 0.1 * 1.5)


def test_lion_is_the_papers_algorithm() -> None:
    """Algorithm 2 of arXiv 2302.06675, element by element in double precision."""
    beta1, beta2, decay = 0.9, 0.95, 0.4
    expected = []
    for index, weight in enumerate(weights()):
        theta = weight.master.double()
        momentum = torch.zeros_like(theta)
        for step in range(1, 11):
            grad, lr = gradients(step)[index].double(), 0.1 / step
            update = torch.sign(beta1 * momentum + (1 - beta1) * grad)
            theta = theta - lr * (update + (decay if weight.decays else 0.0) * theta)
            momentum = beta2 * momentum + (1 - beta2) * grad
        expected.append(theta.float())
    assert_close(run(Lion(betas=(beta1, beta2), weight_decay=decay)), expected, atol=1e-6, rtol=1e-5)


RULES: Mapping[str, Mapping[str, Any]] = {
    "adamw": {},
    "adamw8bit": {"least_size": 16},
    "lion": {"weight_decay": 0.1},
    "muon": {},
    "sgd": {"momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize("kind", RULES)
def test_a_state_saved_and_taken_back_goes_on_bit_for_bit(kind: str) -> None:
    """The saved tensors have the masters' shapes, so that a checkpoint can cut them anew for other ranks."""
    rule = make_rule(kind, RULES[kind])
    straight = weights()
    states = [rule.init(weight) for weight in straight]
    resumed: list[Weight] = []
    again: list[dict[str, Tensor]] = []
    for step in range(1, 9):
        rule.update(straight, gradients(step), states, lr=0.05, step=step)
        if step == 4:
            saved = [{k: v.clone() for k, v in rule.unpacked(state).items()} for state in states]
            for weight, tensors in zip(straight, saved, strict=True):
                assert all(t.shape == weight.master.shape and t.dtype == torch.float32 for t in tensors.values())
            resumed = [Weight(w.name, w.master.clone(), w.decays, w.matrix) for w in straight]
            again = [rule.init(weight) for weight in resumed]
            for state, tensors in zip(again, saved, strict=True):
                rule.pack(state, tensors)
        if step > 4:
            rule.update(resumed, gradients(step), again, lr=0.05, step=step)
    for weight, other, state, same in zip(straight, resumed, states, again, strict=True):
        assert torch.equal(weight.master, other.master), weight.name
        for name, tensor in state.items():
            assert torch.equal(tensor, same[name]), f"{weight.name}: {name}"


@pytest.mark.parametrize("kind", RULES)
def test_every_rule_solves_a_least_squares_problem(kind: str) -> None:
    """‖XW - Y‖² with a known solution, at a rate that falls to nothing."""
    generator = torch.Generator().manual_seed(3)
    inputs, solution = torch.randn(128, 16, generator=generator), torch.randn(16, 8, generator=generator)
    rule = make_rule(kind, {**RULES[kind], "weight_decay": 0.0})
    weight = Weight("blocks.0.w", torch.zeros(16, 8), decays=True, matrix=WholeMatrix())
    state = rule.init(weight)
    losses = []
    for step in range(1, 401):
        error = inputs @ (weight.master - solution)
        losses.append(float(error.square().mean()))
        rule.update([weight], [2 * inputs.T @ error / 128], [state], lr=0.05 * (1 - step / 401), step=step)
    assert losses[-1] < 1e-4 * losses[0]


def test_equal_settings_make_equal_rules() -> None:
    assert make_rule("adamw", {"betas": [0.8, 0.9]}) == AdamW(betas=(0.8, 0.9))
    muon = make_rule("muon", {"betas": (0.7, 0.8), "weight_decay": 0.3})
    assert (muon.weight_decay, muon.others) == (0.3, AdamW((0.7, 0.8), weight_decay=0.3))  # type: ignore[attr-defined]
    assert [kind for kind in RULES if make_rule(kind).needs_whole_matrix] == ["muon"]


@pytest.mark.parametrize(
    ("kind", "settings", "key"),
    [
        ("adam", {}, "kind"),
        ("adamw", {"momentum": 0.9}, "momentum"),
        ("adamw", {"betas": (1.0, 0.9)}, "betas"),
        ("adamw", {"eps": 0.0}, "eps"),
        ("adamw8bit", {"least_size": 0}, "least_size"),
        ("adamw8bit", {"weight_decay": -1.0}, "weight_decay"),
        ("lion", {"betas": (0.9,)}, "betas"),
        ("lion", {"weight_decay": math.inf}, "weight_decay"),
        ("muon", {"iterations": 0}, "iterations"),
        ("muon", {"scale": "rms"}, "scale"),
        ("muon", {"precision": "fp16"}, "precision"),
        ("muon", {"others": None}, "others"),
        ("sgd", {"momentum": 1.0}, "momentum"),
        ("sgd", {"nesterov": True}, "nesterov"),
    ],
)
def test_a_wrong_setting_is_named(kind: str, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_rule(kind, settings)
    assert caught.value.key == key
