"""The encoder: tokens in, and out the hidden state of each in its whole context, masked tokens, a vector, or scores.

    B  batch      T  time      D  hidden      V  vocabulary      C  labels

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

    With the task `masked_token` it has logits and a loss, with `pooled` one vector for a sequence, with `scored` its
    `num_labels` scores (a reranker's one, a classifier's logits), with `hidden` nothing behind the blocks. Padding is
    told apart by `documents_BT`. Raises `ConfigError` for a decoder's task.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.task == "next_token":
            raise ConfigError("an encoder's task is one of an Encoder, got 'next_token': use a Decoder", key="task")
        width, masked = config.hidden_size, config.task == "masked_token"
        self.head = Linear(width, config.vocab_size, bias=False) if masked and not config.tie_embeddings else None
        self.masked = MaskedHead(config) if masked else None
        self.pooler = Linear(width, width) if config.task in ("pooled", "scored") else None
        self.classifier = Linear(width, config.num_labels) if config.task == "scored" else None
        self.initialise()

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] hidden states → [..., V] logits. Raises `ConfigError` for another task than `masked_token`."""
        return linear(self._masked(x), self._head_weight, self._masked.bias)

    def forward(
        self, tokens_BT: Tensor, *, documents_BT: Tensor | None = None, types_BT: Tensor | None = None
    ) -> Tensor:
        """What its task asks for, of each token [B, T, V] or [B, T, D], or of each row [B, D] or [B, C]."""
        x_BTD = self.hidden(tokens_BT, documents_BT=documents_BT, types_BT=types_BT)
        match self.config.task:
            case "masked_token":
                return self.logits(x_BTD)
            case "hidden":
                return x_BTD
            case _:
                return self.pooled(x_BTD[:, 0])

    def pooled(self, first_BD: Tensor) -> Tensor:
        """The vector [B, D], or the scores [B, C], behind the hidden states of first tokens.

        Raises `ConfigError` for another task than `pooled` and `scored`.
        """
        if self.pooler is None:
            raise ConfigError(f"a vector needs a task 'pooled' or 'scored', got {self.config.task!r}", key="task")
        pooled_BD = torch.tanh(self.pooler(first_BD))
        return pooled_BD if self.classifier is None else self.classifier(pooled_BD)

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
