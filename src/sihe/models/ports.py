"""What the decoder lets others replace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Attend(Protocol):
    """Attention of one layer, as the decoder calls it.

    A serving engine hands in one that writes keys and values to its cache and attends over what the cache holds. Where
    the model has a window, an attribute `window` says that this attention keeps to it; where it is an encoder, an
    attribute `causal` is False; where it has biases on scores, an attribute `has_bias` says that this attention adds
    them.
    """

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, /) -> Tensor:
        """The mixed values, [B, T, N, H]. `q` and `k` carry their rotary positions already; K divides N."""
        ...


class Exchange(Protocol):
    """Expert parallelism, as a mixture of experts calls it: rows go to the process that holds their expert, and back.

    Both ways carry gradients. `S` are this process's rows, `R` those that it receives.
    """

    def dispatch(self, x_SD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, object]:
        """Sends rows, sorted by expert, `counts_E[e]` of them for each expert e of the whole model.

        Returns the rows [R, D] for this process's experts, sorted by expert whoever sent them; how many rows each of
        these experts has; and what `combine` will need.
        """
        ...

    def combine(self, y_RD: Tensor, state: object) -> Tensor:
        """The results [S, D] of the rows that this process sent, in the order in which it sent them."""
        ...
