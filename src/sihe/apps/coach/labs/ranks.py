"""Runs a function in a few fresh processes that talk over gloo, and takes their answers.

Fresh processes rather than forks or threads: the console that asks may hold a server, an engine and open databases.
Whatever happens, no process is left behind: a rank leaves when its parent does, all are killed when one fails or when
time is up, and the ranks meet at a file that dies with its folder, so that two labs never meet each other.

This module is also the program that a rank runs: `python -m sihe.apps.coach.labs.ranks`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from sihe.apps.coach.errors import LabFailed, LabTimeout

_POLL_S = 0.02
_TAIL_LINES = 12


def run_ranks(
    target: str, arguments: Mapping[str, Any], *, world_size: int, limit_s: float, threads: int = 1
) -> list[Any]:
    """What `target` ("module:function") returns in each of `world_size` processes of `threads` threads, by rank.

    There are no more threads than processors that this process may use: two that take turns on one measure its
    scheduler.

    The function is called as `function(rank, world_size, **arguments)`; arguments and answers are JSON values. With
    more than one rank a gloo process group is open. Raises `LabFailed` with the words of the rank that failed first,
    and `LabTimeout` after `limit_s` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="sihe-lab-") as name:
        folder = Path(name)
        task = {"target": target, "arguments": dict(arguments), "world_size": world_size, "limit_s": limit_s}
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        processes = []
        try:
            for rank in range(world_size):
                processes.append(_start(folder, rank, threads))
            _wait(processes, folder, limit_s, target)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()
        answers = (folder / f"answer-{rank}.json" for rank in range(world_size))
        return [json.loads(file.read_text(encoding="utf-8")) for file in answers]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(folder: Path, rank: int, threads: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(min(threads, cores())),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",  # without it gloo resolves the host's name
    }
    with (folder / f"words-{rank}").open("wb") as words:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(rank)],
            stdin=subprocess.PIPE,  # never written to: it closes when this process dies
            stdout=words,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path, limit_s: float, target: str) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                words = (folder / f"words-{rank}").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                said = "\n".join(words[-_TAIL_LINES:]) or "it said nothing"
                raise LabFailed(f"rank {rank} of {target} stopped with exit code {code}:\n{said}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            running = [rank for rank, code in enumerate(codes) if code is None]
            raise LabTimeout(
                f"{target} was stopped after {limit_s:g} s while ranks {running} were running: "
                "try smaller parameters, or again when the machine is less busy",
                retry_after_s=limit_s,
            )
        time.sleep(_POLL_S)


def _leave_with_parent() -> None:
    """Ends this process when the parent's end of standard input closes."""

    def watch() -> None:
        while os.read(0, 1):  # the descriptor itself: a reader blocked in sys.stdin breaks the interpreter's exit
            pass
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


def _be_rank(folder: Path, rank: int) -> None:
    _leave_with_parent()
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    world_size = int(task["world_size"])
    if world_size > 1:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'meeting'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=task["limit_s"]),
        )
    module, _, name = task["target"].partition(":")
    answer = getattr(importlib.import_module(module), name)(rank, world_size, **task["arguments"])
    file = folder / f"answer-{rank}.json"
    file.write_text(json.dumps(answer), encoding="utf-8")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    _be_rank(Path(sys.argv[1]), int(sys.argv[2]))
