"""Forked gloo ranks (`support.gloo`) that get a `Ranks`, as the training loop has one, and that wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sihe.training.ranks import Ranks
from support import gloo

_MEETING_S = 60.0


def fork_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = _MEETING_S
) -> gloo.ForkedRanks:
    """`function(ranks, *arguments)` on each of `world_size` ranks; its collectives time out after `timeout_s`."""
    return gloo.ForkedRanks(_with_ranks, world_size, function, timeout_s, arguments)


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = _MEETING_S
) -> list[Any]:
    """What `function(ranks, *arguments)` gives on each of `world_size` ranks."""
    return fork_ranks(function, world_size, *arguments, timeout_s=timeout_s).answers()


def wait_until_told(name: str) -> None:
    """Until another rank calls `tell`."""
    dist.distributed_c10d._get_default_store().wait([name], timedelta(seconds=_MEETING_S))


def tell(name: str) -> None:
    """Lets the ranks go on that wait for `name`."""
    dist.distributed_c10d._get_default_store().set(name, "1")


def _with_ranks(function: Callable[..., Any], timeout_s: float, arguments: tuple[Any, ...]) -> Any:
    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    return function(Ranks(dist.get_rank(), dist.get_world_size(), timeout_s, group), *arguments)
