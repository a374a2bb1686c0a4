"""What the process of `dpo.margin` runs: a tiny policy that can add, and then learns which right answers are liked.

B  pairs      T  time
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.optimizer import MasterOptimizer
from sihe.training.ranks import Ranks
from sihe.training.recipes import losses
from sihe.training.recipes.arithmetic import Arithmetic, arithmetic_chat
from sihe.training.recipes.config import TaskConfig
from sihe.training.recipes.heads import frozen
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.logprobs import next_token_logprobs
from sihe.training.recipes.sequences import Padded

_LARGEST = 9  # of an operand
_HELD_OUT = 20
_BATCH = 32
_CONTEXT = 24
_HIDDEN = 48
_PREPARE_LR, _PREFER_LR = 3e-3, 3e-4
_MEASURE_EVERY = 5
_LIKENESSES = {"alike": 0.9, "unlike": 0.0}


def preference(
    rank: int, world_size: int, *, betas: list[float], margins: list[float], beta: float, prepare: int, steps: int
) -> dict[str, Any]:
    """Loss and gradient weight over `margins` for each of `betas`, and a training with `beta`."""
    del rank, world_size
    return {
        "curves": {str(one): curve(one, margins) for one in betas},
        "course": _train(beta, prepare, steps),
        "displacements": {name: displacement(likeness) for name, likeness in _LIKENESSES.items()},
    }


def curve(beta: float, margins: list[float]) -> dict[str, list[float]]:
    """The house's loss at each margin (of log-ratios), and how fast it pulls: minus its derivative, by autograd."""
    margin_B = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    loss_B = losses.dpo(margin_B, torch.zeros_like(margin_B), beta=beta)
    (slope_B,) = torch.autograd.grad(loss_B.sum(), margin_B)
    return {"loss": loss_B.tolist(), "weight": (-slope_B).tolist()}


def _train(beta: float, prepare: int, steps: int) -> list[dict[str, float]]:
    """What is measured on held-out pairs, from before the first step of DPO to after its last."""
    torch.manual_seed(0)
    chat = arithmetic_chat()
    vocabulary = chat.tokenizer.get_vocab_size()
    policy = Decoder(ModelConfig(vocabulary, _HIDDEN, 2, 4, 4, _HIDDEN // 4, 2 * _HIDDEN, _CONTEXT))
    problems = Arithmetic(TaskConfig(largest=_LARGEST, held_out=_HELD_OUT), seed=0)
    lesson = Lesson(chat, problems, Ranks(), context=_CONTEXT, seed=0)
    optimizer = MasterOptimizer(policy)
    for step in range(prepare):
        answered = lesson.answered(step, _BATCH)
        logps_BT = next_token_logprobs(policy, answered.tokens)
        _move(optimizer, losses.sft_nll(logps_BT, answered.target_mask), _PREPARE_LR)
    reference = frozen(policy)
    optimizer = MasterOptimizer(policy)
    course = [_measured(policy, reference, lesson, 0, beta)]
    for step in range(1, steps + 1):
        chosen_B, rejected_B = (_log_ratio(policy, reference, one) for one in lesson.pairs(step, _BATCH))
        _move(optimizer, losses.dpo(chosen_B, rejected_B, beta=beta).mean(), _PREFER_LR)
        if step % _MEASURE_EVERY == 0 or step == steps:
            course.append(_measured(policy, reference, lesson, step, beta))
    return course


def _move(optimizer: MasterOptimizer, loss: Tensor, lr: float) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step(lr)


def _log_ratio(policy: Decoder, reference: Decoder, conversations: Padded) -> Tensor:
    """Policy over reference, of a whole answer, [B]."""
    with torch.no_grad():
        reference_BT = next_token_logprobs(reference, conversations.tokens)
    logps_BT = next_token_logprobs(policy, conversations.tokens)
    return ((logps_BT - reference_BT) * conversations.target_mask).sum(1)


@torch.no_grad()
def _measured(policy: Decoder, reference: Decoder, lesson: Lesson, step: int, beta: float) -> dict[str, float]:
    chosen_B, rejected_B = (_log_ratio(policy, reference, one) for one in lesson.held_out_pairs())
    margin_B = chosen_B - rejected_B
    return {
        "step": step,
        "loss": float(losses.dpo(chosen_B, rejected_B, beta=beta).mean()),
        "chosen": float(chosen_B.mean()),
        "rejected": float(rejected_B.mean()),
        "margin": float(margin_B.mean()),
        "accuracy": float((margin_B.sign() + 1).mean() / 2),
        "chosen_fell": float((chosen_B < 0).double().mean()),
    }


def displacement(likeness: float, *, step_size: float = 0.1) -> dict[str, float]:
    """One exact gradient step of DPO where nothing but a hidden state moves, over three answers.

    The outputs of the chosen and the rejected answer have cosine `likeness`; the third answer's points along their
    difference. Probabilities before and after, of the chosen (0), the rejected (1) and the third answer (2).
    """
    angle = math.acos(likeness) / 2
    chosen = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    rejected = torch.tensor([math.cos(angle), -math.sin(angle)], dtype=torch.float64)
    head_VD = torch.stack([chosen, rejected, torch.tensor([0.0, 1.0], dtype=torch.float64)])
    hidden_D = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    start_V = torch.log_softmax(head_VD @ hidden_D, 0)
    ratio_V = start_V - start_V.detach()
    (slope_D,) = torch.autograd.grad(losses.dpo(ratio_V[:1], ratio_V[1:2], beta=1.0).sum(), hidden_D)
    end_V = torch.log_softmax(head_VD @ (hidden_D - step_size * slope_D), 0)
    change_V = (end_V - start_V).tolist()
    return dict(zip(("chosen", "rejected", "third"), change_V, strict=True))
