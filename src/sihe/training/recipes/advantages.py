"""From rewards to advantages: how much better a token or a completion was than expected.

    B  sequences      T  tokens of a completion      G  completions of one prompt

Pure functions. Completions are padded on the right; `mask_BT` is 1 on their tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_EPSILON = 1e-4  # added to a group's deviation, as TRL does: equal rewards give zero, not a division by zero


def generalized_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, [B, T] each, zero on padding (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    A completion ends its episode: nothing is expected after its last token. `returns_BT` are advantages plus values,
    what a critic learns. One pass from the last token to the first, over all sequences at once.
    """
    mask_BT = mask_BT.to(values_BT.dtype)
    values_BT, rewards_BT = values_BT * mask_BT, rewards_BT * mask_BT
    advantages_BT = torch.zeros_like(values_BT)
    following_B = torch.zeros_like(values_BT[:, 0])
    next_value_B = torch.zeros_like(following_B)
    for t in reversed(range(values_BT.shape[1])):
        error_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        following_B = (error_B + gamma * lam * following_B) * mask_BT[:, t]
        next_value_B = values_BT[:, t]
        advantages_BT[:, t] = following_B
    return advantages_BT, advantages_BT + values_BT


def group_advantages(rewards_BG: Tensor, *, scaled: bool = True) -> Tensor:
    """How each completion did among those of its prompt, [B, G] (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    With `scaled` in units of the group's (unbiased) standard deviation; without, prompts that are nearly solved or
    nearly hopeless get no extra weight (Liu et al. 2025, arXiv 2503.20783, section 3.1). Needs G of at least 2.
    """
    centred_BG = rewards_BG - rewards_BG.mean(1, keepdim=True)
    return centred_BG / (rewards_BG.std(1, keepdim=True) + _EPSILON) if scaled else centred_BG


def whitened(values_BT: Tensor, mask_BT: Tensor, sum_: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
    """`values_BT` with mean 0 and variance 1 over the tokens that count, zero elsewhere.

    `sum_` adds a tensor up over ranks, so that all of them agree on the moments.
    """
    kept_BT = values_BT * mask_BT
    total, squares, count = sum_(torch.stack([kept_BT.sum(), (kept_BT**2).sum(), mask_BT.sum()]).double()).unbind()
    count = count.clamp(min=1)
    mean = total / count
    deviation = (squares / count - mean**2).clamp(min=0).sqrt()
    return ((values_BT - mean.to(values_BT.dtype)) / (deviation.to(values_BT.dtype) + 1e-8)) * mask_BT
