"""The pieces that a pipeline cuts a decoder into: which layers each has, which rank owns it, and the module itself.

    B  batch      T  time      S  this rank's share of it between the layers, T / tp      D  hidden

A piece keeps the names that its weights have in the whole model, so that checkpoints fit any number of pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.loss import cross_entropy
from sihe.models.moe import balance_loss, mixtures
from sihe.models.places import positions_in, sinusoids
from sihe.models.rope import check_length
from sihe.training.parallel.vocabulary import VocabularyEmbedding

if TYPE_CHECKING:
    from sihe.models.decoder import Decoder
    from sihe.models.ports import Attend
    from sihe.training.parallel.plan import ParallelPlan

V_SCHEDULES = ("zbv", "dualpipe-v")
"""Stages go down the ranks and up again: rank r owns the stages r and 2 pp - 1 - r."""


def stages_of_rank(plan: ParallelPlan, rank: int) -> list[int]:
    """The stages that pipeline rank `rank` owns, in the order of the layers."""
    if plan.schedule in V_SCHEDULES:
        return [rank, plan.num_stages - 1 - rank]
    return list(range(rank, plan.num_stages, plan.pp))


def rank_of_stage(plan: ParallelPlan, stage: int) -> int:
    """The pipeline rank that owns `stage`."""
    if plan.schedule in V_SCHEDULES:
        return min(stage, plan.num_stages - 1 - stage)
    return stage % plan.pp


def cut_layers(costs: Sequence[float], num_stages: int, *, first: float = 0.0, last: float = 0.0) -> list[range]:
    """Consecutive layers for each stage, at least one, such that the most costly stage costs as little as can be.

    `costs` are those of the layers; the first stage has `first` more to do and the last one `last`. Of equal cuts, the
    one is taken whose stages differ least. O(layers^2 x stages). Raises `ConfigError` for fewer layers than stages.
    """
    layers = len(costs)
    if layers < num_stages:
        raise ConfigError(f"a model of {layers} layers has no {num_stages} stages: lower pp", key="parallel.pp")
    before = [0.0, *accumulate(costs)]

    def cost(stage: int, start: int, end: int) -> float:
        return before[end] - before[start] + first * (stage == 0) + last * (stage == num_stages - 1)

    # best[end]: cost of the most costly stage, sum of squares, and the cut, of the first `end` layers in `stage` stages
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}
    for stage in range(num_stages):
        best = {
            end: min(
                (max(worst, here), squares + here * here, [*cut, end])
                for start, (worst, squares, cut) in best.items()
                if start < end
                for here in (cost(stage, start, end),)
            )
            for end in range(stage + 1, layers - (num_stages - 1 - stage) + 1)
        }
    cut = best[layers][2]
    return [range(start, end) for start, end in pairwise(cut)]


def cut_decoder(model: Decoder, num_stages: int) -> list[range]:
    """The layers of each stage of `model`, balanced by what a token costs: its weights, the head's among them.

    An embedding is a look-up and costs nothing beside them.
    """
    costs = [float(sum(weight.numel() for weight in block.parameters())) for block in model.blocks]
    return cut_layers(costs, num_stages, last=float(model.head_weight.numel()))


class Stage(nn.Module):
    """Consecutive layers of a decoder, with its embedding if they are the first and its loss if they are the last.

    It takes over the modules of `model`. Where the head is tied to the embedding, the last of several stages gets a
    `head` of its own, initially a copy (see `copies`). The balance loss of mixtures travels with the hidden states:
    each stage adds that of its layers, so that the last one has the loss that one process computes.
    """

    def __init__(self, model: Decoder, layers: range, *, sequence_parts: int = 1) -> None:
        """`sequence_parts`: of the sequence between the layers this rank has one share of so many."""
        super().__init__()
        if model.type_embedding is not None:
            raise ConfigError("a decoder has no segments: layers.token_types must be 0", key="layers.token_types")
        self.layers = layers
        self.is_first = layers.start == 0
        self.is_last = layers.stop == model.config.num_layers
        self.copies: dict[str, str] = {}
        """Parameters that another stage owns, by their name here; the value is their name in the whole model."""
        self.criterion: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy
        """Summed loss of hidden states [B, S, D], the head's matrix and targets [B, T]; the same on each rank of tp."""
        self.attend: Attend | None = None
        """Replaces causal attention."""
        self.embedding = model.embedding if self.is_first else None
        self.position_embedding = model.position_embedding if self.is_first else None
        self.embedding_norm = model.embedding_norm if self.is_first else None
        self.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in layers})
        self.norm = model.norm if self.is_last else None
        self.head = self._head(model) if self.is_last else None
        self.has_balance = any(mixture.balance_coefficient for mixture in mixtures(model))
        """Whether a balance loss comes with the hidden states."""
        self._config = model.config
        self._places = model.places
        self._sequence_parts = sequence_parts

    def _head(self, model: Decoder) -> nn.Linear | None:
        if model.head is not None or self.is_first:
            return model.head
        self.copies["head.weight"] = "embedding.weight"
        vocab_size, hidden_size = model.embedding.weight.shape
        head = nn.Linear(hidden_size, vocab_size, bias=False, device="meta")
        head.weight = nn.Parameter(model.embedding.weight.detach().clone())
        return head

    def forward(
        self,
        x: Tensor,
        balance: Tensor | None = None,
        *,
        targets_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states [B, S, D] from those of the stage before, or from tokens [B, T]; of the last stage the loss.

        With `has_balance` the hidden states come in and go out with a second tensor, the balance loss so far (float32).
        Targets below 0 do not count. Positions and documents are those of `Decoder.hidden`.
        """
        if positions_BT is None and documents_BT is not None:
            positions_BT = positions_in(documents_BT)
        if self.embedding is not None:
            x = self._embed(self.embedding, x, positions_BT)
        if positions_BT is None:
            places = self._places.prefix(targets_BT.shape[1], x.device, x.dtype)
        else:
            places = self._places.at(positions_BT, x.dtype, documents_BT)
        for block in self.blocks.values():
            x = block(x, places, self.attend)
        if self.has_balance:
            balance = self._with_own(balance, (targets_BT >= 0).sum())
        if self.norm is None:
            return x if balance is None else (x, balance)
        head = self.embedding if self.head is None else self.head
        assert head is not None
        nll = self.criterion(self.norm(x), head.weight, targets_BT)
        return nll if balance is None else nll + balance

    def _embed(self, embedding: nn.Embedding, tokens_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        """What enters the first block, [B, S, D], as `Transformer.embed` gives it for the whole sequence."""
        x_BSD: Tensor = embedding(tokens_BT)
        if self._config.positions.kind in ("learned", "sinusoidal"):
            check_length(tokens_BT.shape[1], self._config.max_positions)
            if positions_BT is None:
                positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0)
            if isinstance(embedding, VocabularyEmbedding):
                positions_BT = embedding.share_of(positions_BT)
            if self.position_embedding is not None:
                x_BSD = x_BSD + self.position_embedding(positions_BT)
            else:
                table_PD = sinusoids(self._config.max_positions, self._config.hidden_size, x_BSD.device)
                x_BSD = x_BSD + table_PD[positions_BT].to(x_BSD.dtype)
        return x_BSD if self.embedding_norm is None else self.embedding_norm(x_BSD)

    def _with_own(self, balance: Tensor | None, count: Tensor) -> Tensor:
        """The balance loss so far with that of these layers, weighed as `Decoder.loss` weighs it."""
        before = torch.zeros((), device=count.device) if balance is None else balance
        own = balance_loss(self.blocks.values())
        if own is None:
            return before  # nothing records gradients
        # Each rank of tp routes all tokens and so has all of this loss, while the gradients of a router are summed over
        # them: the value counts whole, its gradient in part.
        own = own * count
        part = own / self._sequence_parts
        return before + part + (own - part).detach()
