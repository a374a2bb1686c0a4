"""Supervised fine-tuning: the likelihood of what the assistant says, and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from sihe.models.decoder import Decoder
from sihe.training.recipes.config import SftStage
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.logprobs import next_token_logprobs
from sihe.training.recipes.losses import sft_nll
from sihe.training.recipes.types import Terms


class SftObjective:
    """Right answers in both styles, by chance. Measures greedy accuracy and the held-out likelihood."""

    def __init__(self, policy: Decoder, lesson: Lesson, stage: SftStage) -> None:
        self._policy = policy
        self._lesson = lesson
        self._stage = stage

    @property
    def module(self) -> nn.Module:
        """The policy."""
        return self._policy

    def terms(self, step: int) -> Terms:
        """Negative log-likelihood, a sum over the assistant's tokens."""
        batch = self._lesson.answered(step, self._stage.update.batch)
        logps_BT = next_token_logprobs(self._policy, batch.tokens)
        return Terms(-(logps_BT * batch.target_mask).sum(), float(batch.target_mask.sum()))

    @torch.no_grad()
    def measure(self) -> Mapping[str, float]:
        """`accuracy` of greedy answers, and `nll` in nats a token."""
        batch = self._lesson.held_out_answered()
        logps_BT = next_token_logprobs(self._policy, batch.tokens)
        judged = self._lesson.judge(self._lesson.examine(self._policy, temperature=0))
        return {"accuracy": judged["accuracy"], "nll": float(sft_nll(logps_BT, batch.target_mask))}
