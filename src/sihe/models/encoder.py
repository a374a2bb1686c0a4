"""The encoder: tokens in, and out the hidden state of each in its whole context, masked tokens, or one vector.

    B  batch      T  time      D  hidden      V  vocabulary

The blocks are the decoder's, without the causal mask (Devlin et al. 2018, BERT, arXiv 1810.04805).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.config import ModelConfig
from sihe.models.loss import cross_entropy
from sihe.models.mlp import activation
from sihe.models.moe import balance_loss
from sihe.models.norm import norm
from sihe.models.products import Linear, linear
from sihe.models.transformer import Transformer


class Encoder(Transformer):
    """An encoder by configuration. Weights are drawn from torch's random state.

    With the task `masked_token` it has logits and a loss, with `pooled` one vector for a sequence. Padding is told
    apart by `documents_BT`. Raises `ConfigError` for a decoder's task.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.task == "next_token":
            raise ConfigError("an encoder's task is 'masked_token' or 'pooled', got 'next_token'", key="task")
        width, masked = config.hidden_size, config.task == "masked_token"
        self.head = Linear(width, config.vocab_size, bias=False) if masked and not config.tie_embeddings else None
        self.masked = MaskedHead(config) if masked else None
        self.pooler = None if masked else Linear(width, width)
        self.initialise()

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] hidden states → [..., V] logits. Raises `ConfigError` for another task than `masked_token`."""
        return linear(self._masked(x), self._head_weight, self._masked.bias)

    def forward(
        self, tokens_BT: Tensor, *, documents_BT: Tensor | None = None, types_BT: Tensor | None = None
    ) -> Tensor:
        """What its task asks for: logits of each token [B, T, V], or a vector of each row [B, D]."""
        x_BTD = self.hidden(tokens_BT, documents_BT=documents_BT, types_BT=types_BT)
        return self.logits(x_BTD) if self.pooler is None else torch.tanh(self.pooler(x_BTD[:, 0]))

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        *,
        documents_BT: Tensor | None = None,
        types_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Decoder.loss`, of the tokens that `targets_BT` names where they were masked; others are below 0."""
        x_BTD = self._masked(self.hidden(tokens_BT, documents_BT=documents_BT, types_BT=types_BT))
        # The head's bias as one more column, beside a 1 in each hidden state: the loss knows products only.
        x_BTD = nn.functional.pad(x_BTD, (0, 1), value=1.0)
        head = torch.cat((self._head_weight, self._masked.bias.unsqueeze(1)), dim=1)
        count = (targets_BT >= 0).sum()
        nll, balance = cross_entropy(x_BTD, head, targets_BT), balance_loss(self.blocks)
        return nll if balance is None else nll + balance * count, count

    @property
    def _masked(self) -> MaskedHead:
        if self.masked is None:
            raise ConfigError(
                f"logits need an encoder whose task is 'masked_token', got {self.config.task!r}", key="task"
            )
        return self.masked

    @property
    def _head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight


class MaskedHead(nn.Module):
    """What BERT puts before the matrix of its logits, and the bias after it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.activation = activation(config.layers.activation)
        self.norm = norm(config)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return self.norm(self.activation(self.dense(x)))
