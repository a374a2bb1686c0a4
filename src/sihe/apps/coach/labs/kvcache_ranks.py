"""What the process of `kv.cache` runs: the decoder with a cache handed in through `Attend`, and without one.

B  batch      T  time      N  query heads      K  KV heads      H  head dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sihe.apps.coach.labs.timing import best_seconds
from sihe.models.config import ModelConfig
from sihe.models.decoder import Decoder

_VOCABULARY = 512


class Cache:
    """Keys and values of one sequence, kept between calls: an `Attend` that the decoder calls in each layer."""

    def __init__(self, config: ModelConfig, tokens: int) -> None:
        shape = (config.num_layers, 1, config.num_kv_heads, tokens, config.head_dim)
        self.keys = torch.zeros(shape)
        self.values = torch.zeros(shape)
        self.length = 0  # tokens whose keys and values are kept; the caller moves it once every layer has run

    def __call__(self, layer: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Keeps the new keys and values, and attends over all that are kept."""
        new = k_BTKH.shape[1]
        total = self.length + new
        self.keys[layer, :, :, self.length : total] = k_BTKH.transpose(1, 2)
        self.values[layer, :, :, self.length : total] = v_BTKH.transpose(1, 2)
        # A first pass over the prompt is causal; one later token sees everything that is kept.
        assert new == 1 or self.length == 0
        mixed = scaled_dot_product_attention(
            q_BTNH.transpose(1, 2),
            self.keys[layer, :, :, :total],
            self.values[layer, :, :, :total],
            is_causal=new > 1,
            enable_gqa=q_BTNH.shape[2] != k_BTKH.shape[2],
        )
        return mixed.transpose(1, 2)

    @property
    def size_bytes(self) -> int:
        """Bytes of the two tensors."""
        return self.keys.nbytes + self.values.nbytes


@torch.no_grad()
def decode(
    rank: int, world_size: int, *, contexts: list[int], kv_heads: list[int], layers: int, heads: int, head_dim: int
) -> dict[str, Any]:
    """Costs of one token for multi-head (`full`) and grouped-query (`grouped`) attention."""
    del rank, world_size
    shape = {"layers": layers, "heads": heads, "head_dim": head_dim}
    names = ("full", "grouped")
    return {name: _costs(contexts, count, **shape) for name, count in zip(names, kv_heads, strict=True)}


def _costs(contexts: list[int], kv_heads: int, *, layers: int, heads: int, head_dim: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=_VOCABULARY,
        hidden_size=heads * head_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=heads * head_dim * 3,
        max_positions=max(contexts),
    )
    model = Decoder(config).eval()
    tokens_1T = torch.randint(_VOCABULARY, (1, max(contexts)))
    found: dict[str, Any] = {"with_s": [], "without_s": [], "cache_bytes": [], "difference": 0.0}
    for context in contexts:
        prompt, last = tokens_1T[:, : context - 1], tokens_1T[:, context - 1 : context]
        cache = Cache(config, context)
        model.hidden(prompt, attend=cache)
        cache.length = context - 1
        position = torch.tensor([[context - 1]])

        def with_cache(cache: Cache = cache, last: Tensor = last, position: Tensor = position) -> Tensor:
            return model.logits(model.hidden(last, position, cache)[0, -1])

        def without_cache(context: int = context) -> Tensor:
            return model.logits(model.hidden(tokens_1T[:, :context])[0, -1])

        found["difference"] = max(found["difference"], (with_cache() - without_cache()).abs().max().item())
        found["with_s"].append(best_seconds(with_cache))
        found["without_s"].append(best_seconds(without_cache))
        found["cache_bytes"].append(cache.size_bytes)
    return found
