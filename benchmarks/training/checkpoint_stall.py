"""What a checkpoint costs the training: the stall of a save in the background beside a save that is waited for.

    background   from the call of `save` to its return, while the writer of the last one has finished
    waited for   the same checkpoint, written, synced, summed and renamed before the call returns
    copy         the bytes of the state copied once in memory: what bounds the stall
    disk         the same bytes written to one file and synced: what bounds a save that is waited for

A decoder of 113 M parameters in float32 with AdamW: 1.36 GB of weights and moments. Optimizer steps go on between the
call and the end of the writing, as in training; each save waits for the one before outside of the time that is taken,
as it has when checkpoints are further apart than a write lasts. The restart is that of a fresh process: imports, the
newest checkpoint found, verified and loaded, and the first step done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Claim, alternate, at_most, print_table, report

if TYPE_CHECKING:
    import torch

    from sihe.models.decoder import Decoder
    from sihe.training.checkpoint import Checkpoints
    from sihe.training.optimizer import MasterOptimizer

LAYERS, WIDTH, HEADS, FEED_FORWARD, VOCABULARY, LENGTH = 12, 768, 12, 2048, 32_768, 64
STALL_GOAL, RESTART_GOAL_S = 0.15, 10.0
IDENTITY = {"benchmark": "checkpoint_stall"}


def main() -> None:
    """Measures the saves in turn, then restarts from the last; as a child of itself, restarts once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure, instead of a temporary one")
    parser.add_argument("--restart", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.restart:
        restart(options.restart, options.threads)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        claims = measure(Path(folder), options.repeats, options.threads)
        seconds = [_restart_s(Path(folder) / "background", options.threads) for _ in range(options.restarts)]
    print_table({"restart to first step": seconds}, unit="s", baseline="restart to first step")
    claims.append(
        at_most("restart to the first step, fp32", statistics.median(seconds), unit="s", limit=RESTART_GOAL_S)
    )
    report(__file__, claims)


def measure(folder: Path, repeats: int, threads: int) -> list[Claim]:
    """The stall and the save that is waited for, in turn; the claim about their ratio."""
    import torch

    torch.set_num_threads(threads)
    model, optimizer = _training()
    state = [tensor for tensor in optimizer.state_tensors().values() if tensor.ndim]
    size_gb = sum(tensor.numel() * tensor.element_size() for tensor in state) / 1e9
    background = _checkpoints(folder / "background", background=True)
    waited_for = _checkpoints(folder / "waited-for", background=False)
    background.reserve(model, optimizer)
    steps = iter(range(1, 1_000_000))

    def stall() -> float:
        background.finish()
        step = next(steps)
        started = time.perf_counter()
        background.save(step, step, model, optimizer)
        seconds = time.perf_counter() - started
        while not background.completed():  # training goes on beside the writer
            _step(model, optimizer)
        return seconds

    def wait() -> float:
        step = next(steps)
        started = time.perf_counter()
        waited_for.save(step, step, model, optimizer)
        return time.perf_counter() - started

    stall()  # the buffers are there, and the allocator is warm
    buffers = [torch.empty_like(tensor) for tensor in state]
    figures = alternate(
        {
            "waited for": wait,
            "background": stall,
            "copy": _timed(lambda: [buffer.copy_(tensor) for buffer, tensor in zip(buffers, state, strict=True)]),
            "disk": _timed(lambda: _write(folder / "plain", state)),
        },
        repeats=repeats,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.0f} M parameters, {size_gb:.2f} GB, {threads} threads")
    print_table(figures, unit="s", baseline="waited for")
    middle = {name: statistics.median(values) for name, values in figures.items()}
    print(
        f"the stall is {middle['background'] / middle['copy']:.2f} x a copy in memory ({size_gb / middle['copy']:.1f} "
        f"GB/s), the save that is waited for {middle['waited for'] / middle['disk']:.2f} x a plain write "
        f"({size_gb / middle['disk']:.2f} GB/s)\n"
    )
    share = middle["background"] / middle["waited for"]
    name = "stall of a checkpoint in the background beside one that is waited for"
    goal = f"<= {STALL_GOAL} x the peer"
    return [Claim(name, middle["background"], middle["waited for"], share, "s", goal, share <= STALL_GOAL)]


def restart(folder: Path, threads: int) -> None:
    """What a rank does when it starts again, up to the end of its first step."""
    import torch

    torch.set_num_threads(threads)
    model, optimizer = _training()
    found = _checkpoints(folder, background=True).newest(lambda skipped: sys.exit(f"damaged: {skipped}"))
    if found is None:
        sys.exit(f"no checkpoint in {folder}")
    found.load_into(model, optimizer)
    _step(model, optimizer)
    print(json.dumps({"step": found.step}))


def _training() -> tuple[Decoder, MasterOptimizer]:
    """A model after one step, so that its moments are no zeros."""
    import torch

    from sihe.models.config import ModelConfig
    from sihe.models.decoder import Decoder
    from sihe.training.optimizer import MasterOptimizer

    torch.manual_seed(0)
    model = Decoder(ModelConfig(VOCABULARY, WIDTH, LAYERS, HEADS, HEADS, WIDTH // HEADS, FEED_FORWARD, LENGTH))
    optimizer = MasterOptimizer(model)
    _step(model, optimizer)
    return model, optimizer


def _step(model: Decoder, optimizer: MasterOptimizer) -> None:
    import torch

    tokens_BT = torch.randint(VOCABULARY, (1, LENGTH))
    loss, _ = model.loss(tokens_BT, tokens_BT)
    loss.backward()
    optimizer.step(1e-4)
    optimizer.zero_grad()


def _checkpoints(folder: Path, *, background: bool) -> Checkpoints:
    from sihe.training.checkpoint import Checkpoints

    return Checkpoints(folder, IDENTITY, keep=1, background=background)


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return seconds


def _write(path: Path, tensors: list[torch.Tensor]) -> None:
    with path.open("wb") as file:
        for tensor in tensors:
            file.write(memoryview(tensor.detach().numpy()).cast("B"))
        file.flush()
        os.fsync(file.fileno())


def _restart_s(folder: Path, threads: int) -> float:
    command = [sys.executable, "-m", "benchmarks.training.checkpoint_stall"]
    command += ["--restart", str(folder), "--threads", str(threads)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the restart failed:\n{done.stderr}")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
