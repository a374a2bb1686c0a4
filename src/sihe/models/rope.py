"""Rotary positions (Su et al. 2021, arXiv 2104.09864), as Llama checkpoints lay them out: dim i turns with i + H/2.

    B  batch      T  time      X  heads (of queries or of keys)      H  head dim      P  positions in the table

Angles are always computed in float32: in bfloat16, positions beyond 256 would collide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sihe.core.errors import TooLarge


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of one batch of positions, in the dtype of what they will turn: each [B or 1, T, 1, H]."""

    cos: Tensor
    sin: Tensor

    def apply(self, x_BTXH: Tensor) -> Tensor:
        """`x` with each pair (i, i + H/2) turned by the angle of its position."""
        low, high = x_BTXH.chunk(2, dim=-1)
        return x_BTXH * self.cos + torch.cat((-high, low), dim=-1) * self.sin


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
        return Rotation(table.cos[:length].unsqueeze(1), table.sin[:length].unsqueeze(1))

    def _table(self, device: torch.device, dtype: torch.dtype) -> Rotation:
        if (device, dtype) not in self._tables:
            pair = torch.arange(0, self._head_dim, 2, dtype=torch.float32, device=device)
            frequency = self._theta ** -(pair / self._head_dim)
            angle_PH = torch.outer(torch.arange(self._max_positions, device=device).float(), frequency).repeat(1, 2)
            self._tables[device, dtype] = Rotation(angle_PH.cos().to(dtype), angle_PH.sin().to(dtype))
        return self._tables[device, dtype]
