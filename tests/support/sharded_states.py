"""One state, laid out over ranks as each kind of parallelism does it; which part is whose is cut by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from sihe.training.ranks import Ranks

SHAPES = {"uneven": (10, 6), "few_rows": (2, 8, 4), "vector": (12,), "scalar": ()}
"""10 rows and 2 rows do not divide by 4: some ranks have fewer, or none."""

Layout = Callable[[Ranks], dict[str, Tensor]]


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def part_of(tensor: Tensor, size: int, rank: int, dim: int = 0) -> Tensor:
    """As torch's FSDP2 cuts: equal parts, the last ones smaller or empty."""
    parts = tensor.chunk(size, dim)
    return parts[rank] if rank < len(parts) else tensor.narrow(dim, 0, 0)


def replicated(_ranks: Ranks) -> dict[str, Tensor]:
    return whole()


def by_rows(ranks: Ranks) -> dict[str, Tensor]:
    """ZeRO over all ranks; an expert-parallel tensor lies the same way."""
    grid = {"shard": ranks.world_size}
    return {
        name: tensor
        if tensor.ndim == 0
        else placed(tensor, part_of(tensor, ranks.world_size, ranks.rank), grid, [Shard(0)])
        for name, tensor in whole().items()
    }


def hybrid(ranks: Ranks) -> dict[str, Tensor]:
    """Two replicas, each over half of the ranks."""
    half = ranks.world_size // 2
    grid, places = {"replica": 2, "shard": half}, [Replicate(), Shard(0)]
    return {
        name: tensor if tensor.ndim == 0 else placed(tensor, part_of(tensor, half, ranks.rank % half), grid, places)
        for name, tensor in whole().items()
    }


def by_columns(ranks: Ranks) -> dict[str, Tensor]:
    """Tensor parallelism of the second product, two ways, in replicas."""
    grid, places = {"dp": ranks.world_size // 2, "tp": 2}, [Replicate(), Shard(1)]
    return {
        name: tensor if tensor.ndim < 2 else placed(tensor, part_of(tensor, 2, ranks.rank % 2, 1), grid, places)
        for name, tensor in whole().items()
    }


def rows_of_rows(ranks: Ranks) -> dict[str, Tensor]:
    """Tensor parallelism by rows, and ZeRO over the rows of each share."""
    size = ranks.world_size // 2
    grid, places = {"shard": size, "tp": 2}, [_StridedShard(0, split_factor=2), Shard(0)]
    return {
        name: placed(tensor, part_of(part_of(tensor, 2, ranks.rank % 2), size, ranks.rank // 2), grid, places)
        if tensor.ndim
        else tensor
        for name, tensor in whole().items()
    }


def rows_of_columns(ranks: Ranks) -> dict[str, Tensor]:
    """Tensor parallelism by columns, and ZeRO over the rows of each share."""
    size = ranks.world_size // 2
    grid, places = {"shard": size, "tp": 2}, [Shard(0), Shard(1)]
    return {
        name: placed(tensor, part_of(part_of(tensor, 2, ranks.rank % 2, 1), size, ranks.rank // 2), grid, places)
        if tensor.ndim > 1
        else tensor
        for name, tensor in whole().items()
    }


def by_layers(ranks: Ranks) -> dict[str, Tensor]:
    """A pipeline: each tensor is on one rank, but the first, which is tied, is on the first and the last."""
    return {
        name: tensor
        for place, (name, tensor) in enumerate(whole().items())
        if place % ranks.world_size == ranks.rank or (place == 0 and ranks.rank == ranks.world_size - 1)
    }


LAYOUTS: tuple[Layout, ...] = (replicated, by_rows, hybrid, by_columns, rows_of_rows, rows_of_columns, by_layers)


def placed(tensor: Tensor, local: Tensor, grid: dict[str, int], places: list[Placement]) -> DTensor:
    mesh = _mesh(*grid.items())
    return DTensor.from_local(local.clone(), mesh, places, run_check=False, shape=tensor.shape, stride=tensor.stride())


@cache
def _mesh(*axes: tuple[str, int]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(size for _, size in axes), mesh_dim_names=tuple(name for name, _ in axes))


def local_of(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
