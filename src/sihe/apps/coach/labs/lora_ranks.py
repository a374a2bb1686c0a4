"""What the process of `lora.rank` runs: adapters of several ranks that learn an update whose rank is known.

The update of every query and value matrix is made of orthonormal factors, so its `true_rank` singular values are equal
and the best approximation of rank r is known exactly: its relative error is sqrt(1 - r / true_rank) (Eckart and Young
1936, Psychometrika 1(3)). The adapters do not see the update. They see inputs and what the changed product answers.

    D  inputs of a product      O  its outputs      M  inputs of one step      B, T  batch, time
"""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder
from sihe.models.lora import Lora, apply_lora
from sihe.models.lora_config import LoraConfig
from sihe.models.lora_files import ADAPTER_WEIGHTS, save_adapter

_LAYERS = 2
_HEADS = 4
_VOCABULARY = 256
_TIME = 32
_INPUTS = 256  # of one step
_PEAK_LR = 2e-2
_SIZE = 0.5  # Frobenius norm of an update over that of its weight


def ranks(rank: int, world_size: int, *, ranks: list[int], true_rank: int, hidden: int, steps: int) -> dict[str, Any]:
    """For each of `ranks`: parameters, bytes of the file, error of the update, and of the model's next tokens."""
    del rank, world_size
    torch.manual_seed(0)
    base = Decoder(ModelConfig(_VOCABULARY, hidden, _LAYERS, _HEADS, _HEADS, hidden // _HEADS, 2 * hidden, _TIME))
    changed, updates = _changed(base, true_rank)
    found = [_learnt(base, changed, updates, rank, steps) for rank in ranks]
    return {"learnt": found, "base_parameters": sum(parameter.numel() for parameter in base.parameters())}


@torch.no_grad()
def _changed(base: Decoder, true_rank: int) -> tuple[Decoder, dict[str, Tensor]]:
    """A copy of `base` with the known update in its weights, and the update of each matrix."""
    model = copy.deepcopy(base)
    lora = apply_lora(model, LoraConfig(rank=true_rank, alpha=float(true_rank)))  # scale 1
    updates = {}
    for name, a_RD, b_OR in lora.matrices("default"):
        norm = (
            _SIZE * base.get_parameter("blocks.0.attention.qkv.weight").norm() / 3**0.5
        )  # of one of the three matrices
        a_RD.copy_(torch.linalg.qr(torch.randn(a_RD.shape[1], true_rank))[0].T)
        b_OR.copy_(torch.linalg.qr(torch.randn(b_OR.shape[0], true_rank))[0] * norm / math.sqrt(true_rank))
        updates[name] = b_OR @ a_RD
    lora.merge()
    lora.detach()
    return model, updates


def _learnt(base: Decoder, changed: Decoder, updates: dict[str, Tensor], rank: int, steps: int) -> dict[str, float]:
    model = copy.deepcopy(base)
    torch.manual_seed(rank)
    lora = apply_lora(model, LoraConfig(rank=rank, alpha=float(rank)))
    _fit(model, changed, lora, steps)
    errors = [
        float((b_OR @ a_RD - updates[name]).detach().norm() / updates[name].norm())
        for name, a_RD, b_OR in lora.matrices("default")
    ]
    with torch.no_grad():
        tokens_BT = torch.randint(_VOCABULARY, (16, _TIME), generator=torch.Generator().manual_seed(1))
        wanted_BTV, given_BTV, start_BTV = (one(tokens_BT) for one in (changed, model, base))
    with tempfile.TemporaryDirectory(prefix="sihe-lab-lora-") as folder:
        save_adapter(lora, "default", Path(folder))
        size = (Path(folder) / ADAPTER_WEIGHTS).stat().st_size
    return {
        "rank": rank,
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "file_bytes": size,
        "error": sum(errors) / len(errors),
        "logit_error": float((given_BTV - wanted_BTV).norm() / (start_BTV - wanted_BTV).norm()),
    }


def _fit(model: Decoder, changed: Decoder, lora: Lora, steps: int) -> None:
    """Least squares on what each product answers to white inputs, whose best solution is the best in Frobenius norm."""
    pairs = [
        tuple(block.get_submodule("attention.qkv") for block in blocks)
        for blocks in zip(model.blocks, changed.blocks, strict=True)
    ]
    optimizer = torch.optim.Adam(lora.parameters(), lr=_PEAK_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=_PEAK_LR / 100)
    for _ in range(steps):
        loss = torch.zeros(())
        for ours, theirs in pairs:
            x_MD = torch.randn(_INPUTS, ours.get_parameter("weight").shape[-1])
            with torch.no_grad():
                wanted_MO = theirs(x_MD)
            loss = loss + (ours(x_MD) - wanted_MO).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
