"""The trunk of all models here: tokens in, hidden states out.

    B  batch      T  time      D  hidden      P  positions

Embedding, blocks, last norm. A block adds attention and then a feed-forward layer to the stream, each on the normalised
stream (`Block`) or with the sum normalised after it (`PostNormBlock`, as BERT has it). How the model is split over
processes is `training`'s affair.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sihe.models.attention import Attention
from sihe.models.config import ModelConfig
from sihe.models.latent import LatentAttention
from sihe.models.mlp import GatedMLP, PlainMLP
from sihe.models.moe import MixtureOfExperts, mixtures
from sihe.models.norm import norm
from sihe.models.places import Places, PlaceTable, positions_in, sinusoids
from sihe.models.ports import Attend
from sihe.models.rope import check_length

_INIT_STD = 0.02  # Radford et al. 2019 (GPT-2), as is the scale of the layers that write to the residual stream
_WRITERS = ("attention.out.weight", "mlp.down.weight", "mlp.down", "mlp.shared.down.weight")


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised stream and added back to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = _attention(config, layer)
        self.mlp_norm = norm(config)
        self.mlp = _mlp(config)

    def forward(self, x_BTD: Tensor, places: Places, attend: Attend | None = None) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), places, attend)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class PostNormBlock(Block):
    """One layer as of Vaswani et al. 2017 (arXiv 1706.03762): each sum is normalised."""

    def forward(self, x_BTD: Tensor, places: Places, attend: Attend | None = None) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, places, attend))
        return self.mlp_norm(x_BTD + self.mlp(x_BTD))


def _attention(config: ModelConfig, layer: int) -> Attention | LatentAttention:
    return Attention(config, layer) if config.attention.latent is None else LatentAttention(config, layer)


def _mlp(config: ModelConfig) -> MixtureOfExperts | GatedMLP | PlainMLP:
    if config.num_experts:
        return MixtureOfExperts(config)
    return GatedMLP(config) if config.layers.gated else PlainMLP(config)


class Transformer(nn.Module):
    """Embedding, blocks and last norm by configuration. Weights are drawn from torch's random state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, width)
        learned = config.positions.kind == "learned"
        places = config.max_positions + config.positions.offset
        self.position_embedding = nn.Embedding(places, width) if learned else None
        self.type_embedding = nn.Embedding(config.layers.token_types, width) if config.layers.token_types else None
        self.embedding_norm = norm(config) if config.layers.embedding_norm else None
        block = Block if config.layers.norm_first else PostNormBlock
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.num_layers))
        self.norm = norm(config) if config.layers.norm_first else nn.Identity()
        self.places = PlaceTable(config)

    def initialise(self) -> None:
        """Draws every weight anew: normal with deviation 0.02, less by sqrt(2 L) where a layer writes to the stream."""
        for mixture in mixtures(self):
            mixture.reset()
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.ndim == 1:
                nn.init.ones_(weight)
            else:
                writes = name.endswith(_WRITERS)
                nn.init.normal_(weight, std=_INIT_STD / (2 * self.config.num_layers) ** 0.5 if writes else _INIT_STD)

    def embed(self, tokens_BT: Tensor, positions_BT: Tensor | None = None, types_BT: Tensor | None = None) -> Tensor:
        """What enters the first block, [B, T, D]: tokens, with places and segments where the model adds them."""
        x_BTD: Tensor = self.embedding(tokens_BT)
        if self.type_embedding is not None:
            x_BTD = x_BTD + self.type_embedding(torch.zeros_like(tokens_BT) if types_BT is None else types_BT)
        if self.config.positions.kind in ("learned", "sinusoidal"):
            if positions_BT is None:
                check_length(tokens_BT.shape[1], self.config.max_positions)
                positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
            x_BTD = x_BTD + self._position_vectors(positions_BT, x_BTD.dtype)
        return x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)

    def _position_vectors(self, positions_BT: Tensor, dtype: torch.dtype) -> Tensor:
        if self.position_embedding is not None:
            return self.position_embedding(positions_BT + self.config.positions.offset)
        table_PD = sinusoids(self.config.max_positions, self.config.hidden_size, positions_BT.device)
        return table_PD[positions_BT].to(dtype)

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        attend: Attend | None = None,
        *,
        documents_BT: Tensor | None = None,
        types_BT: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [B, T, D].

        `positions_BT` default to 0 .. T - 1 in each row, and lie below `config.max_positions`. `attend` replaces plain
        causal attention over the given tokens. Attention stays inside runs of equal numbers in `documents_BT`, and
        positions that are not given begin at 0 in each. `types_BT` are the segments of a model that has them.
        """
        if positions_BT is None and documents_BT is not None:
            if self.config.positions.kind in ("learned", "sinusoidal"):
                check_length(tokens_BT.shape[1], self.config.max_positions)
            positions_BT = positions_in(documents_BT)
        x_BTD = self.embed(tokens_BT, positions_BT, types_BT)
        if positions_BT is None:
            places = self.places.prefix(tokens_BT.shape[1], x_BTD.device, x_BTD.dtype, windowed=attend is None)
        else:
            places = self.places.at(positions_BT, x_BTD.dtype, documents_BT, windowed=attend is None)
        for block in self.blocks:
            x_BTD = block(x_BTD, places, attend)
        return self.norm(x_BTD)
