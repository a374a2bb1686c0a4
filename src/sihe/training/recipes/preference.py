"""Preferences straight into the policy: DPO, IPO, KTO and ORPO over the same pairs.

B  pairs      T  time
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sihe.models.decoder import Decoder
from sihe.training.recipes import losses
from sihe.training.recipes.config import PreferenceStage
from sihe.training.recipes.heads import frozen
from sihe.training.recipes.lesson import Lesson
from sihe.training.recipes.logprobs import next_token_logprobs
from sihe.training.recipes.sequences import Padded
from sihe.training.recipes.types import Terms


class PreferenceObjective:
    """The policy against a frozen copy of itself as it is when this is made. ORPO does without the copy.

    Measures on held-out pairs how often the policy has moved towards the better answer (`pair_accuracy`), by how much
    (`margin`, of log-ratios), and how answers that it samples are liked.
    """

    def __init__(self, policy: Decoder, lesson: Lesson, stage: PreferenceStage) -> None:
        self._policy = policy
        self._reference = frozen(policy)
        self._lesson = lesson
        self._stage = stage

    @property
    def module(self) -> nn.Module:
        """The policy."""
        return self._policy

    def terms(self, step: int) -> Terms:
        """The loss that the stage names, a sum over pairs."""
        chosen, rejected = self._lesson.pairs(step, self._stage.update.batch)
        loss_B = self._orpo(chosen, rejected) if self._stage.loss == "orpo" else self._relative(chosen, rejected)
        return Terms(loss_B.sum(), len(chosen.tokens))

    @torch.no_grad()
    def measure(self) -> Mapping[str, float]:
        """`pair_accuracy` (a tie counts half), `margin`, and what `Lesson.judge` finds."""
        chosen, rejected = self._lesson.held_out_pairs()
        margin_B = self._log_ratio(chosen).sum(1) - self._log_ratio(rejected).sum(1)
        accuracy = float((margin_B.sign() + 1).mean() / 2)
        judged = self._lesson.judge(self._lesson.examine(self._policy))
        return {"pair_accuracy": accuracy, "margin": float(margin_B.mean()), **judged}

    def _relative(self, chosen: Padded, rejected: Padded) -> Tensor:
        """Losses of log-ratios, [B]."""
        stage = self._stage
        chosen_BT, rejected_BT = self._log_ratio(chosen), self._log_ratio(rejected)
        if stage.loss == "ipo":
            means = (
                ratio_BT.sum(1) / of.target_mask.sum(1)
                for ratio_BT, of in ((chosen_BT, chosen), (rejected_BT, rejected))
            )
            return losses.ipo(*means, beta=stage.beta)
        chosen_B, rejected_B = chosen_BT.sum(1), rejected_BT.sum(1)
        if stage.loss == "kto":
            both_2B = losses.kto(chosen_B, rejected_B, self._divergence(chosen), beta=stage.beta)
            return both_2B.view(2, -1).mean(0)
        return losses.dpo(chosen_B, rejected_B, beta=stage.beta, label_smoothing=stage.label_smoothing)

    def _orpo(self, chosen: Padded, rejected: Padded) -> Tensor:
        """Negative log-likelihood of the better answers and the odds ratio, [B]."""
        chosen_B = _mean_logps(next_token_logprobs(self._policy, chosen.tokens), chosen)
        rejected_B = _mean_logps(next_token_logprobs(self._policy, rejected.tokens), rejected)
        return losses.orpo(chosen_B, rejected_B, beta=self._stage.beta) - chosen_B

    @torch.no_grad()
    def _divergence(self, conversations: Padded) -> Tensor:
        """KTO's estimate of KL(policy, reference), over answers that belong to other questions of the batch: the next
        row's (Ethayarajh et al. 2024, section 4.1)."""
        moved = Padded(*_mismatched(conversations))
        return self._log_ratio(moved).sum(1).mean()

    def _log_ratio(self, conversations: Padded) -> Tensor:
        """Log-ratios of the assistant's tokens, zero elsewhere."""
        with torch.no_grad():
            reference_BT = next_token_logprobs(self._reference, conversations.tokens)
        logps_BT = next_token_logprobs(self._policy, conversations.tokens)
        return (logps_BT - reference_BT) * conversations.target_mask


def _mean_logps(logps_BT: Tensor, conversations: Padded) -> Tensor:
    return (logps_BT * conversations.target_mask).sum(1) / conversations.target_mask.sum(1)


def _mismatched(conversations: Padded) -> tuple[Tensor, Tensor]:
    """Each row's question with the answer of the row after it."""
    rows = []
    for tokens_T, mask_T in zip(conversations.tokens, conversations.mask, strict=True):
        said = mask_T.bool()
        rows.append((tokens_T[: int(said.int().argmax())], tokens_T[said]))
    longest = max(len(question) for question, _ in rows) + max(len(answer) for _, answer in rows)
    tokens_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), longest)
    for row, (question, _) in enumerate(rows):
        answer = rows[(row + 1) % len(rows)][1]
        end = len(question) + len(answer)
        tokens_BT[row, :end] = torch.cat([question, answer])
        mask_BT[row, len(question) : end] = 1
    return tokens_BT, mask_BT
