"""Stochastic gradient descent with momentum (Sutskever et al. 2013): what a test of gradients can see through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sihe.core.errors import ConfigError
from sihe.training.optimizers.rule import PlainState, State, Weight, by_decay, check_weight_decay


@dataclass(frozen=True)
class SGD(PlainState):
    """Momentum as torch has it: b ← momentum·b + g. Weight decay is decoupled, as in every rule here."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    needs_whole_matrix = False

    def __post_init__(self) -> None:
        check_weight_decay(self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum lies in [0, 1), got {self.momentum!r}", key="momentum")
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov looks ahead along a momentum that is not 0", key="nesterov")

    def init(self, weight: Weight) -> State:
        """The momentum, where there is one."""
        return {"momentum": torch.zeros_like(weight.master)} if self.momentum else {}

    @torch.no_grad()
    def update(
        self, weights: Sequence[Weight], grads: Sequence[Tensor], states: Sequence[State], *, lr: float, step: int
    ) -> None:
        """w ← w - lr·(decay·w + b)."""
        for indices, decay in by_decay(weights, self.weight_decay):
            masters = [weights[index].master for index in indices]
            updates = [grads[index] for index in indices]
            if self.momentum:
                buffers = [states[index]["momentum"] for index in indices]
                torch._foreach_mul_(buffers, self.momentum)
                torch._foreach_add_(buffers, updates)
                ahead = torch._foreach_add(updates, buffers, alpha=self.momentum) if self.nesterov else buffers
                updates = list(ahead)
            if decay:
                torch._foreach_mul_(masters, 1 - lr * decay)
            torch._foreach_add_(masters, updates, alpha=-lr)
