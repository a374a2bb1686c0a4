"""From logits to tokens, for a whole batch at once.

The order: penalties, bias, what is not allowed (a grammar's mask, tokens that would end the answer too early),
temperature, min-p, top-k, top-p.

The randomness of a request is one uniform number a token, computed from its seed and the token's position in the answer
alone. So a seeded request draws the same tokens alone, in any batch, and after a restart, on any machine whose logits
agree.

Shapes: B rows, V vocabulary, W the likeliest tokens that are looked at, E entries of all rows' adjustments together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sihe.serving.engine.history import TokenHistory
from sihe.serving.engine.seeds import uniform

# Tokens sorted before a whole row is: top-k and nucleus sets of trained models are nearly always within the first.
_WINDOWS = (256, 4096)
_BLOCK = 256  # weights that are summed as one before the drawn one is looked for among them
_SCORED_ROWS = 64  # rows of a prompt whose log-probabilities are computed at once: bounds the memory


@dataclass(frozen=True, slots=True)
class Draw:
    """How to choose one row's token. `position` counts the tokens of the answer so far.

    `history` brings the penalties, and `drafted` are tokens between it and this row that are only supposed so far.
    `mask` has one bit a token of the vocabulary, set where it is allowed. `banned` tokens are not allowed either,
    unless nothing else is.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    position: int
    logprobs: int | None = None
    min_p: float = 0.0
    history: TokenHistory | None = None
    drafted: tuple[int, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()
    mask: NDArray[np.int32] | None = None

    @property
    def is_restricted(self) -> bool:
        """Whether tokens must be ranked before one is drawn."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token; `is_finite` is false where the logits hold NaN or infinity, and the token means nothing."""

    token: int
    is_finite: bool
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """The log-probability of a token that was given, and the likeliest ones of its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def sample(logits_BV: Tensor, draws: Sequence[Draw]) -> list[Sampled]:
    """One token for each row of `logits_BV`, by its own `Draw`."""
    best_B, tokens_B = _best(logits_BV)
    finite = torch.isfinite(best_B).tolist()
    adjusted_BV = _adjusted(logits_BV, draws)
    if adjusted_BV is not logits_BV:
        best_B, tokens_B = _best(adjusted_BV)
    tokens = tokens_B.tolist()
    random = _random(best_B, draws)
    for row, token in zip(random, _drawn(adjusted_BV, best_B, draws, random), strict=True):
        tokens[row] = token
    logprobs = _logprobs(logits_BV, tokens, draws, finite)
    return [
        Sampled(token, is_finite, *logprobs.get(row, (None, ())))
        for row, (token, is_finite) in enumerate(zip(tokens, finite, strict=True))
    ]


def probabilities(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The distribution that `sample` draws each row's token from, in float64 [B, V]; one token alone where greedy."""
    adjusted_BV = _adjusted(logits_BV, draws)
    best_B, tokens_B = _best(adjusted_BV)
    result_BV = torch.zeros(adjusted_BV.shape, dtype=torch.float64, device=logits_BV.device)
    random = _random(best_B, draws)
    for row in set(range(len(draws))).difference(random):
        result_BV[row, tokens_B[row]] = 1.0
    plain = [row for row in random if not draws[row].is_restricted]
    if plain:
        result_BV[plain] = _scaled(adjusted_BV, best_B, draws, plain).double().exp()
    restricted = [row for row in random if draws[row].is_restricted]
    if restricted:
        scaled_BV = _scaled(adjusted_BV, best_B, draws, restricted)
        for kept in _kept(scaled_BV, [draws[row] for row in restricted]):
            rows_B1 = torch.tensor(restricted, device=kept.ids_BW.device)[kept.rows, None]
            result_BV[rows_B1, kept.ids_BW] = kept.weights_BW
    return result_BV / result_BV.sum(-1, keepdim=True)


def score(logits_TV: Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """The log-probabilities of given `tokens`, each by its row of logits, and of the `top` likeliest beside each."""
    scored: list[Scored] = []
    for start in range(0, len(tokens), _SCORED_ROWS):
        logprobs_TV = logits_TV[start : start + _SCORED_ROWS].float().log_softmax(-1)
        chosen = tokens[start : start + _SCORED_ROWS]
        index = torch.tensor(chosen, device=logits_TV.device)[:, None]
        values = logprobs_TV.gather(1, index)[:, 0].tolist()
        best, ids = logprobs_TV.topk(min(top, logprobs_TV.shape[-1]), dim=-1)
        for token, value, row_ids, row_best in zip(chosen, values, ids.tolist(), best.tolist(), strict=True):
            scored.append(Scored(token, value, tuple(zip(row_ids, row_best, strict=True))))
    return scored


# ---- before temperature ----------------------------------------------------------------------------------------------


def _adjusted(logits_BV: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits after penalties, bias, mask and ban; `logits_BV` itself where nobody asks for any."""
    penalised = [row for row, draw in enumerate(draws) if draw.history is not None]
    biased = [row for row, draw in enumerate(draws) if draw.bias]
    masked = [row for row, draw in enumerate(draws) if draw.mask is not None]
    banned = [row for row, draw in enumerate(draws) if draw.banned]
    if not (penalised or biased or masked or banned):
        return logits_BV
    adjusted_BV = logits_BV.float() if logits_BV.dtype != torch.float32 else logits_BV.clone()
    if penalised:
        _penalise(adjusted_BV, draws, penalised)
    if biased:
        index = [(row, token) for row in biased for token, _ in draws[row].bias if token < adjusted_BV.shape[1]]
        values = [bias for row in biased for token, bias in draws[row].bias if token < adjusted_BV.shape[1]]
        if index:
            rows_E, ids_E = torch.tensor(index, device=adjusted_BV.device).unbind(1)
            adjusted_BV.index_put_((rows_E, ids_E), torch.tensor(values, device=adjusted_BV.device), accumulate=True)
    for row in masked:
        _allow_only(adjusted_BV[row], draws[row].mask)
    for row in banned:
        _ban(adjusted_BV[row], draws[row])
    return adjusted_BV


def _penalise(adjusted_BV: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> None:
    entries, settings = [], []
    for row in rows:
        history = draws[row].history
        assert history is not None
        ids, counts = history.entries(draws[row].drafted)
        entries.append((np.full(len(ids), row), ids, counts))
        settings.append(np.tile([history.repetition, history.presence, history.frequency], (len(ids), 1)))
    device = adjusted_BV.device
    rows_E, ids_E, counts_E = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*entries, strict=True))
    repetition_E, presence_E, frequency_E = torch.from_numpy(np.concatenate(settings)).float().to(device).unbind(1)
    values_E = adjusted_BV[rows_E, ids_E]
    values_E = torch.where(values_E > 0, values_E / repetition_E, values_E * repetition_E)
    values_E -= presence_E * (counts_E > 0) + frequency_E * counts_E
    adjusted_BV.index_put_((rows_E, ids_E), values_E)


def _allow_only(row_V: Tensor, mask: NDArray[np.int32] | None) -> None:
    assert mask is not None
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(row_V)]
    row_V[: len(bits)].masked_fill_(torch.from_numpy(bits == 0).to(row_V.device), -math.inf)
    row_V[len(bits) :] = -math.inf


def _ban(row_V: Tensor, draw: Draw) -> None:
    ids = torch.tensor([id for id in draw.banned if id < len(row_V)], dtype=torch.int64, device=row_V.device)
    before = row_V[ids]
    row_V[ids] = -math.inf
    if draw.mask is not None and row_V.max() == -math.inf:  # the grammar is at its end: the answer is, too
        row_V[ids] = before


# ---- from temperature on ---------------------------------------------------------------------------------------------


def _random(best_B: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Rows whose token is drawn; the largest stands for a row that has no distribution, as of an extreme penalty."""
    rows = [row for row, draw in enumerate(draws) if draw.temperature > 0]
    if not rows:
        return []
    finite = torch.isfinite(best_B).tolist()
    return [row for row in rows if finite[row]]


def _drawn(logits_BV: Tensor, best_B: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> list[int]:
    """A token for each of `rows`."""
    if not rows:
        return []
    if _is_on_cpu(logits_BV):
        return _draw_on_cpu(logits_BV, best_B, [draws[row] for row in rows], rows)
    tokens: dict[int, int] = {}
    plain = [row for row in rows if not draws[row].is_restricted]
    restricted = [row for row in rows if draws[row].is_restricted]
    for chosen, choose in ((plain, _draw_plain), (restricted, _draw_restricted)):
        if chosen:
            scaled = _scaled(logits_BV, best_B, draws, chosen)
            tokens.update(zip(chosen, choose(scaled, [draws[row] for row in chosen]), strict=True))
    return [tokens[row] for row in rows]


def _draw_on_cpu(logits_BV: Tensor, best_B: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> list[int]:
    from sihe.serving.engine.compute.cpu.draws import draw_rows  # loads a compiler

    settings = [
        (
            draw.temperature,
            math.log(draw.min_p) if draw.min_p > 0 else -math.inf,
            draw.top_p,
            uniform(draw.seed, draw.position),
        )
        for draw in draws
    ]
    top_k = np.array([min(draw.top_k, logits_BV.shape[1]) for draw in draws], np.int64)
    found = draw_rows(logits_BV.numpy(), best_B.numpy(), np.array(rows, np.int64), np.array(settings), top_k)
    tokens: list[int] = found.tolist()
    return tokens


def _is_on_cpu(logits_BV: Tensor) -> bool:
    return logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32 and logits_BV.stride(-1) == 1


def _best(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest logit, NaN where there is one, and which it is."""
    if not _is_on_cpu(logits_BV):
        return logits_BV.max(dim=-1)
    array_BV = logits_BV.numpy()  # numpy's search is ten times as fast as torch's, which also wakes torch's threads
    tokens_B = array_BV.argmax(-1)
    return torch.from_numpy(array_BV[np.arange(len(array_BV)), tokens_B]), torch.from_numpy(tokens_B)


def _scaled(logits_BV: Tensor, best_B: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> Tensor:
    """Logits of `rows` in float32, below their maximum (so that no temperature overflows), over the temperature;
    minus infinity where min-p cuts them off."""
    if len(rows) == len(logits_BV):  # usual: no rows to pick out
        scaled = logits_BV.float() - best_B[:, None].float()
    else:
        index = torch.tensor(rows, device=logits_BV.device)
        scaled = logits_BV[index].float() - best_B[index, None].float()
    temperature = torch.tensor([[draws[row].temperature] for row in rows], device=logits_BV.device)
    scaled /= temperature.clamp_min(1e-6)
    if any(draws[row].min_p > 0 for row in rows):
        # the share of the likeliest token is a difference from its logit (Nguyen et al. 2024, arXiv:2407.01082)
        least = [[math.log(draws[row].min_p) if draws[row].min_p > 0 else -math.inf] for row in rows]
        scaled = scaled.where(scaled >= torch.tensor(least, device=scaled.device), -math.inf)
    return scaled


def _draw_plain(scaled_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Inverse of the cumulative distribution, over the vocabulary in its own order.

    Sums of blocks are compared first, so that a row is passed over once and only one block is looked into.
    """
    weights_BV = scaled_BV.exp()
    rows, vocabulary = weights_BV.shape
    if vocabulary % _BLOCK:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, -vocabulary % _BLOCK))
    weights_BNK = weights_BV.view(rows, -1, _BLOCK)
    ends_BN = weights_BNK.sum(-1).double().cumsum(-1)
    target_B1 = _shares(draws, weights_BV.device) * ends_BN[:, -1:]
    block_B1 = torch.searchsorted(ends_BN, target_B1, right=True).clamp_max(ends_BN.shape[1] - 1)
    begin_B1 = torch.where(block_B1 > 0, ends_BN.gather(1, (block_B1 - 1).clamp_min(0)), 0.0)
    inside_BK = weights_BNK[torch.arange(rows, device=block_B1.device), block_B1[:, 0]].double()
    found_B1 = torch.searchsorted(inside_BK.cumsum(-1), target_B1 - begin_B1, right=True)
    # two sums of the same weights may differ in their last bit: then it is the block's last token that has any weight
    places_K = torch.arange(_BLOCK, device=inside_BK.device)
    last_B1 = torch.where(inside_BK > 0, places_K, 0).amax(-1, keepdim=True)
    tokens: list[int] = (block_B1 * _BLOCK + torch.minimum(found_B1, last_B1))[:, 0].tolist()
    return tokens


def _draw_restricted(scaled_BV: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The same within the top k tokens, and of these within the smallest set whose probability reaches top p."""
    tokens = [0] * len(draws)
    for kept in _kept(scaled_BV, draws):
        ends_BW = kept.weights_BW.cumsum(-1)
        shares_B1 = _shares([draws[row] for row in kept.rows], ends_BW.device)
        found_B1 = torch.searchsorted(ends_BW, shares_B1 * ends_BW[:, -1:], right=True)
        for row, token in zip(kept.rows, kept.ids_BW.gather(1, found_B1)[:, 0].tolist(), strict=True):
            tokens[row] = token
    return tokens


@dataclass(frozen=True, slots=True)
class _Kept:
    """What top-k and top-p leave of some rows: token ids, likeliest first, with their weights, 0 for what is out."""

    rows: list[int]
    ids_BW: Tensor  # noqa: N815 - a tensor carries its dims
    weights_BW: Tensor  # noqa: N815


def _kept(scaled_BV: Tensor, draws: Sequence[Draw]) -> list[_Kept]:
    """Each row once: nearly all by their likeliest tokens; the flat ones, whose nucleus reaches further, by more."""
    vocabulary = scaled_BV.shape[-1]
    least = max(draw.top_k for draw in draws)
    found: list[_Kept] = []
    left = list(range(len(draws)))
    for window in (*_WINDOWS, vocabulary):
        size = min(vocabulary, max(window, least))
        whole = len(left) == len(draws)
        kept, reached_B = _rank(scaled_BV if whole else scaled_BV[left], [draws[row] for row in left], size)
        done = [at for at, is_done in enumerate(reached_B.tolist()) if is_done or size == vocabulary]
        if len(done) == len(left):
            found.append(_Kept(left, kept.ids_BW, kept.weights_BW))
            break
        if done:
            found.append(_Kept([left[at] for at in done], kept.ids_BW[done], kept.weights_BW[done]))
        left = [row for at, row in enumerate(left) if at not in done]
    return found


def _rank(scaled_BV: Tensor, draws: Sequence[Draw], window: int) -> tuple[_Kept, Tensor]:
    """What is left among the `window` likeliest, and for each row whether its nucleus ends there."""
    is_whole = window == scaled_BV.shape[-1]
    scores_BW, ids_BW = scaled_BV.sort(dim=-1, descending=True) if is_whole else scaled_BV.topk(window, dim=-1)
    weights_BW = scores_BW.double().exp()
    ranks_W = torch.arange(window, device=scaled_BV.device)
    vocabulary = scaled_BV.shape[-1]
    k_B1 = torch.tensor([[min(draw.top_k, vocabulary) or vocabulary] for draw in draws], device=scaled_BV.device)
    weights_BW = weights_BW.where(ranks_W < k_B1, 0.0)
    # The nucleus is a share of what top-k has left; without top-k, of the whole row.
    whole_B1 = weights_BW.sum(-1, keepdim=True)
    unbounded = [row for row, draw in enumerate(draws) if not 0 < draw.top_k <= window]
    if unbounded:
        whole_B1[unbounded] = scaled_BV[unbounded].exp().sum(-1, keepdim=True, dtype=torch.float64)
    p_B1 = torch.tensor([[draw.top_p] for draw in draws], dtype=torch.float64, device=scaled_BV.device)
    above_BW = (weights_BW.cumsum(-1) - weights_BW) / whole_B1
    reached_B = weights_BW.sum(-1) / whole_B1[:, 0] >= p_B1[:, 0]
    return _Kept([], ids_BW, weights_BW.where(above_BW < p_B1, 0.0)), reached_B


def _shares(draws: Sequence[Draw], device: torch.device) -> Tensor:
    return torch.tensor([[uniform(draw.seed, draw.position)] for draw in draws], dtype=torch.float64, device=device)


def _logprobs(
    logits_BV: Tensor, tokens: Sequence[int], draws: Sequence[Draw], finite: Sequence[bool]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Log-probabilities by the model alone, only for the rows that asked."""
    rows = [row for row, draw in enumerate(draws) if draw.logprobs is not None and finite[row]]
    if not rows:
        return {}
    most = max(draws[row].logprobs or 0 for row in rows)
    scored = score(logits_BV[rows], [tokens[row] for row in rows], most)
    return {row: (item.logprob, item.top[: draws[row].logprobs or 0]) for row, item in zip(rows, scored, strict=True)}
