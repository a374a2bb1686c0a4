"""Self-attention: multi-head, grouped (Ainslie et al. 2023, arXiv 2305.13245) and multi-query.

    B  batch      T  time      S  time, of the keys      D  hidden
    N  query heads      K  key-value heads      H  head dim
    G  rows of one key-value head's group: its N / K queries, its key, its value

One matrix product gives queries, keys and values. Its rows are ordered by key-value head, each group being its query
heads, its key head and its value head, so that a contiguous share of the rows is a whole number of groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sihe.core.errors import ConfigError
from sihe.models.config import ModelConfig
from sihe.models.norm import RMSNorm
from sihe.models.places import Places
from sihe.models.ports import Attend
from sihe.models.products import Linear, factor_dtype
from sihe.models.score_bias import AlibiBias, RelativeBias, ScoreBias


class Attention(nn.Module):
    """Projects, turns queries and keys to their positions, attends, projects back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        shape = config.attention
        self.num_kv_heads = config.num_kv_heads
        self.group = config.num_heads // config.num_kv_heads
        self.head_dim = config.head_dim
        rows = config.num_kv_heads * (self.group + 2) * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=shape.qkv_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if shape.qk_norm else None
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=shape.out_bias)
        self.mix = Mixing(config, layer)

    def forward(self, x_BTD: Tensor, places: Places, attend: Attend | None = None) -> Tensor:
        """What each position gathers from those that it sees, [B, T, D]."""
        qkv_BTKGH = self.qkv(x_BTD).unflatten(-1, (-1, self.group + 2, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = torch.split(qkv_BTKGH, [self.group, 1, 1], dim=3)
            qkv_BTKGH = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=3)
        if places.rotation is None:
            q_BTNH, k_BTKH, v_BTKH = qkv_BTKGH[:, :, :, :-2].flatten(2, 3), qkv_BTKGH[..., -2, :], qkv_BTKGH[..., -1, :]
        else:
            q_BTNH, k_BTKH, v_BTKH = places.rotation.apply(qkv_BTKGH)
        return self.out(self.mix(q_BTNH, k_BTKH, v_BTKH, places, attend).flatten(2))


class Mixing(nn.Module):
    """The part of attention that sees more than one position: scores, their mask and bias, and the mix of values."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.causal = config.attention.causal
        self.bias: ScoreBias | None = None
        match config.positions.kind:
            case "alibi":
                self.bias = AlibiBias(config.num_heads)
            case "relative":
                positions = config.positions
                self.bias = RelativeBias(
                    config.num_heads, positions.buckets, positions.max_distance, causal=self.causal
                )
        self.window = config.attention.window

    def forward(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, places: Places, attend: Attend | None) -> Tensor:
        """Mixed values, [B, T, N, H]. Raises `ConfigError` where `attend` would not compute what the model asks for."""
        if attend is not None:
            is_same = (getattr(attend, "causal", True), getattr(attend, "window", None)) == (self.causal, self.window)
            is_bare = self.bias is not None and not getattr(attend, "has_bias", False)
            if not is_same or is_bare or places.mask is not None:
                raise ConfigError(
                    "another attention can only take the place of one with the same causal mask and window, and this "
                    "model or pass has others, documents or a bias on scores",
                    key="attention",
                )
            return attend(self.layer, q_BTNH, k_BTKH, v_BTKH)
        mask = None if places.mask is None else places.mask.unsqueeze(1)
        if self.bias is not None:
            assert places.distance is not None
            bias_NTS = self.bias(places.distance, q_BTNH.dtype)
            mask = bias_NTS if mask is None else torch.where(mask, bias_NTS, -torch.inf)
        return attention(q_BTNH, k_BTKH, v_BTKH, mask, causal=self.causal)


def attention(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, mask: Tensor | None = None, *, causal: bool) -> Tensor:
    """Softmax attention of whole sequences: [B, T, N, H].

    `mask`, [B or 1, N or 1, T, S], is True where a key is seen, or what is added to its score, and then is all there
    is; without one each position is over those up to itself, if `causal`.
    """
    q, k, v = (x.transpose(1, 2).to(factor_dtype(x)) for x in (q_BTNH, k_BTKH, v_BTKH))
    grouped = q.shape[1] != k.shape[1]
    mixed = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped
    )
    return mixed.to(q_BTNH.dtype).transpose(1, 2)
