"""Tensor and sequence parallelism: each rank of `tp` has a share of every matrix and, in between, of the sequence.

    B  batch      T  time      S  this rank's share of the time, T / tp      D  hidden

The first product of a layer is cut by its rows (heads, or columns of the gated layer), the second by its columns, so
that nothing is sent between the two (Shoeybi et al. 2019, arXiv 1909.08053, section 3). What a layer adds to the
stream is a sum over ranks; it is handed out in shares of the sequence, which the norms then work on, and gathered again
before the next layer (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2). The sum of the two messages is that
of one all-reduce, and no rank keeps the activations of the whole sequence between the layers.

The modules themselves are left alone: their weights become shares, and hooks gather before and scatter after them.
What is not cut (norms, a router) sees part of the work on each rank, so its gradients are summed over `tp`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.attention import Attention
from sihe.models.mlp import GatedMLP
from sihe.models.moe import MixtureOfExperts
from sihe.training.parallel.held import Cut

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sihe.training.parallel.mesh import Axis

_TIME = 1


class _Gather(torch.autograd.Function):
    """Shares of the sequence → the whole of it on every rank; back, each rank's gradients of the whole are summed."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gathered(x_BSD, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed_share(grads[0], ctx.axis), None


class _SumToShares(torch.autograd.Function):
    """Each rank's summand of the whole sequence → this rank's share of the sum; back, the shares are gathered."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _summed_share(x_BTD, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads[0], ctx.axis), None


def gather_sequence(x_BSD: Tensor, axis: Axis) -> Tensor:
    """The whole sequence [B, T, D] from each rank's share."""
    whole: Tensor = _Gather.apply(x_BSD, axis)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return whole


def sum_to_shares(x_BTD: Tensor, axis: Axis) -> Tensor:
    """This rank's share [B, S, D] of the sum over ranks."""
    share: Tensor = _SumToShares.apply(x_BTD, axis)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return share


def cut_block(block: nn.Module, axis: Axis) -> Iterator[tuple[nn.Parameter, Cut]]:
    """Replaces the matrices of one block by this rank's shares and hooks the messages in; each share with its cut.

    Raises `ConfigError` for a layer that cannot be cut.
    """
    for module in block.modules():
        for name, dim in _dims(module).items():
            weight = module.get_parameter(name)
            cut = Cut(axis, dim)
            weight.data = cut.part_of(weight.data)
            yield weight, cut
    for name in ("attention", "mlp"):
        layer = block.get_submodule(name)
        layer.register_forward_pre_hook(lambda _layer, args: (gather_sequence(args[0], axis), *args[1:]))
        layer.register_forward_hook(lambda _layer, _args, output: sum_to_shares(output, axis))


def _dims(module: nn.Module) -> dict[str, int]:
    """The matrices of a layer by name, and the dim along which each is cut; an output is a sum where it is the last."""
    match module:
        case Attention():
            _refuse_bias(module.out)
            return {"qkv.weight": 0, "out.weight": 1} | ({"qkv.bias": 0} if module.qkv.bias is not None else {})
        case GatedMLP():
            return {"gate_up.weight": 1, "down.weight": 1}
        case MixtureOfExperts():
            return {"gate_up": 2, "down": 2}
        case _:
            return {}


def _refuse_bias(linear: nn.Linear) -> None:
    if linear.bias is not None:
        raise ConfigError(
            "parallel setting 'tp' must be 1 for a model whose attention output has a bias", key="parallel.tp"
        )


def _gathered(x: Tensor, axis: Axis) -> Tensor:
    parts = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    dist.all_gather_single(parts, x.contiguous(), group=axis.group)
    return parts.view(axis.size, *x.shape).movedim(0, _TIME).flatten(_TIME, _TIME + 1)


def _summed_share(x: Tensor, axis: Axis) -> Tensor:
    parts = torch.stack(x.chunk(axis.size, _TIME)).flatten(0, 1)
    share = parts.new_empty(x.shape[0], *parts.shape[1:])
    dist.reduce_scatter_single(share, parts, group=axis.group)
    return share
