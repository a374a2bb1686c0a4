"""Rotary positions (Su et al. 2021, arXiv 2104.09864), as Llama checkpoints lay them out: dim i turns with i + H/2.

    B  batch      T  time      N  query heads      K  key-value heads      H  head dim      P  positions in the table
    G  rows of one key-value head's group: its N / K queries, its key, its value

Angles are always computed in float32: in bfloat16, positions beyond 256 would collide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sihe.core.errors import TooLarge


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of one batch of positions, in the dtype of what they will turn: each [B or 1, T, 1, H / 2]."""

    cos: Tensor
    sin: Tensor

    def apply(self, qkv_BTKGH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys turned to their positions, and values: q [B, T, N, H], k and v [B, T, K, H].

        In each of the K groups come first its queries, then its key, then its value.
        """
        turned: tuple[Tensor, Tensor, Tensor]
        turned = _SplitAndTurn.apply(qkv_BTKGH, self.cos, self.sin)  # type: ignore[no-untyped-call]  # torch's own
        return turned


class _SplitAndTurn(torch.autograd.Function):
    """One pass over queries and keys, each way, straight to where the result belongs.

    Composed of single operations it costs twice the time in bfloat16: rotate-half, its concatenation and the gradients
    of the slices each write a tensor that is only read once.
    """

    @staticmethod
    def forward(ctx: Any, qkv_BTKGH: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q_BTKGH, k_BTKH, v_BTKH = _parts(qkv_BTKGH)
        q_turned = q_BTKGH.new_empty(q_BTKGH.shape)
        k_turned = k_BTKH.new_empty(k_BTKH.shape)
        _turn(q_BTKGH, cos.unsqueeze(3), sin.unsqueeze(3), into=q_turned)
        _turn(k_BTKH, cos, sin, into=k_turned)
        return q_turned.flatten(2, 3), k_turned, v_BTKH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BTNH: Tensor, dk_BTKH: Tensor, dv_BTKH: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        batch, time, kv_heads, head_dim = dk_BTKH.shape
        dqkv_BTKGH = dk_BTKH.new_empty(batch, time, kv_heads, dq_BTNH.shape[2] // kv_heads + 2, head_dim)
        dq_into, dk_into, dv_into = _parts(dqkv_BTKGH)
        # The gradient of a rotation is the rotation back.
        _turn(dq_BTNH.reshape(dq_into.shape), cos.unsqueeze(3), -sin.unsqueeze(3), into=dq_into)
        _turn(dk_BTKH, cos, -sin, into=dk_into)
        dv_into.copy_(dv_BTKH)
        return dqkv_BTKGH, None, None


def _parts(qkv_BTKGH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return qkv_BTKGH[:, :, :, :-2], qkv_BTKGH[:, :, :, -2], qkv_BTKGH[:, :, :, -1]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, into: Tensor) -> None:
    (low, high), (low_into, high_into) = x.chunk(2, dim=-1), into.chunk(2, dim=-1)
    torch.mul(low, cos, out=low_into).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=high_into).addcmul_(low, sin)


class RotaryTable:
    """The angles of every position of a model, computed once a device.

    Not a module: it has no weights, and casting a model to bfloat16 must leave the angles alone.
    """

    def __init__(self, head_dim: int, max_positions: int, theta: float) -> None:
        self._head_dim = head_dim
        self._max_positions = max_positions
        self._theta = theta
        self._tables: dict[tuple[torch.device, torch.dtype], Rotation] = {}

    def at(self, positions_BT: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of given positions, each in 0 .. max_positions - 1."""
        table = self._table(positions_BT.device, dtype)
        return Rotation(table.cos[positions_BT].unsqueeze(2), table.sin[positions_BT].unsqueeze(2))

    def prefix(self, length: int, device: torch.device, dtype: torch.dtype) -> Rotation:
        """The rotation of positions 0 .. length - 1, without a copy. Raises `TooLarge` past the end of the table."""
        if length > self._max_positions:
            raise TooLarge(
                f"the model takes sequences of at most {self._max_positions} tokens (max_positions), got {length}: "
                "shorten the input",
                limit=self._max_positions,
                actual=length,
                unit="tokens",
            )
        table = self._table(device, dtype)
        return Rotation(table.cos[None, :length, None], table.sin[None, :length, None])

    def _table(self, device: torch.device, dtype: torch.dtype) -> Rotation:
        if (device, dtype) not in self._tables:
            pair = torch.arange(0, self._head_dim, 2, dtype=torch.float32, device=device)
            frequency = self._theta ** -(pair / self._head_dim)
            angle = torch.outer(torch.arange(self._max_positions, device=device).float(), frequency)
            self._tables[device, dtype] = Rotation(angle.cos().to(dtype), angle.sin().to(dtype))
        return self._tables[device, dtype]
