"""All-reduces of our own beside gloo's, at 2, 4 and 8 processes of this machine, and beside their alpha-beta model.

Each process has one thread. Alpha and beta are fitted, for each number of processes, on messages that all of them send
to their neighbour at once, so that shared cores and memory are in the numbers; adding is not modelled. A figure is the
fastest of several repeats on the slowest rank; algorithms take turns.

Ours are written to be read: goal is that the ring comes near gloo's where the bytes count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Claim, report

WORLDS = (2, 4, 8)
SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 26)
LARGE = 1 << 22
GOAL = 2.0  # x gloo's time from 4 MiB on; and x the model's


def main() -> None:
    """Runs every number of processes; or, as a child of itself, one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", nargs=3, metavar=("FOLDER", "RANK", "WORLD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        folder, rank, world = options.rank
        be_rank(Path(folder), int(rank), int(world), options.repeats)
        return
    claims = []
    for world in WORLDS:
        found = _ranks(world, options.repeats)
        names = list(found["seconds"])
        link = found["link"]
        print(f"\n{world} processes: alpha {link[0] * 1e6:.0f} us, {link[1] / 1e9:.2f} GB/s; ms measured (modelled)")
        print(f"{'bytes':>10} " + " ".join(f"{name:>24}" for name in names))
        for index, size in enumerate(SIZES):
            cells = []
            for name in names:
                modelled = found["modelled"].get(name)
                cell = f"{found['seconds'][name][index] * 1e3:.3f}"
                cells.append(cell + (f" ({modelled[index] * 1e3:.3f})" if modelled else ""))
            print(f"{size:>10} " + " ".join(f"{cell:>24}" for cell in cells))
        claims += _claims(world, found["seconds"], found["modelled"])
    report(__file__, claims)


def _claims(world: int, seconds: dict[str, list[float]], modelled: dict[str, list[float]]) -> list[Claim]:
    large = [index for index, size in enumerate(SIZES) if size >= LARGE]
    ring = [seconds["ring"][index] for index in large]
    against_gloo = statistics.median(ours / seconds["gloo"][index] for ours, index in zip(ring, large, strict=True))
    against_model = statistics.median(ours / modelled["ring"][index] for ours, index in zip(ring, large, strict=True))
    ours, gloo, model = ring[0] * 1e3, seconds["gloo"][large[0]] * 1e3, modelled["ring"][large[0]] * 1e3
    where = f"all-reduce of 4 MiB and more, {world} processes"
    goal = f"<= {GOAL} x, median over the sizes"
    return [
        Claim(f"{where}, our ring beside gloo's", ours, gloo, against_gloo, "ms", goal, against_gloo <= GOAL),
        Claim(f"{where}, our ring beside its model", ours, model, against_model, "ms", goal, against_model <= GOAL),
    ]


def _ranks(world: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.cluster.allreduce", "--repeats", str(repeats), "--rank", folder]
        ranks = [subprocess.Popen([*command, str(rank), str(world)], env=environment) for rank in range(world)]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"a rank of {world} failed; its words are above")
        found: dict[str, dict[str, list[float]]] = json.loads((Path(folder) / "found.json").read_text())
    return found


def be_rank(folder: Path, rank: int, world: int, repeats: int) -> None:
    """Times everything; rank 0 writes it down."""
    import torch
    import torch.distributed as dist

    from sihe.cluster.collectives.catalog import ALGORITHMS
    from sihe.cluster.collectives.fit import fit_link
    from sihe.cluster.collectives.measurement import best_seconds, neighbour_exchanges
    from sihe.cluster.collectives.peers import Peers

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    link = fit_link(neighbour_exchanges(Peers()))
    seconds: dict[str, list[float]] = {"gloo": [], **{name: [] for name in ALGORITHMS}}
    for size in SIZES:
        tensor = torch.zeros(size // 4)  # sums of zeros stay zeros, however often they are repeated
        seconds["gloo"].append(best_seconds(lambda tensor=tensor: dist.all_reduce(tensor), repeats=repeats))
        for name, algorithm in ALGORITHMS.items():
            taken = best_seconds(lambda run=algorithm.run, tensor=tensor: run(tensor, Peers()), repeats=repeats)
            seconds[name].append(taken)
    if rank == 0:
        modelled = {name: [each.cost(size, world, link).seconds for size in SIZES] for name, each in ALGORITHMS.items()}
        found = {"seconds": seconds, "modelled": modelled, "link": [link.latency_s, link.bandwidth]}
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
