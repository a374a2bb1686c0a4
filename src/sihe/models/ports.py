"""What the decoder lets others replace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Attend(Protocol):
    """Attention of one layer, as the decoder calls it.

    A serving engine hands in one that writes keys and values to its cache and attends over what the cache holds.
    """

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """The mixed values, [B, T, N, H]. `q` and `k` carry their rotary positions already; K divides N."""
        ...
