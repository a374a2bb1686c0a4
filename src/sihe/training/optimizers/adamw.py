"""AdamW by torch's fused kernel (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sihe.core.errors import ConfigError
from sihe.training.optimizers.rule import (
    PlainState,
    State,
    Weight,
    by_decay,
    check_betas,
    check_weight_decay,
    steps_before,
)


@dataclass(frozen=True)
class AdamW(PlainState):
    """Adam with decoupled weight decay. Defaults as GPT-3's (Brown et al. 2020, arXiv 2005.14165, appendix B)."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    needs_whole_matrix = False

    def __post_init__(self) -> None:
        check_betas(self.betas)
        check_weight_decay(self.weight_decay)
        if not self.eps > 0:
            raise ConfigError(f"eps is positive, got {self.eps!r}", key="eps")

    def init(self, weight: Weight) -> State:
        """Running means of the gradient and of its square."""
        return {"mean": torch.zeros_like(weight.master), "variance": torch.zeros_like(weight.master)}

    @torch.no_grad()
    def update(
        self, weights: Sequence[Weight], grads: Sequence[Tensor], states: Sequence[State], *, lr: float, step: int
    ) -> None:
        """One fused pass over the decayed weights and one over the others."""
        for indices, decay in by_decay(weights, self.weight_decay):
            masters = [weights[index].master for index in indices]
            adamw(
                masters,
                [grads[index] for index in indices],
                [states[index]["mean"] for index in indices],
                [states[index]["variance"] for index in indices],
                [],
                steps_before(step, len(masters), masters[0]),
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=decay,
                eps=self.eps,
                maximize=False,
            )
