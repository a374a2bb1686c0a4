"""Embedding and loss over a shared-out vocabulary, against one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.loss import cross_entropy
from sihe.training.parallel.mesh import ParallelMesh
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.parallel.tensor import cut_block
from sihe.training.parallel.vocabulary import VocabularyEmbedding, cut_vocabulary, vocabulary_cross_entropy
from support.gloo import run_ranks

CONFIG = ModelConfig(
    vocab_size=44,
    hidden_size=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    intermediate_size=24,
    max_positions=32,
)
CASES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def loss_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """More tokens than one chunk has on two ranks; logits far from 0."""
    torch.manual_seed(3)
    x_BTD = torch.randn(3, 400, 8, dtype=dtype) * 3
    head_VD = torch.randn(24, 8, dtype=dtype) * 3
    return x_BTD.requires_grad_(), head_VD.requires_grad_(), torch.randint(-1, 24, (3, 400))


def model_and_batch(tie: bool) -> tuple[Decoder, Tensor, Tensor]:
    torch.manual_seed(11)
    model = Decoder(replace(CONFIG, tie_embeddings=tie))
    return model, torch.randint(44, (2, 8)), torch.randint(-1, 44, (2, 8))


def losses(tp: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    axis = ParallelMesh(ParallelPlan(tp=tp))["tp"]
    answers = []
    for dtype, _ in CASES:
        x_BTD, head_VD, targets_BT = loss_inputs(dtype)
        x_BSD = x_BTD.detach().chunk(tp, 1)[axis.rank].clone().requires_grad_()
        head_WD = head_VD.detach().chunk(tp)[axis.rank].clone().requires_grad_()
        loss = vocabulary_cross_entropy(x_BSD, head_WD, targets_BT, axis)
        (loss * 0.5).backward()
        assert x_BSD.grad is not None
        assert head_WD.grad is not None
        answers.append((loss.detach(), x_BSD.grad, head_WD.grad))
    return answers


@pytest.mark.parametrize("tp", [2, 4])
def test_loss_and_gradients_are_those_of_the_whole_vocabulary(tp: int) -> None:
    by_rank = run_ranks(losses, tp, tp)
    for case, (dtype, tolerance) in enumerate(CASES):
        x_BTD, head_VD, targets_BT = loss_inputs(dtype)
        loss = cross_entropy(x_BTD, head_VD, targets_BT)
        (loss * 0.5).backward()
        answers = [answer[case] for answer in by_rank]
        for part, _, _ in answers:
            torch.testing.assert_close(part, loss.detach(), rtol=tolerance, atol=0)
        for got, want in (
            (torch.cat([dx for _, dx, _ in answers], 1), x_BTD.grad),
            (torch.cat([dhead for _, _, dhead in answers]), head_VD.grad),
        ):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()))


def model_gradients(tp: int) -> list[tuple[Tensor, dict[str, Tensor], set[str]]]:
    axis = ParallelMesh(ParallelPlan(tp=tp))["tp"]
    return [gradients_of(axis, tie) for tie in (False, True)]


def gradients_of(axis, tie: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
    model, tokens_BT, targets_BT = model_and_batch(tie)
    cuts = dict(cut_block(model.blocks[0], axis))
    for weight in {model.embedding.weight, model.head_weight}:
        cuts[weight] = cut_vocabulary(weight, axis)
    model.embedding = VocabularyEmbedding(model.embedding, axis)
    loss = vocabulary_cross_entropy(model.hidden(tokens_BT), model.head_weight, targets_BT, axis)
    loss.backward()
    named = dict(model.named_parameters())
    dims = {name: cuts[weight].dim for name, weight in named.items() if weight in cuts}
    return loss.detach(), {name: weight.grad for name, weight in named.items() if weight.grad is not None}, dims


@pytest.mark.parametrize("tp", [2, 4])
def test_a_model_with_all_its_matrices_cut_has_the_gradients_of_one_process(tp: int) -> None:
    by_rank = run_ranks(model_gradients, tp, tp)
    for case, tie in enumerate((False, True)):
        model, tokens_BT, targets_BT = model_and_batch(tie)
        loss, _ = model.loss(tokens_BT, targets_BT)
        loss.backward()
        answers = [answer[case] for answer in by_rank]
        torch.testing.assert_close(answers[0][0], loss.detach())
        for name, weight in model.named_parameters():
            parts, dims = [gradients[name] for _, gradients, _ in answers], answers[0][2]
            got = torch.cat(parts, dims[name]) if name in dims else torch.stack(parts).sum(0)
            torch.testing.assert_close(got, weight.grad, rtol=1e-5, atol=1e-5 * float(weight.grad.abs().max()))


class Place:
    """An axis without processes behind it."""

    name, rank, size = "tp", 0, 3


def test_a_vocabulary_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"divisor of vocab_size \(44\).*got 3: pad") as caught:
        cut_vocabulary(nn.Parameter(torch.zeros(44, 2)), Place())
    assert caught.value.key == "parallel.tp"
