"""Lion: the sign of an interpolated momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sihe.training.optimizers.rule import PlainState, State, Weight, by_decay, check_betas, check_weight_decay


@dataclass(frozen=True)
class Lion(PlainState):
    """Every element moves by `lr`; half of AdamW's state.

    The paper takes a learning rate 3 to 10 times smaller than AdamW's, a decay larger by as much, and betas of (0.95,
    0.98) for language models (section 5 and its appendix on hyper-parameters).
    """

    betas: tuple[float, float] = (0.95, 0.98)
    weight_decay: float = 1.0

    needs_whole_matrix = False

    def __post_init__(self) -> None:
        check_betas(self.betas)
        check_weight_decay(self.weight_decay)

    def init(self, weight: Weight) -> State:
        """The momentum."""
        return {"momentum": torch.zeros_like(weight.master)}

    @torch.no_grad()
    def update(
        self, weights: Sequence[Weight], grads: Sequence[Tensor], states: Sequence[State], *, lr: float, step: int
    ) -> None:
        """w ← w - lr·(sign(β₁m + (1 - β₁)g) + decay·w), then m ← β₂m + (1 - β₂)g."""
        for indices, decay in by_decay(weights, self.weight_decay):
            masters = [weights[index].master for index in indices]
            momenta = [states[index]["momentum"] for index in indices]
            slopes = [grads[index] for index in indices]
            directions = torch._foreach_lerp(momenta, slopes, 1 - self.betas[0])
            torch._foreach_sign_(directions)
            if decay:
                torch._foreach_mul_(masters, 1 - lr * decay)
            torch._foreach_add_(masters, directions, alpha=-lr)
            torch._foreach_lerp_(momenta, slopes, 1 - self.betas[1])
