"""Sequences of different lengths as one tensor, padded on the right, where a causal model never looks.

B  sequences      T  the longest of them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sihe.training.recipes.chat import MaskedTokens


@dataclass(frozen=True)
class Padded:
    """`tokens` [B, T] int64 (0 on padding), and `mask` [B, T] float32, 1 on the tokens that the assistant says."""

    tokens: Tensor
    mask: Tensor

    @property
    def target_mask(self) -> Tensor:
        """The mask beside the log-probabilities of all tokens but the first, [B, T - 1]."""
        return self.mask[:, 1:]

    @property
    def last(self) -> Tensor:
        """The position of each sequence's last token that counts."""
        positions_T = torch.arange(self.tokens.shape[1])
        return (self.mask * positions_T).argmax(1)


def padded(sequences: Sequence[MaskedTokens]) -> Padded:
    """`sequences` as rows."""
    longest = max(len(sequence.token_ids) for sequence in sequences)
    tokens_BT = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(sequences), longest)
    for row, sequence in enumerate(sequences):
        length = len(sequence.token_ids)
        tokens_BT[row, :length] = torch.tensor(sequence.token_ids)
        mask_BT[row, :length] = torch.tensor(sequence.mask, dtype=torch.float32)
    return Padded(tokens_BT, mask_BT)


def joined(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Padded:
    """Each prompt with its completion behind it; the completion's tokens count."""
    return padded(
        [
            MaskedTokens((*prompt, *completion), (False,) * len(prompt) + (True,) * len(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    )
