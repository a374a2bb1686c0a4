"""PPO from a reward model: the last stage of learning from human feedback (Ziegler et al. 2019, arXiv 1909.08593).

    B  completions of this rank      T  tokens, the question's included, less one

A round samples completions, scores each with the reward model, charges every token for its divergence from the policy
that the stage began with, and uses the outcome for `epochs` steps. Scores have mean 0 and variance 1 over what the
policy said at the beginning, so that the price of a nat means the same whatever the reward model's scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sihe.models.decoder import Decoder
from sihe.training.recipes import losses
from sihe.training.recipes.advantages import generalized_advantages, whitened
from sihe.training.recipes.arithmetic import END
from sihe.training.recipes.config import PpoStage
from sihe.training.recipes.heads import ActorCritic, Scorer, frozen
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.logprobs import next_token_logprobs
from sihe.training.recipes.sampling import sample_completions
from sihe.training.recipes.sequences import Padded, joined
from sihe.training.recipes.types import Sampling, Terms

# Ziegler et al. 2019, section 2.2: gain of the controller, and the largest error that it reacts to.
_GAIN, _LARGEST_ERROR = 0.1, 0.2
_SMALLEST_DEVIATION = 1e-6  # of a reward model that has no opinion
_NORMALISING = 512  # completions from which the scale of the scores is taken


@dataclass(frozen=True)
class _Round:
    """Completions with everything that the steps over them need, none of it with a graph."""

    batch: Padded
    behaviour: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    score: float
    """Mean of the reward model."""
    kl: float
    """Mean divergence of a completion, in nats."""


class PpoObjective:
    """The policy and its critic, which starts with the reward model's trunk. Measures the true preference."""

    def __init__(self, policy: Decoder, reward: Scorer, lesson: Lesson, stage: PpoStage) -> None:
        self._actor = ActorCritic(policy, Scorer(reward.trunk), stage.kl_coefficient)
        self._reward = reward.requires_grad_(False)
        self._reference = frozen(policy)
        self._lesson = lesson
        self._stage = stage
        self._round: _Round | None = None
        self._mean, self._deviation = self._moments()

    @property
    def module(self) -> nn.Module:
        """Policy, critic and the price of divergence."""
        return self._actor

    def terms(self, step: int) -> Terms:
        """Clipped surrogate and clipped value loss, sums over the completions' tokens."""
        if step % self._stage.epochs == 0 or self._round is None:
            self._round = self._sample(step)
        seen, stage = self._round, self._stage
        mask_BT = seen.batch.target_mask
        logps_BT = next_token_logprobs(self._actor.policy, seen.batch.tokens)
        policy_BT = losses.clipped_policy(logps_BT, seen.behaviour, seen.advantages, clip_low=stage.clip)
        values_BT = self._actor.critic(seen.batch.tokens[:, :-1])
        value_BT = losses.clipped_value(values_BT, seen.values, seen.returns, clip=stage.value_clip)
        loss = ((policy_BT + stage.value_coefficient * value_BT) * mask_BT).sum()
        weight = float(mask_BT.sum())
        moved = float((((logps_BT - seen.behaviour).exp() - 1).abs() > stage.clip).mul(mask_BT).sum())
        metrics = {
            "reward_score": seen.score * weight,
            "kl": seen.kl * weight,
            "kl_coefficient": float(self._actor.kl_coefficient) * weight,
            "value_loss": float((value_BT.detach() * mask_BT).sum()),
            "clipped": moved,
        }
        return Terms(loss, weight, metrics)

    @torch.no_grad()
    def measure(self) -> Mapping[str, float]:
        """What `Lesson.judge` finds, the reward model's `score`, and the `kl` of a held-out completion in nats."""
        examined = self._lesson.examine(self._actor.policy)
        batch = joined(examined.prompts, [completion.token_ids for completion in examined.completions])
        return {
            **self._lesson.judge(examined),
            "score": float(self._scores(batch).mean()),
            "kl": float(self._k1(batch).sum(1).mean()),
        }

    @torch.no_grad()
    def _sample(self, step: int) -> _Round:
        stage, lesson, ranks = self._stage, self._lesson, self._lesson.ranks
        prompts = lesson.prompts(lesson.problems(step, stage.update.batch))
        seed = (lesson.seed << 32) + (step << 8) + ranks.rank
        sampled = sample_completions(self._actor.policy, prompts, Sampling(stage.max_tokens), seed=seed, end=END)
        batch = joined(prompts, [completion.token_ids for completion in sampled])
        mask_BT = batch.target_mask
        k1_BT = self._k1(batch)
        score_B = self._scores(batch)
        rewards_BT = -self._actor.kl_coefficient * k1_BT
        rewards_BT[torch.arange(len(score_B)), batch.last - 1] += score_B
        values_BT = self._actor.critic(batch.tokens[:, :-1])
        advantages_BT, returns_BT = generalized_advantages(
            rewards_BT, values_BT, mask_BT, gamma=stage.gamma, lam=stage.lam
        )
        sums = ranks.sum_(torch.tensor([float(k1_BT.sum()), float(score_B.sum()), len(score_B)], dtype=torch.float64))
        kl, score = (sums[:2] / sums[2]).tolist()
        self._control(kl)
        behaviour_BT = next_token_logprobs(self._actor.policy, batch.tokens)
        advantages_BT = whitened(advantages_BT, mask_BT, ranks.sum_)
        return _Round(batch, behaviour_BT, values_BT, advantages_BT, returns_BT, score, kl)

    @torch.no_grad()
    def _moments(self) -> tuple[float, float]:
        """Mean and deviation of the reward model's scores under the first policy (Ziegler et al. 2019, section 2.1).

        Every rank draws the same completions, and so does a run that goes on: nothing has to be sent or kept.
        """
        prompts = self._lesson.prompts(self._lesson.problems_of_all(-1, _NORMALISING))
        sampling = Sampling(self._stage.max_tokens)
        sampled = sample_completions(self._reference, prompts, sampling, seed=self._lesson.seed, end=END)
        batch = joined(prompts, [completion.token_ids for completion in sampled])
        score_B = self._reward.score(batch.tokens, batch.last)
        return float(score_B.mean()), max(float(score_B.std()), _SMALLEST_DEVIATION)

    def _scores(self, batch: Padded) -> Tensor:
        """The normalised score of each completion, [B]."""
        return (self._reward.score(batch.tokens, batch.last) - self._mean) / self._deviation

    def _control(self, kl: float) -> None:
        """Moves the price of divergence towards where the policy keeps to the target."""
        if self._stage.kl_target is not None:
            error = max(-_LARGEST_ERROR, min(_LARGEST_ERROR, kl / self._stage.kl_target - 1))
            self._actor.kl_coefficient.mul_(1 + _GAIN * error)

    def _k1(self, batch: Padded) -> Tensor:
        """Log-ratios to the reference on the completions' tokens, zero elsewhere."""
        logps_BT = next_token_logprobs(self._actor.policy, batch.tokens)
        reference_BT = next_token_logprobs(self._reference, batch.tokens)
        return losses.kl_k1(logps_BT, reference_BT) * batch.target_mask
