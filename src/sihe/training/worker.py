"""The process of one rank: `python -m sihe.training.worker <folder of the run>`, started by a launcher."""

from __future__ import annotations

import sys
from pathlib import Path

from sihe.cluster.launchers.rank import supervised


def main() -> None:
    """Joins the other ranks and trains."""
    import torch  # after `supervised` made sure that this process dies with its launcher

    from sihe.training import layout
    from sihe.training.loop import TrainLoop
    from sihe.training.plan import TrainPlan
    from sihe.training.ranks import joined

    folder = Path(sys.argv[1])
    torch.set_flush_denormal(True)  # moments of weights that are not used decay into denormals, which are slow
    with joined(TrainPlan.read(folder / layout.PLAN).config.collective_timeout_s) as ranks:
        TrainLoop(folder, ranks).run()


if __name__ == "__main__":
    supervised(main)
