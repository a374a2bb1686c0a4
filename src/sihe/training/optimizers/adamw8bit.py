"""AdamW whose running means take one byte each (Dettmers et al. 2022, arXiv 2110.02861): 2 bytes a weight, not 8.

Why the states are our own and not a library's: docs/adr/0013-optimisers.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sihe.core.errors import ConfigError
from sihe.training.optimizers.adamw import AdamW
from sihe.training.optimizers.blockwise import dequantise, num_blocks, quantise
from sihe.training.optimizers.rule import State, Weight

_SIGNED = {"mean": True, "variance": False}


@dataclass(frozen=True)
class AdamW8bit:
    """AdamW on hidden matrices with block-wise 8-bit states; every other weight keeps float32 states.

    Embeddings stay in float32 because their gradients are uneven (section 2.3 of the paper), and so does what this rank
    holds fewer than `least_size` elements of, where there is nothing to save. The step itself is AdamW's, in float32,
    one weight at a time: the largest weight's states are unpacked at once, never all.
    """

    adamw: AdamW = field(default_factory=AdamW)
    least_size: int = 4096  # as bitsandbytes' min_8bit_size

    needs_whole_matrix = False

    def __post_init__(self) -> None:
        if self.least_size < 1:
            raise ConfigError(f"least_size is at least 1, got {self.least_size!r}", key="least_size")

    def init(self, weight: Weight) -> State:
        """For each mean its codes and its blocks' divisors; plain tensors where nothing is packed."""
        if weight.matrix is None or weight.master.numel() < self.least_size:
            return self.adamw.init(weight)
        state: State = {}
        for name, zeros in self.adamw.init(weight).items():
            codes = torch.empty_like(zeros, dtype=torch.uint8)
            scales = zeros.new_empty(num_blocks(zeros.numel()))
            quantise(zeros, codes, scales, is_signed=_SIGNED[name])
            state |= {f"{name}_codes": codes, f"{name}_scales": scales}
        return state

    @torch.no_grad()
    def update(
        self, weights: Sequence[Weight], grads: Sequence[Tensor], states: Sequence[State], *, lr: float, step: int
    ) -> None:
        """Unpacks, steps, packs."""
        plain = [index for index, state in enumerate(states) if "mean" in state]
        self.adamw.update(
            [weights[index] for index in plain],
            [grads[index] for index in plain],
            [states[index] for index in plain],
            lr=lr,
            step=step,
        )
        for weight, grad, state in zip(weights, grads, states, strict=True):
            if "mean" not in state:
                unpacked = dict(self.unpacked(state))
                self.adamw.update([weight], [grad], [unpacked], lr=lr, step=step)
                self.pack(state, unpacked)

    def unpacked(self, state: State) -> Mapping[str, Tensor]:
        """The means in float32: new tensors where they are packed, the live ones where not."""
        if "mean" in state:
            return state
        return {
            name: dequantise(state[f"{name}_codes"], state[f"{name}_scales"], is_signed=is_signed)
            for name, is_signed in _SIGNED.items()
        }

    def pack(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Rounds `tensors` into the state; those that `unpacked` gave come back bit for bit."""
        if "mean" in state:
            self.adamw.pack(state, tensors)
            return
        for name, is_signed in _SIGNED.items():
            quantise(tensors[name], state[f"{name}_codes"], state[f"{name}_scales"], is_signed=is_signed)
