"""What the process of `pos.extrapolation` runs: small decoders over the bytes of a text, trained on short windows.

All have the same sizes, seed and batches and differ in how they know places. The loss is that of the last bytes of a
window, which have the longest context and stand where nobody stood in training.

    B  batch      T  time
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sihe.models.architecture import PositionConfig, PositionKind, RopeScaling
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder

_VOCABULARY = 256  # bytes
_HIDDEN, _HEADS, _LAYERS = 64, 4, 2
_BATCH = 16
_PEAK_LR = 1e-2
_WARMUP_STEPS = 20
_HELD_OUT = 0.1  # share of the text at its end that is not trained on
_JUDGED = 32  # last bytes of a window, whose loss counts
_WINDOWS = 24


def losses(
    rank: int, world_size: int, *, files: list[str], kinds: list[PositionKind], lengths: list[int], steps: int
) -> dict[str, Any]:
    """Nats per byte at the end of held-out windows of each of `lengths`; training sees the first of them only.

    The ranks share the kinds out among them.
    """
    text = torch.tensor(list(b"\n".join(Path(file).read_bytes() for file in files)))
    border = int(len(text) * (1 - _HELD_OUT))
    train, held = text[:border], text[border:]
    found: dict[str, Any] = {}
    for kind in kinds[rank::world_size]:
        model = _trained(kind, train, lengths[0], lengths[-1], steps)
        found[kind] = [_loss(model, held, length) for length in lengths]
        if kind == "rope":
            squeezed = [_loss(_squeezed(model, lengths[0], length), held, length) for length in lengths]
            found["rope-scaled"] = squeezed
    return found


def _config(kind: PositionKind, longest: int) -> ModelConfig:
    # Every distance that training has seen has a bucket or shares one with its neighbours; longer ones share the last.
    positions = PositionConfig(kind=kind, buckets=32, max_distance=128)
    return ModelConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_HIDDEN,
        num_layers=_LAYERS,
        num_heads=_HEADS,
        num_kv_heads=_HEADS,
        head_dim=_HIDDEN // _HEADS,
        intermediate_size=2 * _HIDDEN,
        max_positions=longest,
        positions=positions,
    )


def _trained(kind: PositionKind, text: Tensor, length: int, longest: int, steps: int) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(_config(kind, longest))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP_STEPS, max(0.05, 1 - step / steps))
    )
    generator = torch.Generator().manual_seed(1)  # the same batches for every kind
    for _ in range(steps):
        starts = torch.randint(len(text) - length, (_BATCH, 1), generator=generator)
        tokens_BT = text[starts + torch.arange(length + 1)]
        logits = model(tokens_BT[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _squeezed(model: Decoder, trained: int, length: int) -> Decoder:
    """The same weights with all positions divided such that `length` fits into what was trained (arXiv 2306.15595)."""
    if length <= trained:
        return model
    scaling = RopeScaling(kind="linear", factor=length / trained, original_positions=trained)
    config = dataclasses.replace(model.config, positions=PositionConfig(scaling=scaling))
    changed = Decoder(config)
    changed.load_state_dict(model.state_dict())
    return changed.eval()


@torch.no_grad()
def _loss(model: Decoder, text: Tensor, length: int) -> float:
    """Mean loss of the last bytes of `_WINDOWS` windows whose ends are the same for every length."""
    longest = model.config.max_positions
    ends = torch.linspace(longest, len(text) - 2, _WINDOWS).long()
    tokens_BT = text[ends[:, None] + torch.arange(1 - length, 2)]
    logits = model(tokens_BT[:, :-1])[:, -_JUDGED:]
    return cross_entropy(logits.flatten(0, 1).float(), tokens_BT[:, -_JUDGED:].flatten()).item()
