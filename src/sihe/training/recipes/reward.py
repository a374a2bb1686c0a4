"""A reward model from preferences: the first half of learning from human feedback (Ouyang et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sihe.training.recipes.config import RewardStage
from sihe.training.recipes.heads import Scorer
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.losses import bradley_terry
from sihe.training.recipes.sequences import Padded
from sihe.training.recipes.types import Terms


class RewardObjective:
    """Scores better answers above worse ones. Measures how often that holds on held-out pairs."""

    def __init__(self, scorer: Scorer, lesson: Lesson, stage: RewardStage) -> None:
        self._scorer = scorer
        self._lesson = lesson
        self._stage = stage

    @property
    def module(self) -> nn.Module:
        """The reward model."""
        return self._scorer

    def terms(self, step: int) -> Terms:
        """Negative log-likelihood of the preferences, a sum over pairs."""
        chosen, rejected = self._lesson.pairs(step, self._stage.update.batch)
        chosen_B, rejected_B = score(self._scorer, chosen), score(self._scorer, rejected)
        right = float((chosen_B > rejected_B).sum())
        return Terms(bradley_terry(chosen_B, rejected_B).sum(), len(chosen_B), {"pair_accuracy": right})

    @torch.no_grad()
    def measure(self) -> Mapping[str, float]:
        """`pair_accuracy` (a tie counts half) and the mean `margin` of scores."""
        chosen, rejected = self._lesson.held_out_pairs()
        margin_B = score(self._scorer, chosen) - score(self._scorer, rejected)
        return {"pair_accuracy": float((margin_B.sign() + 1).mean() / 2), "margin": float(margin_B.mean())}


def score(scorer: Scorer, conversations: Padded) -> Tensor:
    """Each conversation's score."""
    return scorer.score(conversations.tokens, conversations.last)
