"""Real gloo ranks that start at once: forked from one process that has imported torch already."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sihe.training.ranks import Ranks

_MEETING_S = 60.0
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["support.forked_ranks", "sihe.training.checkpoint", "sihe.training.parallel.apply"])


class ForkedRanks:
    """`function(ranks, *arguments)` on each of `world_size` ranks; collectives time out after `timeout_s`."""

    def __init__(
        self, function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = _MEETING_S
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._processes, self._results = [], []
        for rank in range(world_size):
            here, there = _context.Pipe(duplex=False)
            args = (there, function, rank, world_size, store, timeout_s, arguments)
            process = _context.Process(target=_run, args=args, daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._results.append(here)

    def results(self) -> list[Any]:
        """What each rank gave. Raises the error of the first that failed, as text."""
        try:
            results = [self._result_of(rank) for rank in range(len(self._processes))]
        finally:
            self.kill()
        for rank, (result, error) in enumerate(results):
            assert error is None, f"rank {rank} failed: {error}"
            results[rank] = result
        return results

    def kill(self) -> None:
        """SIGKILLs every rank that is still there."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def _result_of(self, rank: int) -> tuple[Any, str | None]:
        assert self._results[rank].poll(2 * _MEETING_S), f"rank {rank} hangs"
        try:
            answer: tuple[Any, str | None] = pickle.loads(self._results[rank].recv_bytes())
        except EOFError:
            return None, "it died"
        return answer


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = _MEETING_S
) -> list[Any]:
    """What `function(ranks, *arguments)` gives on each of `world_size` ranks."""
    return ForkedRanks(function, world_size, *arguments, timeout_s=timeout_s).results()


def wait_until_told(name: str) -> None:
    """Until another rank calls `tell`."""
    dist.distributed_c10d._get_default_store().wait([name], timedelta(seconds=_MEETING_S))


def tell(name: str) -> None:
    """Lets the ranks go on that wait for `name`."""
    dist.distributed_c10d._get_default_store().set(name, "1")


def _run(
    answer: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    timeout_s: float,
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=_MEETING_S),
        )
        group = dist.new_group(timeout=timedelta(seconds=timeout_s))
        result = function(Ranks(rank, world_size, timeout_s, group), *arguments)
        # As bytes: `send` would share a tensor's memory, which is gone when this process is.
        answer.send_bytes(pickle.dumps((result, None)))
        dist.barrier()  # nobody leaves while others still talk to it
        dist.destroy_process_group()
    except Exception as error:
        import traceback

        answer.send_bytes(pickle.dumps((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")))
