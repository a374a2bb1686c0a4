"""Muon beside `torch.optim.Muon` and beside the singular value decomposition; on parts of matrices as on whole ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.optimizers import AdamW, Muon, Weight, WholeMatrix
from sihe.training.optimizers.muon import is_hidden_matrix, orthogonal
from support.gloo import run_ranks
from support.optimizer_ranks import PLACEMENTS, gradients, muon_on_parts


def moved(rule: Muon, start: Tensor, grads: list[Tensor], *, lr: float = 0.01) -> Tensor:
    weight = Weight("blocks.0.w", start.clone(), decays=True, matrix=WholeMatrix())
    state = rule.init(weight)
    for step, grad in enumerate(grads, start=1):
        rule.update([weight], [grad], [state], lr=lr, step=step)
    return weight.master


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
@pytest.mark.parametrize(("scale", "theirs"), [("adamw", "match_rms_adamw"), ("spectral", "original")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_torch(shape: tuple[int, int], scale: str, theirs: str, nesterov: bool) -> None:
    """torch iterates in bfloat16. The same iteration in float32 lies as near as bfloat16 can tell (8 bits)."""
    start, *grads = gradients(shape, 9)
    parameter = torch.nn.Parameter(start.clone())
    reference = torch.optim.Muon(
        [parameter], lr=0.01, weight_decay=0.2, momentum=0.9, nesterov=nesterov, adjust_lr_fn=theirs
    )
    for grad in grads:
        parameter.grad = grad
        reference.step()
    settings = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.2, "scale": scale}
    size = (parameter.detach() - start).abs().max()
    for precision, tolerance in (("bf16", 0.02), ("fp32", 0.02)):
        ours = moved(Muon(**settings, precision=precision), start, grads)
        assert float((ours - parameter.detach()).abs().max() / size) < tolerance


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (3, 8, 8)])
def test_singular_values_move_by_the_polynomial_and_vectors_stay(shape: tuple[int, ...]) -> None:
    (matrix,) = gradients(shape, 1)
    u, values, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm(dim=(-2, -1))[..., None]
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = u @ torch.diag_embed(values) @ vt
    torch.testing.assert_close(orthogonal(matrix), expected.float(), atol=2e-5, rtol=1e-4)
    assert 0.6 < float(values.min()) < float(values.max()) < 1.25


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert torch.equal(orthogonal(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_a_stack_is_its_matrices_one_by_one() -> None:
    start, *grads = gradients((3, 6, 10), 5)
    stacked = moved(Muon(), start, grads)
    for index in range(3):
        alone = moved(Muon(), start[index], [grad[index] for grad in grads])
        torch.testing.assert_close(stacked[index], alone, atol=1e-6, rtol=1e-5)


def test_other_weights_move_by_adamw() -> None:
    rule, plain = Muon(others=AdamW(betas=(0.7, 0.8))), AdamW(betas=(0.7, 0.8))
    start, *grads = gradients((7, 5), 4)
    results = []
    for each in (rule, plain):
        weight = Weight("embedding", start.clone(), decays=True)
        state = each.init(weight)
        for step, grad in enumerate(grads, start=1):
            each.update([weight], [grad], [state], lr=0.01, step=step)
        results.append(weight.master)
    assert torch.equal(*results)


def test_which_weights_are_hidden_matrices() -> None:
    model = Decoder(ModelConfig(61, 32, 2, 4, 2, 8, 48, 40))
    names = [name for name, weight in model.named_parameters() if is_hidden_matrix(name, weight)]
    first = [name for name in names if name.startswith("blocks.0.")]
    assert sorted(name.removeprefix("blocks.0.") for name in first) == [
        "attention.out.weight",
        "attention.qkv.weight",
        "mlp.down.weight",
        "mlp.gate_up.weight",
    ]
    assert all(name.startswith("blocks.") for name in names)


@pytest.mark.parametrize("placed", PLACEMENTS)
def test_a_matrix_in_parts_moves_as_a_whole_one(placed: str) -> None:
    start, *grads = gradients((12, 10), 4)
    expected = moved(Muon(), start, grads)
    for whole in run_ranks(muon_on_parts, 4, placed, (12, 10), 3):
        torch.testing.assert_close(whole, expected, atol=1e-6, rtol=1e-5)


def test_ranks_without_a_row_take_part_all_the_same() -> None:
    start, *grads = gradients((3, 10), 4)
    for whole in run_ranks(muon_on_parts, 4, "rows of rows", (3, 10), 3):
        torch.testing.assert_close(whole, moved(Muon(), start, grads), atol=1e-6, rtol=1e-5)
