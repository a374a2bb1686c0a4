"""Distillation: a small model learns the next-token distributions of a large one (Hinton, Vinyals and Dean 2015)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from sihe.models.decoder import Decoder
from sihe.training.recipes import losses
from sihe.training.recipes.config import DistilStage
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.logprobs import chunked_divergence
from sihe.training.recipes.sequences import Padded
from sihe.training.recipes.types import Terms


class DistilObjective:
    """The student against the teacher, on the assistant's tokens. Measures their divergence on held-out answers."""

    def __init__(self, student: Decoder, teacher: Decoder, lesson: Lesson, stage: DistilStage) -> None:
        self._student = student
        self._teacher = teacher.requires_grad_(False)
        self._lesson = lesson
        self._stage = stage
        divergence = losses.forward_kl if stage.divergence == "forward" else losses.reverse_kl
        self._divergence = partial(divergence, temperature=stage.temperature)

    @property
    def module(self) -> nn.Module:
        """The student."""
        return self._student

    def terms(self, step: int) -> Terms:
        """The divergence, a sum over the assistant's tokens."""
        batch = self._lesson.answered(step, self._stage.update.batch)
        kl_BT = self._kl(batch, self._divergence)
        return Terms((kl_BT * batch.target_mask).sum(), float(batch.target_mask.sum()))

    @torch.no_grad()
    def measure(self) -> Mapping[str, float]:
        """`kl` (teacher, student) at temperature 1, in nats a token, and the `accuracy` of greedy answers."""
        batch = self._lesson.held_out_answered()
        kl = losses.masked_mean(self._kl(batch, losses.forward_kl), batch.target_mask)
        judged = self._lesson.judge(self._lesson.examine(self._student, temperature=0))
        return {"kl": float(kl), "accuracy": judged["accuracy"]}

    def _kl(self, batch: Padded, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        tokens_BT = batch.tokens[:, :-1]
        with torch.no_grad():
            teacher_BTD = self._teacher.hidden(tokens_BT)
        student_BTD = self._student.hidden(tokens_BT)
        heads = self._student.head_weight, self._teacher.head_weight
        return chunked_divergence(student_BTD, heads[0], teacher_BTD, heads[1], divergence)
