"""The decoder: tokens in, hidden states, logits or loss out.

    B  batch      T  time      D  hidden      V  vocabulary
    N  query heads      K  key-value heads      H  head dim

A sequence flows through `Decoder.hidden`: embedding, then for each block x + attention(norm(x)) and x + mlp(norm(x)),
then a last norm. How keys and values are kept between calls is the caller's affair (see `Attend`); how the model is
split over processes is `training`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sihe.models.attention import Attention
from sihe.models.config import ModelConfig
from sihe.models.loss import cross_entropy
from sihe.models.mlp import GatedMLP
from sihe.models.moe import MixtureOfExperts, balance_loss, mixtures
from sihe.models.norm import RMSNorm
from sihe.models.ports import Attend
from sihe.models.rope import RotaryTable, Rotation

_INIT_STD = 0.02  # Radford et al. 2019 (GPT-2), as is the scale of the layers that write to the residual stream
_WRITERS = ("attention.out.weight", "mlp.down.weight", "mlp.down", "mlp.shared.down.weight")


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised stream and added back to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MixtureOfExperts(config) if config.num_experts else GatedMLP(config)

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend | None = None) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, attend)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Decoder(nn.Module):
    """A Llama-shaped language model by configuration. Weights are drawn from torch's random state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._rotary = RotaryTable(config.head_dim, config.max_positions, config.rope_theta)
        self.initialise()

    def initialise(self) -> None:
        """Draws every weight anew: normal with deviation 0.02, less by sqrt(2 L) where a layer writes to the stream."""
        for mixture in mixtures(self):
            mixture.reset()
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                nn.init.ones_(weight)
            else:
                writes = name.endswith(_WRITERS)
                nn.init.normal_(weight, std=_INIT_STD / (2 * self.config.num_layers) ** 0.5 if writes else _INIT_STD)

    @property
    def head_weight(self) -> Tensor:
        """The [V, D] matrix behind the logits: the embedding's own when the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def hidden(self, tokens_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Hidden states after the last norm, [B, T, D].

        `positions_BT` default to 0 .. T - 1 in each row, and lie below `config.max_positions`. `attend` replaces causal
        attention over the given tokens.
        """
        x_BTD = self.embedding(tokens_BT)
        if positions_BT is None:
            rotation = self._rotary.prefix(tokens_BT.shape[1], x_BTD.device, x_BTD.dtype)
        else:
            rotation = self._rotary.at(positions_BT, x_BTD.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotation, attend)
        return self.norm(x_BTD)

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] hidden states → [..., V] logits, in the dtype of the weights."""
        return nn.functional.linear(x, self.head_weight)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Logits of the next token at every position, [B, T, V]."""
        return self.logits(self.hidden(tokens_BT, positions_BT, attend))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the targets' negative log-likelihood in nats (float32), and how many targets count.

        Targets below 0 are left out. Cheaper than `forward` and a cross-entropy: no [B, T, V] tensor exists. While
        gradients are recorded, the sum has a mixture's balance in it, times the count (see `moe.balance_loss`).
        """
        nll = cross_entropy(self.hidden(tokens_BT), self.head_weight, targets_BT)
        count = (targets_BT >= 0).sum()
        balance = balance_loss(self.blocks)
        return nll if balance is None else nll + balance * count, count


def empty_decoder(config: ModelConfig) -> Decoder:
    """A decoder without memory for its weights, to be filled by a checkpoint."""
    with torch.device("meta"):
        return Decoder(config)
