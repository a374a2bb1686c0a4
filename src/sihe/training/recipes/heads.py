"""Decoders that give a number at each token instead of a next token: reward models and critics.

B  batch      T  time      D  hidden
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sihe.models.decoder import Decoder


class Scorer(nn.Module):
    """A copy of `trunk` with a linear head of one output, which starts at zero: every score is 0 before training."""

    def __init__(self, trunk: Decoder) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(trunk).requires_grad_(True)
        self.head = nn.Linear(trunk.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if self.trunk.head is not None:
            self.trunk.head.requires_grad_(False)  # the vocabulary's head is never used

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] scores, each of the text up to its token."""
        return self.head(self.trunk.hidden(tokens_BT))[..., 0]

    def score(self, tokens_BT: Tensor, last_B: Tensor) -> Tensor:
        """The score at each row's last token, [B]."""
        scores_BT: Tensor = self(tokens_BT)
        return scores_BT[torch.arange(len(last_B)), last_B]


class ActorCritic(nn.Module):
    """What PPO trains: the policy, its critic, and the price of divergence, which checkpoints keep with them."""

    def __init__(self, policy: Decoder, critic: Scorer, kl_coefficient: float) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.kl_coefficient = nn.Parameter(torch.tensor(kl_coefficient), requires_grad=False)


def frozen(policy: Decoder) -> Decoder:
    """A copy of `policy` that is never trained: the reference of preferences and of divergences."""
    return copy.deepcopy(policy).requires_grad_(False)
