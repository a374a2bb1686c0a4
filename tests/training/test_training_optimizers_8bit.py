"""8-bit states: how near they are, that they come back bit for bit, and that training with them arrives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sihe.training.optimizers import AdamW, AdamW8bit, Weight, WholeMatrix
from sihe.training.optimizers.blockwise import BLOCK, dequantise, num_blocks, quantise


def there_and_back(values: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales = torch.empty_like(values, dtype=torch.uint8), torch.empty(num_blocks(values.numel()))
    quantise(values, codes, scales, is_signed=is_signed)
    return dequantise(codes, scales, is_signed=is_signed), codes, scales


@pytest.mark.parametrize("is_signed", [True, False])
def test_all_256_codes_are_different_values(is_signed: bool) -> None:
    table = dequantise(torch.arange(256, dtype=torch.uint8), torch.ones(1), is_signed=is_signed)
    assert torch.equal(table, table.unique())  # ascending, no two alike
    assert float(table[-1]) == 1.0
    assert (float(table[0]) < -0.99) if is_signed else (0 < float(table[0]) < 1e-7)


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("shape", [(4, 256), (3, 5, 41), (1,), (0, 7)])
def test_errors_are_within_half_a_gap_of_the_map(is_signed: bool, shape: tuple[int, ...]) -> None:
    """The decade [0.1, 1] has 64 signed values (0.9 / 64 apart), or 128 squares; below it the gap shrinks along.

    The bins by which codes are looked up add 2^-10 of the number.
    """
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = values if is_signed else values.square()
    got, _, _ = there_and_back(values, is_signed=is_signed)
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    largest = flat.abs().amax(dim=1, keepdim=True).expand_as(flat).flatten()[: values.numel()].view(shape)
    half_a_gap = 0.9 / (64 if is_signed else 128) / 2
    assert bool(((got - values).abs() <= 1.15 * half_a_gap * largest + 1e-12).all())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=600),
    st.booleans(),
)
def test_what_was_unpacked_packs_into_the_same_bits(numbers: list[float], is_signed: bool) -> None:
    values = torch.tensor(numbers) if is_signed else torch.tensor(numbers).abs()
    once, codes, scales = there_and_back(values, is_signed=is_signed)
    twice, codes_again, scales_again = there_and_back(once, is_signed=is_signed)
    assert torch.equal(scales, scales_again)
    assert torch.equal(codes, codes_again)
    assert torch.equal(once, twice)


def test_a_square_beside_a_huge_one_is_not_rounded_to_nothing() -> None:
    got, _, _ = there_and_back(torch.tensor([1.0, 1e-12]), is_signed=False)
    assert float(got[1]) > 0


def test_states_take_two_bytes_a_weight_and_a_little() -> None:
    weight = Weight("blocks.0.w", torch.zeros(128, 128), decays=True, matrix=WholeMatrix())
    state = AdamW8bit().init(weight)
    assert sum(tensor.nbytes for tensor in state.values()) == 2 * 128 * 128 * (1 + 4 / BLOCK)


@pytest.mark.parametrize(
    ("shape", "matrix"), [((4095,), WholeMatrix()), ((128, 128), None)], ids=["small", "embedding"]
)
def test_small_weights_and_embeddings_keep_exact_states(shape: tuple[int, ...], matrix: WholeMatrix | None) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    results = []
    for rule in (AdamW8bit(), AdamW()):
        generator.manual_seed(1)
        weight = Weight("w", start.clone(), decays=True, matrix=matrix)
        state = rule.init(weight)
        for step in range(1, 5):
            rule.update([weight], [torch.randn(shape, generator=generator)], [state], lr=0.1, step=step)
        results.append(weight.master)
    assert torch.equal(*results)


def test_a_step_is_adamws_within_the_maps_resolution() -> None:
    """Twenty steps of noisy gradients: the path differs from AdamW's by under 3 % of its length (RMS)."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 128, generator=generator)
    slope = torch.randn(64, 128, generator=generator)
    paths = []
    for rule in (AdamW8bit(), AdamW()):
        generator.manual_seed(1)
        weight = Weight("blocks.0.w", start.clone(), decays=True, matrix=WholeMatrix())
        state = rule.init(weight)
        for step in range(1, 21):
            grad = slope + 0.5 * torch.randn(64, 128, generator=generator)
            rule.update([weight], [grad], [state], lr=0.01, step=step)
        paths.append(weight.master - start)
    ours, exact = paths
    assert float((ours - exact).square().mean().sqrt()) < 0.03 * float(exact.square().mean().sqrt())


def test_a_network_learns_as_with_adamw() -> None:
    """Two layers that learn a fixed network's outputs: the loss at the end is within 10 % of AdamW's, or lower."""

    def final_loss(rule: AdamW | AdamW8bit) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(256, 32, generator=generator)
        teacher = [torch.randn(shape, generator=generator) / shape[0] ** 0.5 for shape in ((32, 128), (128, 32))]
        targets = torch.tanh(inputs @ teacher[0]) @ teacher[1]
        layers = [(0.1 * torch.randn(w.shape, generator=generator)).requires_grad_() for w in teacher]
        moved = [Weight(f"blocks.{i}.w", w.detach(), decays=True, matrix=WholeMatrix()) for i, w in enumerate(layers)]
        states = [rule.init(weight) for weight in moved]
        losses = []
        for step in range(1, 301):
            loss = (torch.tanh(inputs @ layers[0]) @ layers[1] - targets).square().mean()
            losses.append(float(loss.detach()))
            grads = torch.autograd.grad(loss, layers)
            rule.update(moved, list(grads), states, lr=5e-3 * (1 - step / 301), step=step)
        return losses[0], losses[-1]

    first, exact = final_loss(AdamW(weight_decay=0.0))
    _, packed = final_loss(AdamW8bit(AdamW(weight_decay=0.0), least_size=1024))
    assert exact < 0.01 * first
    assert packed < 1.1 * exact
