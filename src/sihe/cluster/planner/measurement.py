"""This machine as a cluster of single-threaded ranks: products, copies and messages, timed for a second or two each.

It is also the program of the two ranks whose messages are timed: `python -m sihe.cluster.planner.measurement`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sihe.cluster.collectives.costs import Link
from sihe.cluster.collectives.fit import fit_link
from sihe.cluster.planner.types import ClusterSpec, Precision
from sihe.core.errors import TransientError

_LIMIT_S = 120
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCK = 1024  # rows of the products: large enough for the peak, small enough where a dtype is emulated
_COPIED_BYTES = 64 << 20  # more than caches hold


def measure_machine() -> ClusterSpec:
    """One node whose devices are this machine's cores, each with its share of the memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peaks = {precision: _product_flops(dtype) for precision, dtype in _DTYPES.items()}
        bandwidth = _copy_bandwidth()
    finally:
        torch.set_num_threads(threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    link = _loopback()
    return ClusterSpec(
        "this machine",
        nodes=1,
        per_node=cores,
        memory_bytes=memory / cores,
        memory_bandwidth=bandwidth,
        peak_flops=peaks,
        inside=link,
        between=link,
        matmul_efficiency=0.9,  # of the layers' less even shapes; the large square product is the peak
        memory_efficiency=1.0,  # measured, not a data sheet's
    )


def _product_flops(dtype: torch.dtype) -> float:
    a, b = torch.randn(2, _BLOCK, _BLOCK).to(dtype)
    return 2 * _BLOCK**3 / _fastest(lambda: a @ b)


def _copy_bandwidth() -> float:
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / _fastest(lambda: target.copy_(source))  # read and written


def _fastest(operation: Callable[[], object], *, repeats: int = 3) -> float:
    operation()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        operation()
        taken.append(time.perf_counter() - started)
    return min(taken)


def _loopback() -> Link:
    """What two processes of this machine have between them. Raises `TransientError` when they do not meet."""
    with tempfile.TemporaryDirectory(prefix="sihe-plan-") as folder:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        }
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, folder]
        ranks = [
            subprocess.Popen([*command, str(rank)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for rank in range(2)
        ]
        try:
            for rank in ranks:
                _, words = rank.communicate(timeout=_LIMIT_S)
                if rank.returncode:
                    said = words.decode(errors="replace").strip().splitlines()[-1:]
                    raise TransientError(f"messages could not be timed: {' '.join(said)}; run the same command again")
        except subprocess.TimeoutExpired:
            raise TransientError(f"messages were not timed within {_LIMIT_S} s: try when less runs here") from None
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        points = json.loads((Path(folder) / "points.json").read_text(encoding="utf-8"))
    return fit_link([(size, seconds) for size, seconds in points])


def _be_rank(folder: Path, rank: int) -> None:
    import torch.distributed as dist

    from sihe.cluster.collectives.measurement import neighbour_exchanges
    from sihe.cluster.collectives.peers import Peers

    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    points = neighbour_exchanges(Peers())
    if rank == 0:
        (folder / "points.json").write_text(json.dumps(points), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _be_rank(Path(sys.argv[1]), int(sys.argv[2]))
