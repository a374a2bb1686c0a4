"""GRPO: verifiable rewards, and the other completions of a prompt in place of a critic (Shao et al. 2024, arXiv
2402.03300; token-level mean and wider upper clip as Yu et al. 2025, arXiv 2503.14476).

    P  prompts of this rank      G  completions of each      B  completions (P * G)      T  tokens less one

Someone else samples (`Rollout`). Weights reach it by rounds; each completion says by which weights it was made, and
groups that are too old are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sihe.core.telemetry import logger
from sihe.models.decoder import Decoder
from sihe.training.recipes import losses
from sihe.training.recipes.advantages import group_advantages
from sihe.training.recipes.config import GrpoStage
from sihe.training.recipes.errors import StaleRollouts, WeightSyncFailed
from sihe.training.recipes.heads import frozen
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.logprobs import next_token_logprobs
from sihe.training.recipes.ports import Rollout
from sihe.training.recipes.sequences import Padded, joined
from sihe.training.recipes.types import Completion, Sampling, Terms

_log = logger(__name__)


@dataclass(frozen=True)
class _Round:
    """Completions with what the steps over them need."""

    batch: Padded
    behaviour: Tensor
    reference: Tensor
    advantages: Tensor
    metrics: Mapping[str, float]


class GrpoObjective:
    """The policy against the rule whether its answer is right. Measures the share of right sampled answers."""

    def __init__(self, policy: Decoder, rollout: Rollout, lesson: Lesson, stage: GrpoStage) -> None:
        self._policy = policy
        self._reference = frozen(policy)
        self._rollout = rollout
        self._lesson = lesson
        self._stage = stage
        self._round: _Round | None = None

    @property
    def module(self) -> nn.Module:
        """The policy."""
        return self._policy

    def terms(self, step: int) -> Terms:
        """Clipped surrogate and divergence, sums over the completions' tokens. Raises `StaleRollouts`."""
        if step % self._stage.epochs == 0 or self._round is None:
            self._round = self._sample(step // self._stage.epochs)
        seen, stage = self._round, self._stage
        mask_BT = seen.batch.target_mask
        logps_BT = next_token_logprobs(self._policy, seen.batch.tokens)
        policy_BT = losses.clipped_policy(
            logps_BT, seen.behaviour, seen.advantages, clip_low=stage.clip_low, clip_high=stage.clip_high
        )
        k3_BT = losses.kl_k3(logps_BT, seen.reference)
        loss = ((policy_BT + stage.kl_coefficient * k3_BT) * mask_BT).sum()
        weight = float(mask_BT.sum())
        ratio_BT = (logps_BT.detach() - seen.behaviour).exp()
        left_BT = (ratio_BT < 1 - stage.clip_low) | (ratio_BT > 1 + stage.clip_high)
        metrics = {name: value * weight for name, value in seen.metrics.items()}
        metrics["kl"] = float((k3_BT.detach() * mask_BT).sum())
        metrics["clipped"] = float((left_BT * mask_BT).sum())
        return Terms(loss, weight, metrics)

    @torch.no_grad()
    def measure(self) -> Mapping[str, float]:
        """What `Lesson.judge` finds."""
        return self._lesson.judge(self._lesson.examine(self._policy))

    def _sample(self, number: int) -> _Round:
        """Round `number` of rollouts."""
        stage, lesson = self._stage, self._lesson
        if number % stage.sync_every == 0 or self._round is None:
            self._synchronise(number)
        # ranks share out prompts, not completions: a group is compared within one rank
        problems = lesson.problems(number, stage.update.batch // stage.group)
        repeated = [problem for problem in problems for _ in range(stage.group)]
        prompts = lesson.prompts(repeated)
        seed = (lesson.seed << 32) + (number << 8) + lesson.ranks.rank
        completions = self._rollout.sample(prompts, Sampling(stage.max_tokens), seed=seed)
        rows = fresh_groups(completions, stage.group, version=number, max_staleness=stage.max_staleness)
        kept = [completions[row] for row in rows]
        right = [float(repeated[row].is_right(lesson.text(completions[row]))) for row in rows]
        batch = joined([prompts[row] for row in rows], [completion.token_ids for completion in kept])
        rewards_PG = torch.tensor(right).view(-1, stage.group)
        with torch.no_grad():
            reference_BT = next_token_logprobs(self._reference, batch.tokens)
        return _Round(
            batch=batch,
            behaviour=_behaviour(batch, kept),
            reference=reference_BT,
            advantages=group_advantages(rewards_PG, scaled=stage.scaled).view(-1, 1),
            metrics={
                "reward": float(rewards_PG.mean()),
                "solved_prompts": float((rewards_PG.mean(1) == 1).float().mean()),
                # groups that teach nothing: every completion did as well as the others
                "level_prompts": float((rewards_PG.std(1) == 0).float().mean()),
                "staleness": number - sum(completion.version for completion in kept) / len(kept),
                "dropped": 1 - len(kept) / len(completions),
            },
        )

    def _synchronise(self, number: int) -> None:
        """Sends the weights. A transfer that fails leaves the old ones, until what they make is too old."""
        try:
            self._rollout.load(self._policy, number)
        except WeightSyncFailed as error:
            _log.warning("weight_sync_failed", version=number, reason=str(error))


def fresh_groups(completions: Sequence[Completion], group: int, *, version: int, max_staleness: int) -> list[int]:
    """Indices of the completions whose whole group was made by weights at most `max_staleness` versions old.

    Raises `StaleRollouts` when there are none.
    """
    rows: list[int] = []
    for start in range(0, len(completions), group):
        members = range(start, start + group)
        if all(version - completions[row].version <= max_staleness for row in members):
            rows += members
    if not rows:
        raise StaleRollouts(version, min(completion.version for completion in completions), max_staleness)
    return rows


def _behaviour(batch: Padded, completions: Sequence[Completion]) -> Tensor:
    """The log-probabilities that came with the completions, where their tokens are."""
    logps_BT = torch.zeros(batch.target_mask.shape)
    for row, completion in enumerate(completions):
        logps_BT[row, batch.target_mask[row].bool()] = torch.tensor(completion.logprobs)
    return logps_BT
