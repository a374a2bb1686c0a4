"""Two ranks that compute the gradients of one global batch and store them, for comparison with a single process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from sihe.cluster.launchers.rank import supervised
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.optimizer import MasterOptimizer
from sihe.training.parallel.apply import ParallelModel
from sihe.training.parallel.mesh import ParallelMesh
from sihe.training.parallel.plan import ParallelPlan
from sihe.training.ranks import Ranks, joined
from sihe.training.schedule import CosineSchedule
from sihe.training.step import TrainStep

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_positions=16,
)
LEFT_OUT = -1


def global_batch(*, ragged: bool) -> np.ndarray:
    """8 samples of 16 targets; `ragged` leaves out most targets of the first half, so that the ranks' counts differ."""
    batch = np.random.default_rng(5).integers(0, CONFIG.vocab_size, (8, 17))
    if ragged:
        batch[:4, 3:] = LEFT_OUT
    return batch


def step_for(dtype: torch.dtype, ranks: Ranks, micro_batch: int) -> tuple[Decoder, TrainStep]:
    torch.manual_seed(3)
    mesh = ParallelMesh(ParallelPlan(dp=ranks.world_size)) if ranks.world_size > 1 else None
    decoder = Decoder(CONFIG)
    model = ParallelModel(decoder, mesh, dtype=dtype)
    schedule = CosineSchedule(peak_lr=1e-3, warmup_steps=1, total_steps=10)
    optimizer = MasterOptimizer(model.held, mesh=mesh)
    return decoder, TrainStep(model, optimizer, schedule, ranks, micro_batch=micro_batch)


def main() -> None:
    folder = Path(sys.argv[1])
    with joined(60.0) as ranks:
        for dtype in (torch.float32, torch.bfloat16):
            for ragged in (False, True):
                model, step = step_for(dtype, ranks, micro_batch=2)
                batch = global_batch(ragged=ragged)[4 * ranks.rank : 4 * ranks.rank + 4]
                loss, tokens, samples = step.accumulate(batch)
                gradients = {name: weight.grad for name, weight in model.named_parameters()}
                stored = {"loss": loss, "tokens": tokens, "samples": samples, "gradients": gradients}
                torch.save(stored, folder / f"{dtype}-{ragged}-{ranks.rank}.pt")


if __name__ == "__main__":
    supervised(main)
