"""The decoder: tokens in, hidden states, logits of the next token, or loss out.

    B  batch      T  time      D  hidden      V  vocabulary

How keys and values are kept between calls is the caller's affair (see `Attend`); how the model is split over processes
is `training`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sihe.core.errors import ConfigError
from sihe.models.config import ModelConfig
from sihe.models.loss import cross_entropy
from sihe.models.moe import balance_loss
from sihe.models.ports import Attend
from sihe.models.products import Linear, linear
from sihe.models.transformer import Transformer


class Decoder(Transformer):
    """A language model by configuration. Weights are drawn from torch's random state.

    Raises `ConfigError` for another task than the next token.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.task != "next_token":
            raise ConfigError(f"a decoder's task is 'next_token', got {config.task!r}: use an Encoder", key="task")
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.initialise()

    @property
    def head_weight(self) -> Tensor:
        """The [V, D] matrix behind the logits: the embedding's own when the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] hidden states → [..., V] logits, in the dtype of the weights."""
        return linear(x, self.head_weight)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        attend: Attend | None = None,
        *,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every position, [B, T, V]; the arguments are those of `hidden`."""
        return self.logits(self.hidden(tokens_BT, positions_BT, attend, documents_BT=documents_BT))

    def loss(
        self, tokens_BT: Tensor, targets_BT: Tensor, *, documents_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sum of the targets' negative log-likelihood in nats (float32), and how many targets count.

        Targets below 0 are left out. Cheaper than `forward` and a cross-entropy: no [B, T, V] tensor exists. While
        gradients are recorded, the sum has a mixture's balance in it, times the count (see `moe.balance_loss`).
        """
        nll = cross_entropy(self.hidden(tokens_BT, documents_BT=documents_BT), self.head_weight, targets_BT)
        count = (targets_BT >= 0).sum()
        balance = balance_loss(self.blocks)
        return nll if balance is None else nll + balance * count, count


def empty_decoder(config: ModelConfig) -> Decoder:
    """A decoder without memory for its weights, to be filled by a checkpoint."""
    with torch.device("meta"):
        return Decoder(config)
