"""Chunked log-probabilities and divergences: the values and gradients of the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sihe.training.recipes.logprobs import chunked_divergence, next_token_logprobs, token_logprobs
from sihe.training.recipes.losses import forward_kl, reverse_kl
from support.tiny_models import tiny_config


def plain(x_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor) -> Tensor:
    return torch.log_softmax(x_BTD @ head_VD.T, -1).gather(-1, targets_BT[..., None])[..., 0]


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_values_and_gradients_are_the_plain_ones_for_any_weight_on_each_token(chunk: int) -> None:
    generator = torch.Generator().manual_seed(chunk)
    weights_BT = torch.randn(2, 5, generator=generator)
    targets_BT = torch.randint(0, 11, (2, 5), generator=generator)
    ours = torch.randn(2, 5, 6, generator=generator).requires_grad_(), torch.randn(11, 6, generator=generator)
    x_BTD, head_VD = ours[0], ours[1].requires_grad_()
    theirs = x_BTD.detach().clone().requires_grad_(), head_VD.detach().clone().requires_grad_()
    logps_BT = token_logprobs(x_BTD, head_VD, targets_BT, chunk=chunk)
    expected_BT = plain(*theirs, targets_BT)
    torch.testing.assert_close(logps_BT, expected_BT)
    (logps_BT * weights_BT).sum().backward()
    (expected_BT * weights_BT).sum().backward()
    torch.testing.assert_close(x_BTD.grad, theirs[0].grad)
    torch.testing.assert_close(head_VD.grad, theirs[1].grad)


def test_no_tensor_of_all_logits_is_kept() -> None:
    x_BTD, head_VD = torch.randn(4, 8, 2, requires_grad=True), torch.randn(1000, 2, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda t: t):
        token_logprobs(x_BTD, head_VD, torch.zeros(4, 8, dtype=torch.long), chunk=4)
    assert max(kept) == head_VD.numel()  # 2,000, where logits are 32,000


def test_a_models_log_probabilities_are_those_of_its_logits() -> None:
    from sihe.models.decoder import Decoder

    torch.manual_seed(0)
    model = Decoder(tiny_config())
    tokens_BT = torch.randint(0, model.config.vocab_size, (3, 9))
    expected = torch.log_softmax(model(tokens_BT)[:, :-1], -1).gather(-1, tokens_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(next_token_logprobs(model, tokens_BT, chunk=5), expected)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_a_chunked_divergence_has_the_plain_value_and_gradient(divergence) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    student_BTD = torch.randn(2, 5, 6, generator=generator).requires_grad_()
    head_VD = torch.randn(11, 6, generator=generator).requires_grad_()
    teacher_BTE = torch.randn(2, 5, 8, generator=generator)
    teacher_head_VE = torch.randn(11, 8, generator=generator)
    weights_BT = torch.randn(2, 5, generator=generator)
    ours = chunked_divergence(student_BTD, head_VD, teacher_BTE, teacher_head_VE, divergence, chunk=3)
    theirs = divergence(student_BTD @ head_VD.T, teacher_BTE @ teacher_head_VE.T)
    torch.testing.assert_close(ours, theirs)
    ours_grads = torch.autograd.grad((ours * weights_BT).sum(), [student_BTD, head_VD])
    torch.testing.assert_close(ours_grads, torch.autograd.grad((theirs * weights_BT).sum(), [student_BTD, head_VD]))
