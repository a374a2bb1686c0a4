"""From weights in training to a model folder that serving and other tools read."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from sihe.core.errors import NotFound
from sihe.core.files import new_directory
from sihe.models.checkpoint import save_model
from sihe.models.decoder import Decoder
from sihe.training import layout
from sihe.training.checkpoint import Checkpoints
from sihe.training.plan import TOKENIZER_FILES, TrainPlan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export_model(model: Decoder, dataset: Path, target: Path) -> None:
    """Writes weights, configuration and the data set's tokenizer to the new folder `target`, whole or not at all."""
    with new_directory(target) as staging:
        save_model(model, staging)
        for name in TOKENIZER_FILES:
            shutil.copyfile(dataset / name, staging / name)


def export_checkpoint(folder: Path, step: int, target: Path) -> None:
    """Exports the checkpoint of `step` of the run in `folder`, whatever ranks and plan wrote it, in this process alone.

    Where the run averages its weights (`ema_decay`), the average is what is exported. Raises `NotFound` that names the
    steps there are, `CorruptData`.
    """
    plan = TrainPlan.read(folder / layout.PLAN)
    checkpoints = Checkpoints(folder / layout.CHECKPOINTS, plan.identity, keep=plan.config.keep_checkpoints)
    if step not in checkpoints.steps():
        raise NotFound("checkpoint of step", str(step), hint=f"the run has {checkpoints.steps() or 'none'}")
    model = Decoder(plan.model).to(DTYPES[plan.config.precision])
    checkpoints.at(step).load_weights(model, averaged=plan.config.ema_decay is not None)
    export_model(model, plan.dataset, target)
