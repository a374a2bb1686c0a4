"""Pretraining: the likelihood of plain text, every token of it, without questions and answers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sihe.models.decoder import Decoder
from sihe.training.recipes.config import PretrainStage
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.logprobs import next_token_logprobs
from sihe.training.recipes.losses import sft_nll
from sihe.training.recipes.types import Terms


class PretrainObjective:
    """Right equations as documents. Measures the likelihood of held-out ones, and whether the model ends them right."""

    def __init__(self, policy: Decoder, lesson: Lesson, stage: PretrainStage) -> None:
        self._policy = policy
        self._lesson = lesson
        self._stage = stage

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._policy

    def terms(self, step: int) -> Terms:
        """Negative log-likelihood, a sum over tokens."""
        batch = self._lesson.documents(self._lesson.problems(step, self._stage.update.batch))
        logps_BT = next_token_logprobs(self._policy, batch.tokens)
        return Terms(-(logps_BT * batch.target_mask).sum(), float(batch.target_mask.sum()))

    @torch.no_grad()
    def measure(self) -> Mapping[str, float]:
        """`nll` in nats a token (the operands are drawn by chance, so it has a floor), and greedy `accuracy`."""
        batch = self._lesson.documents(self._lesson.held_out)
        logps_BT = next_token_logprobs(self._policy, batch.tokens)
        judged = self._lesson.judge(self._lesson.examine(self._policy, temperature=0, is_chat=False))
        return {"nll": float(sft_nll(logps_BT, batch.target_mask)), "accuracy": judged["accuracy"]}
