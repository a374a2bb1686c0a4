"""Rotary positions (Su et al. 2021, arXiv 2104.09864), as Llama checkpoints lay them out: dim i turns with i + H/2.

    B  batch      T  time      N  query heads      K  key-value heads      H  head dim      P  positions in the table
    G  rows of one key-value head's group: its N / K queries, its key, its value

Angles are always computed in float32: in bfloat16, positions beyond 256 would collide. How they are stretched for
longer sequences says `RopeScaling`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sihe.core.errors import TooLarge
from sihe.models.architecture import RopeScaling


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of one batch of positions, in the dtype of what they will turn: each [B or 1, T, 1, H / 2]."""

    cos: Tensor
    sin: Tensor

    def apply(self, qkv_BTKGH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys turned to their positions, and values: q [B, T, N, H], k and v [B, T, K, H].

        In each of the K groups come first its queries, then its key, then its value.
        """
        if torch.compiler.is_compiling():  # it fuses single operations, and takes none that write to a slice
            q_BTKGH, k_BTKH, v_BTKH = _parts(qkv_BTKGH)
            q_BTNH = _turned(q_BTKGH, self.cos.unsqueeze(3), self.sin.unsqueeze(3)).flatten(2, 3)
            return q_BTNH, _turned(k_BTKH, self.cos, self.sin), v_BTKH
        turned: tuple[Tensor, Tensor, Tensor]
        turned = _SplitAndTurn.apply(qkv_BTKGH, self.cos, self.sin)  # type: ignore[no-untyped-call]  # torch's own
        return turned

    def turn(self, x_BTNH: Tensor) -> Tensor:
        """Any heads turned to their positions."""
        return _turned(x_BTNH, self.cos, self.sin)


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


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, into: Tensor) -> None:
    (low, high), (low_into, high_into) = x.chunk(2, dim=-1), into.chunk(2, dim=-1)
    torch.mul(low, cos, out=low_into).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=high_into).addcmul_(low, sin)


class RotaryTable:
    """The angles of every position of a model, computed once a device.

    Not a module: it has no weights, and casting a model to bfloat16 must leave the angles alone.
    """

    def __init__(self, head_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None = None) -> None:
        self._head_dim = head_dim
        self._max_positions = max_positions
        self._theta = theta
        self._scaling = scaling
        self._is_dynamic = scaling is not None and scaling.kind == "dynamic"
        self._tables: dict[tuple[torch.device, torch.dtype, int], Rotation] = {}

    def at(self, positions_BT: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of given positions, each in 0 .. max_positions - 1; dynamic scaling goes by the largest."""
        length = int(positions_BT.max()) + 1 if self._is_dynamic and positions_BT.numel() else 0
        table = self._table(positions_BT.device, dtype, length)
        return Rotation(table.cos[positions_BT].unsqueeze(2), table.sin[positions_BT].unsqueeze(2))

    def prefix(self, length: int, device: torch.device, dtype: torch.dtype) -> Rotation:
        """The rotation of positions 0 .. length - 1, without a copy. Raises `TooLarge` past the end of the table."""
        check_length(length, self._max_positions)
        table = self._table(device, dtype, length)
        return Rotation(table.cos[None, :length, None], table.sin[None, :length, None])

    def _table(self, device: torch.device, dtype: torch.dtype, length: int) -> Rotation:
        """All positions of the model; with dynamic scaling as in a sequence of `length`, of which the last is kept."""
        stretched = length if self._is_dynamic else 0
        key = (device, dtype, stretched)
        if key not in self._tables:
            if self._is_dynamic:
                self._tables.clear()
            frequency, factor = frequencies(self._head_dim, self._theta, self._scaling, stretched, device)
            angle = torch.outer(torch.arange(self._max_positions, device=device).float(), frequency)
            self._tables[key] = Rotation((angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype))
        return self._tables[key]


def check_length(length: int, max_positions: int) -> None:
    """Raises `TooLarge` for a sequence that is longer than the model takes."""
    if length > max_positions:
        raise TooLarge(
            f"the model takes sequences of at most {max_positions} tokens (max_positions), got {length}: "
            "shorten the input",
            limit=max_positions,
            actual=length,
            unit="tokens",
        )


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, length: int, device: torch.device
) -> tuple[Tensor, float]:
    """Radians per position of each pair of dims, [H / 2] in float32, and what cosines and sines are multiplied by.

    `length` is that of the sequence, which only dynamic scaling asks for. The sources are named at `RopeScaling`.
    """
    share = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    plain = theta**-share
    if scaling is None:
        return plain, 1.0
    factor, original = scaling.factor, scaling.original_positions
    match scaling.kind:
        case "linear":
            return plain / factor, 1.0
        case "dynamic":
            growth = factor * max(length, original) / original - (factor - 1)
            return (theta * growth ** (head_dim / (head_dim - 2))) ** -share, 1.0
        case "llama3":
            turns = original * plain / (2 * math.pi)
            kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
            kept = kept.clamp(0, 1)
            return plain * kept + plain / factor * (1 - kept), 1.0
        case "yarn":
            kept = 1 - _yarn_ramp(head_dim, theta, scaling, device)
            by_default = 0.1 * math.log(factor) + 1
            return plain * kept + plain / factor * (1 - kept), scaling.attention_factor or by_default


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling, device: torch.device) -> Tensor:
    """0 for the pairs that turn more than `beta_fast` times in the original length, 1 below `beta_slow`: [H / 2]."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(scaling.original_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    pair = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    return ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
