"""Activation checkpointing changes what is kept and when work is done, and nothing else."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.architecture import AttentionConfig, LatentConfig, LayerConfig, PositionConfig
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.moe import mixtures
from sihe.models.recompute import recompute
from sihe.models.recompute_config import Policy, RecomputeConfig

BASE = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=40,
)
MODELS = {
    "dense": BASE,
    "mixture": replace(BASE, num_experts=4, experts_per_token=2, balance_coefficient=0.5, capacity_factor=1.0),
    "balanced by bias": replace(BASE, num_experts=4, experts_per_token=2, router_balance="bias"),
    "classic": replace(
        BASE,
        positions=PositionConfig("relative", buckets=8, max_distance=9),
        layers=LayerConfig(norm="layer", norm_first=False, gated=False, activation="gelu", mlp_bias=True),
    ),
    "latent": replace(
        BASE, num_kv_heads=4, attention=AttentionConfig(latent=LatentConfig(kv_rank=6, rotary_dim=4, value_dim=5))
    ),
}
POLICIES: list[tuple[Policy, list[int], list[int]]] = [
    ("none", [1, 1, 1, 1], [1, 1, 1, 1]),
    ("attention", [2, 2, 2, 2], [1, 1, 1, 1]),
    ("full", [2, 2, 2, 2], [2, 2, 2, 2]),
    ("every", [2, 1, 1, 2], [2, 1, 1, 2]),
]


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    return Decoder(request.param)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(61, (2, 21), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(20) // 8).expand(2, -1)
    return tokens[:, :-1], tokens[:, 1:], documents


def gradients(model: Decoder) -> tuple[Tensor, ...]:
    inputs, targets, documents = batch()
    nll, _ = model.loss(inputs, targets, documents_BT=documents)
    return nll.detach(), *torch.autograd.grad(nll, tuple(model.parameters()))


@pytest.mark.parametrize("policy", [policy for policy, _, _ in POLICIES])
def test_loss_gradients_and_loads_are_the_same(model: Decoder, policy: Policy) -> None:
    expected = gradients(model)
    loads = [(mixture.load_E, mixture.seen_E, mixture.dropped) for mixture in mixtures(model)]
    for mixture in mixtures(model):
        mixture.reset()
    names = list(model.state_dict())
    recompute(model.blocks, RecomputeConfig(policy, every=3))
    for got, want in zip(gradients(model), expected, strict=True):
        assert torch.equal(got, want)
    for mixture, (load, seen, dropped) in zip(mixtures(model), loads, strict=True):
        assert mixture.load_E is not None
        assert mixture.seen_E is not None
        assert load is not None
        assert seen is not None
        assert torch.equal(mixture.load_E, load)
        assert torch.equal(mixture.seen_E, seen)
        assert mixture.dropped == dropped
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(("policy", "attention", "mlp"), POLICIES)
def test_only_what_was_chosen_runs_twice(policy: Policy, attention: list[int], mlp: list[int]) -> None:
    torch.manual_seed(0)
    model = Decoder(BASE)
    recompute(model.blocks, RecomputeConfig(policy, every=3))
    runs: Counter[nn.Module] = Counter()
    kept = 0

    def count(module: nn.Module, args: object, output: object) -> None:
        runs[module] += 1

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 1
        return tensor

    products = [(block.attention.qkv, block.mlp.gate_up) for block in model.blocks]
    for product in sum(products, ()):
        product.register_forward_hook(count)
    inputs, targets, _ = batch()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nll, _ = model.loss(inputs, targets)
    nll.backward()
    assert [runs[qkv] for qkv, _ in products] == attention
    assert [runs[gate_up] for _, gate_up in products] == mlp
    if policy == "full":
        assert kept <= 10  # of embedding, last norm and loss what they need; of each block its input

    runs.clear()
    with torch.no_grad():
        model.loss(inputs, targets)
    assert set(runs.values()) == {1}


def test_a_policy_replaces_the_one_before_and_a_copy_has_its_own() -> None:
    torch.manual_seed(0)
    model = Decoder(BASE)
    recompute(model.blocks, RecomputeConfig("full"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(2)
    inputs, _, _ = batch()
    assert not torch.allclose(twin(inputs), model(inputs))
    recompute(twin.blocks, RecomputeConfig())
    assert torch.equal(twin(inputs), doubled(BASE)(inputs))
    assert all("forward" not in vars(module) for module in twin.modules())


def doubled(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    return model


def test_layers_are_numbered_in_the_whole_model() -> None:
    model = Decoder(BASE)
    recompute(model.blocks, RecomputeConfig("every", every=3), first_layer=5)
    assert ["forward" in vars(block) for block in model.blocks] == [False, True, False, False]


@pytest.mark.parametrize(
    ("values", "key"),
    [({"policy": "some"}, "recompute.policy"), ({"policy": "every", "every": 0}, "recompute.every")],
)
def test_a_wrong_policy_is_named(values: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RecomputeConfig(**values)
    assert caught.value.key == key
