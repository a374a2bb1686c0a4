"""A writer of checkpoints that somebody kills: `python -m sihe.apps.coach.labs.checkpoint_writer FOLDER LAYERS`.

It completes a first checkpoint, notes a digest of what it holds, moves every weight, and writes a second one in the
background. It dies with the process that started it.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch

from sihe.cluster.launchers.rank import supervised
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.training.checkpoint import Checkpoints
from sihe.training.optimizer import MasterOptimizer

FIRST_DIGEST = "first.sha256"
_HIDDEN = 512
_VOCABULARY = 8192
_IDENTITY = {"lab": "ckpt.async"}


def state_of(layers: int) -> tuple[Decoder, MasterOptimizer]:
    """A decoder of 4.2 M + 3.4 M · `layers` parameters after one step, the same at every call."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(_VOCABULARY, _HIDDEN, layers, 8, 8, _HIDDEN // 8, 3 * _HIDDEN, 128))
    optimizer = MasterOptimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1e-3)
    return model, optimizer


def open_checkpoints(folder: Path, *, background: bool) -> Checkpoints:
    """The checkpoints of this lab under `folder`; the newest two stay."""
    return Checkpoints(folder, _IDENTITY, keep=2, background=background)


def digest(optimizer: MasterOptimizer) -> str:
    """SHA-256 of everything that the optimizer keeps, the weights included."""
    found = hashlib.sha256()
    for name, tensor in sorted(optimizer.state_tensors().items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().numpy().data)
    return found.hexdigest()


def main() -> None:
    """Writes both checkpoints."""
    folder, layers = Path(sys.argv[1]), int(sys.argv[2])
    model, optimizer = state_of(layers)
    checkpoints = open_checkpoints(folder, background=True)
    checkpoints.save(1, 1, model, optimizer)
    checkpoints.finish()
    (folder / FIRST_DIGEST).write_text(digest(optimizer), encoding="utf-8")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    checkpoints.save(2, 2, model, optimizer)
    checkpoints.finish()


if __name__ == "__main__":
    supervised(main)
