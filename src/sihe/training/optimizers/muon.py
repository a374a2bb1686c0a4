"""Muon: momentum whose singular values are all made about one (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

For the matrices of hidden layers alone; embeddings, head and vectors move by AdamW with the same learning rate, which
the scale of Liu et al. 2025 (arXiv 2502.16982, section 2.2) makes fit both. `torch.optim.Muon` does the same for whole
parameters of two dims; this one also takes stacks of matrices, and parts of matrices that other ranks hold the rest of.

Shapes: M rows, N columns; leading dims stack matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from sihe.core.errors import ConfigError
from sihe.training.optimizers.adamw import AdamW
from sihe.training.optimizers.rule import Matrix, PlainState, State, Weight, check_weight_decay

Scale = Literal["adamw", "spectral"]
Precision = Literal["fp32", "bf16"]

# The quintic of Jordan's post: the steepest at 0 that keeps singular values within about 0.7 … 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7  # as torch.optim.Muon


@dataclass(frozen=True)
class Muon(PlainState):
    """Orthogonalised momentum for hidden matrices, `others` for the rest."""

    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    iterations: int = 5
    scale: Scale = "adamw"
    """`adamw`: times 0.2·sqrt(max(M, N)), the size of AdamW's updates; `spectral`: times sqrt(max(1, M/N))."""
    precision: Precision = "fp32"
    """Of the iterations; bf16 is as good for training, and faster where the hardware multiplies it."""
    others: AdamW = field(default_factory=AdamW)

    needs_whole_matrix = True

    def __post_init__(self) -> None:
        check_weight_decay(self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum lies in [0, 1), got {self.momentum!r}", key="momentum")
        if not 1 <= self.iterations < 100:
            raise ConfigError(f"iterations lies in 1..99, got {self.iterations!r}", key="iterations")
        if self.scale not in get_args(Scale):
            raise ConfigError(f"scale is one of {', '.join(get_args(Scale))}, got {self.scale!r}", key="scale")
        if self.precision not in get_args(Precision):
            raise ConfigError(
                f"precision is one of {', '.join(get_args(Precision))}, got {self.precision!r}", key="precision"
            )

    def init(self, weight: Weight) -> State:
        """The momentum of a hidden matrix; of any other weight what AdamW keeps."""
        return self.others.init(weight) if weight.matrix is None else {"momentum": torch.zeros_like(weight.master)}

    @torch.no_grad()
    def update(
        self, weights: Sequence[Weight], grads: Sequence[Tensor], states: Sequence[State], *, lr: float, step: int
    ) -> None:
        """Gathers each hidden matrix's direction, makes it orthogonal, and moves this rank's part along its part."""
        rest = [index for index, weight in enumerate(weights) if weight.matrix is None]
        if rest:
            self.others.update(
                [weights[index] for index in rest],
                [grads[index] for index in rest],
                [states[index] for index in rest],
                lr=lr,
                step=step,
            )
        for weight, grad, state in zip(weights, grads, states, strict=True):
            if weight.matrix is not None:
                momentum = state["momentum"].lerp_(grad, 1 - self.momentum)
                direction = grad.lerp(momentum, self.momentum) if self.nesterov else momentum
                self._move(weight, weight.matrix, direction, lr)

    def _move(self, weight: Weight, matrix: Matrix, direction: Tensor, lr: float) -> None:
        whole_MN = matrix.gather(direction)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        update = matrix.scatter(orthogonal(whole_MN, self.iterations, dtype))
        rows, columns = whole_MN.shape[-2:]
        ratio = 0.2 * math.sqrt(max(rows, columns)) if self.scale == "adamw" else math.sqrt(max(1.0, rows / columns))
        if weight.decays:
            weight.master.mul_(1 - lr * self.weight_decay)
        weight.master.add_(update, alpha=-lr * ratio)


def orthogonal(matrix_MN: Tensor, iterations: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Near U·Vᵀ of the singular value decomposition of each matrix, in `dtype`: singular values within 0.7 … 1.2.

    Newton-Schulz: with X scaled to a norm of at most 1, X ← aX + (bXXᵀ + c(XXᵀ)²)X moves each singular value by the
    polynomial as + bs³ + cs⁵ and leaves the vectors. Values that are tiny beside the largest stay below 0.7.
    """
    is_tall = matrix_MN.size(-2) > matrix_MN.size(-1)
    x = matrix_MN.to(dtype)
    x = x.mT if is_tall else x  # the product with its transpose is then the smaller of the two
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(iterations):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return x.mT if is_tall else x


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether the parameter `name` of a `Decoder` is a matrix, or a stack of matrices, inside of its blocks."""
    return parameter.ndim >= 2 and "blocks." in name
