"""Expert parallelism: each rank of `ep` holds some experts of every mixture, and rows travel to where theirs is.

    S  rows that this rank sends      R  rows that it receives      D  hidden      E  experts
    P  ranks of the axis      L  experts of one rank, E / P

The ranks of the axis see different tokens, as data ranks do. Before the experts, each rank sends every row to the rank
that holds its expert, in one all-to-all, and gets the results back in another (Lepikhin et al. 2020, arXiv 2006.16668,
section 3.2). How many rows go where is only known then, so the counts are exchanged first. An expert's gradient is
complete within the axis; it is summed over the ranks that hold the same expert (`replica` x `cp`), not over all data
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.moe import mixtures
from sihe.training.parallel.held import Cut

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sihe.training.parallel.mesh import Axis


def cut_experts(block: nn.Module, axis: Axis) -> Iterator[tuple[nn.Parameter, Cut]]:
    """Leaves each mixture in `block` this rank's experts and makes its rows travel; each weight with its cut.

    Raises `ConfigError` for a number of experts that the axis does not divide.
    """
    for mixture in mixtures(block):
        if mixture.num_experts % axis.size:
            raise ConfigError(
                f"parallel setting 'ep' must be a divisor of num_experts ({mixture.num_experts}), got {axis.size}",
                key="parallel.ep",
            )
        cut = Cut(axis, 0)
        for weight in (mixture.gate_up, mixture.down):
            weight.data = cut.part_of(weight.data)
            yield weight, cut
        mixture.exchange = ExpertExchange(axis)


class ExpertExchange:
    """An `Exchange` over the ranks of one axis, of which rank p holds the experts p E/P up to (p + 1) E/P.

    All ranks of the axis call it together, each with its own rows, however few.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def dispatch(self, x_SD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, object]:
        """The rows [R, D] for this rank's experts, sorted by expert; how many each has, [L]; and the way back."""
        sent_PL = counts_E.view(self._axis.size, -1)
        received_PL = torch.empty_like(sent_PL)
        dist.all_to_all_single(received_PL, sent_PL.contiguous(), group=self._axis.group)
        route = _Route.between(sent_PL, received_PL, self._axis)
        x_RD: Tensor = _Travel.apply(x_SD, route, False)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return x_RD, received_PL.sum(0), route

    def combine(self, y_RD: Tensor, state: object) -> Tensor:
        """The results [S, D] of the rows that this rank sent, in their order."""
        assert isinstance(state, _Route)
        y_SD: Tensor = _Travel.apply(y_RD, state, True)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return y_SD


@dataclass(frozen=True)
class _Route:
    """Where the rows of one pass go."""

    axis: Axis
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    by_expert: Tensor
    """[R]: which of the received rows, sorted by rank and then by expert, stands where once sorted by expert alone."""
    by_rank: Tensor
    """[R]: the same, back."""

    @classmethod
    def between(cls, sent_PL: Tensor, received_PL: Tensor, axis: Axis) -> _Route:
        """From how many rows go to, and come from, each rank for each of the receiver's experts."""
        expert_PL = torch.arange(received_PL.shape[1], device=received_PL.device).expand_as(received_PL)
        expert_R = expert_PL.flatten().repeat_interleave(received_PL.flatten())
        by_expert = expert_R.argsort(stable=True)
        return cls(axis, sent_PL.sum(1).tolist(), received_PL.sum(1).tolist(), by_expert, by_expert.argsort())

    def there(self, x_SD: Tensor) -> Tensor:
        """[S, D] by expert of the whole model → [R, D] by expert of this rank."""
        return self._exchange(x_SD, self.sent, self.received)[self.by_expert]

    def back(self, y_RD: Tensor) -> Tensor:
        """[R, D] → [S, D]."""
        return self._exchange(y_RD[self.by_rank], self.received, self.sent)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=self.axis.group)
        return arrived


class _Travel(torch.autograd.Function):
    """Rows along a route, or back; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: _Route, homeward: bool) -> Tensor:
        ctx.route, ctx.homeward = route, homeward
        return route.back(rows) if homeward else route.there(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.route.there(grads[0]) if ctx.homeward else ctx.route.back(grads[0]), None, None
