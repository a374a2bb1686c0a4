"""What the decoder promises on its own: causality, positions, the replaceable attention, the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from sihe.core.errors import TooLarge
from sihe.models import loss as loss_module
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.loss import cross_entropy
from sihe.models.mlp import GatedMLP
from sihe.models.norm import RMSNorm
from sihe.models.rope import RotaryTable

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=40,
)


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(1))


def test_the_number_of_weights_is_as_configured() -> None:
    for config in (CONFIG, replace(CONFIG, tie_embeddings=False), replace(CONFIG, num_kv_heads=4)):
        assert sum(weight.numel() for weight in Decoder(config).parameters()) == config.num_parameters


def test_a_seed_gives_the_same_weights(model: Decoder, tokens: Tensor) -> None:
    torch.manual_seed(0)
    assert torch.equal(Decoder(CONFIG)(tokens), model(tokens))


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, vocab_size=5000)
    nll, count = Decoder(config).loss(torch.randint(5000, (8, 40)), torch.randint(5000, (8, 40)))
    assert float((nll / count).detach()) == pytest.approx(torch.tensor(5000.0).log().item(), abs=0.02)


def test_no_position_sees_a_later_token(model: Decoder, tokens: Tensor) -> None:
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_given_positions_equal_the_default_ones(model: Decoder, tokens: Tensor) -> None:
    positions_BT = torch.arange(20).expand(3, 20)
    torch.testing.assert_close(model(tokens, positions_BT), model(tokens))


def test_only_distances_between_positions_count(model: Decoder, tokens: Tensor) -> None:
    shifts_B1 = torch.tensor([[0], [7], [20]])
    torch.testing.assert_close(model(tokens, torch.arange(20) + shifts_B1), model(tokens), atol=1e-5, rtol=1e-4)


class Recorded:
    """Plain attention in one line of algebra, which also counts calls: the oracle of the port."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        self.layers.append(layer)
        group = q_BTNH.shape[2] // k_BTKH.shape[2]
        k_BTNH, v_BTNH = (x.repeat_interleave(group, dim=2) for x in (k_BTKH, v_BTKH))
        score_BNTS = torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH) / q_BTNH.shape[-1] ** 0.5
        later = torch.ones(score_BNTS.shape[-2:]).triu(1).bool()
        return torch.einsum("bnts,bsnh->btnh", score_BNTS.masked_fill(later, -torch.inf).softmax(-1), v_BTNH)


def test_attention_can_be_replaced(model: Decoder, tokens: Tensor) -> None:
    recorded = Recorded()
    torch.testing.assert_close(model.logits(model.hidden(tokens, attend=recorded)), model(tokens))
    assert recorded.layers == [0, 1]


def test_too_long_a_sequence_says_so(model: Decoder) -> None:
    with pytest.raises(TooLarge, match=r"at most 40 tokens .* got 41") as caught:
        model(torch.zeros(1, 41, dtype=torch.long))
    assert (caught.value.limit, caught.value.actual) == (40, 41)


def test_angles_stay_exact_when_the_model_is_cast() -> None:
    table = RotaryTable(head_dim=8, max_positions=4096, theta=1e4)
    rounded = table.prefix(4096, torch.device("cpu"), torch.bfloat16).cos[0, :, 0]
    expected = (torch.arange(4096, dtype=torch.float64)[:, None] * 1e4 ** -(torch.arange(4) / 4).double()).cos()
    assert float((rounded.double() - expected).abs().max()) < 2**-7  # rounding of the result, not of the angle


# ---- hand-written gradients, against finite differences in float64 -------------------------------------------------


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)


def test_gradients_of_the_norm() -> None:
    norm = RMSNorm(6, eps=0.1).double()
    x, weight = doubles(2, 3, 6), doubles(6)
    assert torch.autograd.gradcheck(lambda x, w: functional_call(norm, {"weight": w}, x), (x, weight))
    expected = functional.rms_norm(x, (6,), weight, 0.1)
    torch.testing.assert_close(functional_call(norm, {"weight": weight}, x), expected)


