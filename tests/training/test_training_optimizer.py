"""The optimizer against torch's own, by hand, and across a save and a load."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sihe.core.errors import ConfigError, InvalidInput
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.optimizer import MasterOptimizer
from sihe.training.optimizers.adamw import AdamW

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


def decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG).to(dtype)


def backward(model: Decoder, seed: int) -> None:
    tokens = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(seed))
    nll, count = model.loss(tokens[:, :-1], tokens[:, 1:])
    (nll / count).backward()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_float32_steps_are_those_of_torch() -> None:
    """torch's plain implementation, with clipping by torch and one group without decay."""
    ours, theirs = decoder(), decoder()
    mine = MasterOptimizer(ours, AdamW(betas=(0.9, 0.95), weight_decay=0.1), clip_norm=0.5)
    parameters = list(theirs.parameters())
    groups = [
        {"params": [weight for weight in parameters if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in parameters if weight.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    norms = []
    for step in range(10):
        lr = 1e-2 / (step + 1)
        backward(ours, step)
        backward(theirs, step)
        norms.append(mine.step(lr))
        expected = float(nn.utils.clip_grad_norm_(parameters, 0.5))
        assert norms[-1] == pytest.approx(expected, rel=1e-5)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        mine.zero_grad()
        reference.zero_grad()
    assert any(norm > 0.5 for norm in norms)  # the clipping was at work
    for (name, got), want in zip(ours.named_parameters(), parameters, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5, msg=name)


def test_two_steps_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    optimizer = MasterOptimizer(model, AdamW(betas=(0.5, 0.5), eps=1e-12, weight_decay=0.1), clip_norm=math.inf)
    weight, mean, variance = 2.0, 0.0, 0.0
    for step, gradient in enumerate((3.0, -1.0), start=1):
        model.weight.grad = torch.tensor([[gradient]])
        assert optimizer.step(0.1) == pytest.approx(abs(gradient))
        mean, variance = 0.5 * mean + 0.5 * gradient, 0.5 * variance + 0.5 * gradient**2
        bias = 1 - 0.5**step
        weight = weight * (1 - 0.1 * 0.1) - 0.1 * (mean / bias) / math.sqrt(variance / bias)
        assert float(model.weight.detach()) == pytest.approx(weight, rel=1e-6)


def test_vectors_are_not_decayed() -> None:
    model = decoder()
    optimizer = MasterOptimizer(model, AdamW(weight_decay=0.5))
    before = weights(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step(0.1)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, before[name] * (1 - 0.05 if weight.ndim > 1 else 1), msg=name)


def test_clipping_limits_the_update_and_reports_the_norm_before() -> None:
    free, clipped = decoder(), decoder()
    for model in (free, clipped):
        backward(model, 0)
    norm = MasterOptimizer(free, clip_norm=math.inf).step(0.0)
    first = next(weight for weight in clipped.parameters())
    before = first.grad.clone()
    assert MasterOptimizer(clipped, clip_norm=norm / 4).step(0.0) == pytest.approx(norm)
    torch.testing.assert_close(first.grad, before / 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = decoder()
    optimizer = MasterOptimizer(model)
    backward(model, 0)
    optimizer.step(1e-2)
    before, state = weights(model), {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    model.norm.weight.grad[3] = bad
    assert not math.isfinite(optimizer.step(1e-2))
    assert_same(weights(model), before)
    assert_same(optimizer.state_tensors(), state)


def test_bfloat16_weights_are_the_rounded_masters() -> None:
    model = decoder(torch.bfloat16)
    optimizer = MasterOptimizer(model)
    for step in range(5):
        backward(model, step)
        optimizer.step(1e-3)
        optimizer.zero_grad()
    state = optimizer.state_tensors()
    assert {state[f"{kind}.norm.weight"].dtype for kind in ("weight", "mean", "variance")} == {torch.float32}
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, state[f"weight.{name}"].bfloat16()), name


def test_the_state_does_not_depend_on_the_precision_of_the_weights() -> None:
    """It holds the float32 masters, so a run in bfloat16 goes on in float32 and back."""
    half, full = decoder(torch.bfloat16), decoder()
    optimizer = MasterOptimizer(half)
    backward(half, 0)
    optimizer.step(1e-2)
    MasterOptimizer(full).load_state_tensors(optimizer.state_tensors())
    for name, weight in half.named_parameters():
        assert torch.equal(weight, full.get_parameter(name).bfloat16()), name


def test_steps_too_small_for_bfloat16_add_up() -> None:
    """1,000 steps of 1e-5 from 1.0 are lost one by one in bfloat16 (spacing 2^-8 below 1) and arrive with masters."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = MasterOptimizer(model, AdamW(weight_decay=0.0), clip_norm=math.inf)
    for _ in range(1000):
        model.weight.grad = torch.ones(1, 1, dtype=torch.bfloat16)
        optimizer.step(1e-5)
    assert float(model.weight.detach()) == pytest.approx(0.99, abs=2**-8)
    assert float(optimizer.state_tensors()["weight.weight"]) == pytest.approx(0.99, rel=1e-4)


def test_bfloat16_weights_take_float32_gradients_where_they_lie() -> None:
    model = nn.Linear(4, 4, bias=False).bfloat16()
    model.weight.grad_dtype = torch.float32
    buffer = torch.zeros(16)
    model.weight.grad = buffer.view(4, 4)
    optimizer = MasterOptimizer(model, clip_norm=1.0)
    model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    assert optimizer.step(1e-3) == pytest.approx(8.0)  # sixteen gradients of 2
    torch.testing.assert_close(buffer, torch.full((16,), 0.25))
    optimizer.zero_grad()
    assert not buffer.any()
    assert model.weight.grad.data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_bit_for_bit_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    through, before = decoder(dtype), decoder(dtype)
    uninterrupted, killed = MasterOptimizer(through), MasterOptimizer(before)
    for step in range(3):
        for model, optimizer in ((through, uninterrupted), (before, killed)):
            backward(model, step)
            optimizer.step(1e-2)
            optimizer.zero_grad()
    save_file(killed.state_tensors(), tmp_path / "optimizer.safetensors")
    save_file(weights(before), tmp_path / "model.safetensors")

    torch.manual_seed(99)
    after = Decoder(CONFIG).to(dtype)
    after.load_state_dict(load_file(tmp_path / "model.safetensors"))
    resumed = MasterOptimizer(after)
    resumed.load_state_tensors(load_file(tmp_path / "optimizer.safetensors"))
    for step in range(3, 6):
        norms = []
        for model, optimizer in ((through, uninterrupted), (after, resumed)):
            backward(model, step)
            norms.append(optimizer.step(1e-2))
            optimizer.zero_grad()
        assert norms[0] == norms[1]
    assert_same(weights(after), weights(through))
    assert_same(resumed.state_tensors(), uninterrupted.state_tensors())


def test_the_state_of_another_model_is_refused_and_changes_nothing() -> None:
    model = decoder()
    optimizer = MasterOptimizer(model)
    backward(model, 0)
    optimizer.step(1e-2)
    good = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    missing = {name: tensor for name, tensor in good.items() if name != "mean.norm.weight"}
    for bad, pattern in (
        (missing, r"'mean\.norm\.weight' should be float32\[32\], got absent"),
        (good | {"mean.norm.weight": torch.ones(31)}, r"should be float32\[32\], got float32\[31\]"),
        (good | {"mean.head.weight": torch.ones(1)}, r"'mean\.head\.weight' should be absent"),
    ):
        with pytest.raises(InvalidInput, match=pattern):
            optimizer.load_state_tensors(bad)
        assert_same(optimizer.state_tensors(), good)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": math.nan}, "clip_norm"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        if "clip_norm" in change:
            MasterOptimizer(decoder(), **change)
        AdamW(**change)
    assert caught.value.key == key


def test_bfloat16_learns_as_float32_does() -> None:
    """The same data for 80 steps: with masters, the loss curves lie on each other."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randint(61, (61, 2), generator=generator)  # each token has one of two successors
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        model = decoder(dtype)
        optimizer = MasterOptimizer(model, clip_norm=1.0)
        draws = torch.Generator().manual_seed(4)
        curve = []
        for _ in range(80):
            tokens = [torch.randint(61, (8,), generator=draws)]
            for _ in range(20):
                tokens.append(table[tokens[-1], torch.randint(2, (8,), generator=draws)])
            tokens_BT = torch.stack(tokens, dim=1)
            nll, count = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
            (nll / count).backward()
            optimizer.step(1e-2)
            optimizer.zero_grad()
            curve.append(float(nll.detach() / count))
        curves.append(torch.tensor(curve))
    exact, rounded = curves
    assert exact[-10:].mean() < 2.5 < exact[0] - 1  # it learnt: from log 61 = 4.1 towards log 2
    assert float((rounded - exact).abs().mean() / exact.mean()) < 0.02
