"""From logits to tokens, for a whole batch at once.

The randomness of a request is one uniform number a token, computed from its seed and the token's position in the answer
alone. So a seeded request draws the same tokens alone, in any batch, and after a restart, on any machine whose logits
agree.

Shapes: B rows, V vocabulary, W the likeliest tokens that are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_WINDOW = 256  # tokens sorted before a whole row is: top-k and nucleus sets of trained models are nearly always smaller


@dataclass(frozen=True, slots=True)
class Draw:
    """How to choose one row's token. `position` counts the tokens of the answer so far."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    position: int
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token; `is_finite` is false where the logits hold NaN or infinity, and the token means nothing."""

    token: int
    is_finite: bool
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int) -> float:
    """A number in (0, 1) from a seed and a position: two rounds of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014)."""
    state = _mix((seed + 0x9E3779B97F4A7C15) & _MASK)
    bits = _mix((state + (position + 1) * 0x9E3779B97F4A7C15) & _MASK)
    return ((bits >> 11) + 0.5) / (1 << 53)


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(logits_BV: Tensor, draws: Sequence[Draw]) -> list[Sampled]:
    """One token for each row of `logits_BV`, by its own `Draw`."""
    best_B, tokens_B = logits_BV.max(dim=-1)
    tokens = tokens_B.tolist()
    finite = torch.isfinite(best_B).tolist()
    random = [row for row, draw in enumerate(draws) if draw.temperature > 0 and finite[row]]
    plain = [row for row in random if draws[row].top_k == 0 and draws[row].top_p >= 1]
    restricted = [row for row in random if not (draws[row].top_k == 0 and draws[row].top_p >= 1)]
    for rows, choose in ((plain, _draw_plain), (restricted, _draw_restricted)):
        if rows:
            scaled = _scaled(logits_BV, best_B, draws, rows)
            for row, token in zip(rows, choose(scaled, [draws[row] for row in rows]), strict=True):
                tokens[row] = token
    logprobs = _logprobs(logits_BV, tokens, draws, finite)
    return [
        Sampled(token, is_finite, *logprobs.get(row, (None, ())))
        for row, (token, is_finite) in enumerate(zip(tokens, finite, strict=True))
    ]


def _scaled(logits_BV: Tensor, best_B: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> Tensor:
    """Logits of `rows` in float32, below their maximum (so that no temperature overflows), over the temperature."""
    index = torch.tensor(rows, device=logits_BV.device)
    temperature = torch.tensor([[draws[row].temperature] for row in rows], device=logits_BV.device)
    shifted = logits_BV[index].float() - best_B[index, None].float()
    return shifted / temperature.clamp_min(1e-6)


def _draw_plain(scaled_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Inverse of the cumulative distribution, over the vocabulary in its own order."""
    return _invert(scaled_BV.exp(), draws)


def _draw_restricted(scaled_BV: Tensor, draws: Sequence[Draw], window: int = _WINDOW) -> list[int]:
    """The same within the top k tokens, and of these within the smallest set whose probability reaches top p."""
    vocabulary = scaled_BV.shape[-1]
    window = min(vocabulary, max(window, *(draw.top_k for draw in draws)))
    scores_BW, ids_BW = scaled_BV.topk(window, dim=-1)
    weights_BW = scores_BW.double().exp()
    ranks_W = torch.arange(window, device=scaled_BV.device)
    k_B1 = torch.tensor([[draw.top_k or vocabulary] for draw in draws], device=scaled_BV.device)
    weights_BW = weights_BW.where(ranks_W < k_B1, 0.0)
    # The nucleus is a share of what top-k has left; without top-k, of the whole row.
    whole_B1 = weights_BW.sum(-1, keepdim=True).where(k_B1 <= window, scaled_BV.double().exp().sum(-1, keepdim=True))
    p_B1 = torch.tensor([[draw.top_p] for draw in draws], dtype=torch.float64, device=scaled_BV.device)
    above_BW = (weights_BW.cumsum(-1) - weights_BW) / whole_B1
    kept_BW = weights_BW.where(above_BW < p_B1, 0.0)
    tokens = ids_BW.gather(1, torch.tensor(_invert(kept_BW, draws), device=ids_BW.device)[:, None])[:, 0].tolist()
    if window < vocabulary:
        reached_B = weights_BW.sum(-1) / whole_B1[:, 0] >= p_B1[:, 0]
        wide = [row for row, done in enumerate(reached_B.tolist()) if not done]
        if wide:  # a flat distribution: its nucleus reaches beyond the window
            redone = _draw_restricted(scaled_BV[wide], [draws[row] for row in wide], vocabulary)
            for row, token in zip(wide, redone, strict=True):
                tokens[row] = token
    return tokens


def _invert(weights_BW: Tensor, draws: Sequence[Draw]) -> list[int]:
    """For each row the first index at which the cumulative weight exceeds that row's uniform share of the total."""
    cumulative_BW = weights_BW.double().cumsum(-1)
    share_B1 = torch.tensor(
        [[uniform(draw.seed, draw.position)] for draw in draws], dtype=torch.float64, device=weights_BW.device
    )
    found_B1 = torch.searchsorted(cumulative_BW, share_B1 * cumulative_BW[:, -1:], right=True)
    indices: list[int] = found_B1[:, 0].tolist()
    return indices


def _logprobs(
    logits_BV: Tensor, tokens: Sequence[int], draws: Sequence[Draw], finite: Sequence[bool]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Log-probabilities before temperature, only for the rows that asked."""
    rows = [row for row, draw in enumerate(draws) if draw.logprobs is not None and finite[row]]
    if not rows:
        return {}
    logprobs_BV = logits_BV[rows].float().log_softmax(-1)
    most = max(draws[row].logprobs or 0 for row in rows)
    values, ids = logprobs_BV.topk(min(most, logprobs_BV.shape[-1]), dim=-1)
    report = {}
    for index, row in enumerate(rows):
        count = draws[row].logprobs or 0
        top = tuple(zip(ids[index, :count].tolist(), values[index, :count].tolist(), strict=True))
        report[row] = (float(logprobs_BV[index, tokens[row]]), top)
    return report
