"""Runs a function in a few processes that form a gloo group, and brings back what each returned.

The processes are forked from one server that has imported torch once, so that a launch costs a fraction of a second
and not the start of an interpreter. A rank that fails, or is not done in time, takes the others with it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

_LIMIT_S = 120.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("pytest", "torch.distributed.pipelining", "torch.distributed.tensor", "support.gloo"),
        *("sihe.models.decoder", "sihe.training.checkpoint", "sihe.training.parallel.apply"),
    ]
)


class ForkedRanks:
    """`function(*arguments)` in each of `world_size` ranks; it must be importable, its answers picklable.

    Whoever makes it ends it, by `answers` or by `kill`.
    """

    def __init__(
        self, function: Callable[..., Any], world_size: int, *arguments: Any, limit_s: float = _LIMIT_S
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._deadline = monotonic() + limit_s
        self._processes, self._pipes = [], []
        task = pickle.dumps((function, arguments))
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            meeting = f"{self._folder.name}/meeting"
            process = _CONTEXT.Process(target=_be_rank, args=(rank, world_size, meeting, task, theirs, limit_s))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def answers(self) -> list[Any]:
        """What each rank returned. Raises `AssertionError` with the traceback of the rank that failed first."""
        try:
            return _answers(self._pipes, self._deadline)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILLs every rank that is still there."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, limit_s: float = _LIMIT_S) -> list[Any]:
    """What `function(*arguments)` returns in each rank, by rank. Raises as `ForkedRanks.answers`."""
    return ForkedRanks(function, world_size, *arguments, limit_s=limit_s).answers()


def _answers(pipes: list[Connection], deadline: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < len(pipes):
        missing = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = wait(missing, max(deadline - monotonic(), 0))
        if not ready:
            raise AssertionError(f"only ranks {sorted(answers)} of {len(pipes)} answered in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]  # `wait` gives back what it was given
            try:
                succeeded, answer = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} of {len(pipes)} died") from None
            assert succeeded, f"rank {rank} of {len(pipes)} failed:\n{answer}"
            answers[rank] = answer
    return [answers[rank] for rank in range(len(pipes))]


def _be_rank(rank: int, world_size: int, meeting: str, task: bytes, pipe: Connection, limit_s: float) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=limit_s),
        )
        function, arguments = pickle.loads(task)
        answer = pickle.dumps((True, function(*arguments)))
        dist.barrier()  # a rank that leaves early would break the connections of the others
    except BaseException:  # whatever it is, the test shall show it
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)
    os._exit(0)  # without the group's own farewell, which waits for peers that may have failed
