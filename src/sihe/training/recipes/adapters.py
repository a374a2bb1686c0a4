"""LoRA in a recipe: an adapter is trained in place of the weights, and merged into them when the stage ends."""

from __future__ import annotations

import torch

from sihe.models.decoder import Decoder
from sihe.models.lora import Lora, apply_lora
from sihe.training.recipes.config import AdapterConfig


class TrainedAdapter:
    """The adapter of `policy` during one stage."""

    def __init__(self, policy: Decoder, lora: Lora) -> None:
        self._policy = policy
        self._lora = lora

    def merge(self) -> None:
        """Adds what was learnt to the weights, which are free to train again."""
        self._lora.merge()
        self._lora.detach()
        self._policy.requires_grad_(True)


def attach_adapter(policy: Decoder, config: AdapterConfig, *, seed: int) -> TrainedAdapter:
    """Freezes `policy` and gives it an adapter that changes nothing yet; its weights follow `seed`."""
    torch.manual_seed(seed)
    return TrainedAdapter(policy, apply_lora(policy, config.lora))
