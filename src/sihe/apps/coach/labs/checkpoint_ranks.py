"""What the process of `ckpt.async` runs: the same state saved in the foreground and in the background, and writers
that are killed half way.

The state is a decoder with its optimizer: float32 weights and two moments. A killed writer is a process of its own,
struck by SIGKILL when its staging folder holds a chosen share of the bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sihe.apps.coach.labs.checkpoint_writer import FIRST_DIGEST, digest, open_checkpoints, state_of
from sihe.cluster.launchers.rank import LAUNCHER_PID
from sihe.training.optimizer import MasterOptimizer
from sihe.training.types import CheckpointSkipped

_REPEATS = 2
_WIDTH = 512  # of the matrix whose products stand for the training beside the writer
_POLL_S = 0.001


def saves(rank: int, world_size: int, *, layers: int, shares: list[float]) -> dict[str, Any]:
    """Stalls, bytes, and what is left after a kill at each of `shares` of the bytes."""
    del rank, world_size
    with tempfile.TemporaryDirectory(prefix="sihe-lab-checkpoints-") as name:
        model, optimizer = state_of(layers)
        found = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **_foreground(Path(name, "foreground"), model, optimizer),
            **_background(Path(name, "background"), model, optimizer, layers),
        }
        kills = [
            _killed(Path(name, f"killed-{place}"), layers, share, found["size_bytes"])
            for place, share in enumerate(shares)
        ]
    return found | {"kills": kills}


def _foreground(folder: Path, model: nn.Module, optimizer: MasterOptimizer) -> dict[str, Any]:
    checkpoints = open_checkpoints(folder, background=False)
    stalls = []
    for step in range(1, _REPEATS + 1):
        start = time.perf_counter()
        checkpoints.save(step, step, model, optimizer)
        stalls.append(time.perf_counter() - start)
    return {"stall_s": min(stalls), "size_bytes": checkpoints.completed()[-1].size_bytes}


def _background(folder: Path, model: nn.Module, optimizer: MasterOptimizer, layers: int) -> dict[str, Any]:
    """The stall, what goes on beside the writer, and whether the file holds the moment of the save to the last bit."""
    checkpoints = open_checkpoints(folder, background=True)
    checkpoints.reserve(model, optimizer)
    stalls, written, products = [], [], 0
    matrix = torch.ones(_WIDTH, _WIDTH)
    for step in range(1, _REPEATS + 1):
        checkpoints.finish()
        before = digest(optimizer)
        start = time.perf_counter()
        checkpoints.save(step, step, model, optimizer)
        stalls.append(time.perf_counter() - start)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)  # the training goes on, in the memory that was saved
        products = 0
        while not (done := checkpoints.completed()):
            matrix @ matrix
            products += 1
        written.append(done[-1].seconds)
    other_model, other = state_of(layers)
    checkpoints.at(_REPEATS).load_into(other_model, other)
    return {
        "background_stall_s": min(stalls),
        "write_s": min(written),
        "products": products,
        "is_moment_of_save": digest(other) == before,
    }


def _killed(folder: Path, layers: int, share: float, size_bytes: int) -> dict[str, Any]:
    """Kills a writer at `share` of its second checkpoint, and opens what it left."""
    folder.mkdir()
    environment = {**os.environ, LAUNCHER_PID: str(os.getpid())}
    command = [sys.executable, "-m", "sihe.apps.coach.labs.checkpoint_writer", str(folder), str(layers)]
    writer = subprocess.Popen(command, env=environment)
    try:
        while writer.poll() is None and _staged_bytes(folder) < share * size_bytes:
            time.sleep(_POLL_S)
    finally:
        writer.kill()
        code = writer.wait()
    staged = _staged_bytes(folder)
    skipped: list[CheckpointSkipped] = []
    newest = open_checkpoints(folder, background=False).newest(skipped.append)
    assert newest is not None, "the first checkpoint was complete before the second began"
    model, optimizer = state_of(layers)
    newest.load_into(model, optimizer)
    expected = (folder / FIRST_DIGEST).read_text(encoding="utf-8")
    return {
        "share": share,
        "code": code,
        "staged_bytes": staged,
        "step": newest.step,
        "is_whole": not skipped and (newest.step != 1 or digest(optimizer) == expected),
        "left_bytes": _staged_bytes(folder),
    }


def _staged_bytes(folder: Path) -> int:
    """Bytes of a second checkpoint that has no name yet."""
    total = 0
    for path in folder.glob(".step-00000002.tmp-*/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # it got its name
            continue
    return total