def test_gradients_of_the_feed_forward_layer() -> None:
    mlp = GatedMLP(replace(CONFIG, hidden_size=5, intermediate_size=3)).double()
    weights = {name: weight.detach().requires_grad_() for name, weight in mlp.named_parameters()}
    assert torch.autograd.gradcheck(
        lambda x, *w: functional_call(mlp, dict(zip(weights, w, strict=True)), x), (doubles(2, 4, 5), *weights.values())
    )


@pytest.mark.parametrize("group", [1, 3])
def test_gradients_of_the_rotation(group: int) -> None:
    table = RotaryTable(head_dim=4, max_positions=9, theta=10.0)
    qkv_BTKGH = doubles(2, 5, 2, group + 2, 4)
    for rotation in (
        table.prefix(5, torch.device("cpu"), torch.float64),
        table.at(torch.tensor([[0, 1, 2, 3, 4], [8, 3, 3, 0, 7]]), torch.float64),
    ):
        assert torch.autograd.gradcheck(rotation.apply, (qkv_BTKGH,))
        q_BTNH, k_BTKH, v_BTKH = rotation.apply(qkv_BTKGH)
        # A rotation leaves lengths alone, and the values are untouched.
        torch.testing.assert_close(q_BTNH.norm(dim=-1), qkv_BTKGH[:, :, :, :group].norm(dim=-1).flatten(2))
        torch.testing.assert_close(k_BTKH.norm(dim=-1), qkv_BTKGH[:, :, :, group].norm(dim=-1))
        assert torch.equal(v_BTKH, qkv_BTKGH[:, :, :, group + 1])


# ---- loss ----------------------------------------------------------------------------------------------------------


def plain(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy((x @ head.T).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 4),
    time=st.integers(1, 9),
    chunk=st.integers(1, 40),
    ignored=st.floats(0, 1),
    scale=st.floats(-3, 3),
    seed=st.integers(0, 2**20),
)
def test_loss_and_its_gradients_are_those_of_cross_entropy(
    batch: int, time: int, chunk: int, ignored: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, time, 6, generator=generator, requires_grad=True)
    head = torch.randn(11, 6, generator=generator, requires_grad=True)
    targets = torch.randint(11, (batch, time), generator=generator)
    targets[torch.rand(batch, time, generator=generator) < ignored] = -1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "_CHUNK", chunk)
        ours = cross_entropy(x, head, targets)
    got = torch.autograd.grad(ours * scale, (x, head))
    theirs = plain(x, head, targets)
    torch.testing.assert_close(ours, theirs)
    for mine, reference in zip(got, torch.autograd.grad(theirs * scale, (x, head)), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)


def test_every_negative_target_is_left_out(model: Decoder, tokens: Tensor) -> None:
    targets = tokens.roll(-1, dims=1)
    half = targets.clone()
    half[:, ::2] = -1
    other = targets.clone()
    other[:, ::2] = -100
    nll, count = model.loss(tokens, half)
    assert int(count) == 30
    torch.testing.assert_close(nll, model.loss(tokens, other)[0])
    skipped, _ = model.loss(tokens, torch.where(half < 0, targets, -1))
    torch.testing.assert_close(nll + skipped, model.loss(tokens, targets)[0])


def test_no_target_at_all_is_a_zero_with_zero_gradients(model: Decoder, tokens: Tensor) -> None:
    nll, count = model.loss(tokens, torch.full_like(tokens, -1))
    nll.backward()
    assert (float(nll.detach()), int(count)) == (0.0, 0)
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


def test_loss_without_gradients_is_the_same(model: Decoder, tokens: Tensor) -> None:
    targets = tokens.roll(-1, dims=1)
    with torch.no_grad():
        quiet, _ = model.loss(tokens, targets)
    assert torch.equal(quiet, model.loss(tokens, targets)[0])


def test_bfloat16_gradients_stay_near_float32(model: Decoder, tokens: Tensor) -> None:
    """Rounding costs some percent in each gradient; a wrong formula would cost much more."""
    targets = tokens.roll(-1, dims=1)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).zero_grad()
        nll, count = model.loss(tokens, targets)
        (nll / count).backward()
        gradients.append({name: weight.grad.float().clone() for name, weight in model.named_parameters()})
    for name, exact in gradients[0].items():
        assert float((gradients[1][name] - exact).norm() / exact.norm()) < 0.05, name
