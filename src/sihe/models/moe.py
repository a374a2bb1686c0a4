"""Mixture of experts: each token is worked on by the few feed-forward layers that a router chooses for it.

    B  batch      T  time      D  hidden      M  tokens (B * T)      k  experts of one token      E  experts
    F  intermediate of one expert      S  choices that are kept, at most M * k      R  rows of this process's experts

A choice is one token at one expert, numbered `rank * M + token`, so that all first choices come before all second ones.
Sorted by expert, the choices of one expert are contiguous rows, and each expert is one matrix product over its rows.

**Routing** is Mixtral's (Jiang et al. 2024, arXiv 2401.04088, section 2.1): softmax over all experts, the k largest,
made to sum to 1. It is computed in float32 whatever the weights are, because a rounded score changes the choice.

**Balance**, so that no expert starves, by one of:

- `loss`: per layer E * sum_e f_e P_e (Fedus et al. 2021, arXiv 2101.03961, section 2.2), where f_e is the share of the
  choices that went to expert e and P_e the mean of its probability. It is 1 when all are even. (That of `transformers`
  is k times as large, because its f_e sum to k.) See `balance_loss` for how it enters the training loss.
- `bias`: a number per expert that is added to the scores for choosing and not for weighing, and that moves by a fixed
  step against the load, outside of the gradient (Wang et al. 2024, arXiv 2408.15664, section 3).

**Capacity** bounds the rows of one expert at ceil(capacity_factor * M * k / E); what is over is dropped, the last
tokens and the second choices first (Lepikhin et al. 2020, arXiv 2006.16668, section 2.2), and passes by on the stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sihe.models.config import ModelConfig
from sihe.models.mlp import GatedMLP, swiglu
from sihe.models.ports import Exchange
from sihe.models.products import factor_dtype

_BIAS_STEP = 1e-3  # Wang et al. 2024, section 4.2: the best of those they tried
_recording: ContextVar[bool] = ContextVar("recording", default=True)


class MixtureOfExperts(nn.Module):
    """A router, its experts, and beside them an expert that all tokens share, if the configuration has one.

    `exchange` puts expert parallelism underneath: the expert weights are then this process's share of the experts, by
    dim 0, and rows travel to where their expert is.
    """

    balance_steps: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, intermediate = config.num_experts, config.hidden_size, config.expert_intermediate_size
        self.num_experts = experts
        self.experts_per_token = config.experts_per_token
        self.balance_coefficient = config.balance_coefficient if config.router_balance == "loss" else 0.0
        self.capacity_factor = config.capacity_factor
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2, intermediate, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, intermediate))
        self.shared = GatedMLP(config, config.shared_expert_size) if config.shared_expert_size else None
        # Whole steps, not their product: casting the model to bfloat16 must not round the bias.
        steps_E = torch.zeros(experts, dtype=torch.int64) if config.router_balance == "bias" else None
        self.register_buffer("balance_steps", steps_E)
        self.exchange: Exchange | None = None
        self.load_E: Tensor | None = None
        self.seen_E: Tensor | None = None
        self.dropped = 0
        self._balance: Tensor | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D].

        Leaves in `load_E` how many choices went to each expert before any were dropped, of all experts and of this
        process's tokens, and in `dropped` how many were; passes that record gradients add to `seen_E`.
        """
        x_MD = x_BTD.flatten(0, -2)
        weights_Mk, chosen_Mk, load_E = self._route(x_MD)
        choices_S, counts_E = self._sorted(chosen_Mk, load_E)
        x_SD = _Spread.apply(x_MD, choices_S, self.experts_per_token)  # type: ignore[no-untyped-call]  # torch's own
        if self.exchange is None:
            y_SD = self._experts(x_SD, counts_E)
        else:
            x_RD, counts_local_E, state = self.exchange.dispatch(x_SD, counts_E)
            y_SD = self.exchange.combine(self._experts(x_RD, counts_local_E), state)
        rows_kMD = y_SD.new_zeros(chosen_Mk.numel(), y_SD.shape[1]).index_copy(0, choices_S, y_SD)
        rows_MkD = rows_kMD.view(self.experts_per_token, *x_MD.shape).transpose(0, 1)
        y_BTD = torch.einsum("mk,mkd->md", weights_Mk.to(rows_MkD.dtype), rows_MkD).view(x_BTD.shape)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)

    def reset(self) -> None:
        """Forgets the load that was seen, and the bias."""
        self.load_E, self.seen_E, self.dropped, self._balance = None, None, 0, None
        if self.balance_steps is not None:
            self.balance_steps.zero_()

    @torch.no_grad()
    def update_bias(self) -> None:
        """Moves each expert's bias one step against its load in `seen_E`, and starts counting anew.

        Call it once an optimizer step. Where several processes see different tokens, sum `seen_E` over them before.
        """
        if self.seen_E is not None and self.balance_steps is not None:
            load_E = self.seen_E.double()
            self.balance_steps += torch.sign(load_E.mean() - load_E).long()
        self.seen_E = None

    def take_balance(self) -> Tensor | None:
        """The weighted balance loss of the last pass that recorded gradients, once; a float32 scalar."""
        balance, self._balance = self._balance, None
        return balance

    def _route(self, x_MD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each token the weights of its experts and which they are, best first; of each expert its choices."""
        exact = torch.promote_types(x_MD.dtype, torch.float32)
        p_ME = nn.functional.linear(x_MD.to(exact), self.router.weight.to(exact)).softmax(-1)
        if self.balance_steps is not None:
            chosen_Mk = (p_ME.detach() + self.balance_steps * _BIAS_STEP).topk(self.experts_per_token).indices
            best_Mk = p_ME.gather(1, chosen_Mk)
        else:
            best_Mk, chosen_Mk = p_ME.topk(self.experts_per_token)
        load_E = torch.bincount(chosen_Mk.flatten(), minlength=self.num_experts)
        self.load_E = load_E
        if torch.is_grad_enabled():
            self._record(load_E, p_ME)
        return best_Mk / best_Mk.sum(1, keepdim=True), chosen_Mk, load_E

    def _record(self, load_E: Tensor, p_ME: Tensor) -> None:
        balance = None
        if self.balance_coefficient:
            share_E = load_E.to(p_ME.dtype) / load_E.sum()
            # In a repeated pass too: its activations must be those of the first.
            balance = self.balance_coefficient * self.num_experts * (share_E @ p_ME.mean(0))
        if _recording.get():
            self.seen_E = load_E if self.seen_E is None else self.seen_E + load_E
            self._balance = balance

    def _sorted(self, chosen_Mk: Tensor, load_E: Tensor) -> tuple[Tensor, Tensor]:
        """The choices that are kept, by expert, in each the better choices first; how many each expert has."""
        experts_S, choices_S = torch.sort(chosen_Mk.T.flatten(), stable=True)
        if self.capacity_factor is None:
            return choices_S, load_E
        capacity = math.ceil(self.capacity_factor * chosen_Mk.numel() / self.num_experts)
        before_E = load_E.cumsum(0) - load_E
        place_S = torch.arange(len(choices_S), device=choices_S.device) - before_E[experts_S]
        choices_S = choices_S[place_S < capacity]
        self.dropped = chosen_Mk.numel() - len(choices_S)
        return choices_S, load_E.clamp(max=capacity)

    def _experts(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert of this process over its rows of `x`, which are sorted by expert."""
        counts = tuple(counts_E.tolist())
        gate_up_R2F = _Grouped.apply(x_RD, self.gate_up.flatten(1, 2), counts)  # type: ignore[no-untyped-call]  # torch's own
        return _Grouped.apply(swiglu(gate_up_R2F), self.down, counts)  # type: ignore[no-untyped-call]  # torch's own


class _Spread(torch.autograd.Function):
    """The token behind each choice. Back, a token's gradients are summed in the same order each time."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, choices_S: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(choices_S)
        ctx.shape = (k, *x_MD.shape)
        return x_MD[choices_S % x_MD.shape[0]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (choices_S,) = ctx.saved_tensors
        k, tokens, hidden = ctx.shape
        rows = grad_SD.new_zeros(k * tokens, hidden).index_copy_(0, choices_S, grad_SD)
        return rows.view(ctx.shape).sum(0), None, None


class _Grouped(torch.autograd.Function):
    """Rows, sorted by expert, times the matrix [out, in] of their expert. Gradients go straight into the stack."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.counts = counts
        exact = factor_dtype(x_RI)
        y_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1], dtype=exact)
        for weight_OI, x, y in zip(
            weight_EOI, torch.split(x_RI, list(counts)), torch.split(y_RO, list(counts)), strict=True
        ):
            torch.mm(x.to(exact), weight_OI.to(exact).T, out=y)
        return y_RO.to(x_RI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RI, weight_EOI = ctx.saved_tensors
        exact = factor_dtype(x_RI)
        grad_RO = grad_RO.to(exact)
        dx_RI = torch.empty_like(x_RI, dtype=exact) if ctx.needs_input_grad[0] else None
        dweight_EOI = torch.empty_like(weight_EOI, dtype=exact) if ctx.needs_input_grad[1] else None
        start = 0
        for expert, count in enumerate(ctx.counts):
            rows = slice(start, start + count)
            start += count
            if dx_RI is not None:
                torch.mm(grad_RO[rows], weight_EOI[expert].to(exact), out=dx_RI[rows])
            if dweight_EOI is not None:
                torch.mm(grad_RO[rows].T, x_RI[rows].to(exact), out=dweight_EOI[expert])
        dx = None if dx_RI is None else dx_RI.to(x_RI.dtype)
        return dx, None if dweight_EOI is None else dweight_EOI.to(weight_EOI.dtype), None


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def balance_loss(blocks: Iterable[nn.Module]) -> Tensor | None:
    """Sum over layers of balance_coefficient * aux in the last pass, a float32 scalar; None where there is none.

    It can be taken once after each pass that records gradients. `Decoder.loss` adds it times the count of targets: over
    micro-batches i, whose sums and counts n_i are added up, the mean loss is then the mean negative log-likelihood plus
    sum_i n_i balance_i / sum_i n_i, so that the coefficient means the same whatever the split. The aux itself is that
    of one micro-batch on one process, as in the papers, and not quite that of their union.
    """
    found = [mixture.take_balance() for block in blocks for mixture in mixtures(block)]
    terms = [term for term in found if term is not None]
    return torch.stack(terms).sum() if terms else None


@contextmanager
def replayed() -> Iterator[None]:
    """Within it a pass is run again for its activations: nothing is counted or collected a second time."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)
