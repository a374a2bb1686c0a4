"""The process of one rank: `python -m sihe.training.worker <folder of the run>`, started by a launcher."""

from __future__ import annotations

import sys
from pathlib import Path

from sihe.cluster.launchers.rank import EXIT_LEFT, supervised
from sihe.core.allocator import keep_freed_memory


def main() -> None:
    """Joins the other ranks and trains."""
    # Heavy imports come after `supervised` made sure that this process dies with its launcher.
    from sihe.training import layout
    from sihe.training.loop import TrainLoop
    from sihe.training.plan import TrainPlan
    from sihe.training.ranks import joined

    folder = Path(sys.argv[1])
    prepare_process()
    with joined(TrainPlan.read(folder / layout.PLAN).config.collective_timeout_s) as ranks:
        is_done = TrainLoop(folder, ranks).run()
    if not is_done:
        raise SystemExit(EXIT_LEFT)


def prepare_process() -> None:
    """Settings of a process that does nothing but train."""
    import torch

    torch.set_flush_denormal(True)  # moments of weights that are not used decay into denormals, which are slow
    keep_freed_memory()


if __name__ == "__main__":
    supervised(main)
