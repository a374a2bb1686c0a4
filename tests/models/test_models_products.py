"""Products of bfloat16 tensors are the same numbers whether the processor multiplies them or float32 does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sihe.models import precision
from sihe.models.attention import attention
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.products import Linear, factor_dtype, linear

BF16_STEP = 2.0**-8  # the distance between neighbours, relative to the number
SHAPE = {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MODELS = {
    "dense": ModelConfig(**SHAPE, intermediate_size=48, max_positions=64),
    "experts": ModelConfig(
        **SHAPE, intermediate_size=48, max_positions=64, num_experts=4, experts_per_token=2, expert_intermediate_size=16
    ),
}


@pytest.fixture(params=[True, False], ids=["native", "widened"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    value: bool = request.param
    monkeypatch.setattr("sihe.models.products.native_bf16", lambda: value)
    return value


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def nearness(actual: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest number of the tensor."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def test_only_bfloat16_on_a_processor_without_it_is_widened(native: bool) -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert factor_dtype(torch.ones(1, dtype=dtype)) is dtype
    assert factor_dtype(torch.ones(1, dtype=torch.bfloat16)) is (torch.bfloat16 if native else torch.float32)
    assert factor_dtype(torch.ones(1, dtype=torch.bfloat16, device="meta")) is torch.bfloat16


@pytest.mark.parametrize("rows", [1, 63, 64, 200])
@pytest.mark.usefixtures("native")
def test_a_linear_layer_is_its_exact_result_rounded_once(rows: int) -> None:
    layer = Linear(80, 48).bfloat16()
    x = drawn(rows, 80).requires_grad_()
    y = layer(x)
    dy = drawn(*y.shape, seed=1)
    y.backward(dy)
    exact = Linear(80, 48).double()
    exact.load_state_dict(layer.state_dict())
    x_exact = x.detach().double().requires_grad_()
    y_exact = exact(x_exact)
    y_exact.backward(dy.double())
    assert y.dtype is torch.bfloat16
    pairs = [(y, y_exact), (x.grad, x_exact.grad), (layer.weight.grad, exact.weight.grad)]
    for actual, expected in [*pairs, (layer.bias.grad, exact.bias.grad)]:
        assert actual is not None
        assert expected is not None
        assert nearness(actual.detach(), expected.detach()) <= BF16_STEP


def test_gradients_are_computed_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sihe.models.products.native_bf16", lambda: False)
    x, weight = drawn(64, 8), drawn(4, 8)
    linear(x.requires_grad_(), weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None
    linear(x.detach(), weight.requires_grad_()).sum().backward()
    assert weight.grad is not None


@pytest.mark.usefixtures("native")
def test_attention_in_bfloat16_stays_near_float64() -> None:
    q, k, v = drawn(2, 70, 4, 8), drawn(2, 70, 2, 8, seed=1), drawn(2, 70, 2, 8, seed=2)
    mixed = attention(q, k, v, causal=True)
    assert mixed.dtype is torch.bfloat16
    exact = attention(q.double(), k.double(), v.double(), causal=True)
    assert nearness(mixed, exact) <= 4 * BF16_STEP  # a bfloat16 kernel rounds the weights of the mix as well


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.usefixtures("native")
def test_the_gradients_of_a_model_stay_near_float32(name: str) -> None:
    tokens_BT = torch.randint(96, (4, 65), generator=torch.Generator().manual_seed(3))
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Decoder(MODELS[name]).to(dtype)
        if name == "experts":
            for block in model.blocks:  # a rounded stream must not choose other experts
                block.mlp.router.weight.data.zero_()
        loss, count = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        (loss / count).backward()
        gradients[dtype] = {key: weight.grad for key, weight in model.named_parameters() if "router" not in key}
    for key, expected in gradients[torch.float32].items():
        actual = gradients[torch.bfloat16][key]
        assert actual is not None
        assert expected is not None
        assert actual.dtype is torch.bfloat16
        assert nearness(actual, expected) <= 0.04, key


def test_what_this_processor_multiplies_faster_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.bfloat16: 1.0, torch.float32: 2.0}
    tries = iter(range(10**6))

    def product_s(dtype: torch.dtype) -> float:
        assert torch.get_num_threads() == 1
        disturbance = next(tries) % 7  # some tries are disturbed, the best of each is not
        return seconds[dtype] + 5.0 * disturbance

    monkeypatch.setattr(precision, "_product_s", product_s)
    threads = torch.get_num_threads()
    for amx, avx512, bf16_s, expected in (
        (True, True, 9.0, True),
        (False, True, 1.0, True),
        (False, True, 3.0, False),
        (False, False, 1.0, False),
    ):
        seconds[torch.bfloat16] = bf16_s
        answers = {"_is_amx_tile_supported": amx, "_is_avx512_bf16_supported": avx512}
        monkeypatch.setattr(precision, "_has", answers.__getitem__)
        assert precision.native_bf16.__wrapped__() is expected
    assert precision.native_bf16.__wrapped__("meta") is False
    assert torch.get_num_threads() == threads
