"""Feed-forward layers: the gated SwiGLU (Shazeer 2020, arXiv 2002.05202), and the plain one before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sihe.models.architecture import Activation
from sihe.models.config import ModelConfig
from sihe.models.products import Linear, linear


class GateUp(nn.Module):
    """Gate and up as one tensor, [2, intermediate, hidden]: one product, and a cut through dim 1 halves both alike."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, intermediate_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., gate | up]."""
        return linear(x, self.weight.flatten(0, 1))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), `config.intermediate_size` wide unless told otherwise."""

    def __init__(self, config: ModelConfig, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = intermediate_size or config.intermediate_size
        self.gate_up = GateUp(config.hidden_size, width)
        self.down = Linear(width, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        return self.down(swiglu(self.gate_up(x_BTD)))


class PlainMLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        bias = config.layers.mlp_bias
        self.activation = activation(config.layers.activation)
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        return self.down(self.activation(self.up(x_BTD)))


def activation(name: Activation) -> Callable[[Tensor], Tensor]:
    """The function by its name; `gelu_tanh` is its approximation (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    match name:
        case "silu":
            return nn.functional.silu
        case "relu":
            return nn.functional.relu
        case "gelu":
            return nn.functional.gelu
        case "gelu_tanh":
            return partial(nn.functional.gelu, approximate="tanh")


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [..., gate | up] → [..., half as many]."""
    return _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]  # torch's own


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [..., gate | up], whose gradient is written in place of being put together from halves."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = nn.functional.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        dgate_up = torch.empty_like(gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        torch.mul(grad, activated, out=dup)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=dgate)
        return dgate_up
