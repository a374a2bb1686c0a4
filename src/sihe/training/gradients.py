"""All gradients of a model in one float32 tensor, so that one all-reduce carries them.

Each parameter's `.grad` is a view into it. Autograd adds to the views in place, in float32 also where the weights are
bfloat16: micro-batches and ranks are summed without the rounding of eight bits of mantissa.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

_ALIGNMENT = 16  # elements: 64 bytes, one cache line and one AVX-512 register


class GradientBuffer:
    """Owns the gradients of `parameters`. Nobody else may set `.grad` (a `zero_grad` that sets `None` would)."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        owned = [parameter for parameter in parameters if parameter.requires_grad]
        starts, size = [], 0
        for parameter in owned:
            starts.append(size)
            size += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        self.flat = torch.zeros(size, dtype=torch.float32)
        for parameter, start in zip(owned, starts, strict=True):
            parameter.grad_dtype = torch.float32
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)

    def zero_(self) -> None:
        """Starts a new sum."""
        self.flat.zero_()
