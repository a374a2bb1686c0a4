"""LoRA in a recipe: an adapter is trained in place of the weights, and merged into them when the stage ends.

With a quantised base (QLoRA: Dettmers et al. 2023, arXiv 2305.14314) the model that comes out is what the adapter was
trained on: the numbers that the codes stand for, plus the update.
"""

from __future__ import annotations

import torch

from sihe.models.decoder import Decoder
from sihe.models.lora import Lora, apply_lora
from sihe.models.quantised import dequantise, quantise
from sihe.training.recipes.config import AdapterConfig


class TrainedAdapter:
    """The adapter of `policy` during one stage."""

    def __init__(self, policy: Decoder, lora: Lora, config: AdapterConfig) -> None:
        self._policy = policy
        self._lora = lora
        self._config = config

    def merge(self) -> None:
        """Adds what was learnt to the weights, which are plain and free to train again."""
        lora = self._lora
        if self._config.base != "none":
            learnt = [weight.detach() for weight in lora.parameters()]
            lora.detach()
            dequantise(self._policy)
            lora = apply_lora(self._policy, self._config.lora)
            with torch.no_grad():
                for weight, value in zip(lora.parameters(), learnt, strict=True):
                    weight.copy_(value)
        lora.merge()
        lora.detach()
        self._policy.requires_grad_(True)


def attach_adapter(policy: Decoder, config: AdapterConfig, *, seed: int) -> TrainedAdapter:
    """Freezes `policy` (but for its embeddings, where `config` says so), quantises it on request, and gives it an
    adapter that changes nothing yet.

    The adapter's weights follow `seed`.
    """
    if config.base != "none":
        quantise(policy, config.base)
    torch.manual_seed(seed)
    lora = apply_lora(policy, config.lora)
    policy.embedding.requires_grad_(config.embedding)
    if policy.head is not None:
        policy.head.requires_grad_(config.embedding)
    return TrainedAdapter(policy, lora, config)
